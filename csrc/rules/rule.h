// What every rule shares: the hyperparameter row it is built from, and the few operations beyond + - * /.
//
// A rule is the update of one element, from floats in registers to floats in registers. It is templated on the
// compute type C (float, double), applied to elements of type X (C, or a vector of C), built once per tensor from the
// group's hyperparameters in double and the step count t, and applied to each element. It sees no pointer, no dtype and
// no hardware. It returns the update, which it took off the parameter. What it decides once per tensor is a bit of its
// `branches`; the sets of them that most steps take are listed in kUsual, the most frequent first, and the CPU compiles
// each of those as a loop without tests. states() is how many of its state tensors it reads and writes.
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

// A bit of a rule's branches, or none.
FUSEDOPT_FN constexpr u32 set(u32 branch, bool taken) { return taken ? branch : 0u; }

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

#if !defined(__CUDACC__) && !defined(__CUDACC_RTC__)
// A vector, element by element: compilers make one instruction of it.
template <class X>
FUSEDOPT_FN X square_root(X x) {
  X root;
  for (unsigned k = 0; k < sizeof(X) / sizeof(x[0]); ++k) root[k] = square_root(x[k]);
  return root;
}
#endif

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
template <class X, class C>
FUSEDOPT_FN X lerp(X start, X end, C weight, C one_minus_weight, bool nearer_to_end) {
  const X difference = end - start;
  return nearer_to_end ? end - difference * one_minus_weight : start + weight * difference;
}

// The larger of two; NaN if either is NaN, as torch.maximum.
template <class X>
FUSEDOPT_FN X maximum(X a, X b) {
  return ((a > b) | (a != a)) ? a : b;
}

// x; in the place of an infinity the number next to it.
template <class C, class X>
FUSEDOPT_FN X bounded(X x) {
  const X most = X{} + C(sizeof(C) == 8 ? 1.7976931348623157e308 : 3.4028234663852886e38);
  x = x > most ? most : x;
  return x < -most ? -most : x;
}

}  // namespace fusedopt
