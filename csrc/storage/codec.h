// How floats of 16 and 8 bits become float32 and back: explicit integer code, round to nearest even, denormals kept,
// NaN canonical. The same operations on every backend give the same bits.
//
// F is float or a vector of floats, U the unsigned integer of 32 bits, or a vector of as many: a narrower float lies in
// the low bits of it.
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

// The bits of a float32 number, rounded: the high 16 bits count.
template <class U>
FUSEDOPT_FN U round_to_bf16(U bits) {
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

template <class U, class F>
FUSEDOPT_FN U bf16_from_float(F x) {
  const U rounded = round_to_bf16(bit_cast<U>(x)) >> 16;
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

// The same of the two float16 beside x. Below 2^-14 all have the same last place: 2^-14 is added to a magnitude there,
// so that the same 13 bits are dropped; that sum is off by 2^-38 at most, 2^-14 of the gap. What is above the largest
// is left to its store, to nearest: chance makes no infinity. The sign is kept, of zeros too.
template <class X, class U>
FUSEDOPT_FN X f16_at_random(X x, U random) {
  const U sign = bit_cast<U>(x) & 0x80000000u;
  const U dropped = random & 0x1FFFu;
  const X magnitude = bit_cast<X>(bit_cast<U>(x) & 0x7FFFFFFFu);
  const X least_normal = X{} + bit_cast<float>(113u << 23);
  const X most = X{} + 65504.0f;
  const X normal = bit_cast<X>((bit_cast<U>(magnitude) + dropped) & 0xFFFFE000u);
  const X shifted = bit_cast<X>((bit_cast<U>(magnitude + least_normal) + dropped) & 0xFFFFE000u);
  const X rounded = magnitude < least_normal ? shifted - least_normal : normal;
  return magnitude <= most ? bit_cast<X>(sign | bit_cast<U>(rounded)) : x;
}

// The float of 8 bits with 4 of exponent and 3 of mantissa, no infinity and a NaN of each sign (e4m3fn).
constexpr float kMostFloat8 = 448.0f;

template <class F, class U>
FUSEDOPT_FN F float_from_f8(U byte) {
  const U sign = (byte & 0x80u) << 24;
  const U shifted = (byte & 0x7Fu) << 20;
  const U nan = U{} + 0x7FC00000u;
  const U normal = shifted + (120u << 23);
  const U denormal = bit_cast<U>(bit_cast<F>(shifted + (121u << 23)) - bit_cast<float>(121u << 23));
  const U finite = shifted < (1u << 23) ? denormal : normal;
  return bit_cast<F>(sign | (shifted == (0x7Fu << 20) ? nan : finite));
}

// Of a magnitude up to kMostFloat8, to nearest even. Below 2^-6 one float addition rounds at the right bit.
template <class U, class F>
FUSEDOPT_FN U f8_from_float(F x) {
  const U bits = bit_cast<U>(x);
  const U sign = (bits >> 24) & 0x80u;
  const U magnitude = bits & 0x7FFFFFFFu;
  const u32 denormal_magic = 141u << 23;
  const U denormal = bit_cast<U>(bit_cast<F>(magnitude) + bit_cast<float>(denormal_magic)) - denormal_magic;
  const U normal = (magnitude - (120u << 23) + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
  return sign | (magnitude < (121u << 23) ? denormal : normal);
}

// Of x from 0 to kMostFloat8, to one of the two beside it, to each with the probability that makes the mean x; `random`
// is 16 bits. 2^-6 is added to what is below it: then the last place is the same, and the same bits are dropped.
template <class U, class F>
FUSEDOPT_FN U f8_at_random(F x, U random) {
  const F least_normal = F{} + bit_cast<float>(121u << 23);
  const F shifted = x + least_normal;
  const U dropped = (random << 4) + 8u;
  const U normal = (bit_cast<U>(x) - (120u << 23) + dropped) >> 20;
  const U denormal = (bit_cast<U>(shifted) - (121u << 23) + dropped) >> 20;
  return x < least_normal ? denormal : normal;
}

}  // namespace fusedopt
