// Random bits from counters: the same wherever, whenever and in whatever order they are asked for.
//
// The mixing steps are those of C. Wellons' lowbias32 ("Prospecting for hash functions", 2018), the one 32-bit hash of
// two multiplications with the least bias that his search found; the two words of the key go in before each of them.
#pragma once

#include "types.h"

namespace fusedopt {

// U is the unsigned integer of 32 bits, or a vector of as many.
template <class U>
FUSEDOPT_FN U random_bits(U counter, u32 key, u32 other_key) {
  U x = counter ^ key;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = x ^ other_key;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// A stream of random bits: one word for each element of a tensor, by its place, at one step.
struct RandomStream {
  u32 key, step;

  FUSEDOPT_FN RandomStream() {}
  FUSEDOPT_FN RandomStream(u32 seed, u64 t) : key(seed), step(random_bits<u32>(u32(t), seed, 0x9E3779B9u)) {}

  // Of elements from `place` on, none of them 2^32 elements further.
  template <class U>
  FUSEDOPT_FN U bits(u64 place, U offset) const {
    return random_bits(offset + u32(place), key ^ u32(place >> 32), step);
  }

  // Where 16 bits are enough, elements that are 16 apart share a word: in which place it is, and which half is theirs.
  FUSEDOPT_FN static u64 word_of(u64 place) { return (place >> 5 << 4) | (place & 15); }
  FUSEDOPT_FN static bool has_high_half(u64 place) { return (place >> 4 & 1) != 0; }
};

}  // namespace fusedopt
