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

// Where the leaves of one tensor are reported, and what an Access gathers the terms of a leaf in.
struct LeafReport {
  void* tally = nullptr;      // null: nothing is reported
  double* columns = nullptr;  // at the tensor's first leaf
  u64 leaves = 0;             // of the table: from column to column
  u32* events = nullptr;      // of one thread in this leaf, where an Access counts so

  FUSEDOPT_FN bool is_wanted() const { return tally != nullptr; }
};

// Writes down what leaf `index` of the tensor came to: its squares are added in the order of reduce.h.
FUSEDOPT_FN void write_leaf(const LeafReport& report, u64 index, const double (&squares)[kReportSquares],
                            double nonfinite, double lost) {
  for (int s = 0; s < kReportSquares; ++s) report.columns[u64(s) * report.leaves + index] = squares[s];
  report.columns[u64(kNonfinite) * report.leaves + index] = nonfinite;
  report.columns[u64(kLost) * report.leaves + index] = lost;
}

}  // namespace fusedopt
