// The kernels of rules/adam.h.
#include "cuda/kernels/entry.h"
#include "rules/adam.h"

#define FUSEDOPT_ENTRY(variant, param, state, features) FUSEDOPT_KERNEL(adam, Adam, variant, param, state, features)
FUSEDOPT_VARIANTS(FUSEDOPT_ENTRY)
