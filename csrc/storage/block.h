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

// Small whole numbers as floats and back, by bits: an exact sum with a float whose last bit counts ones, or 2^-15.
constexpr u32 kOnes = 0x4B000000u;  // 2^23
constexpr float kOnesFloat = 8388608.0f;
constexpr u32 kParts = 0x43800000u;  // 2^8
constexpr float kPartsFloat = 256.0f;

// The largest code, as a number.
FUSEDOPT_FN constexpr float most_code(int storage) {
  return storage == kSigned8 ? 127.0f : storage == kRoot8 ? 255.0f : kMostFloat8;
}
// What the largest magnitude of a block becomes. Where it is rounded at random, so little less than the largest code
// that no product with the inverse, which both are rounded, comes out above that.
FUSEDOPT_FN constexpr float most_coded(int storage) {
  return storage == kRoot8 ? 255.0f - 0x1p-14f : storage == kFloat8Square ? kMostFloat8 - 0x1p-13f : most_code(storage);
}

// What the codes of a block are multiplied by, and what values are multiplied by to become codes: of one state, or of
// several at once.
template <class F>
struct BlockScale {
  F scale, inverse;

  // `largest`: bits of the largest magnitude in the block. One that is not finite leaves no value of the block finite.
  template <class U>
  FUSEDOPT_FN BlockScale(F code, F coded, U largest) {
    const F none = F{}, nan = none + bit_cast<float>(0x7FC00000u);
    const F magnitude = bit_cast<F>(largest);
    const F reach = magnitude / code;
    const auto finite = largest < 0x7F800000u;
    const auto normal = reach >= 1.17549435e-38f;  // below, the inverse could overflow: such a block is 0
    scale = finite ? (normal ? reach : none) : nan;
    inverse = (finite & normal) ? coded / magnitude : none;
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

// The code of x, of which y is the product with the inverse: the low 8 bits, others may be above. `random`, 16 bits,
// decides which of two, where both are near. Where the inverse is 0, all codes of the block are 0, and not found here.
template <class U, class F>
FUSEDOPT_FN U code_from_float(int storage, F x, F y, U random) {
  if (storage == kSigned8) return bit_cast<U>(y + 1.5f * kOnesFloat);
  if (storage == kFloat8) return f8_from_float<U>(y);
  const U none = U{}, one = none + 1u;
  if (storage == kFloat8Square) {
    const U code = f8_at_random(y, random), least = x > F{} ? one : none;
    return code > least ? code : least;
  }
  // 15 bits behind the point, to which as many random ones are added. Above the code are bits of 2^8, the same for all;
  // the bits of a root that is not 0 are a large number.
  const U code = (bit_cast<U>(y + kPartsFloat) + (random & 0x7FFFu)) >> 15;
  const U bits = bit_cast<U>(x), smallest = none + (kParts >> 15 | 1u);
  const U least = bits < smallest ? bits : smallest;
  return code > least ? code : least;
}

// The bits of a magnitude: they are in the order of the magnitudes, NaN above all.
template <class U, class F>
FUSEDOPT_FN U magnitude_bits(F x) {
  return bit_cast<U>(x) & 0x7FFFFFFFu;
}

}  // namespace fusedopt
