"""Every step of an optimizer, whoever calls it, beside torch.optim's from the same parameters, gradients and state."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

# An update is some 16 roundings of half an ulp, in theirs as in ours. The first moment may cancel: then its rounding
# counts against √v ≥ √(1 − β₂)·|g|, 32 times smaller than the gradient for β₂ = 0.999.
ULPS = 16 + 3 * 32


class BesideTorch:
    """Hooks that compare.

    Attributes:
        steps: how many were compared.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        assert type(optimizer).__module__.startswith("fusedopt."), f"{type(optimizer)} is not ours"
        self.steps = 0
        self._twin_class = getattr(torch.optim, type(optimizer).__name__)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._step_twin(optimizer)
            return None

        def evaluate() -> Any:  # as Lightning does: the gradients come within the step
            loss = closure()
            self._step_twin(optimizer)
            return loss

        return args[:1], {"closure": evaluate}

    def _step_twin(self, optimizer: Optimizer) -> None:
        groups = [{**group, "params": [_copy(param) for param in group["params"]]} for group in optimizer.param_groups]
        self._twin = self._twin_class(groups)
        self._twin.load_state_dict(deepcopy(optimizer.state_dict()))
        self._twin.step()
        self._launches = fusedopt.launch_count()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        assert fusedopt.launch_count() == self._launches + 1
        self.steps += 1
        for ours, theirs in zip(optimizer.param_groups, self._twin.param_groups, strict=True):
            for param, other in zip(ours["params"], theirs["params"], strict=True):
                self._compare(param.detach(), other.detach(), ours["lr"])
                for name, value in optimizer.state[param].items():
                    largest = 1.0 if param.grad is None else float(param.grad.abs().max())
                    self._compare(value, self._twin.state[other][name], largest)

    def _compare(self, ours: Tensor, theirs: Tensor, size: float) -> None:
        """Equal but for rounding of numbers as large as these, or as `size`."""
        rounding = ULPS * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs.to(ours.device), rtol=rounding, atol=rounding * float(size))


def _copy(param: Tensor) -> Tensor:
    copy = param.detach().clone().requires_grad_(param.requires_grad)
    copy.grad = None if param.grad is None else param.grad.detach().clone()
    return copy
