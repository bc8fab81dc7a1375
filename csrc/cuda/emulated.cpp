// The kernels of one rule for the emulator, compiled once per rule, which FUSEDOPT_RULE names; its header is included
// by the command (build_support/units.py).
#include "cuda/emulated.h"

#include "cuda/kernel.h"

namespace fusedopt {
namespace emulated {

EmulatedKernel FUSEDOPT_RULE(int variant) {
#define FUSEDOPT_POINTER(name, param, state, features) \
  sweep_kernel<class_of::FUSEDOPT_RULE, Variant<param, state, features>>,
  static const EmulatedKernel table[] = {FUSEDOPT_VARIANTS(FUSEDOPT_POINTER)};
#undef FUSEDOPT_POINTER
  return table[variant];
}

}  // namespace emulated
}  // namespace fusedopt
