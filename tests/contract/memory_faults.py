"""What may happen to memory behind an optimizer's back. As a program: tries each row and tells the errors.

A program of its own, because what is not refused here may end the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt

SHAPE = (6, 4)
NAME = "parameter 1 of group 0"


class Case:
    """An optimizer that has taken two steps of two parameters."""

    def __init__(self, cls: str, options: dict[str, Any]) -> None:
        """Takes the name of the optimizer and its options."""
        self.params = [nn.Parameter(torch.ones(SHAPE)) for _ in range(2)]
        self.copies = [torch.ones(SHAPE) for _ in self.params]
        if options.get("copy_to"):
            options = {**options, "copy_to": self.copies}
        self.optimizer = getattr(fusedopt, cls)(self.params, lr=0.5, **options)
        for param in self.params:
            param.grad = torch.ones(SHAPE)
        for _ in range(2):
            self.optimizer.step()

    @property
    def param(self) -> Tensor:
        """The parameter that something happens to."""
        return self.params[1]

    @property
    def grad(self) -> Tensor:
        """Its gradient."""
        assert self.param.grad is not None
        return self.param.grad

    @property
    def copy(self) -> Tensor:
        """Its copy."""
        return self.copies[1]

    def state(self, name: str) -> Tensor:
        """A state of it."""
        tensor: Tensor = self.optimizer.state[self.param][name]
        return tensor

    def reshape(self, *shape: int) -> None:
        """Gives it another shape, and a gradient of that."""
        self.param.data = torch.ones(shape)
        self.param.grad = torch.ones(shape)

    def overlap(self) -> None:
        """Moves it onto a part of the other parameter."""
        memory = torch.ones(SHAPE[0] + 1, SHAPE[1])
        self.params[0].data, self.param.data = memory[:-1], memory[1:]


def _freed_rate(case: Case) -> None:
    rate = torch.tensor(0.5)
    case.optimizer.param_groups[0]["lr"] = rate
    case.optimizer.step()
    _resize(rate, 0)


def _resize(tensor: Tensor, size: int) -> None:
    tensor.untyped_storage().resize_(size)


def _set(param: Tensor) -> None:
    with torch.no_grad():
        param.set_(torch.ones(4, 6))
    param.grad = torch.ones(4, 6)


CODES = {"state_dtype": torch.int8}
COPY = {"copy_to": True}

# Optimizer, options, what happens, the message.
FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[Case], Any], str]] = {
    "larger parameter": (
        "Adam",
        {},
        lambda case: case.reshape(4000),
        rf"exp_avg of {NAME} has shape \(6, 4\), the parameter \(4000,\)",
    ),
    "parameter of as many elements": (
        "AdamW",
        {},
        lambda case: case.reshape(4, 6),
        rf"exp_avg of {NAME} has shape \(6, 4\), the parameter \(4, 6\)",
    ),
    "parameter that was set": (
        "SGD",
        {"momentum": 0.5},
        lambda case: _set(case.param),
        rf"momentum_buffer of {NAME} has shape \(6, 4\), the parameter \(4, 6\)",
    ),
    "larger parameter with codes": (
        "Adam",
        CODES,
        lambda case: case.reshape(4000),
        rf"exp_avg of {NAME} has shape \(6, 4\), the parameter \(4000,\)",
    ),
    "larger parameter with an average": (
        "SGD",
        {"ema_decay": 0.5},
        lambda case: case.reshape(4000),
        rf"ema of {NAME} has shape \(6, 4\), the parameter \(4000,\)",
    ),
    "larger parameter with a copy": (
        "SGD",
        COPY,
        lambda case: case.reshape(4000),
        rf"copy_to of {NAME} has shape \(6, 4\), the parameter \(4000,\)",
    ),
    "freed parameter": (
        "Adam",
        {},
        lambda case: _resize(case.param, 0),
        rf"^{NAME} of shape \(6, 4\) .* needs a storage of 96 bytes, but its storage has 0",
    ),
    "shrunk parameter": (
        "SGD",
        {},
        lambda case: _resize(case.param, 8),
        rf"^{NAME} of shape \(6, 4\) .* needs a storage of 96 bytes, but its storage has 8",
    ),
    "freed gradient": (
        "SGD",
        {},
        lambda case: _resize(case.grad, 0),
        f"gradient of {NAME} .* needs a storage of 96 bytes, but its storage has 0",
    ),
    "freed learning rate": (
        "SGD",
        {},
        lambda case: _freed_rate(case),
        "'lr' of group 0 of shape .* needs a storage of 4 bytes, but its storage has 0",
    ),
    "freed decay of the average": (
        "SGD",
        {"ema_decay": torch.tensor(0.5)},
        lambda case: _resize(case.optimizer._phase.ema_decay, 0),
        "ema_decay of shape .* needs a storage of 4 bytes, but its storage has 0",
    ),
    "parameter moved onto another": (
        "Adam",
        {},
        lambda case: case.overlap(),
        "parameter 0 of group 0 .* and parameter 1 of group 0 .* share some of their elements",
    ),
    "freed state": (
        "Adam",
        {},
        lambda case: _resize(case.state("exp_avg_sq"), 0),
        f"exp_avg_sq of {NAME} .* needs a storage of 96 bytes, but its storage has 0",
    ),
    "shrunk state": (
        "SGD",
        {"momentum": 0.5},
        lambda case: (_resize(case.state("momentum_buffer"), 8), case.optimizer.refresh()),
        f"momentum_buffer of {NAME} .* needs a storage of 96 bytes, but its storage has 8",
    ),
    "freed count": (
        "Adam",
        {},
        lambda case: _resize(case.state("step"), 0),
        "step of parameter 0 of group 0 .* needs a storage of 4 bytes, but its storage has 0",
    ),
    "freed scales": (
        "Adam",
        CODES,
        lambda case: _resize(case.state("exp_avg_scale"), 0),
        f"exp_avg_scale of {NAME} .* needs a storage of 4 bytes, but its storage has 0",
    ),
    "freed copy": (
        "SGD",
        COPY,
        lambda case: _resize(case.copy, 0),
        f"copy_to of {NAME} .* needs a storage of 96 bytes, but its storage has 0",
    ),
    "copy with other data": (
        "SGD",
        COPY,
        lambda case: setattr(case.copy, "data", torch.ones(3)),
        rf"copy_to of {NAME} has shape \(3,\), the parameter \(6, 4\)",
    ),
    "resized copy": (
        "SGD",
        COPY,
        lambda case: case.copy.resize_(5000),
        rf"copy_to of {NAME} has shape \(5000,\), the parameter \(6, 4\)",
    ),
}


def outcome(cls: str, options: dict[str, Any], happen: Callable[[Case], Any]) -> list[str]:
    """What two steps after it raise, and what they should not have done."""
    case = Case(cls, options)
    happen(case)
    before = case.params[0].detach().clone()
    told = []
    for _ in range(2):  # refused again, not forgotten
        try:
            case.optimizer.step()
            told.append("nothing was raised")
        except ValueError as error:
            told.append(str(error))
    if not torch.equal(case.params[0].detach(), before):
        told.append("parameter 0 was stepped")
    return told


if __name__ == "__main__":
    for fault, (cls, options, happen, _) in FAULTS.items():
        print(json.dumps([fault, outcome(cls, options, happen)]), flush=True)
