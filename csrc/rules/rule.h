// What every rule shares: the hyperparameter row it is built from, and the few operations beyond + - * /.
//
// A rule is the update of one element, from floats in registers to floats in registers. It is templated on the
// compute type C (float, double), built once per tensor from the group's hyperparameters in double and the step
// count t, and applied to each element. It sees no pointer, no dtype and no hardware.
#pragma once

#include "types.h"

namespace fusedopt {

constexpr int kHypers = 8;  // hyperparameters a rule may name
constexpr int kStates = 3;  // state tensors a rule may keep

// Flag 0 belongs to the sweep (it negates the gradient); a rule's own flags start at bit 1.
constexpr u32 kMaximize = 1u << 0;

// The hyperparameters of one group, as doubles: each rule names its own columns.
struct Hypers {
  double value[kHypers];
  u32 flags;
  FUSEDOPT_FN bool has(u32 flag) const { return (flags & flag) != 0; }
};

FUSEDOPT_FN float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FUSEDOPT_FN double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// base^t by repeated squaring: the same bits on every backend, where pow() is not.
FUSEDOPT_FN double power(double base, u64 t) {
  double result = 1.0;
  for (; t != 0; t >>= 1) {
    if (t & 1) result *= base;
    base *= base;
  }
  return result;
}

// start + weight·(end − start), from whichever end is nearer, so that weight 1 gives `end` exactly.
template <class C>
FUSEDOPT_FN C lerp(C start, C end, C weight, C one_minus_weight) {
  const C difference = end - start;
  return weight < C(0.5) ? start + weight * difference : end - difference * one_minus_weight;
}

// The larger of two; NaN if either is NaN, as torch.maximum.
template <class C>
FUSEDOPT_FN C maximum(C a, C b) {
  return (a > b || a != a) ? a : b;
}

}  // namespace fusedopt
