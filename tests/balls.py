"""Numbers with a bound on their rounding errors, and the textbook updates on them: how far two right answers may be.

A ball is a float64 tensor and a radius. Every operation adds one rounding: ``u`` times the result, ``tiny`` where it
underflows. What a program computes from the same inputs, with roundings no larger and no more of them, lies within the
radius of what another one does, each from the center.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """The roundings that are counted: relative error ``u``, absolute error ``tiny`` below the normal range."""

    u: float
    tiny: float

    @staticmethod
    def of(dtype: torch.dtype) -> Precision:
        """Two roundings of a dtype for each operation of the textbook.

        Orders of the same operations differ, as where a constant factor goes; none has more than twice as many.
        """
        finfo = torch.finfo(dtype)
        return Precision(u=2 * finfo.eps / 2, tiny=2 * finfo.tiny * finfo.eps)


@dataclass(frozen=True)
class Ball:
    """A number within ``radius`` of ``center``, elementwise."""

    center: Tensor
    radius: Tensor
    precision: Precision

    def _make(self, center: Tensor, radius: Tensor) -> Ball:
        rounding = self.precision.u * (center.abs() + radius) + self.precision.tiny
        return Ball(center, radius + rounding, self.precision)

    def _ball(self, other: Ball | float) -> Ball:
        return other if isinstance(other, Ball) else self.scalar(other)

    def scalar(self, value: float, error: float | None = None) -> Ball:
        """A number that was computed in float64, by default with one rounding; another one brings it in here."""
        center = torch.full_like(self.center, value)
        return self._make(center, torch.full_like(center, abs(value) * 2.0**-53 if error is None else error))

    def __add__(self, other: Ball | float) -> Ball:
        other = self._ball(other)
        return self._make(self.center + other.center, self.radius + other.radius)

    def __sub__(self, other: Ball | float) -> Ball:
        other = self._ball(other)
        return self._make(self.center - other.center, self.radius + other.radius)

    def __mul__(self, other: Ball | float) -> Ball:
        other = self._ball(other)
        spread = self.center.abs() * other.radius + other.center.abs() * self.radius + self.radius * other.radius
        return self._make(self.center * other.center, spread)

    def __truediv__(self, other: Ball | float) -> Ball:
        other = self._ball(other)
        quotient = self.center / other.center
        smallest = other.center.abs() - other.radius
        spread = (self.radius + quotient.abs() * other.radius) / smallest
        return self._make(quotient, torch.where(smallest > 0, spread, math.inf))

    def __neg__(self) -> Ball:
        return Ball(-self.center, self.radius, self.precision)

    def sqrt(self) -> Ball:
        """The root; of what may be below 0 through rounding, that of the largest it may be."""
        root = self.center.sqrt()
        spread = torch.where(
            self.center > self.radius,
            self.radius / (root + (self.center - self.radius).clamp_min(0).sqrt()),
            (self.center + self.radius).sqrt(),
        )
        return self._make(root, spread)

    def maximum(self, other: Ball) -> Ball:
        """The larger."""
        return Ball(torch.maximum(self.center, other.center), torch.maximum(self.radius, other.radius), self.precision)


Balls = dict[str, Ball]


def sgd(param: Ball, grad: Ball, states: Mapping[str, Ball], group: Mapping[str, Any], step: int) -> Balls:
    """SGD as torch.optim documents it."""
    g = -grad if group["maximize"] else grad
    if group["weight_decay"] != 0:
        g = g + param * group["weight_decay"]
    if group["momentum"] == 0:
        return {"param": param - g * group["lr"]}
    velocity = g
    if step > 1:
        velocity = states["momentum_buffer"] * group["momentum"] + g * (1 - group["dampening"])
    direction = g + velocity * group["momentum"] if group["nesterov"] else velocity
    return {"param": param - direction * group["lr"], "momentum_buffer": velocity}


def adam(param: Ball, grad: Ball, states: Mapping[str, Ball], group: Mapping[str, Any], step: int) -> Balls:
    """Adam, AMSGrad and AdamW as torch.optim documents them."""
    beta1, beta2 = group["betas"]
    g = -grad if group["maximize"] else grad
    p = param
    if group["weight_decay"] != 0:
        if group["decoupled_weight_decay"]:
            p = p - p * (group["lr"] * group["weight_decay"])
        else:
            g = g + p * group["weight_decay"]
    updated = {
        "exp_avg": _lerp(states["exp_avg"], g, beta1),
        "exp_avg_sq": states["exp_avg_sq"] * beta2 + g * g * (1 - beta2),
    }
    largest = updated["exp_avg_sq"]
    if group["amsgrad"]:
        largest = updated["max_exp_avg_sq"] = states["max_exp_avg_sq"].maximum(largest)
    root = largest.sqrt() / _bias_correction(p, beta2, step).sqrt()
    updated["param"] = p - updated["exp_avg"] / (root + group["eps"]) / _bias_correction(p, beta1, step) * group["lr"]
    return updated


def _lerp(start: Ball, end: Ball, beta: float) -> Ball:
    """From the nearer end, as torch.lerp documents."""
    return start + (end - start) * (1 - beta) if beta > 0.5 else end - (end - start) * beta


def _bias_correction(like: Ball, beta: float, step: int) -> Ball:
    """1 − βᵗ, where each of at most t multiplications and the subtraction were rounded in float64."""
    return like.scalar(1 - beta**step, (step + 1) * 2.0**-53)


UPDATES = {"SGD": sgd, "Adam": adam}
