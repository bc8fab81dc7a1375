// The norm of all gradients: one partial result for each leaf, joined in the order of the leaves. Written once, for
// host and device.
#pragma once

#include "rules/reduce.h"
#include "sweep.h"

namespace fusedopt {

// Calls visit(index of the leaf among all leaves of the table, view of that leaf) for every leaf of a chunk.
template <class Visit>
FUSEDOPT_FN void for_each_leaf(const LaunchParams& launch, const Chunk& chunk, const Visit& visit) {
  const ChunkView view(launch, chunk, AnyVariant{});
  const u64 first = launch.table.first_leaf[chunk.tensor] + u64(view.begin / kLeaf);
  for (i32 at = 0; at < view.size; at += i32(kLeaf)) visit(first + u64(at / kLeaf), view.part(at, i32(kLeaf)));
}

// The norm whose leaves have come to this.
FUSEDOPT_FN double norm_of(const Phase& phase, double joined) {
  return phase.has(kLargestNorm) ? joined : square_root(joined);
}

// What the gradients of a group are multiplied by.
FUSEDOPT_FN double coefficient_of(const LaunchParams& launch, u32 group) {
  const Phase& phase = launch.phase;
  const double max_norm = launch.groups[group].max_norm;
  if (!phase.has(kClips) || max_norm < 0.0) return 1.0;
  return clip_coefficient(norm_of(phase, phase.joined[phase.has(kNormsByGroup) ? group : 0]), max_norm);
}

// Whether a norm keeps the launch from changing anything, for a gradient that is not finite.
FUSEDOPT_FN bool is_refused(const Phase& phase, double norm) { return phase.has(kSkipsNonfinite) && !is_finite(norm); }

// Says in the report whether this launch was skipped. Called by one thread of the grid.
FUSEDOPT_FN void mark_report(const LaunchParams& launch, bool skipped) {
  if (launch.phase.has(kReports)) launch.phase.report[u64(kReportColumns) * launch.table.leaves] = skipped ? 1.0 : 0.0;
}

}  // namespace fusedopt
