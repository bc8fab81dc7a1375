// How 16-bit floats become float32 and back: explicit integer code, round to nearest even, denormals kept, NaN
// canonical. The same operations on every backend give the same bits, and compilers vectorise them.
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

FUSEDOPT_FN float float_from_bf16(u16 bits) { return bit_cast<float>(u32(bits) << 16); }

FUSEDOPT_FN u16 bf16_from_float(float x) {
  const u32 bits = bit_cast<u32>(x);
  const u32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return u16(x != x ? 0x7FC0u : rounded);
}

// After F. Giesen's half_to_float: shift the exponent, then let one exact float subtraction renormalise denormals.
FUSEDOPT_FN float float_from_f16(u16 half) {
  const u32 sign = u32(half & 0x8000u) << 16;
  const u32 shifted = u32(half & 0x7FFFu) << 13;
  const u32 exponent = shifted & 0x0F800000u;
  const u32 normal = shifted + (112u << 23);
  const u32 special = shifted + (224u << 23);  // Inf and NaN
  const u32 denormal = bit_cast<u32>(bit_cast<float>(shifted + (113u << 23)) - bit_cast<float>(113u << 23));
  const u32 magnitude = exponent == 0 ? denormal : exponent == 0x0F800000u ? special : normal;
  return bit_cast<float>(sign | magnitude);
}

// After F. Giesen's float_to_half_fast3_rtne: for results below 2^-14, one float addition rounds at the right bit.
FUSEDOPT_FN u16 f16_from_float(float x) {
  const u32 bits = bit_cast<u32>(x);
  const u32 sign = (bits >> 16) & 0x8000u;
  const u32 magnitude = bits & 0x7FFFFFFFu;
  const u32 special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const u32 denormal_magic = 126u << 23;
  const u32 denormal = bit_cast<u32>(bit_cast<float>(magnitude) + bit_cast<float>(denormal_magic)) - denormal_magic;
  const u32 normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const u32 finite = magnitude < (113u << 23) ? denormal : normal;
  return u16(sign | (magnitude >= (143u << 23) ? special : finite));
}

}  // namespace fusedopt
