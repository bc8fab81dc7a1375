// Every rule, by stem and class: the one list that the engines, the emulator and the launcher are made from.
#pragma once

#include "rules/adam.h"
#include "rules/sgd.h"

#define FUSEDOPT_RULES(X) \
  X(sgd, SGD)             \
  X(adam, Adam)
