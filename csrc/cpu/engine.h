// The CPU engine's entry points: one function per rule and variant, compiled once per instruction set.
#pragma once

#include "table.h"

namespace fusedopt {

// Sweeps chunks [first, last) of a launch.
using SweepChunks = void (*)(const LaunchParams& launch, u32 first, u32 last);

// Joins the gradients of the leaves of chunks [first, last): see norm.h. `largest`: of phase flags.
using MeasureChunks = void (*)(const LaunchParams& launch, u32 first, u32 last);

#define FUSEDOPT_DECLARE_ENGINE(isa)         \
  namespace isa {                            \
  SweepChunks engine(int rule, int variant); \
  MeasureChunks measure_engine();            \
  }
FUSEDOPT_DECLARE_ENGINE(baseline)
FUSEDOPT_DECLARE_ENGINE(avx2)
FUSEDOPT_DECLARE_ENGINE(avx512)
FUSEDOPT_DECLARE_ENGINE(neon)
#undef FUSEDOPT_DECLARE_ENGINE

}  // namespace fusedopt
