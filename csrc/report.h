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

// The squares of a leaf are summed in the order of reduce.h. An event is a count of non-finite gradients and kLostEvent
// times a count of lost updates: exact in float for a leaf, in any order.
constexpr float kLostEvent = 4096.0f;

// Where the leaves of one tensor are reported, and what an Access gathers the terms of a leaf in.
struct LeafReport {
  void* tally = nullptr;      // null: nothing is reported
  double* columns = nullptr;  // at the tensor's first leaf
  u64 leaves = 0;             // of the table: from column to column
  u32* events = nullptr;      // of one thread in this leaf, where an Access counts them so

  FUSEDOPT_FN bool is_wanted() const { return tally != nullptr; }
};

// Writes down what the terms of leaf `index` of the tensor came to.
FUSEDOPT_FN void write_leaf(const LeafReport& report, u64 index, const double (&squares)[kReportSquares], float event) {
  const i64 events = i64(event), lost = events / i64(kLostEvent);
  for (int s = 0; s < kReportSquares; ++s) report.columns[u64(s) * report.leaves + index] = squares[s];
  report.columns[u64(kNonfinite) * report.leaves + index] = double(events - lost * i64(kLostEvent));
  report.columns[u64(kLost) * report.leaves + index] = double(lost);
}

}  // namespace fusedopt
