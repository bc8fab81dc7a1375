// The CPU engine's entry points: per instruction set a function for each rule and variant, and one that measures.
#pragma once

#include "rules/all.h"
#include "table.h"

namespace fusedopt {

// Sweeps chunks [first, last) of a launch. `fresh`: null, or a bit for each of a row's states that is to be cleared
// first.
using SweepChunks = void (*)(const LaunchParams& launch, u32 first, u32 last, const u8* fresh);

// Joins the gradients of the leaves of chunks [first, last): see norm.h. `largest`: of phase flags.
using MeasureChunks = void (*)(const LaunchParams& launch, u32 first, u32 last);

#define FUSEDOPT_DECLARE_RULE(stem, Rule) SweepChunks stem(int variant);
#define FUSEDOPT_NAME_RULE(stem, Rule) stem,
#define FUSEDOPT_DECLARE_ENGINE(isa)                             \
  namespace isa {                                                \
  FUSEDOPT_RULES(FUSEDOPT_DECLARE_RULE)                          \
  inline SweepChunks engine(int rule, int variant) {             \
    using Select = SweepChunks (*)(int);                         \
    const Select rules[] = {FUSEDOPT_RULES(FUSEDOPT_NAME_RULE)}; \
    return rules[rule](variant);                                 \
  }                                                              \
  MeasureChunks measure_engine();                                \
  }
FUSEDOPT_DECLARE_ENGINE(baseline)
FUSEDOPT_DECLARE_ENGINE(avx2)
FUSEDOPT_DECLARE_ENGINE(avx512)
FUSEDOPT_DECLARE_ENGINE(neon)
#undef FUSEDOPT_DECLARE_ENGINE
#undef FUSEDOPT_NAME_RULE
#undef FUSEDOPT_DECLARE_RULE

}  // namespace fusedopt
