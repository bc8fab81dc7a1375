// Adam, AMSGrad and AdamW.
//
// D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2015, algorithm 1 in the order that its section 2
// recommends: α_t = α·√(1−β₂ᵗ)/(1−β₁ᵗ) and θ ← θ − α_t·m/(√v + ε̂) with ε̂ = ε·√(1−β₂ᵗ), which is the same number with
// one division less. I. Loshchilov, F. Hutter, "Decoupled Weight Decay Regularization", 2019, algorithm 2, line 12. S.
// Reddi et al., "On the Convergence of Adam and Beyond", 2018 (AMSGrad, bias-corrected as torch.optim does).
#pragma once

#include "rules/rule.h"

namespace fusedopt {

template <class C>
struct Adam {
  static constexpr int kRuleStates = 3;
  enum Hyper { kLr, kBeta1, kBeta2, kEps, kWeightDecay };
  enum Flag : u32 { kAmsgrad = 1u << 1, kDecoupled = 1u << 2 };

  enum Branch : u32 { kMaximum = 1u << 0, kL2 = 1u << 1, kDecay = 1u << 2, kNearerToGradient = 1u << 3 };
  static constexpr u32 kUsual[] = {kDecay, 0, kL2};

  C beta1, one_minus_beta1, beta2, one_minus_beta2;
  C alpha_t, eps_hat, l2, decay;
  u32 branches;

  FUSEDOPT_FN Adam(const Hypers& h, u64 t)
      : beta1(C(h.value[kBeta1])),
        one_minus_beta1(C(1.0 - h.value[kBeta1])),
        beta2(C(h.value[kBeta2])),
        one_minus_beta2(C(1.0 - h.value[kBeta2])) {
    const double bias_correction1 = 1.0 - power(h.value[kBeta1], t);
    const double bias_correction2_sqrt = square_root(1.0 - power(h.value[kBeta2], t));
    alpha_t = C(h.value[kLr] / bias_correction1 * bias_correction2_sqrt);
    eps_hat = C(h.value[kEps] * bias_correction2_sqrt);
    l2 = h.has(kDecoupled) ? C(0) : C(h.value[kWeightDecay]);
    decay = h.has(kDecoupled) ? C(h.value[kLr] * h.value[kWeightDecay]) : C(0);
    branches = set(kMaximum, h.has(kAmsgrad)) | set(kL2, l2 != C(0)) | set(kDecay, decay != C(0)) |
               set(kNearerToGradient, !(one_minus_beta1 < C(0.5)));
  }

  FUSEDOPT_FN bool has(u32 branch) const { return (branches & branch) != 0; }
  FUSEDOPT_FN int states() const { return has(kMaximum) ? 3 : 2; }

  template <class X>
  FUSEDOPT_FN X operator()(X& p, X g, X& exp_avg, X& exp_avg_sq, X& max_exp_avg_sq) const {
    g = has(kL2) ? g + l2 * p : g;
    exp_avg = lerp(exp_avg, g, one_minus_beta1, beta1, has(kNearerToGradient));
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g;
    max_exp_avg_sq = has(kMaximum) ? maximum(max_exp_avg_sq, exp_avg_sq) : exp_avg_sq;
    const X adaptive = alpha_t * (exp_avg / (square_root(max_exp_avg_sq) + eps_hat));
    // An infinite parameter decays to itself, as in p·(1 − decay): ∞ − ∞ would be NaN.
    const X update = has(kDecay) ? adaptive + bounded<C>(decay * p) : adaptive;
    p = p - update;
    return update;
  }
};

}  // namespace fusedopt
