// The norm of all gradients: one partial result for each leaf, joined in the order of the leaves. Written once, for
// host and device.
#pragma once

#include "rules/reduce.h"
#include "sweep.h"

namespace fusedopt {

// Calls visit(index of the leaf among all leaves of the table, view of that leaf) for every leaf of a chunk.
template <class Visit>
FUSEDOPT_FN void for_each_leaf(const LaunchParams& launch, const Chunk& chunk, const Visit& visit) {
  const ChunkView view(launch, chunk);
  const u64 first = launch.table.first_leaf[chunk.tensor] + u64(view.begin / kLeaf);
  for (i32 at = 0; at < view.size; at += i32(kLeaf)) visit(first + u64(at / kLeaf), view.part(at, i32(kLeaf)));
}

// What follows from the joined result of all leaves. Called by one thread of the grid.
FUSEDOPT_FN double norm_of(const Phase& phase, double joined) {
  return phase.has(kLargestNorm) ? joined : square_root(joined);
}

// What the gradients of this launch are multiplied by.
FUSEDOPT_FN double coefficient_of(const Phase& phase, double norm) {
  return phase.has(kClips) ? clip_coefficient(norm, phase.max_norm) : 1.0;
}

// Whether the launch changes nothing, for a gradient that is not finite.
FUSEDOPT_FN bool is_refused(const Phase& phase, double norm) { return phase.has(kSkipsNonfinite) && !is_finite(norm); }

}  // namespace fusedopt
