// How 16-bit floats become float32 and back: explicit integer code, round to nearest even, denormals kept, NaN
// canonical. The same operations on every backend give the same bits.
//
// F is float or a vector of floats, U the unsigned integer of 32 bits, or a vector of as many: a 16-bit float lies in
// the low half of it.
#pragma once

#include "types.h"

namespace fusedopt {

template <class To, class From>
FUSEDOPT_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class F, class U>
FUSEDOPT_FN F float_from_bf16(U bits) {
  return bit_cast<F>(bits << 16);
}

template <class U, class F>
FUSEDOPT_FN U bf16_from_float(F x) {
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const U nan = U{} + 0x7FC0u;
  return x != x ? nan : rounded;
}

// Rounds to one of the two bfloat16 beside x, to each with the probability that makes the mean x.
template <class X, class U>
FUSEDOPT_FN X bf16_at_random(X x, U random) {
  const X rounded = bit_cast<X>((bit_cast<U>(x) + (random & 0xFFFFu)) & 0xFFFF0000u);
  return x - x == X{} ? rounded : x;
}

// After F. Giesen's half_to_float: shift the exponent, then let one exact float subtraction renormalise denormals.
template <class F, class U>
FUSEDOPT_FN F float_from_f16(U half) {
  const U sign = (half & 0x8000u) << 16;
  const U shifted = (half & 0x7FFFu) << 13;
  const U exponent = shifted & 0x0F800000u;
  const U normal = shifted + (112u << 23);
  const U special = shifted + (224u << 23);  // Inf and NaN
  const U denormal = bit_cast<U>(bit_cast<F>(shifted + (113u << 23)) - bit_cast<float>(113u << 23));
  const U finite = exponent == 0u ? denormal : normal;
  return bit_cast<F>(sign | (exponent == 0x0F800000u ? special : finite));
}

// After F. Giesen's float_to_half_fast3_rtne: for results below 2^-14, one float addition rounds at the right bit.
template <class U, class F>
FUSEDOPT_FN U f16_from_float(F x) {
  const U bits = bit_cast<U>(x);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7FFFFFFFu;
  const U infinity = U{} + 0x7C00u;
  const U nan = U{} + 0x7E00u;
  const U special = magnitude > 0x7F800000u ? nan : infinity;
  const u32 denormal_magic = 126u << 23;
  const U denormal = bit_cast<U>(bit_cast<F>(magnitude) + bit_cast<float>(denormal_magic)) - denormal_magic;
  const U normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < (113u << 23) ? denormal : normal;
  const U rounded = magnitude >= (143u << 23) ? special : finite;
  return sign | rounded;
}

}  // namespace fusedopt
