// Entry points of one rule: a kernel per variant, named fusedopt_<rule>_<variant>.
#pragma once

#include "cuda/kernel.h"

#define FUSEDOPT_KERNEL(rule, Rule, variant, param, state, features)                                  \
  extern "C" __global__ void __launch_bounds__(fusedopt::kBlockThreads,                               \
                                               fusedopt::Variant<param, state, features>::kMinBlocks) \
      fusedopt_##rule##_##variant(const __grid_constant__ fusedopt::KernelParams params) {            \
    fusedopt::sweep_kernel<fusedopt::Rule, fusedopt::Variant<param, state, features>>(params);        \
  }
