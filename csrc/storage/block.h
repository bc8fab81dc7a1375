// States in 8 bits: a code for each element and one float32 scale for each block of them.
//
// int8: means are coded linearly, with a sign; means of squares by their root, which is what an update divides by.
// float8: both as they are. A mean of squares that is not 0 never becomes 0, so that no update is larger than twice
// what it would be; and its code is rounded up or down at random, by as much as it lies between two: a decay of 1/1000
// a step is less than half a code, which rounding to nearest would lose every time. docs/memory.md has the other codes
// that were tried.
#pragma once

#include "rules/rule.h"
#include "storage/random.h"
#include "storage/storage.h"

namespace fusedopt {

// Small whole numbers as floats and back, by bits: an exact sum with a float whose last bit counts ones.
constexpr u32 kOnes = 0x4B000000u;  // 2^23
constexpr float kOnesFloat = 8388608.0f;

// The largest code, as a number.
FUSEDOPT_FN constexpr float most_code(int storage) {
  return storage == kSigned8 ? 127.0f : storage == kRoot8 ? 255.0f : kMostFloat8;
}

// What the codes of a block are multiplied by, and what values are multiplied by to become codes.
struct BlockScale {
  float scale, inverse;

  // `largest`: bits of the largest magnitude in the block. One that is not finite leaves no value of the block finite.
  FUSEDOPT_FN BlockScale(int storage, u32 largest) {
    const float reach = bit_cast<float>(largest) / most_code(storage);
    const bool finite = largest < 0x7F800000u;
    const bool normal = reach >= 1.17549435e-38f;  // below, the inverse could overflow: such a block is 0
    scale = !finite ? bit_cast<float>(0x7FC00000u) : normal ? reach : 0.0f;
    inverse = finite && normal ? most_code(storage) / bit_cast<float>(largest) : 0.0f;
  }
};

// The value of a code, which lies in the low 8 bits.
template <class F, class U>
FUSEDOPT_FN F float_from_code(int storage, U code, float scale) {
  if (storage == kSigned8) return (bit_cast<F>((code ^ 0x80u) | kOnes) - (kOnesFloat + 128.0f)) * scale;
  if (storage != kRoot8) return float_from_f8<F>(code) * scale;
  const F root = (bit_cast<F>(code | kOnes) - kOnesFloat) * scale;
  return root * root;
}

// What is coded of a value. Where it is the root, the rule mostly has it already: then it costs nothing.
template <class F>
FUSEDOPT_FN F what_is_coded(int storage, F x) {
  return storage == kRoot8 ? square_root(x) : x;
}

// The code of it. `random`, 16 bits, decides which of two, where both are near. What is no number becomes some code.
template <class U, class F>
FUSEDOPT_FN U code_from_float(int storage, F x, float inverse, U random) {
  const F none = F{};
  const F most = none + most_code(storage);
  F y = x * inverse;
  if (storage == kSigned8) {
    y = y < most ? y : most;
    return bit_cast<U>(y + 1.5f * kOnesFloat) & 0xFFu;
  }
  if (storage == kFloat8) {
    y = y < most ? y : most;
    return f8_from_float<U>(y > -most ? y : -most);
  }
  if (storage == kFloat8Square) {
    const U zero = U{}, one = zero + 1u;
    const U least = x > none ? one : zero;
    y = y < most ? y : most;
    const U code = f8_at_random(y, random);
    return code > least ? code : least;
  }
  // Between -0.5 and 0.5, and 0 on average.
  const F dither = bit_cast<F>((random << 7) | 0x3F800000u) - (1.5f - 0x1p-17f);
  y = y + dither;
  y = y < most ? y : most;
  const F one = none + 1.0f;
  const F least = x > none ? one : none;
  y = y > least ? y : least;
  return bit_cast<U>(y + kOnesFloat) & 0xFFu;
}

// The bits of a magnitude: they are in the order of the magnitudes, NaN above all.
template <class U, class F>
FUSEDOPT_FN U magnitude_bits(F x) {
  return bit_cast<U>(x) & 0x7FFFFFFFu;
}

}  // namespace fusedopt
