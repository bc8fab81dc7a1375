// The persistent kernel: every block takes chunks in turn; the last block to finish advances the step counts.
#pragma once

#include "cuda/access.h"
#include "norm.h"

namespace fusedopt {

constexpr int kBlockThreads = 256;
constexpr int kInlineGroups = 4;   // groups and gradient addresses that ride in the launch itself: together
constexpr int kInlineGrads = 384;  // with LaunchParams under the 4 KB that every driver takes

// The one argument of every kernel. Where a count is not 0, that column of `launch` is here instead.
struct KernelParams {
  LaunchParams launch;
  u32 inline_groups;
  u32 inline_grads;
  GroupRow groups[kInlineGroups];
  u64 grads[kInlineGrads];
};
static_assert(sizeof(KernelParams) <= 4096, "kernel parameters");

// What one thread prepares for all of its block: kept in shared memory, not in every thread's registers.
template <template <class> class Rule>
struct BlockState {
  Rule<float> in_float;
  Rule<double> in_double;
  ChunkView view;
  double coefficient;
  u32 flags;
  u32 is_last;
};

// The rule that a block has built, which serves as long as neither group nor step nor compute type changes.
struct BuiltRule {
  u32 group = ~0u;
  u64 step = 0;
  bool in_double = false;
};

template <template <class> class Rule, class V>
FUSEDOPT_FN void prepare_chunk(const LaunchParams& launch, const Chunk& chunk, BuiltRule& built,
                               BlockState<Rule>& block) {
  block.view = ChunkView(launch, chunk);
  const u32 group = launch.table.group[chunk.tensor];
  const u64 step = next_step(launch, chunk.tensor);
  const bool in_double = V::kDouble && block.view.computes_in_double();
  if (in_double)
    DeviceAccess::prepare<V, double>(block.view);
  else
    DeviceAccess::prepare<V, float>(block.view);
  if (group == built.group && step == built.step && in_double == built.in_double) return;
  built.group = group;
  built.step = step;
  built.in_double = in_double;
  const Hypers hypers = read_hypers(launch.groups[group]);
  block.flags = hypers.flags;
  if constexpr (V::kSide) block.coefficient = coefficient_of(launch, group);
  if (in_double)
    block.in_double = Rule<double>(hypers, step);
  else
    block.in_float = Rule<float>(hypers, step);
}

// What a block joins, in shared memory: leaves of the gradients, their results, or the tally of a leaf that is
// reported.
union BlockJoins {
  struct {
    double values[kJoined];
    double groups[kJoined];
    double chains[kChains];
  } tree;
  DeviceAccess::Tally tally;
};

template <class V>
FUSEDOPT_FN void* block_tally() {
  if constexpr (V::kReports)
    return &device::shared<BlockJoins>().tally;
  else
    return nullptr;
}

template <template <class> class Rule, class V>
FUSEDOPT_FN void sweep_block(const LaunchParams& launch, BlockState<Rule>& block) {
  const int lane = device::thread_index();
  const int lanes = device::block_threads();
  void* const tally = block_tally<V>();
  BuiltRule built;
  FUSEDOPT_LOOP
  for (u32 c = device::block_index(); c < launch.chunk_count; c += device::block_count()) {
    const Chunk chunk = chunk_at<V>(launch, c);
    if (launch.grads[chunk.tensor] == 0) continue;
    device::barrier();  // all are done with the last chunk
    if (lane == 0) prepare_chunk<Rule, V>(launch, chunk, built, block);
    device::barrier();
    const u64 step = next_step(launch, chunk.tensor);
    if (V::kDouble && block.view.computes_in_double())
      sweep_chunk<DeviceAccess, V>(block.view, block.in_double,
                                   gradient_of<V, double>(launch, block.flags, block.coefficient),
                                   side_of<V, double>(launch, chunk.tensor, tally), step, lane, lanes);
    else
      sweep_chunk<DeviceAccess, V>(block.view, block.in_float,
                                   gradient_of<V, float>(launch, block.flags, block.coefficient),
                                   side_of<V, float>(launch, chunk.tensor, tally), step, lane, lanes);
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

// What the terms of a leaf of some size join to: chains[0].
template <bool kLargest>
FUSEDOPT_FN void join_chains(const double* terms, int size, double* chains) {
  device::barrier();
  for (int c = device::thread_index(); c < kChains; c += device::block_threads())
    chains[c] = join_chain<kLargest>(c, size, [&](int k) { return terms[k]; });
  join_block(chains, kChains, kLargest);
}

template <class V, class C>
FUSEDOPT_FN void fill_leaf(const ChunkView& leaf, const Gradient<C>& gradient, double* values, bool largest) {
  FUSEDOPT_LOOP
  for (int k = device::thread_index(); k < leaf.size; k += device::block_threads()) {
    C g[1] = {};
    const i64 at = StridedIndex(leaf, k)(kGrad);
    const int storage = V::storage(kGrad, leaf.storage);
    DeviceAccess::Packet<C, 1> packet = {};
    DeviceAccess::fetch<Width<1>>(packet, storage, leaf.address[kGrad], at, false);
    DeviceAccess::decode<Width<1>>(packet, storage, g, 1);
    gradient.divide(g);
    values[k] = largest ? term<true>(double(g[0])) : term<false>(double(g[0]));
  }
}

// The first pass: every block joins the leaves of its chunks.
template <class V>
FUSEDOPT_FN void measure_block(const LaunchParams& launch, double* values, double* chains) {
  const bool largest = launch.phase.has(kLargestNorm);
  FUSEDOPT_LOOP
  for (u32 c = device::block_index(); c < launch.chunk_count; c += device::block_count()) {
    const Chunk chunk = launch.chunks[c];
    const bool live = launch.grads[chunk.tensor] != 0;
    for_each_leaf(launch, chunk, [&](u64 index, const ChunkView& leaf) {
      if (live) {
        if (V::kDouble && leaf.computes_in_double())
          fill_leaf<V>(leaf, Gradient<double>(launch, 0), values, largest);
        else
          fill_leaf<V>(leaf, Gradient<float>(launch, 0), values, largest);
        if (largest)
          join_chains<true>(values, leaf.size, chains);
        else
          join_chains<false>(values, leaf.size, chains);
      }
      if (device::thread_index() == 0) launch.phase.leaf_sums[index] = live ? chains[0] : 0.0;
      device::barrier();
    });
  }
}

// What some leaves join to, by one block: groups of 2,048 leaves, then the groups.
FUSEDOPT_FN double join_leaves(const double* sums, u64 leaves, bool largest, double* values, double* groups) {
  for (int k = device::thread_index(); k < kJoined; k += device::block_threads()) groups[k] = 0.0;
  for (u64 group = 0; group * kJoined < leaves; ++group) {
    device::barrier();
    for (int k = device::thread_index(); k < kJoined; k += device::block_threads()) {
      const u64 leaf = group * kJoined + u64(k);
      values[k] = leaf < leaves ? sums[leaf] : 0.0;
    }
    join_block(values, kJoined, largest);
    if (device::thread_index() == 0) groups[group] = values[0];
  }
  join_block(groups, kJoined, largest);
  return groups[0];
}

// Blocks take the parts of the table in turn.
FUSEDOPT_FN void join_parts(const LaunchParams& launch, double* values, double* groups) {
  const u64* const bounds = launch.table.part_leaf;
  FUSEDOPT_LOOP
  for (u64 part = device::block_index(); part < launch.table.parts; part += device::block_count()) {
    device::barrier();  // all are done with the last part
    const double joined = join_leaves(launch.phase.leaf_sums + bounds[part], bounds[part + 1] - bounds[part],
                                      launch.phase.has(kLargestNorm), values, groups);
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
  auto& tree = device::shared<BlockJoins>().tree;
  measure_block<V>(launch, tree.values, tree.chains);
  device::grid_barrier(launch.arrivals + 1);
  join_parts(launch, tree.values, tree.groups);
  if (launch.phase.stage != kMeasures) device::grid_barrier(launch.arrivals + 1);
}

// What a skipped step does: nothing, or it clears the gradients.
FUSEDOPT_FN void skip_block(const LaunchParams& launch) {
  if (device::block_index() == 0 && device::thread_index() == 0) mark_report(launch, true);
  if (!launch.phase.has(kClearsGrads)) return;
  FUSEDOPT_LOOP
  for (u32 c = device::block_index(); c < launch.chunk_count; c += device::block_count()) {
    const Chunk chunk = launch.chunks[c];
    if (launch.grads[chunk.tensor] == 0) continue;
    clear_chunk<DeviceAccess>(ChunkView(launch, chunk), device::thread_index(), device::block_threads());
  }
}

// Every block has read the step counts it needs before the last to arrive writes them.
template <template <class> class Rule>
FUSEDOPT_FN void finish(const LaunchParams& launch, BlockState<Rule>& block) {
  device::barrier();
  if (device::thread_index() == 0) {
    device::fence();
    block.is_last = device::atomic_increment(launch.arrivals) == device::block_count() - 1;
  }
  device::barrier();
  if (!block.is_last) return;
  device::fence();
  advance_steps(launch, device::thread_index(), device::block_threads());
  if (device::thread_index() != 0) return;
  mark_report(launch, false);
  *launch.arrivals = 0;
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
    double& refused = device::shared<BlockJoins>().tree.values[0];
    if (launch.phase.reads_twice() && !admit_gradients(launch, &refused)) return skip_block(launch);
  }
  BlockState<Rule>& block = device::shared<BlockState<Rule>>();
  sweep_block<Rule, V>(launch, block);
  finish(launch, block);
}

}  // namespace fusedopt
