// What a report says of each leaf: norms of gradient, parameter and update, and what went wrong. Written once, for host
// and device; fusedopt/report.py joins the leaves.
#pragma once

#include "rules/reduce.h"

namespace fusedopt {

enum ReportColumn : int {
  kGradSquares,    // of the gradient, unscaled, before it is clipped
  kParamSquares,   // of the parameter after the update, as it is stored
  kUpdateSquares,  // of the update, as the rule found it
  kNonfinite,      // gradients that are infinite or NaN
  kLost,           // elements whose update was not 0 and yet left them as they were stored
  kReportColumns
};
constexpr int kReportSquares = kNonfinite;  // columns that are sums of squares

// The terms of a leaf, element k joined with element k + kHalfLeaf already, which is how the tree of reduce.h begins.
// An event is a count of non-finite gradients and kLostEvent times a count of lost updates: exact in float for a leaf.
constexpr int kHalfLeaf = kJoined / 2;
constexpr float kLostEvent = 4096.0f;
struct LeafTally {
  double squares[kReportSquares][kHalfLeaf];
  float events[kHalfLeaf];
};

// Where the leaves of one tensor are reported, and the half of a leaf that is being swept.
struct LeafReport {
  LeafTally* tally = nullptr;  // null: nothing is
  double* columns = nullptr;   // at the tensor's first leaf
  u64 leaves = 0;              // of the table: from column to column
  int half = 0;

  FUSEDOPT_FN bool is_wanted() const { return tally != nullptr; }
};

// Joins what was tallied, by all lanes, and writes it down as leaf `index` of the tensor.
template <class Barrier>
FUSEDOPT_FN void write_leaf(const LeafReport& report, u64 index, int lane, int lanes, const Barrier& barrier) {
  LeafTally& tally = *report.tally;
  FUSEDOPT_LOOP
  for (int s = 0; s < kReportSquares; ++s) join_halves<false>(tally.squares[s], kHalfLeaf, lane, lanes, barrier);
  join_halves<false>(tally.events, kHalfLeaf, lane, lanes, barrier);
  if (lane != 0) return;
  const i64 events = i64(tally.events[0]), lost = events / i64(kLostEvent);
  for (int s = 0; s < kReportSquares; ++s) report.columns[u64(s) * report.leaves + index] = tally.squares[s][0];
  report.columns[u64(kNonfinite) * report.leaves + index] = double(events - lost * i64(kLostEvent));
  report.columns[u64(kLost) * report.leaves + index] = double(lost);
}

// For a leaf that does not fill the tally: absent elements are 0.
FUSEDOPT_FN void clear_tally(LeafTally& tally, int lane, int lanes) {
  FUSEDOPT_LOOP
  for (int k = lane; k < kHalfLeaf; k += lanes) {
    for (int s = 0; s < kReportSquares; ++s) tally.squares[s][k] = 0.0;
    tally.events[k] = 0.0f;
  }
}

}  // namespace fusedopt
