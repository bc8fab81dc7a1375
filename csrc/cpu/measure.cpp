// The norms' share of one CPU thread: the gradients of leaves, joined. Compiled once per instruction set
// (FUSEDOPT_ISA).
#include "cpu/access.h"
#include "cpu/engine.h"
#include "norm.h"

namespace fusedopt {
namespace {

struct Isa {};  // internal linkage: see HostAccess
using Access = HostAccess<Isa>;

// The terms of a leaf's gradient, joined. A leaf is gathered in the compute type first: then every loop is a vector
// loop.
template <class V, class C, bool kLargest>
double join_leaf(const ChunkView& leaf, const Gradient<C>& gradient) {
  C gathered[kJoined];
  const auto fetch = [&](auto width, i64 at, i32 to, int count) {
    using W = decltype(width);
    using X = typename Access::template Lanes<C, W::value>;
    constexpr int M = W::value * int(sizeof(C)) / int(sizeof(X));
    X x[M];
    typename Access::template Packet<C, W::value> packet = {};
    Access::template fetch<W>(packet, V::storage(kGrad, leaf.storage), leaf.address[kGrad], at, false);
    Access::template decode<W>(packet, V::storage(kGrad, leaf.storage), x, count);
    __builtin_memcpy(gathered + to, x, u64(count) * sizeof(C));
  };
  if (V::kStrided && leaf.layout)
    for (i32 i = 0; i < leaf.size; ++i) fetch(Width<1>{}, StridedIndex(leaf, i)(kGrad), i, 1);
  else
    Access::template walk<V, C>(leaf, 0, 1, [&](auto width, i32 i, int count) { fetch(width, i, i, count); });
  if (gradient.unscale)
    for (i32 i = 0; i < leaf.size; ++i) gathered[i] = gathered[i] / gradient.scale;
  double terms[kJoined];
  for (i32 i = 0; i < leaf.size; ++i) terms[i] = term<kLargest>(double(gathered[i]));
  for (i32 i = leaf.size; i < kJoined; ++i) terms[i] = 0.0;
  join_halves<kLargest>(terms, kJoined, 0, 1, [] {});
  return terms[0];
}

template <bool kLargest>
double measure_leaf(const LaunchParams& launch, const ChunkView& leaf) {
  using Any = Variant<kAnyStorage, kAnyStorage, kStridedFeature | kDoubleFeature>;
  using F32 = Variant<kFloat32, kFloat32, 0>;
  if (leaf.computes_in_double()) return join_leaf<Any, double, kLargest>(leaf, Gradient<double>(launch, 0));
  const Gradient<float> gradient(launch, 0);
  if (leaf.layout == nullptr && leaf.storage_of(kGrad) == kFloat32)
    return join_leaf<F32, float, kLargest>(leaf, gradient);
  return join_leaf<Any, float, kLargest>(leaf, gradient);
}

void measure_chunks(const LaunchParams& launch, u32 first, u32 last) {
  for (u32 c = first; c < last; ++c) {
    const Chunk chunk = launch.chunks[c];
    const bool live = launch.grads[chunk.tensor] != 0;
    for_each_leaf(launch, chunk, [&](u64 index, const ChunkView& leaf) {
      double& sum = launch.phase.leaf_sums[index];
      sum = 0.0;
      if (live)
        sum = launch.phase.has(kLargestNorm) ? measure_leaf<true>(launch, leaf) : measure_leaf<false>(launch, leaf);
    });
  }
}

}  // namespace

namespace FUSEDOPT_ISA {
MeasureChunks measure_engine() { return measure_chunks; }
}  // namespace FUSEDOPT_ISA

}  // namespace fusedopt
