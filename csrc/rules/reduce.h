// How many values become one, in an order that is the same everywhere: a tree of halves over 2,048 values, absent ones
// being 0. Twin of triton_kernels/reduce.py and of fusedopt.reference.join.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

constexpr int kJoined = 2048;

// What an element contributes: its square, or its magnitude. The square of a float32 is exact in double.
template <bool kLargest>
FUSEDOPT_FN double term(double x) {
  return kLargest ? (x < 0.0 ? -x : x) : x * x;
}

// The sum, or the larger of two: NaN if either is NaN.
template <bool kLargest, class T>
FUSEDOPT_FN T join(T a, T b) {
  return kLargest ? maximum(a, b) : a + b;
}

// Joins value k with value k + half, for every k below half, until one is left: values[0]. `lane` of `lanes` threads
// does its share; `barrier` lets all of them come to the end of a level.
template <bool kLargest, class T, class Barrier>
FUSEDOPT_FN void join_halves(T* values, int count, int lane, int lanes, const Barrier& barrier) {
  for (int half = count / 2; half > 0; half /= 2) {
    for (int k = lane; k < half; k += lanes) values[k] = join<kLargest>(values[k], values[k + half]);
    barrier();
  }
}

// What the gradients are multiplied by so that their norm is at most max_norm, as torch.nn.utils.clip_grad_norm_.
FUSEDOPT_FN double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

FUSEDOPT_FN bool is_finite(double x) { return x - x == 0.0; }

}  // namespace fusedopt
