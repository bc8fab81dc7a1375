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

  C lr, momentum, one_minus_dampening, weight_decay;
  bool has_momentum, nesterov, first;

  FUSEDOPT_FN SGD(const Hypers& h, u64 t)
      : lr(C(h.value[kLr])),
        momentum(C(h.value[kMomentum])),
        one_minus_dampening(C(1.0 - h.value[kDampening])),
        weight_decay(C(h.value[kWeightDecay])),
        has_momentum(h.value[kMomentum] != 0.0),
        nesterov(h.has(kNesterov)),
        first(t == 1) {}

  FUSEDOPT_FN void operator()(C& p, C g, C& momentum_buffer, C&, C&) const {
    g = weight_decay != C(0) ? g + weight_decay * p : g;
    const C velocity = first ? g : momentum * momentum_buffer + one_minus_dampening * g;
    const C lookahead = nesterov ? g + momentum * velocity : velocity;
    momentum_buffer = velocity;
    p = p - lr * (has_momentum ? lookahead : g);
  }
};

}  // namespace fusedopt
