// What happens to one chunk: load, unscale, rule, store, outputs beside the update. Written once, for host and device.
//
// Access says how memory is reached (cpu/access.h, cuda/access.h) and walks a chunk in vectors of its own width; V is
// the variant; C the compute type.
#pragma once

#include "storage/block.h"
#include "storage/master.h"
#include "variants.h"

namespace fusedopt {

// A width that a walk passes to the sweep: N elements, of which the last few may be missing (partial), at addresses
// that are aligned for N-wide access or not.
template <int N, bool kAligned_ = true, bool kPartial_ = false>
struct Width {
  static constexpr int value = N;
  static constexpr bool kAligned = kAligned_;
  static constexpr bool kPartial = kPartial_;
};

// One chunk of one tensor: where each slot's elements are, and how many the chunk has.
struct ChunkView {
  u64 address[kElementSlots];  // of the chunk's element 0 where dense, of the tensor's where strided; 0: slot absent
  u64 storage;
  const i64* layout;  // null: dense
  i64 begin;          // of the chunk in its tensor, in elements
  i32 size;           // in elements
  u32 aligned;        // bit per slot: vector access is possible from element `boundary` on; the access sets both
  i32 boundary;
  i32 block_bits;       // 2^this are the elements of a block of codes
  u64 scales[kStates];  // of the chunk's first block; 0: the state is not in codes
  float* step;          // how many steps its tensor has taken; null: its rule needs no count
  u64 place;       // in the whole tensor, over all devices: of its first element, or of the tensor's where it has runs
  u64 run, pitch;  // see Slot

  // All that is read is read before any of it is looked at: on a GPU a read takes longer than all the rest here.
  template <class V>
  FUSEDOPT_FN ChunkView(const LaunchParams& launch, const Chunk& chunk, V) {
    const TensorTable& table = launch.table;
    u64 start[kSlots];
    FUSEDOPT_UNROLL
    for (int s = 0; s < kSlots; ++s) start[s] = V::may_have(s) ? table.slot(s, chunk.tensor) : 0;
    start[kGrad] = launch.grads[chunk.tensor];
    const i64 numel = table.numel[chunk.tensor];
    const i32 at = V::kStrided ? table.layout[chunk.tensor] : kDenseLayout;
    storage = table.storage[chunk.tensor];
    begin = i64(chunk.index) * launch.chunk_elements;
    const i64 rest = numel - begin;
    size = i32(rest < launch.chunk_elements ? rest : launch.chunk_elements);
    layout = at == kDenseLayout ? nullptr : table.layouts + at;
    aligned = 0;
    boundary = 0;
    FUSEDOPT_UNROLL
    for (int s = 0; s < kElementSlots; ++s) {
      const u64 advance = layout == nullptr ? u64(begin) * u64(storage_bytes(V::storage(s, storage))) : 0;
      address[s] = start[s] == 0 ? 0 : start[s] + advance;
    }
    step = reinterpret_cast<float*>(start[kStep]);
    run = start[kRun];
    pitch = start[kPitch];
    place = start[kPlace] + (run == 0 ? u64(begin) : 0);
    block_bits = i32(mode() & kBlockBits);
    FUSEDOPT_UNROLL
    for (int s = 0; s < kStates; ++s) {
      const u64 scale = start[kScale0 + s];
      scales[s] = scale == 0 ? 0 : scale + (u64(begin) >> block_bits) * sizeof(float);
    }
  }
  // Some of its elements, fewer where it ends before.
  FUSEDOPT_FN ChunkView part(i32 at, i32 count) const {
    ChunkView found = *this;
    const i32 rest = at < size ? size - at : 0;
    found.begin += at;
    if (run == 0) found.place += u64(at);
    found.size = rest < count ? rest : count;
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < kElementSlots; ++s)
      if (layout == nullptr && has(s)) found.address[s] += u64(at) * u64(storage_bytes(storage_of(s)));
    for (int s = 0; s < kStates; ++s)
      if (scales[s] != 0) found.scales[s] += (u64(at) >> block_bits) * sizeof(float);
    return found;
  }
  // The place of element i in the whole tensor. Tensors with runs go through variants that admit strides.
  template <class V>
  FUSEDOPT_FN u64 place_at(i32 i) const {
    if (!V::kStrided || run == 0) return place + u64(i);
    const u64 element = u64(begin + i);
    return place + element / run * pitch + element % run;
  }
  // Whether elements from i on follow each other there, with places of the same upper half: see RandomStream::bits.
  FUSEDOPT_FN bool in_one_run(i32 i, i32 count) const {
    if (run == 0 || count < 1) return true;
    const u64 element = u64(begin + i), at = element % run, first = place + element / run * pitch + at;
    return at + u64(count) <= run && first >> 32 == (first + u64(count) - 1) >> 32;
  }
  FUSEDOPT_FN int storage_of(int slot) const { return int(storage >> (kStorageBits * slot)) & kStorageMask; }
  FUSEDOPT_FN u32 mode() const { return u32(storage >> kModeShift); }
  FUSEDOPT_FN bool has(int slot) const { return address[slot] != 0; }
  FUSEDOPT_FN bool is_aligned(int slot) const { return (aligned >> slot & 1u) != 0; }
  // True where the chunk is computed in float64: any of its slots is float64.
  FUSEDOPT_FN bool computes_in_double() const {
    for (int s = 0; s < kElementSlots; ++s)
      if (has(s) && storage_of(s) == kFloat64) return true;
    return false;
  }
};

// Which of its rule's states a slot is; a slot before the states counts as the first.
FUSEDOPT_FN int state_of(int slot) { return slot < kState0 ? 0 : slot - kState0; }

// The scale of the block of a state that element i of a chunk is in.
FUSEDOPT_FN float* scale_at(const ChunkView& chunk, int state, i32 i) {
  return reinterpret_cast<float*>(chunk.scales[state]) + (i >> chunk.block_bits);
}

// What becomes of a gradient before the rule sees it.
template <class C>
struct Gradient {
  C scale = C(1);
  C coefficient = C(1);
  bool unscale = false, negate = false, clips = false;

  FUSEDOPT_FN Gradient() {}
  FUSEDOPT_FN Gradient(const LaunchParams& launch, u32 flags)
      : scale(launch.grad_scale ? C(*launch.grad_scale) : C(1)),
        unscale(launch.grad_scale != nullptr),
        negate((flags & kMaximize) != 0) {}

  FUSEDOPT_FN bool is_plain() const { return !unscale && !negate; }

  template <class X, int M>
  FUSEDOPT_FN void divide(X (&g)[M]) const {
    if (unscale) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k) g[k] = g[k] / scale;
    }
  }
  template <class X, int M>
  FUSEDOPT_FN void clip(X (&g)[M]) const {
    if (clips) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k) g[k] = g[k] * coefficient;
    }
    if (negate) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k) g[k] = -g[k];
    }
  }
};

// Where element i of a chunk lies in each slot, in elements from the slot's address.
struct DenseIndex {
  i32 i;
  FUSEDOPT_FN DenseIndex(const ChunkView&, i32 i) : i(i) {}
  FUSEDOPT_FN i64 operator()(int) const { return i; }
};

struct StridedIndex {
  i64 offset[kElementSlots];

  FUSEDOPT_FN StridedIndex(const ChunkView& chunk, i32 i) {
    const i64* const layout = chunk.layout;
    for (int s = 0; s < kElementSlots; ++s) offset[s] = layout ? 0 : i;
    if (!layout) return;
    const i64 ndim = layout[0];
    const i64* sizes = layout + 1;
    const i64* strides = sizes + ndim;
    i64 rest = chunk.begin + i;
    for (i64 d = ndim - 1; d >= 0; --d) {
      const i64 coordinate = rest % sizes[d];
      rest /= sizes[d];
      for (int s = 0; s < kElementSlots; ++s) offset[s] += coordinate * strides[s * ndim + d];
    }
  }
  FUSEDOPT_FN i64 operator()(int slot) const { return offset[slot]; }
};

// One vector, as its rule found and left it.
template <class X, int M>
struct Witness {
  X grad[M];    // unscaled, before it is clipped
  X before[M];  // the parameter
  X after[M];   // and as the rule left it
  X update[M];
};
// That of the elements of a width, computed in C: one by one, or in vectors.
template <class Access, class C, class W, class X = typename Access::template Lanes<C, W::value>>
using WitnessOf = Witness<X, W::value* int(sizeof(C)) / int(sizeof(X))>;

template <class X, int M>
FUSEDOPT_FN void copy(X (&to)[M], const X (&from)[M]) {
  FUSEDOPT_UNROLL
  for (int k = 0; k < M; ++k) to[k] = from[k];
}

// The terms of one vector, `place` being that of its first element in the part of a leaf that is gathered at once; p is
// the parameter as it is stored. What is kept of a 16-bit parameter counts as part of it.
template <class Access, class W, class X, int M>
FUSEDOPT_FN void tally_vector(const LeafReport& report, bool keeps_rest, const Witness<X, M>& seen, const X (&p)[M],
                              i32 place, int count) {
  const X zero = X{}, one = X{} + 1.0f;
  X lost[M];
  FUSEDOPT_UNROLL
  for (int k = 0; k < M; ++k) {
    const X after = keeps_rest ? seen.after[k] : p[k];
    lost[k] = (seen.before[k] == after) & (seen.update[k] != zero) ? one : zero;
  }
  Access::template tally<W>(report, place, seen.grad, p, seen.update, lost, count);
}

// A vector of what comes beside the update. Average, copy and report are those of the parameter as its storage has
// rounded it, which the next forward pass will see.
template <class Access, class V, class C, class W, class Index, class X, int M>
FUSEDOPT_FN void sweep_sides(const ChunkView& chunk, const Side<C>& side, const Index& at, X (&p)[M],
                             const Witness<X, M>& seen, i32 place, int count) {
  if (side.averages || side.copies || side.report.is_wanted())
    Access::template round_as_stored<W>(V::storage(kParam, chunk.storage), p);
  if constexpr (V::kReports)
    if (side.report.is_wanted())
      tally_vector<Access, W>(side.report, V::kMastered && chunk.has(kMaster), seen, p, place, count);
  if (side.averages && chunk.has(kEma)) {
    X ema[M];
    typename Access::template Packet<C, W::value> packet = {};
    const int ema_storage = V::storage(kEma, chunk.storage);
    Access::template fetch<W>(packet, ema_storage, chunk.address[kEma], at(kEma), chunk.is_aligned(kEma));
    Access::template decode<W>(packet, ema_storage, ema, count);
    FUSEDOPT_UNROLL
    for (int k = 0; k < M; ++k) ema[k] = side.average(ema[k], p[k]);
    Access::template store<W>(ema_storage, chunk.address[kEma], at(kEma), chunk.is_aligned(kEma), ema, count);
  }
  if (side.copies && chunk.has(kCopy)) {
    X copied[M];  // so that no other step keeps the parameter in memory for a call
    copy(copied, p);
    Access::template store<W>(V::storage(kCopy, chunk.storage), chunk.address[kCopy], at(kCopy),
                              chunk.is_aligned(kCopy), copied, count);
  }
  if (side.clears) {
    const X zero[M] = {};
    Access::template store<W>(V::storage(kGrad, chunk.storage), chunk.address[kGrad], at(kGrad),
                              chunk.is_aligned(kGrad), zero, count);
  }
}
template <class Access, class V, class C, class W, class Index, class X, int M>
FUSEDOPT_FN void sweep_sides(const ChunkView&, const NoSide&, const Index&, X (&)[M], const Witness<X, M>&, i32, int) {}

// The master slot of one vector: from the stored parameter to the exact one, and back.
template <class Access, class V, class C, class W>
struct Master {
  static constexpr bool kThere = V::kMastered && sizeof(C) == 4;
  typename Access::template Packet<C, kThere ? W::value : 1> packet = {};

  template <class Index>
  FUSEDOPT_FN void fetch(const ChunkView& chunk, const Index& at) {
    if constexpr (kThere)
      if (V::keeps(chunk.has(kMaster)))
        Access::template fetch<W>(packet, V::storage(kMaster, chunk.storage), chunk.address[kMaster], at(kMaster),
                                  chunk.is_aligned(kMaster));
  }
  template <class X, int M>
  FUSEDOPT_FN void join(const ChunkView& chunk, X (&p)[M], int count) const {
    if constexpr (kThere) {
      if (!V::keeps(chunk.has(kMaster))) return;
      const int storage = V::storage(kMaster, chunk.storage);
      X kept[M];
      if (storage == kLowBits)
        Access::template decode_low<W>(packet, kept, count);
      else
        Access::template decode<W>(packet, storage, kept, count);
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k)
        p[k] =
            exact_param<typename Access::template Bits<X>>(V::storage(kParam, chunk.storage), storage, p[k], kept[k]);
    }
  }
  template <class X, int M, class Index>
  FUSEDOPT_FN static void keep(const ChunkView& chunk, X (&p)[M], const Index& at, int count) {
    if constexpr (kThere) {
      if (!V::keeps(chunk.has(kMaster))) return;
      const int storage = V::storage(kMaster, chunk.storage);
      X kept[M];
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k)
        kept[k] = split_param<typename Access::template Bits<X>>(V::storage(kParam, chunk.storage), storage, p[k]);
      if (storage == kLowBits)
        Access::template store_low<W>(chunk.address[kMaster], at(kMaster), chunk.is_aligned(kMaster), kept, count);
      else
        Access::template store<W>(storage, chunk.address[kMaster], at(kMaster), chunk.is_aligned(kMaster), kept, count);
    }
  }
};

// Stands for the states of a block in a variant without blocks.
struct NoBlock {};

// A vector up to its states: load, unscale, rule, store of the states.
template <class Access, class V, class C, class W, class Rule, class Index, class Block>
FUSEDOPT_FN WitnessOf<Access, C, W> update_vector(const ChunkView& chunk, const Rule& rule, const Gradient<C>& gradient,
                                                  const Index& at, i32 place, int count, Block&& block) {
  constexpr int N = W::value;
  using X = typename Access::template Lanes<C, N>;
  constexpr int M = N * int(sizeof(C)) / int(sizeof(X));
  constexpr int kUsed = kState0 + Rule::kRuleStates;  // slots that this rule can have
  constexpr bool kBlocks = V::kBlocks && sizeof(C) == 4;
  typename Access::template Packet<C, N> packet[kUsed] = {};
  X x[kElementSlots][M];
  FUSEDOPT_UNROLL_SLOTS
  for (int s = 0; s < kUsed; ++s)
    if (Access::has(chunk, rule, s)) {
      if constexpr (kBlocks)
        if (V::codes(s, chunk.storage)) {
          Access::template fetch_codes<W>(packet[s], chunk.address[s], at(s), chunk.is_aligned(s));
          continue;
        }
      Access::template fetch<W>(packet[s], V::storage(s, chunk.storage), chunk.address[s], at(s), chunk.is_aligned(s));
    }
  Master<Access, V, C, W> master;
  master.fetch(chunk, at);
  FUSEDOPT_UNROLL_SLOTS
  for (int s = 0; s < kUsed; ++s)
    if (Access::has(chunk, rule, s)) {
      if constexpr (kBlocks)
        if (V::codes(s, chunk.storage)) {
          Access::template decode_codes<W>(packet[s], V::storage(s, chunk.storage), block.scale[state_of(s)], x[s],
                                           count);
          continue;
        }
      Access::template decode<W>(packet[s], V::storage(s, chunk.storage), x[s], count);
    } else {
      for (int k = 0; k < M; ++k) x[s][k] = X{};
    }
  master.join(chunk, x[kParam], count);
  Witness<X, M> seen;
  copy(seen.before, x[kParam]);
  gradient.divide(x[kGrad]);
  copy(seen.grad, x[kGrad]);
  gradient.clip(x[kGrad]);
  FUSEDOPT_UNROLL
  for (int k = 0; k < M; ++k)
    seen.update[k] = rule(x[kParam][k], x[kGrad][k], x[kState0][k], x[kState1][k], x[kState2][k]);
  copy(seen.after, x[kParam]);
  FUSEDOPT_UNROLL_SLOTS
  for (int s = kState0; s < kUsed; ++s)
    if (Access::has(chunk, rule, s)) {
      if constexpr (kBlocks)
        if (V::codes(s, chunk.storage)) {
          FUSEDOPT_UNROLL
          for (int k = 0; k < M; ++k) x[s][k] = what_is_coded(V::storage(s, chunk.storage), x[s][k]);
          block.template take<W>(state_of(s), place, x[s], count);
          continue;
        }
      Access::template store<W>(V::storage(s, chunk.storage), chunk.address[s], at(s), chunk.is_aligned(s), x[s],
                                count);
    }
  return seen;
}

// The rest: store of the parameter, and what comes beside it.
template <class Access, class V, class C, class W, class Index, class S, class Block, class X, int M>
FUSEDOPT_FN void finish_vector(const ChunkView& chunk, const S& side, const Index& at, i32 place, int count,
                               Block&& block, const Witness<X, M>& seen) {
  constexpr bool kBlocks = V::kBlocks && sizeof(C) == 4;
  X p[M];
  copy(p, seen.after);
  Master<Access, V, C, W>::keep(chunk, p, at, count);
  if constexpr (kBlocks && (V::kRounds || !V::kFixed))
    if (V::kRounds || (chunk.mode() & kRoundsAtRandom)) {
      FUSEDOPT_UNROLL
      for (int k = 0; k < M; ++k)
        p[k] = at_random_16(V::storage(kParam, chunk.storage), p[k],
                            block.rounding.bits(chunk.template place_at<V>(place), Access::template places<X>(k)));
    }
  if constexpr (Access::template kKeepsParam<V>)
    block.keep(place, p);
  else
    Access::template store<W>(V::storage(kParam, chunk.storage), chunk.address[kParam], at(kParam),
                              chunk.is_aligned(kParam), p, count);
  sweep_sides<Access, V, C, W>(chunk, side, at, p, seen, place, count);
}

// Element i of a chunk alone; a vector is walked where the chunk is dense only.
template <class V, class W>
using IndexOf = Either<V::kStrided && W::value == 1, StridedIndex, DenseIndex>;

// A chunk whose states are codes: blocks, or what a lane has of one, are updated as a whole, then coded. Between the
// two a CPU updates the next block: the scale of one, which all of its elements wait for, is found meanwhile.
template <class Access, class V, class Rule, class S>
FUSEDOPT_FN void sweep_blocks(const ChunkView& chunk, const Rule& rule, const Gradient<float>& gradient, const S& side,
                              u64 step, int lane, int lanes) {
  using Part = typename Access::template Part<V>;
  const RandomStream random(0, step), rounding(chunk.mode() >> kKeyShift, step);
  const auto is_coded = [&](int s) FUSEDOPT_INLINE {
    return Access::has(chunk, rule, kState0 + s) && V::codes(kState0 + s, chunk.storage);
  };
  // All of it is inlined, so that on a CPU the rule's branches are known in the loops: a call would hide them.
  const auto update = [&](Part& part) FUSEDOPT_INLINE {
    const i32 first = part.first;
    part.rounding = rounding;
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < Rule::kRuleStates; ++s)
      part.scale[s] = part.count > 0 && chunk.scales[s] ? *scale_at(chunk, s, first) : 0.0f;
    Access::template walk_part<V>(chunk, part, [&](auto width, i32 i, int n) FUSEDOPT_INLINE {
      using W = decltype(width);
      const IndexOf<V, W> at(chunk, i);
      const auto seen = update_vector<Access, V, float, W>(chunk, rule, gradient, at, i, n, part);
      finish_vector<Access, V, float, W>(chunk, side, at, i, n, part, seen);
    });
  };
  const auto code = [&](const Part& part) FUSEDOPT_INLINE {
    if constexpr (Access::template kKeepsParam<V>) Access::template store_param<V>(chunk, part);
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < Rule::kRuleStates; ++s)
      if (is_coded(s))
        Access::template store_part<V>(chunk, part, s, V::storage(kState0 + s, chunk.storage), part.inverse[s], random);
  };
  const auto scale = [&](Part& part) FUSEDOPT_INLINE {
    int storage[kStates];  // of those that are in codes
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < kStates; ++s)
      storage[s] = s < Rule::kRuleStates && is_coded(s) ? V::storage(kState0 + s, chunk.storage) : kAnyStorage;
    part.find_scales(storage, chunk.block_bits);
    const bool is_first = part.count > 0 && (part.first & ((1 << chunk.block_bits) - 1)) == 0;
    FUSEDOPT_UNROLL_SLOTS
    for (int s = 0; s < Rule::kRuleStates; ++s)
      if (storage[s] != kAnyStorage && is_first) *scale_at(chunk, s, part.first) = part.scale[s];
  };
  Access::template walk_parts<V>(chunk, lane, lanes, update, scale, code);
}

template <class Access, class V, class C, class Rule, class S>
FUSEDOPT_FN void sweep_part(const ChunkView& chunk, const Rule& rule, const Gradient<C>& gradient, const S& side,
                            u64 step, int lane, int lanes) {
  if constexpr (V::kBlocks && sizeof(C) == 4)
    sweep_blocks<Access, V>(chunk, rule, gradient, side, step, lane, lanes);
  else
    Access::template walk<V, C>(
        chunk, lane, lanes,
        [&](auto width, i32 i, int count) FUSEDOPT_INLINE {
          using W = decltype(width);
          return update_vector<Access, V, C, W>(chunk, rule, gradient, IndexOf<V, W>(chunk, i), i, count, NoBlock{});
        },
        [&](auto width, i32 i, int count, const auto& seen) FUSEDOPT_INLINE {
          using W = decltype(width);
          finish_vector<Access, V, C, W>(chunk, side, IndexOf<V, W>(chunk, i), i, count, NoBlock{}, seen);
        });
}

// A chunk at the step `step` of its tensor: where its leaves are reported, in the order that suits the tally.
template <class Access, class V, class C, class Rule, class S>
FUSEDOPT_FN void sweep_chunk(const ChunkView& chunk, const Rule& rule, const Gradient<C>& gradient, S side, u64 step,
                             int lane, int lanes) {
  if constexpr (V::kReports)
    Access::template report_chunk<V, C>(chunk, side.report, lane, lanes, [&](const ChunkView& part) FUSEDOPT_INLINE {
      sweep_part<Access, V>(part, rule, gradient, side, step, lane, lanes);
    });
  else
    sweep_part<Access, V>(chunk, rule, gradient, side, step, lane, lanes);
}

// Sets a chunk's gradient to 0: what is left of a step that is skipped, where gradients are to be cleared.
template <class Access>
FUSEDOPT_FN void clear_chunk(const ChunkView& chunk, int lane, int lanes) {
  using X = typename Access::template Lanes<double, 1>;
  const X zero[1] = {};
  FUSEDOPT_LOOP
  for (i32 i = lane; i < chunk.size; i += lanes) {
    const i64 at = StridedIndex(chunk, i)(kGrad);
    Access::template store<Width<1>>(chunk.storage_of(kGrad), chunk.address[kGrad], at, false, zero, 1);
  }
}

// Hyperparameters of a group, those that are tensors read now.
FUSEDOPT_FN Hypers read_hypers(const GroupRow& group) {
  Hypers hypers = group.hypers;
  u64 tensors = 0;
  for (int h = 0; h < kHypers; ++h) tensors |= group.tensor[h];
  if (tensors == 0) return hypers;  // mostly: a GPU then waits for all of this once, not for one after the other
  for (int h = 0; h < kHypers; ++h) {
    const u64 address = group.tensor[h];
    if (address == 0) continue;
    const int storage = group.storage[h];
    if (storage == kFloat64)
      hypers.value[h] = *reinterpret_cast<const double*>(address);
    else if (storage == kFloat32)
      hypers.value[h] = *reinterpret_cast<const float*>(address);
    else
      hypers.value[h] = decode16<float>(storage, *reinterpret_cast<const u16*>(address));
  }
  return hypers;
}

FUSEDOPT_FN bool is_skipped(const LaunchParams& launch) { return launch.found_inf && *launch.found_inf != 0.0f; }

// The count of the step being taken, from 1.
FUSEDOPT_FN u64 next_step(const ChunkView& chunk) { return chunk.step ? u64(*chunk.step) + 1 : 1; }

// What becomes of the gradients of a group in this launch.
template <class V, class C>
FUSEDOPT_FN Gradient<C> gradient_of(const LaunchParams& launch, u32 flags, double coefficient) {
  Gradient<C> gradient(launch, flags);
  if constexpr (V::kSide) {
    gradient.coefficient = C(coefficient);
    gradient.clips = launch.phase.has(kClips);
  }
  return gradient;
}

// A chunk by its place in the order of a launch, of those from `first` to `last`: from the end where the gradients have
// just been read once, to meet what the cache still holds.
template <class V>
FUSEDOPT_FN Chunk chunk_at(const LaunchParams& launch, u32 c, u32 first, u32 last) {
  return launch.chunk(V::kSide && launch.phase.reads_twice() ? first + (last - 1 - c) : c);
}

// Where a tensor's leaves are reported; `tally` is room for the terms of one.
template <class V>
FUSEDOPT_FN LeafReport report_of(const LaunchParams& launch, u32 tensor, void* tally) {
  if (!V::kReports || !launch.phase.has(kReports)) return {};
  return {tally, launch.phase.report + launch.table.first_leaf[tensor], launch.table.leaves};
}

// What side outputs of a tensor's chunk need in its step `step`: nothing in a variant without them.
template <class V, class C>
FUSEDOPT_FN auto side_of(const LaunchParams& launch, u32 tensor, u64 step, void* tally) {
  if constexpr (V::kSide)
    return Side<C>(launch.phase, step, report_of<V>(launch, tensor, tally));
  else
    return NoSide{};
}

// A tensor that had a gradient has taken a step: once no more chunk of it is to read the count.
FUSEDOPT_FN void advance_step(const LaunchParams& launch, u64 tensor) {
  float* const step = reinterpret_cast<float*>(launch.table.slot(kStep, tensor));
  if (step && launch.grads[tensor] != 0) *step += 1.0f;
}

}  // namespace fusedopt
