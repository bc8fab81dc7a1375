// The kernels of one rule for the emulator, compiled once per rule, which FUSEDOPT_RULE names; its header is included
// by the command (build_support/units.py). A build that is to be installed has none: they are for tests, in a checkout.
#include "cuda/emulated.h"

#include "cuda/kernel.h"

namespace fusedopt {
namespace emulated {

#ifdef FUSEDOPT_NO_EMULATION
EmulatedKernel FUSEDOPT_RULE(int) { return nullptr; }
#else
EmulatedKernel FUSEDOPT_RULE(int variant) {
#define FUSEDOPT_POINTER(name, param, state, features) \
  sweep_kernel<class_of::FUSEDOPT_RULE, Variant<param, state, features>>,
  static const EmulatedKernel table[] = {FUSEDOPT_VARIANTS(FUSEDOPT_POINTER)};
#undef FUSEDOPT_POINTER
  return table[variant];
}
#endif

}  // namespace emulated
}  // namespace fusedopt
