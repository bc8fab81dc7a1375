// The kernels of rules/sgd.h.
#include "cuda/kernels/entry.h"
#include "rules/sgd.h"

#define FUSEDOPT_ENTRY(variant, param, state, features) FUSEDOPT_KERNEL(sgd, SGD, variant, param, state, features)
FUSEDOPT_VARIANTS(FUSEDOPT_ENTRY)
