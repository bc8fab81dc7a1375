// What the processor is, where that decides how it is best used.
#pragma once

#include "types.h"

namespace fusedopt {

// Zen 4, or the Zen 3 of the same family, which has no AVX-512. It does a 512-bit operation in two halves, so that
// arithmetic gains little by it; and where a load lies one line beyond a store modulo 4096, the load waits for the
// store if that is of a whole line: up to a third slower.
FUSEDOPT_FN bool is_zen4() {
#if defined(__x86_64__)
  static const bool found = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("amdfam19h") != 0;
  }();
  return found;
#else
  return false;
#endif
}

}  // namespace fusedopt
