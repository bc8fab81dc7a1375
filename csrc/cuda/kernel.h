// The persistent kernel: blocks take large chunks in turn, then their warps small ones. Whoever sweeps a tensor's only
// chunk advances its step count; those of the others the last block to have read one.
#pragma once

#include "cuda/access.h"
#include "norm.h"

namespace fusedopt {

constexpr int kBlockThreads = 256;
constexpr int kInlineGroups = 4;   // groups and gradient addresses that ride in the launch itself: together
constexpr int kInlineGrads = 384;  // with LaunchParams under the 4 KB that every driver takes

// The one argument of every kernel. Where an inline count is not 0, that column of `launch` is here instead.
struct KernelParams {
  LaunchParams launch;
  u32 large_chunks;      // of launch.chunks, the first: each for a whole block; a warp takes one of the others
  u32 late_count;        // of tensors that have not exactly one chunk
  const u32* late_rows;  // which they are; not read where chunk_order is kOfOneTensor
  u32 inline_groups;
  u32 inline_grads;
  GroupRow groups[kInlineGroups];
  u64 grads[kInlineGrads];
};
static_assert(sizeof(KernelParams) <= 4096, "kernel parameters");

// The rule that a team has built, which serves as long as neither group nor step nor compute type changes.
struct BuiltRule {
  u32 group = ~0u;
  bool in_double = false;
  u64 step = 0;
};

// The chunks of a team: every so many from `next` on, of large ones for blocks, then of small ones for warps.
struct Pass {
  u32 first, last;  // of all teams
  u32 next, stride;
};

// What one thread prepares for all that sweep a chunk, and what goes on from chunk to chunk: kept in shared memory, not
// in every thread's registers.
template <template <class> class Rule>
struct ChunkState {
  Rule<float> in_float;
  Rule<double> in_double;
  ChunkView view;
  BuiltRule built;
  double coefficient;
  u32 flags;
  u32 tensor;
  Pass pass;
  bool is_live;  // whether the tensor has a gradient
  bool is_last;  // whether the team has no chunk after this
};

// Those of all warps of a block; where the block is one team, it has the first.
template <template <class> class Rule>
struct BlockState {
  ChunkState<Rule> of[kBlockThreads / device::kWarpThreads];
  u32 arrived, is_last;
};

// The threads that take a chunk together, a block or a warp, and which one of all teams they are. All of it is worked
// out where it is needed: kept, it would cost every thread registers.
struct Team {
  bool is_warp;

  FUSEDOPT_FN int lane() const {
    return is_warp ? device::thread_index() % device::kWarpThreads : device::thread_index();
  }
  FUSEDOPT_FN int lanes() const { return is_warp ? device::kWarpThreads : device::block_threads(); }
  FUSEDOPT_FN int in_block() const { return is_warp ? device::thread_index() / device::kWarpThreads : 0; }
  // Neighbours are in different blocks, so that few chunks are spread over all multiprocessors.
  FUSEDOPT_FN u32 index() const { return u32(in_block()) * device::block_count() + device::block_index(); }
  FUSEDOPT_FN u32 count() const { return device::block_count() * u32(device::block_threads() / lanes()); }
  FUSEDOPT_FN void barrier() const {
    if (is_warp)
      device::warp_barrier();
    else
      device::barrier();
  }
};

// Says that this block has read all step counts that it needs; returns how many blocks have said so before. Behind the
// last of them the counts may be written, and the counter is 0 again. To look at what this returns is to wait for it.
FUSEDOPT_FN u32 arrive(const LaunchParams& launch) {
  return device::count_released(launch.arrivals, device::block_count() - 1);
}
constexpr u32 kNotArrived = ~0u;

template <template <class> class Rule, class V>
FUSEDOPT_FN void build_rule(const LaunchParams& launch, const BuiltRule& wanted, ChunkState<Rule>& state) {
  state.built = wanted;
  const Hypers hypers = read_hypers(launch.groups[wanted.group]);
  state.flags = hypers.flags;
  if constexpr (V::kSide) state.coefficient = coefficient_of(launch, wanted.group);
  if (wanted.in_double)
    state.in_double = Rule<double>(hypers, wanted.step);
  else
    state.in_float = Rule<float>(hypers, wanted.step);
}

// Reads the row, then the step count and the hyperparameters. Returns what arrive() has, where the block arrives with
// this chunk: while the rule is built, the count is on its way.
template <template <class> class Rule, class V>
FUSEDOPT_FN u32 prepare_chunk(const LaunchParams& launch, const Chunk& chunk, bool arrives, ChunkState<Rule>& state) {
  ChunkView view(launch, chunk, V{});
  const u32 group = launch.table.group[chunk.tensor];
  const i64 numel = launch.table.numel[chunk.tensor];
  const u64 step = next_step(view);
  if (view.step && view.size == numel) *view.step = float(step);
  const u32 arrived = arrives ? arrive(launch) : kNotArrived;
  const bool in_double = V::kDouble && view.computes_in_double();
  if (in_double)
    DeviceAccess::prepare<V, double>(view);
  else
    DeviceAccess::prepare<V, float>(view);
  state.tensor = chunk.tensor;
  state.view = view;
  const BuiltRule& built = state.built;
  if (group != built.group || step != built.step || in_double != built.in_double)
    build_rule<Rule, V>(launch, {group, in_double, step}, state);
  return arrived;
}

// What a block joins, in shared memory: 2,048 numbers, or the tally of a leaf that is reported.
template <class V>
union BlockJoins {
  double values[kJoined];
  Either<V::kReports, DeviceAccess::Tally, double> tally;
};

template <class V>
FUSEDOPT_FN void* block_tally() {
  if constexpr (V::kReports)
    return &device::shared<BlockJoins<V>>().tally;
  else
    return nullptr;
}

// Takes the next chunk of a team: what one thread does for all. It looks it up before the others are done with the last
// one. A block arrives before it sweeps its last large chunk, where others wait for that: the tensors whose step counts
// the last block is to advance have no small chunks.
template <template <class> class Rule, class V>
FUSEDOPT_FN void take_chunk(const LaunchParams& launch, const Team& team, bool arrives, BlockState<Rule>& block) {
  ChunkState<Rule>& state = block.of[team.in_block()];
  Pass& pass = state.pass;
  Chunk chunk = {};
  bool is_live = false;
  if (team.lane() == 0) {
    chunk = chunk_at<V>(launch, pass.next, pass.first, pass.last);
    is_live = launch.grads[chunk.tensor] != 0;
  }
  team.barrier();
  if (team.lane() == 0) {
    state.is_live = is_live;
    const bool is_last = pass.last - pass.next <= pass.stride;
    state.is_last = is_last;
    pass.next += pass.stride;
    if (is_live) {
      const u32 arrived = prepare_chunk<Rule, V>(launch, chunk, arrives && is_last, state);
      if (arrives) block.arrived = arrived;
    }
  }
  team.barrier();
}

template <template <class> class Rule, class V>
FUSEDOPT_FN void sweep_block(const KernelParams& params, const LaunchParams& launch, BlockState<Rule>& block) {
  void* const tally = block_tally<V>();
  if (device::thread_index() == 0) block.arrived = kNotArrived;
  FUSEDOPT_LOOP
  for (int is_small = 0; is_small < 2; ++is_small) {
    const Team team{is_small != 0};
    ChunkState<Rule>& state = block.of[team.in_block()];
    device::barrier();  // all are done with the pass before
    const u32 first = is_small == 0 ? 0 : params.large_chunks;
    const u32 last = is_small == 0 ? params.large_chunks : launch.chunk_count;
    if (last - first <= team.index()) continue;
    if (team.lane() == 0) {
      state.built = {};
      state.pass = {first, last, first + team.index(), team.count()};
    }
    do {
      take_chunk<Rule, V>(launch, team, is_small == 0 && params.late_count != 0, block);
      if (!state.is_live) continue;
      const u64 step = state.built.step;
      if (V::kDouble && state.view.computes_in_double())
        sweep_chunk<DeviceAccess, V>(
            state.view, state.in_double, gradient_of<V, double>(launch, state.flags, state.coefficient),
            side_of<V, double>(launch, state.tensor, step, tally), step, team.lane(), team.lanes());
      else
        sweep_chunk<DeviceAccess, V>(
            state.view, state.in_float, gradient_of<V, float>(launch, state.flags, state.coefficient),
            side_of<V, float>(launch, state.tensor, step, tally), step, team.lane(), team.lanes());
    } while (!state.is_last);
  }
}

FUSEDOPT_FN void join_block(double* values, int count, bool largest) {
  const int lane = device::thread_index(), lanes = device::block_threads();
  const auto barrier = [] { device::barrier(); };
  barrier();
  if (largest)
    join_halves<true>(values, count, lane, lanes, barrier);
  else
    join_halves<false>(values, count, lane, lanes, barrier);
}

// How elements become one number (reduce.h): decided when compiled, or as it runs, which is half the code.
template <bool kLargest>
struct JoinsAs {
  FUSEDOPT_FN double join(double one, double other) const { return fusedopt::join<kLargest>(one, other); }
  template <class C>
  FUSEDOPT_FN double take(double joined, C x) const {
    return join_term<kLargest>(joined, x);
  }
};

struct Joins {
  bool largest;

  FUSEDOPT_FN double join(double one, double other) const {
    return largest ? JoinsAs<true>{}.join(one, other) : JoinsAs<false>{}.join(one, other);
  }
  template <class C>
  FUSEDOPT_FN double take(double joined, C x) const {
    return largest ? JoinsAs<true>{}.take(joined, x) : JoinsAs<false>{}.take(joined, x);
  }
};

// What a leaf's gradients come to, by a warp: each lane has the chains `lane` and `lane` + 32, of which it loads some
// elements before it joins the first.
template <class V, class C, class Joining>
FUSEDOPT_FN double join_leaf(const ChunkView& leaf, const Gradient<C>& gradient, const Joining& joining, int lane) {
  static_assert(kChains == 2 * device::kWarpThreads, "two chains a lane");
  constexpr int kAtOnce = V::kFixed ? 8 : 1;  // rows; float64 and strided leaves, which are rare, one at a time
  const int storage = V::storage(kGrad, leaf.storage);
  const int first[2] = {chain_begin(lane), chain_begin(lane + device::kWarpThreads)};
  double joined[2] = {0.0, 0.0};
  FUSEDOPT_LOOP
  for (int row = 0; row < kChain && row * kRow < leaf.size; row += kAtOnce) {
    DeviceAccess::Packet<C, 1> packet[kAtOnce][2] = {};
    FUSEDOPT_UNROLL
    for (int k = 0; k < 2 * kAtOnce; ++k) {
      const int element = first[k % 2] + (row + k / 2) * kRow;
      if (element < leaf.size)
        DeviceAccess::fetch<Width<1>>(packet[k / 2][k % 2], storage, leaf.address[kGrad],
                                      IndexOf<V, Width<1>>(leaf, element)(kGrad), false);
    }
    FUSEDOPT_UNROLL
    for (int k = 0; k < 2 * kAtOnce; ++k) {
      if (first[k % 2] + (row + k / 2) * kRow >= leaf.size) continue;
      C g[1] = {};
      DeviceAccess::decode<Width<1>>(packet[k / 2][k % 2], storage, g, 1);
      gradient.divide(g);
      joined[k % 2] = joining.take(joined[k % 2], g[0]);
    }
  }
  double all = joining.join(joined[0], joined[1]);
  FUSEDOPT_LOOP
  for (int distance = device::kWarpThreads / 2; distance > 0; distance /= 2)
    all = joining.join(all, device::shuffle_xor(all, distance));
  return all;
}

// A leaf next to each other in memory, of one storage: the loads are short.
template <int kStorage>
FUSEDOPT_FN double join_dense_leaf(const ChunkView& leaf, const Gradient<float>& gradient, bool largest, int lane) {
  using V = Variant<kStorage, kStorage, 0>;
  return largest ? join_leaf<V>(leaf, gradient, JoinsAs<true>{}, lane)
                 : join_leaf<V>(leaf, gradient, JoinsAs<false>{}, lane);
}

template <class V, class C>
FUSEDOPT_FN double join_leaf(const LaunchParams& launch, const ChunkView& leaf, int lane) {
  const Gradient<C> gradient(launch, 0);
  const bool largest = launch.phase.has(kLargestNorm);
  const bool is_strided = V::kStrided && leaf.layout != nullptr;
  const int storage = is_strided ? kAnyStorage : V::storage(kGrad, leaf.storage);
  if constexpr (sizeof(C) == 4) {
    if (storage == kFloat32) return join_dense_leaf<kFloat32>(leaf, gradient, largest, lane);
    if (storage == kBFloat16) return join_dense_leaf<kBFloat16>(leaf, gradient, largest, lane);
    if (storage == kFloat16) return join_dense_leaf<kFloat16>(leaf, gradient, largest, lane);
  }
  return join_leaf<V>(leaf, gradient, Joins{largest}, lane);
}

// The first pass: every warp joins leaves.
template <class V>
FUSEDOPT_FN void measure_leaves(const LaunchParams& launch) {
  const Team team{true};
  const u32 per_chunk = u32(launch.chunk_elements / kLeaf);
  FUSEDOPT_LOOP
  for (u64 turn = team.index(); turn < u64(launch.chunk_count) * per_chunk; turn += team.count()) {
    const Chunk chunk = launch.chunk(u32(turn / per_chunk));
    const ChunkView view(launch, chunk, V{});
    const i32 at = i32(turn % per_chunk) * i32(kLeaf);
    if (at >= view.size) continue;
    double joined = 0.0;
    if (view.has(kGrad)) {
      const ChunkView leaf = view.part(at, i32(kLeaf));
      if (V::kDouble && leaf.computes_in_double())
        joined = join_leaf<V, double>(launch, leaf, team.lane());
      else
        joined = join_leaf<V, float>(launch, leaf, team.lane());
    }
    const u64 index = launch.table.first_leaf[chunk.tensor] + u64((view.begin + at) / kLeaf);
    if (team.lane() == 0) launch.phase.leaf_sums[index] = joined;
  }
}

// What up to 2,048 numbers join to.
FUSEDOPT_FN double join_numbers(const double* numbers, u64 count, bool largest, double* values) {
  device::barrier();  // all are done with the last ones
  for (int k = device::thread_index(); k < kJoined; k += device::block_threads())
    values[k] = u64(k) < count ? numbers[k] : 0.0;
  join_block(values, kJoined, largest);
  return values[0];
}

// The leaves of a part of the table are joined in groups of 2,048, whose numbers lie behind those of all leaves.
struct LeafGroups {
  const double* leaves;
  u64 leaf_count, count;
  double* joined;

  FUSEDOPT_FN LeafGroups(const LaunchParams& launch, u64 part) {
    const u64 first = launch.table.part_leaf[part];
    leaves = launch.phase.leaf_sums + first;
    leaf_count = launch.table.part_leaf[part + 1] - first;
    count = (leaf_count + kJoined - 1) / kJoined;
    joined = launch.phase.leaf_sums + launch.table.leaves + first / kJoined + part;
  }
};

// Blocks take the groups of all parts in turn.
FUSEDOPT_FN void join_groups(const LaunchParams& launch, double* values) {
  u64 turn = device::block_index();
  FUSEDOPT_LOOP
  for (u64 part = 0; part < launch.table.parts; ++part) {
    const LeafGroups groups(launch, part);
    FUSEDOPT_LOOP
    for (; turn < groups.count; turn += device::block_count()) {
      const u64 first = turn * kJoined;
      const double joined =
          join_numbers(groups.leaves + first, groups.leaf_count - first, launch.phase.has(kLargestNorm), values);
      if (device::thread_index() == 0) groups.joined[turn] = joined;
    }
    turn -= groups.count;
  }
}

// Blocks take the parts in turn. `few`: every part has one group at most, which was not joined before.
FUSEDOPT_FN void join_parts(const LaunchParams& launch, bool few, double* values) {
  FUSEDOPT_LOOP
  for (u64 part = device::block_index(); part < launch.table.parts; part += device::block_count()) {
    const LeafGroups groups(launch, part);
    const double joined = join_numbers(few ? groups.leaves : groups.joined, few ? groups.leaf_count : groups.count,
                                       launch.phase.has(kLargestNorm), values);
    if (device::thread_index() == 0) launch.phase.joined[part] = joined;
  }
}

// Every block looks at all norms, the first writes them down. False: the launch is to change nothing.
FUSEDOPT_FN bool admit_gradients(const LaunchParams& launch, double* refused) {
  const Phase& phase = launch.phase;
  const bool writes = device::block_index() == 0;
  device::barrier();
  if (device::thread_index() == 0) *refused = 0.0;
  device::barrier();
  FUSEDOPT_LOOP
  for (u64 n = u64(device::thread_index()); n < phase.norms; n += u64(device::block_threads())) {
    const double norm = norm_of(phase, phase.joined[n]);
    if (writes) phase.results[1 + n] = norm;
    if (is_refused(phase, norm)) *refused = 1.0;
  }
  device::barrier();
  const bool admitted = *refused == 0.0;
  if (writes && !admitted && device::thread_index() == 0) phase.results[0] += 1.0;
  return admitted;
}

// Measures all gradients. What any block finds, all blocks can read after.
template <class V>
FUSEDOPT_FN void measure_all(const LaunchParams& launch) {
  double* const values = device::shared<BlockJoins<V>>().values;
  measure_leaves<V>(launch);
  device::grid_barrier(launch.arrivals + 1);
  const bool few = launch.table.leaves <= u64(kJoined);
  if (!few) {
    join_groups(launch, values);
    device::grid_barrier(launch.arrivals + 1);
  }
  join_parts(launch, few, values);
  if (launch.phase.stage != kMeasures) device::grid_barrier(launch.arrivals + 1);
}

// What a skipped step does: nothing, or it clears the gradients.
FUSEDOPT_FN void skip_block(const LaunchParams& launch) {
  if (device::block_index() == 0 && device::thread_index() == 0) mark_report(launch, true);
  if (!launch.phase.has(kClearsGrads)) return;
  FUSEDOPT_LOOP
  for (u32 c = device::block_index(); c < launch.chunk_count; c += device::block_count()) {
    const Chunk chunk = launch.chunk(c);
    if (launch.grads[chunk.tensor] == 0) continue;
    clear_chunk<DeviceAccess>(ChunkView(launch, chunk, AnyVariant{}), device::thread_index(), device::block_threads());
  }
}

// The last block to arrive advances the step counts of tensors that have several chunks, or none.
template <template <class> class Rule>
FUSEDOPT_FN void finish(const KernelParams& params, const LaunchParams& launch, BlockState<Rule>& block) {
  if (params.late_count == 0) return;
  const int lane = device::thread_index();
  if (lane == 0) {
    block.is_last = (block.arrived != kNotArrived ? block.arrived : arrive(launch)) == device::block_count() - 1;
    if (block.is_last) device::fence();  // what the others have read, they have read before what follows
  }
  device::barrier();
  if (!block.is_last) return;
  for (u32 k = u32(lane); k < params.late_count; k += u32(device::block_threads()))
    advance_step(launch, launch.chunk_order == kOfOneTensor ? 0 : params.late_rows[k]);
}

template <template <class> class Rule, class V>
FUSEDOPT_FN void sweep_kernel(const KernelParams& params) {
  LaunchParams launch = params.launch;
  if (params.inline_groups != 0) launch.groups = params.groups;
  if (params.inline_grads != 0) launch.grads = params.grads;
  if (is_skipped(launch)) {
    if (V::kSide) skip_block(launch);
    return;
  }
  if constexpr (V::kSide) {
    if (launch.phase.measures()) measure_all<V>(launch);
    if (launch.phase.stage == kMeasures) return;
    double& refused = device::shared<BlockJoins<V>>().values[0];
    if (launch.phase.reads_twice() && !admit_gradients(launch, &refused)) return skip_block(launch);
  }
  BlockState<Rule>& block = device::shared<BlockState<Rule>>();
  if (V::kSide && device::block_index() == 0 && device::thread_index() == 0) mark_report(launch, false);
  sweep_block<Rule, V>(params, launch, block);
  finish(params, launch, block);
}

}  // namespace fusedopt
