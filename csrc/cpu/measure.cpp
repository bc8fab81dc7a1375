// The norms' share of one CPU thread: the gradients of leaves, joined. Compiled once per instruction set
// (FUSEDOPT_ISA).
#include "cpu/access.h"
#include "cpu/engine.h"
#include "norm.h"

namespace fusedopt {
namespace {

struct Isa {};  // internal linkage: see HostAccess
using Access = HostAccess<Isa>;

// The terms of a leaf's gradient, joined.
template <class V, class C, bool kLargest>
double join_leaf(const ChunkView& leaf, const Gradient<C>& gradient) {
  return Access::join_leaf<V, C, kLargest>(leaf, [&](auto width, i32 i, auto& g, int count) FUSEDOPT_INLINE {
    using W = decltype(width);
    const int storage = V::storage(kGrad, leaf.storage);
    typename Access::template Packet<C, W::value> packet = {};
    Access::template fetch<W>(packet, storage, leaf.address[kGrad], IndexOf<V, W>(leaf, i)(kGrad), false);
    Access::template decode<W>(packet, storage, g, count);
    gradient.divide(g);
  });
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
    const Chunk chunk = launch.chunk(c);
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
