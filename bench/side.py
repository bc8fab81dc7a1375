"""What the programs beside `python -m bench` compare: sides that take turns, on parameters that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bench.case import LEARNING_RATES
from bench.contender import fill
from bench.workloads import Workload


@dataclass(frozen=True)
class Side:
    """One way to do a step. Implements `timing.Timed`.

    Attributes:
        name: Unique among those that take turns.
        step: The work to time.
        before: Untimed work before every step, where there is any.
    """

    name: str
    step: Callable[[], Any]
    before: Callable[[], Any] | None = None

    @property
    def prepares(self) -> bool:
        """Whether there is something to do before every step."""
        return self.before is not None

    def present(self) -> AbstractContextManager[None]:
        """Its tensors are always there."""
        return nullcontext()

    def prepare(self) -> None:
        """Does what is to be done before a step."""
        if self.before is not None:
            self.before()


class Parameters:
    """A workload's parameters, the same every time, with gradients that keep their memory.

    Args:
        workload: Shapes, groups, and dtypes where the groups are bound to one.
        dtype: That of the others.
        device: Where.

    Attributes:
        groups: For an optimizer, which may write into them.
        flat: All parameters.
    """

    SEED = 2

    def __init__(self, workload: Workload, dtype: str, device: str) -> None:
        tensors = workload.allocate(dtype, device)
        fill([tensor for group in tensors for tensor in group], self.SEED, signed=False)
        made = [[Parameter(tensor) for tensor in group] for group in tensors]
        self.flat = [param for group in made for param in group]
        self.groups: list[dict[str, Any]] = [
            {"params": params, "lr": LEARNING_RATES[group.torch_dtype(dtype)] * group.lr_scale}
            for params, group in zip(made, workload.groups, strict=True)
        ]
        self._grads = [torch.empty_like(param) for param in self.flat]
        for param, grad in zip(self.flat, self._grads, strict=True):
            param.grad = grad

    def refill(self, values: Sequence[Tensor]) -> None:
        """The gradients that a backward pass would have left."""
        torch._foreach_copy_(self._grads, list(values))


def gradients(workload: Workload, dtype: str, device: str) -> list[Tensor]:
    """Values of the gradients of a workload's parameters, the same every time."""
    values = [tensor for group in workload.allocate(dtype, device) for tensor in group]
    fill(values, 1, signed=True)
    return values
