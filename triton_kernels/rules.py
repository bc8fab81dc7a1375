"""The math of every rule, twin of csrc/rules/: the update of one element, and the scalars it is built from.

A rule is two functions. `<rule>_scalars` takes a group's hyperparameters in float64 and the step count t, and
rounds each scalar once to the compute type; `<rule>` takes an element of parameter, gradient and three states
in registers and returns the new parameter and states, and the update. Neither sees a pointer, a storage or a block
size. The papers are cited in csrc/rules/; every float32 operation here is separate and IEEE-rounded, in the same order.
"""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Flag 0 belongs to the sweep (it negates the gradient); a rule's own flags start at bit 1.
MAXIMIZE = tl.constexpr(1 << 0)
SGD_NESTEROV = tl.constexpr(1 << 1)
ADAM_AMSGRAD = tl.constexpr(1 << 1)
ADAM_DECOUPLED = tl.constexpr(1 << 2)


@triton.jit
def divide(a, b):
    """The IEEE quotient: `/` alone is approximate for float32, and tl.div_rn refuses float64."""
    if a.dtype == tl.float64:
        quotient = a / b
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def square_root(x):
    """The IEEE square root, by the same division of labour."""
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def power(base, t):
    """Gives base^t by repeated squaring, in float64: the same bits on every backend, where pow() is not."""
    result = tl.full([], 1.0, tl.float64)
    while t != 0:
        if (t & 1) != 0:
            result *= base
        base *= base
        t = t >> 1
    return result


@triton.jit
def lerp(start, end, weight, one_minus_weight):
    """Gives start + weight·(end − start), from whichever end is nearer: weight 1 gives `end` exactly."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - difference * one_minus_weight)


@triton.jit
def maximum(a, b):
    """The larger of two; NaN if either is NaN, as torch.maximum."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def bounded(x):
    """x; in the place of an infinity the number next to it."""
    most = tl.full([], 1.7976931348623157e308, tl.float64)
    if x.dtype == tl.float32:
        most = tl.full([], 3.4028234663852886e38, tl.float32)
    x = tl.where(x > most, most, x)
    return tl.where(x < -1.0 * most, -1.0 * most, x)


class SGDScalars(NamedTuple):
    """What SGD needs of its group and step."""

    lr: Any
    momentum: Any
    one_minus_dampening: Any
    weight_decay: Any
    has_momentum: Any
    nesterov: Any
    first: Any


@triton.jit
def sgd_scalars(hypers, flags, t, C: tl.constexpr):
    """The scalars of csrc/rules/sgd.h: SGD."""
    lr, momentum, dampening, weight_decay, _4, _5, _6, _7 = hypers
    return SGDScalars(
        lr=lr.to(C),
        momentum=momentum.to(C),
        one_minus_dampening=(1.0 - dampening).to(C),
        weight_decay=weight_decay.to(C),
        has_momentum=momentum != 0.0,
        nesterov=(flags & SGD_NESTEROV) != 0,
        first=t == 1,
    )


@triton.jit
def sgd(p, g, momentum_buffer, state1, state2, s):
    """One element of csrc/rules/sgd.h: SGD."""
    g = tl.where(s.weight_decay != 0.0, g + s.weight_decay * p, g)
    velocity = tl.where(s.first, g, s.momentum * momentum_buffer + s.one_minus_dampening * g)
    lookahead = tl.where(s.nesterov, g + s.momentum * velocity, velocity)
    update = s.lr * tl.where(s.has_momentum, lookahead, g)
    return p - update, velocity, state1, state2, update


class AdamScalars(NamedTuple):
    """What Adam needs of its group and step."""

    beta1: Any
    one_minus_beta1: Any
    beta2: Any
    one_minus_beta2: Any
    alpha_t: Any
    eps_hat: Any
    l2: Any
    decay: Any
    amsgrad: Any


@triton.jit
def adam_scalars(hypers, flags, t, C: tl.constexpr):
    """The scalars of csrc/rules/adam.h: Adam."""
    lr, beta1, beta2, eps, weight_decay, _5, _6, _7 = hypers
    decoupled = (flags & ADAM_DECOUPLED) != 0
    bias_correction1 = 1.0 - power(beta1, t)
    bias_correction2_sqrt = square_root(1.0 - power(beta2, t))
    return AdamScalars(
        beta1=beta1.to(C),
        one_minus_beta1=(1.0 - beta1).to(C),
        beta2=beta2.to(C),
        one_minus_beta2=(1.0 - beta2).to(C),
        alpha_t=(lr / bias_correction1 * bias_correction2_sqrt).to(C),
        eps_hat=(eps * bias_correction2_sqrt).to(C),
        l2=tl.where(decoupled, 0.0, weight_decay).to(C),
        decay=tl.where(decoupled, lr * weight_decay, 0.0).to(C),
        amsgrad=(flags & ADAM_AMSGRAD) != 0,
    )


@triton.jit
def adam(p, g, exp_avg, exp_avg_sq, max_exp_avg_sq, s):
    """One element of csrc/rules/adam.h: Adam."""
    g = tl.where(s.l2 != 0.0, g + s.l2 * p, g)
    exp_avg = lerp(exp_avg, g, s.one_minus_beta1, s.beta1)
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g * g
    max_exp_avg_sq = tl.where(s.amsgrad, maximum(max_exp_avg_sq, exp_avg_sq), exp_avg_sq)
    adaptive = s.alpha_t * divide(exp_avg, square_root(max_exp_avg_sq) + s.eps_hat)
    update = tl.where(s.decay != 0.0, adaptive + bounded(s.decay * p), adaptive)
    return p - update, exp_avg, exp_avg_sq, max_exp_avg_sq, update


class Rule(NamedTuple):
    """A rule as the launcher selects it: its two functions, and how many states it keeps."""

    scalars: Any
    update: Any
    states: int


# Every rule, by stem: csrc/rules/all.h.
RULES = {
    "sgd": Rule(sgd_scalars, sgd, 1),
    "adam": Rule(adam_scalars, adam, 3),
}
