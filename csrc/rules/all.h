// Every rule, by stem and class: the one list that the engines, the emulated kernels and the launcher are made from.
// rules/<stem>.h holds the class. No rule is included here, so that a change of one compiles that one anew.
#pragma once

#define FUSEDOPT_RULES(X) \
  X(sgd, SGD)             \
  X(adam, Adam)

namespace fusedopt {

// The class of a rule by its stem, for files that are compiled once for each: class_of::adam<C> is Adam<C>.
#define FUSEDOPT_NAME_CLASS(stem, Rule) \
  template <class C>                    \
  struct Rule;                          \
  namespace class_of {                  \
  template <class C>                    \
  using stem = fusedopt::Rule<C>;       \
  }
FUSEDOPT_RULES(FUSEDOPT_NAME_CLASS)
#undef FUSEDOPT_NAME_CLASS

}  // namespace fusedopt
