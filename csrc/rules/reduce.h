// How many values become one, in an order that is the same everywhere. The 2,048 terms of a leaf make 64 chains; the
// chains, and groups of 2,048 leaves, are joined in a tree of halves; what is absent counts as 0. Twin of
// triton_kernels/reduce.py and of fusedopt/reference.py.
//
// A leaf is rows of 16 elements, its quarter is 32 rows. A chain adds what one column of a quarter has, in the order of
// the memory: a CPU keeps the chains of a quarter in registers, and the threads of a GPU block have one each.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

constexpr int kJoined = 2048;
constexpr int kRow = 16;                 // elements next to each other, each of another chain
constexpr int kChain = 32;               // elements of a chain, a row apart
constexpr int kQuarter = kRow * kChain;  // of a leaf: the elements of as many chains as a row has
constexpr int kQuarters = kJoined / kQuarter;
constexpr int kChains = kJoined / kChain;  // of a leaf: those of its first quarter come first

// What an element, or each of a vector, contributes: its square, or its magnitude. The square of a float32 is exact in
// double, denormals and the largest included.
template <bool kLargest, class X>
FUSEDOPT_FN X term(X x) {
  if constexpr (kLargest)
    return x <= X{} ? X{} - x : x;
  else
    return x * x;
}

// The sum, or the larger of two: NaN if either is NaN.
template <bool kLargest, class T>
FUSEDOPT_FN T join(T a, T b) {
  if constexpr (kLargest)
    return maximum(a, b);
  else
    return a + b;
}

// What a chain has joined so far, and one element more. A square that is exact need not be rounded before it is added.
template <bool kLargest, class C>
FUSEDOPT_FN double join_term(double joined, C x) {
#if defined(__CUDA_ARCH__)
  if constexpr (!kLargest && sizeof(C) == 4) return __fma_rn(double(x), double(x), joined);
#endif
  return join<kLargest>(joined, term<kLargest>(double(x)));
}

// The first element of chain c in its leaf; the others are a row apart each.
FUSEDOPT_FN int chain_begin(int c) { return c / kRow * kQuarter + c % kRow; }
// Behind its last, of a leaf that has `size` elements.
FUSEDOPT_FN int chain_end(int c, int size) {
  const int whole = chain_begin(c) + kQuarter;
  return whole < size ? whole : size;
}

// What chain c joins to, of a leaf that has `size` elements.
template <bool kLargest, class C>
FUSEDOPT_FN double join_chain(int c, int size, const C* elements) {
  double joined = 0.0;
  for (int k = chain_begin(c); k < chain_end(c, size); k += kRow) joined = join_term<kLargest>(joined, elements[k]);
  return joined;
}

// Squares of a report are added in the type that is computed in, which in float is a matter of a few instructions, and
// in double where that does not hold what they come to: where float has infinities, or where it may have lost squares
// that it rounds to a multiple of 2^-149. A sum that holds is within about 2^-19 of itself: 32 roundings.
template <class C>
constexpr C kLeastHeld = C(sizeof(C) == 4 ? 7.888609052210118e-31 : 0.0);  // 2^-100
template <class C>
constexpr C kMostHeld = C(sizeof(C) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308);
template <class C, class X>
FUSEDOPT_FN auto holds(X sum) {  // an element, or each of a vector; not where it is NaN
  return (sum >= X{} + kLeastHeld<C>)&(sum <= X{} + kMostHeld<C>);
}

// What the squares of chain c come to in a report.
template <class C>
FUSEDOPT_FN double add_chain(int c, int size, const C* elements) {
  C sum = C(0);
  for (int k = chain_begin(c); k < chain_end(c, size); k += kRow) sum = sum + elements[k] * elements[k];
  return holds<C>(sum) ? double(sum) : join_chain<false>(c, size, elements);
}

// Joins value k with value k + half, for every k below half, until few are left, at the start. `lane` of `lanes`
// threads does its share; `barrier` lets all of them come to the end of a level.
template <bool kLargest, class T, class Barrier>
FUSEDOPT_FN void join_halves(T* values, int count, int lane, int lanes, const Barrier& barrier, int left = 1) {
  for (int half = count / 2; half >= left; half /= 2) {
    for (int k = lane; k < half; k += lanes) values[k] = join<kLargest>(values[k], values[k + half]);
    barrier();
  }
}

// What the gradients are multiplied by so that their norm is at most max_norm, as torch.nn.utils.clip_grad_norm_.
FUSEDOPT_FN double clip_coefficient(double norm, double max_norm) {
  const double coefficient = max_norm / (norm + 1e-6);
  return coefficient >= 1.0 ? 1.0 : coefficient;
}

template <class C>
FUSEDOPT_FN bool is_finite(C x) {
  return x - x == C(0);
}

}  // namespace fusedopt
