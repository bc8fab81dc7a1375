// Prints the random words that a kernel draws. Usage: check_random <seed> <step> <place>...
#include <cstdio>
#include <cstdlib>

#include "storage/random.h"

int main(int count, char** words) {
  const auto number = [&](int k) { return std::strtoull(words[k], nullptr, 10); };
  const fusedopt::RandomStream stream(fusedopt::u32(number(1)), number(2));
  for (int k = 3; k < count; ++k) std::printf("%u\n", stream.bits(number(k), fusedopt::u32(0)));
  return 0;
}
