// The kernels as g++ compiled them, for the emulator: one function per rule and variant.
#pragma once

#include "cuda/emulator.h"
#include "rules/all.h"

namespace fusedopt {
namespace emulated {

#define FUSEDOPT_DECLARE_RULE(stem, Rule) EmulatedKernel stem(int variant);
FUSEDOPT_RULES(FUSEDOPT_DECLARE_RULE)
#undef FUSEDOPT_DECLARE_RULE

}  // namespace emulated

// The host build of kernel fusedopt_<rule>_<variant>; null: this build has none.
inline EmulatedKernel emulated_kernel(int rule, int variant) {
  using Select = EmulatedKernel (*)(int);
#define FUSEDOPT_NAME_RULE(stem, Rule) emulated::stem,
  const Select rules[] = {FUSEDOPT_RULES(FUSEDOPT_NAME_RULE)};
#undef FUSEDOPT_NAME_RULE
  return rules[rule](variant);
}

}  // namespace fusedopt
