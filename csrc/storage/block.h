// States in 8 bits: a code for each element and one float32 scale for each block of them.
//
// Means are coded linearly, with a sign. Means of squares are coded by their root, which is what an update divides by:
// a root that is not 0 never becomes 0, so that no update is larger than twice what it would be; and the root is
// rounded up or down at random, by as much as it lies between two codes: a decay of 1/1000 a step is less than half a
// code, which rounding to nearest would lose every time. docs/memory.md has the other codes that were tried.
#pragma once

#include "rules/rule.h"
#include "storage/random.h"
#include "storage/storage.h"

namespace fusedopt {

// Small whole numbers as floats and back, by bits: an exact sum with a float whose last bit counts ones.
constexpr u32 kOnes = 0x4B000000u;  // 2^23
constexpr float kOnesFloat = 8388608.0f;

// What the codes of a block are multiplied by, and what values are multiplied by to become codes.
struct BlockScale {
  float scale, inverse;

  // `largest`: bits of the largest magnitude in the block. One that is not finite leaves no value of the block finite.
  FUSEDOPT_FN BlockScale(int storage, u32 largest) {
    const float value = bit_cast<float>(largest);
    const float reach = storage == kRoot8 ? square_root(value) / 255.0f : value / 127.0f;
    const bool finite = largest < 0x7F800000u;
    const bool normal = reach >= 1.17549435e-38f;  // below, the inverse could overflow: such a block is 0
    scale = !finite ? bit_cast<float>(0x7FC00000u) : normal ? reach : 0.0f;
    inverse = finite && normal ? 1.0f / reach : 0.0f;
  }
};

// The value of a code, which lies in the low 8 bits.
template <class F, class U>
FUSEDOPT_FN F float_from_code(int storage, U code, float scale) {
  if (storage == kSigned8) return (bit_cast<F>((code ^ 0x80u) | kOnes) - (kOnesFloat + 128.0f)) * scale;
  const F root = (bit_cast<F>(code | kOnes) - kOnesFloat) * scale;
  return root * root;
}

// The code of a value; `random` decides which of two, where both are near.
template <class U, class F>
FUSEDOPT_FN U code_from_float(int storage, F x, float inverse, U random) {
  const F none = F{};
  if (storage == kSigned8) {
    const F most = none + 127.0f;
    F y = x * inverse;
    y = y < most ? y : most;
    y = y > -most ? y : -most;
    return bit_cast<U>(y + 1.5f * kOnesFloat) & 0xFFu;
  }
  const F one = none + 1.0f, most = none + 255.0f;
  const F dither = bit_cast<F>((random >> 9) | 0x3F800000u) - 1.5f;  // between -0.5 and 0.5
  F y = square_root(x) * inverse + dither;
  y = y < most ? y : most;
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
