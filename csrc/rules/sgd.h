// Stochastic gradient descent: plain, with momentum, with Nesterov's momentum.
//
// H. Robbins, S. Monro, "A Stochastic Approximation Method", 1951; B. Polyak, "Some methods of speeding up the
// convergence of iteration methods", 1964; I. Sutskever et al., "On the importance of initialization and momentum
// in deep learning", 2013 (Nesterov), in the form torch.optim.SGD gives them: the velocity is not scaled by lr,
// and the first velocity is the gradient itself, undampened.
#pragma once

#include "rules/rule.h"

namespace fusedopt {

template <class C>
struct SGD {
  static constexpr int kRuleStates = 1;
  enum Hyper { kLr, kMomentum, kDampening, kWeightDecay };
  enum Flag : u32 { kNesterov = 1u << 1 };

  enum Branch : u32 { kL2 = 1u << 0, kMoves = 1u << 1, kFirst = 1u << 2, kLooksAhead = 1u << 3 };
  static constexpr u32 kUsual[] = {kMoves, kMoves | kL2, 0, kL2, kMoves | kLooksAhead, kMoves | kLooksAhead | kL2};

  C lr, momentum, one_minus_dampening, weight_decay;
  u32 branches;

  FUSEDOPT_FN SGD(const Hypers& h, u64 t)
      : lr(C(h.value[kLr])),
        momentum(C(h.value[kMomentum])),
        one_minus_dampening(C(1.0 - h.value[kDampening])),
        weight_decay(C(h.value[kWeightDecay])) {
    const bool moves = h.value[kMomentum] != 0.0;
    branches = set(kL2, weight_decay != C(0)) | set(kMoves, moves) | set(kFirst, moves && t == 1) |
               set(kLooksAhead, moves && h.has(kNesterov));
  }

  FUSEDOPT_FN bool has(u32 branch) const { return (branches & branch) != 0; }
  FUSEDOPT_FN int states() const { return has(kMoves) ? 1 : 0; }

  template <class X>
  FUSEDOPT_FN X operator()(X& p, X g, X& momentum_buffer, X&, X&) const {
    g = has(kL2) ? g + weight_decay * p : g;
    const X velocity = has(kFirst) ? g : momentum * momentum_buffer + one_minus_dampening * g;
    momentum_buffer = velocity;
    const X update = lr * (has(kLooksAhead) ? g + momentum * velocity : has(kMoves) ? velocity : g);
    p = p - update;
    return update;
  }
};

}  // namespace fusedopt
