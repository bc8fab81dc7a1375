// How a slot lives in memory: the storage codes, their sizes, and the conversion of one element to and from the
// compute type. A storage rounds once, at the store.
#pragma once

#include "storage/codec.h"

namespace fusedopt {

enum Storage : u8 {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kLowBits = 4,  // of a float32: master.h
  kSigned8 = 5,  // 8 bits and a scale for each block: block.h
  kRoot8 = 6,
  kFloat8 = 7,        // e4m3, of a mean
  kFloat8Square = 8,  // the same, of a mean of squares: rounded at random, never to 0
  kStorages
};

constexpr int kAnyStorage = -1;   // a variant that reads the storage of each slot at run time
constexpr int kCodes8 = 15;       // a variant whose first state is kSigned8 and whose others are kRoot8
constexpr int kFloatCodes8 = 14;  // the same of kFloat8 and kFloat8Square

FUSEDOPT_FN constexpr bool is_code(int storage) { return storage >= kSigned8 && storage <= kFloat8Square; }

// Two bits for each storage: the power of two that its bytes are. Looked up without a branch, so that a GPU has all
// loads of a row under way at once.
constexpr u32 kLogBytes =
    2u << 2 * kFloat32 | 3u << 2 * kFloat64 | 1u << 2 * kBFloat16 | 1u << 2 * kFloat16 | 1u << 2 * kLowBits;
FUSEDOPT_FN constexpr int storage_bytes(int storage) { return 1 << (kLogBytes >> 2 * storage & 3u); }
static_assert(2 * kStorages <= 32 && storage_bytes(kRoot8) == 1, "codes are the storages of one byte");

// The two 16-bit floats, in the terms of codec.h.
template <class F, class U>
FUSEDOPT_FN F float_from_16(int storage, U bits) {
  return storage == kBFloat16 ? float_from_bf16<F>(bits) : float_from_f16<F>(bits);
}

template <class U, class F>
FUSEDOPT_FN U float_to_16(int storage, F x) {
  return storage == kBFloat16 ? bf16_from_float<U>(x) : f16_from_float<U>(x);
}

template <class F, class U>
FUSEDOPT_FN F at_random_16(int storage, F x, U random) {
  return storage == kBFloat16 ? bf16_at_random(x, random) : f16_at_random(x, random);
}

// One element, as the integer that memory holds.
template <class C>
FUSEDOPT_FN C decode16(int storage, u16 bits) {
  return C(float_from_16<float>(storage, u32(bits)));
}

template <class C>
FUSEDOPT_FN u16 encode16(int storage, C x) {
  return u16(float_to_16<u32>(storage, float(x)));
}

}  // namespace fusedopt
