// What a launch does beside the update: norm and check of all gradients before it; in its pass the average of the
// parameter, its copy, the cleared gradient.
#pragma once

#include "report.h"

namespace fusedopt {

enum PhaseFlag : u32 {
  kAverages = 1u << 0,        // tensors with a kEma slot have it moved towards the parameter
  kWarmsUp = 1u << 1,         // the decay of the average is at most (1 + t) / (10 + t)
  kCopies = 1u << 2,          // tensors with a kCopy slot have the parameter written to it
  kClearsGrads = 1u << 3,     // every gradient that was read is set to 0
  kClips = 1u << 4,           // gradients are scaled down so that their norm is at most max_norm
  kLargestNorm = 1u << 5,     // the norm is that of the largest magnitude, not of the squares
  kSkipsNonfinite = 1u << 6,  // nothing at all changes where a gradient is not finite
  kReports = 1u << 7,         // what report.h says of every leaf is written down
  kNormsByGroup = 1u << 8     // every group is clipped by a norm of its own
};

// What a launch does of a step whose norm crosses launches: where it is that of several devices, what each has
// measured is joined between the two.
enum Stage : u32 { kWholeStep, kMeasures, kUpdates };

// The same for all tensors of a launch.
struct Phase {
  u32 flags;
  u32 stage;
  double ema_decay;
  const float* ema_decay_tensor;  // null, or the decay is read from there at run time
  u64 norms;                      // 1, or as many as there are groups
  double* leaf_sums;              // room for one number for each leaf of the table, and behind them of their groups
  double* joined;                 // what the leaves of each part of the table join to; read as that of each norm
  double* results;                // how many launches were skipped; then the norms before clipping
  double* report;  // kReportColumns columns of one number for each leaf; then whether the last launch was skipped
  FUSEDOPT_FN bool has(u32 flag) const { return (flags & flag) != 0; }
  FUSEDOPT_FN bool reads_twice() const { return has(kClips | kSkipsNonfinite); }
  FUSEDOPT_FN bool measures() const { return reads_twice() && stage != kUpdates; }
};

// What the side outputs of one tensor need to know at its step t. The first average is the parameter itself, as that
// of torch.optim.swa_utils.AveragedModel is.
template <class C>
struct Side {
  C decay, one_minus_decay;
  bool averages, copies, first, nearer_to_param, clears;
  LeafReport report;

  FUSEDOPT_FN Side(const Phase& phase, u64 t, const LeafReport& tensor_report)
      : averages(phase.has(kAverages)),
        copies(phase.has(kCopies)),
        first(t <= 1),
        clears(phase.has(kClearsGrads)),
        report(tensor_report) {
    double d = phase.ema_decay_tensor ? double(*phase.ema_decay_tensor) : phase.ema_decay;
    const double most = (1.0 + double(t)) / (10.0 + double(t));
    if (phase.has(kWarmsUp) && most < d) d = most;
    decay = C(d);
    one_minus_decay = C(1.0 - d);
    nearer_to_param = !(one_minus_decay < C(0.5));
  }

  template <class X>
  FUSEDOPT_FN X average(X ema, X param) const {
    return first ? param : lerp(ema, param, one_minus_decay, decay, nearer_to_param);
  }
};

// Stands for Side in a variant without side outputs.
struct NoSide {};

}  // namespace fusedopt
