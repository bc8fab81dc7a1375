"""The same updates from scratch in plain torch: the truth in float64, and bit for bit the kernels in float32.

Each rule is the paper's lines on tensors of one floating dtype, from separate multiplications, additions, subtractions,
divisions and square roots. Nothing here is fast, and nothing is clever.

Example:
    >>> import torch
    >>> p, g = torch.tensor([1.0]), torch.tensor([0.5])
    >>> update = sgd(p, g, None, step=1, lr=0.1)
    >>> float(update.param)
    0.949999988079071
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

LEAF = 2048  # elements; csrc/table.h
ROW, CHAIN = 16, 32  # csrc/rules/reduce.h
LEAST_HELD = 2.0**-100  # the same, of float32
REPORT_COLUMNS = 5  # csrc/report.h
PARAM_SQUARES = 1  # of these


class SGDUpdate(NamedTuple):
    """What a step of SGD leaves behind: new tensors, in the dtype of the computation."""

    param: Tensor
    momentum_buffer: Tensor | None
    update: Tensor


class AdamUpdate(NamedTuple):
    """What a step of Adam leaves behind: new tensors, in the dtype of the computation."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    update: Tensor


def power(base: float, t: int) -> float:
    """``base**t`` by repeated squaring in float64: the same bits wherever it is done, where ``pow`` is not."""
    result = 1.0
    while t > 0:
        if t & 1:
            result *= base
        base *= base
        t >>= 1
    return result


def square_root(x: Tensor) -> Tensor:
    """The correctly rounded root.

    ``torch.sqrt`` is that on GPUs; on CPUs it goes through a vector library that misses the last bit of about one
    float32 in six, so the processor's own root is taken there, by numpy.
    """
    if x.device.type != "cpu":
        return torch.sqrt(x)
    with numpy.errstate(invalid="ignore"):  # the root of a negative number is NaN here as there
        return torch.from_numpy(numpy.sqrt(numpy.atleast_1d(x.detach().numpy()))).reshape(x.shape)


def lerp(start: Tensor, end: Tensor, weight: float, one_minus_weight: float) -> Tensor:
    """``start + weight·(end − start)``, from whichever end is nearer, so that weight 1 gives ``end`` exactly."""
    w, rest = _scalar(weight, start), _scalar(one_minus_weight, start)
    difference = end - start
    if float(w) < 0.5:
        return start + w * difference
    return end - difference * rest


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    *,
    step: int,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: float | None = None,
) -> SGDUpdate:
    """Stochastic gradient descent (Robbins & Monro 1951; Polyak 1964; Sutskever et al. 2013).

    Args:
        param: the parameter, any floating dtype.
        grad: its gradient, same shape and dtype.
        momentum_buffer: the velocity; not read on the first step.
        step: the count of this step, from 1. The first velocity is the gradient itself.
        lr: learning rate.
        momentum: factor of the old velocity; 0: no velocity is kept.
        dampening: share of the gradient that is kept out of the velocity after the first step.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead along the velocity.
        maximize: climb instead of descend.
        grad_scale: what the gradient is divided by first, as ``torch.amp`` asks; None: nothing.

    Returns:
        The parameter and its velocity after the step, and the update, which was taken off the parameter.
    """
    g = _prepare(grad, grad_scale, maximize)
    decay = _scalar(weight_decay, param)
    if float(decay) != 0.0:
        g = g + decay * param
    if momentum == 0.0:
        update = _scalar(lr, param) * g
        return SGDUpdate(param - update, None, update)
    if step == 1 or momentum_buffer is None:
        velocity = g
    else:
        velocity = _scalar(momentum, param) * momentum_buffer + _scalar(1.0 - dampening, param) * g
    direction = g + _scalar(momentum, param) * velocity if nesterov else velocity
    update = _scalar(lr, param) * direction
    return SGDUpdate(param - update, velocity, update)


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    grad_scale: float | None = None,
) -> AdamUpdate:
    """Adam (Kingma & Ba 2015), AMSGrad (Reddi et al. 2018), AdamW (Loshchilov & Hutter 2019).

    In the order that Kingma & Ba's section 2 recommends: ``α_t = α·√(1−β₂ᵗ)/(1−β₁ᵗ)`` and ``ε̂ = ε·√(1−β₂ᵗ)``.

    Args:
        param: the parameter, any floating dtype.
        grad: its gradient, same shape and dtype.
        exp_avg: first moment ``m``.
        exp_avg_sq: second moment ``v``.
        max_exp_avg_sq: largest second moment so far: AMSGrad; None: Adam.
        step: the count ``t`` of this step, from 1.
        lr: learning rate ``α``.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: ``ε``, added to the root of the second moment.
        weight_decay: ``λ``.
        decoupled: AdamW's decay of the parameter itself; False: L2 penalty added to the gradient.
        maximize: climb instead of descend.
        grad_scale: what the gradient is divided by first, as ``torch.amp`` asks; None: nothing.

    Returns:
        The parameter and its moments after the step, and the update, which was taken off the parameter.
    """
    bias_correction1 = 1.0 - power(beta1, step)
    bias_correction2_sqrt = math.sqrt(1.0 - power(beta2, step))
    alpha_t = _scalar(lr / bias_correction1 * bias_correction2_sqrt, param)
    eps_hat = _scalar(eps * bias_correction2_sqrt, param)
    l2 = _scalar(0.0 if decoupled else weight_decay, param)
    decay = _scalar(lr * weight_decay if decoupled else 0.0, param)

    g = _prepare(grad, grad_scale, maximize)
    if float(l2) != 0.0:
        g = g + l2 * param
    m = lerp(exp_avg, g, 1.0 - beta1, beta1)
    v = _scalar(beta2, param) * exp_avg_sq + _scalar(1.0 - beta2, param) * g * g
    v_max = None if max_exp_avg_sq is None else torch.maximum(max_exp_avg_sq, v)
    update = alpha_t * (m / (square_root(v if v_max is None else v_max) + eps_hat))
    if float(decay) != 0.0:
        # An infinite parameter decays to itself, as in p·(1 − decay): ∞ − ∞ would be NaN.
        most = torch.finfo(param.dtype).max
        update = update + (decay * param).clamp(-most, most)
    return AdamUpdate(param - update, m, v, v_max, update)


def decay_at(decay: float, step: int, *, warms_up: bool) -> float:
    """The decay of an average at the step ``step``, from 1; one that warms up begins at 2/11 and grows towards it."""
    return min(decay, (1.0 + step) / (10.0 + step)) if warms_up else decay


def average(ema: Tensor, param: Tensor, *, step: int, decay: float) -> Tensor:
    """The average of a parameter after its step: ``decay·ema + (1 − decay)·param``; at step 1 the parameter.

    Args:
        ema: the average so far, in the dtype of the computation.
        param: the parameter after the step, the same.
        step: the count of this step, from 1.
        decay: share of the old average that stays.
    """
    return param.clone() if step <= 1 else lerp(ema, param, 1.0 - decay, decay)


def clipped(grad: Tensor, coefficient: float | None, grad_scale: float | None) -> Tensor:
    """A gradient divided by the scale of ``torch.amp``, then multiplied by what clips it; None: neither."""
    if grad_scale is not None:
        grad = grad / _scalar(grad_scale, grad)
    return grad if coefficient is None else grad * _scalar(coefficient, grad)


def leaf_sums(flat: Tensor, *, largest: bool) -> Tensor:
    """The squares of every 2,048 elements summed in the order of csrc/rules/reduce.h, in float64; or the largest."""
    return _join_halves(_chains(flat.double(), largest=largest).flatten(1), largest)


def reported_sums(flat: Tensor) -> Tensor:
    """The same of a report, whose chains add in the dtype of the computation where that holds the sum."""
    sums, exact = _chains(flat, largest=False), _chains(flat.double(), largest=False)
    least = LEAST_HELD if flat.dtype == torch.float32 else 0.0
    holds = (sums >= least) & sums.isfinite()
    return _join_halves(torch.where(holds, sums.double(), exact).flatten(1), False)


def _chains(flat: Tensor, *, largest: bool) -> Tensor:
    """What the chains of every leaf come to: [leaves, quarters, ROW]."""
    values = torch.zeros(-(-flat.numel() // LEAF) * LEAF, dtype=flat.dtype, device=flat.device)
    values[: flat.numel()] = flat.abs() if largest else flat * flat
    rows = values.reshape(-1, LEAF // (ROW * CHAIN), CHAIN, ROW)
    chains = torch.zeros_like(rows[:, :, 0])
    for k in range(CHAIN):
        chains = _join(chains, rows[:, :, k], largest)
    return chains


def leaf_report(grad: Tensor, param: Tensor, update: Tensor, *, lost: Tensor) -> Tensor:
    """What csrc/report.h says of every leaf of a tensor, in its columns.

    Args:
        grad: the gradient, unscaled, before it is clipped, flat in the order of the memory.
        param: the parameter after the update, as it is stored; the same.
        update: as the rule found it; the same.
        lost: whether the update of an element left it as it was stored, though it was not 0; the same.
    """
    squares = [reported_sums(values) for values in (grad, param, update)]
    counts = [leaf_sums(event.to(torch.float64), largest=False) for event in (~grad.isfinite(), lost)]
    return torch.stack([*squares, *counts])


def joined_leaves(leaves: Tensor, *, largest: bool) -> Tensor:
    """What leaves join to, along the last dimension: groups of 2,048, then the groups."""
    for _ in range(2):
        count = leaves.shape[-1]
        padded = leaves.new_zeros((*leaves.shape[:-1], max(-(-count // LEAF), 1) * LEAF))
        padded[..., :count] = leaves
        leaves = _join_halves(padded.reshape(*leaves.shape[:-1], -1, LEAF), largest)
    return leaves.squeeze(-1)


def norm_of(joined: float, *, largest: bool) -> float:
    """The norm whose leaves have come to this."""
    return joined if largest or joined != joined else math.sqrt(joined)


def clip_coefficient(norm: float, max_norm: float) -> float:
    """What gradients of a norm are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` has it; below 0: any norm."""
    coefficient = max_norm / (norm + 1e-6)
    return 1.0 if max_norm < 0.0 or coefficient >= 1.0 else coefficient


def _join(one: Tensor, other: Tensor, largest: bool) -> Tensor:
    return torch.maximum(one, other) if largest else one + other


def _join_halves(values: Tensor, largest: bool) -> Tensor:
    while values.shape[-1] > 1:
        low, high = values.chunk(2, dim=-1)
        values = _join(low, high, largest)
    return values[..., 0]


def _scalar(x: float, like: Tensor) -> Tensor:
    """A hyperparameter, rounded once to the dtype of the computation."""
    return torch.tensor(x, dtype=torch.float64, device="cpu").to(dtype=like.dtype, device=like.device)


def _prepare(grad: Tensor, grad_scale: float | None, maximize: bool) -> Tensor:
    if grad_scale is not None:
        grad = grad / _scalar(grad_scale, grad)
    return -grad if maximize else grad
