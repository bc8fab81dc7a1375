"""What a behaviour is made of: an implementation under test, tensors, and the comparison with torch's for-loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt

CLASSES = ("SGD", "Adam", "AdamW")

# One set of options of each class that keeps every state it can.
FULL_OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.01},
    "Adam": {"lr": 0.1, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.1, "weight_decay": 0.1},
}
STATES = {
    "SGD": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
}


class Wrong(AssertionError):
    """What was promised did not happen, and nobody said so."""


def demand(truth: bool, message: str) -> None:
    """Finds a behaviour wrong."""
    if not truth:
        raise Wrong(message)


@dataclass(frozen=True)
class Kit:
    """An implementation of the three optimizers, and the device it is tried on.

    Attributes:
        name: "for-loop", "foreach" or "fused" of torch, or a backend of fusedopt.
        device: of all tensors.
        package: ``torch.optim`` or ``fusedopt``.
        options: what makes a class of the package this implementation.
    """

    name: str
    device: str
    package: Any
    options: tuple[tuple[str, Any], ...]

    @property
    def is_torch(self) -> bool:
        """Whether it is one of torch's own."""
        return self.package is torch.optim

    def make(self, cls: str, params: Iterable[Any], **options: Any) -> Optimizer:
        """An optimizer of this implementation."""
        made: Optimizer = getattr(self.package, cls)(params, **{**dict(self.options), **options})
        return made

    def param(self, values: Any, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        """A parameter with given values."""
        return nn.Parameter(torch.as_tensor(values, dtype=dtype).to(self.device, copy=True))

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between -1 and 1 that are the same wherever they are drawn."""
        generator = torch.Generator().manual_seed(seed)
        real = torch.float64 if dtype.is_complex else dtype
        values = torch.rand((*shape, 2) if dtype.is_complex else shape, generator=generator) * 2 - 1
        values = values.to(real)
        return (torch.view_as_complex(values) if dtype.is_complex else values).to(self.device, dtype)


def torch_kits(device: str = "cpu") -> list[Kit]:
    """Torch's own three implementations."""
    flags = {"for-loop": {"foreach": False, "fused": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    return [Kit(name, device, torch.optim, tuple(options.items())) for name, options in flags.items()]


def fused_kit(backend: str, device: str = "cpu") -> Kit:
    """Fusedopt on one backend."""
    return Kit(backend, device, fusedopt, (("backend", backend),))


def truth_kit(device: str = "cpu") -> Kit:
    """Torch's for-loop, to compare with."""
    return torch_kits(device)[0]


Gradients = Callable[[int, int], Tensor | None]


def train(optimizer: Optimizer, params: Sequence[Tensor], steps: int, gradients: Gradients, first: int = 0) -> None:
    """Takes steps; ``gradients(step, index)`` is what each parameter gets, None for none."""
    for step in range(first, first + steps):
        for index, param in enumerate(params):
            grad = gradients(step, index)
            param.grad = None if grad is None else grad.to(param.device)
        optimizer.step()


def tolerance(dtype: torch.dtype, steps: int) -> float:
    """How far two ways to compute a few steps may be apart, numbers of size 1 and learning rates up to 0.1.

    Each step rounds every slot once, by half a unit in the last place; the two ways order their operations
    differently, each of about eight operations a step rounding again in the type of the computation.
    """
    computed = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    return steps * (torch.finfo(dtype).eps + 8 * torch.finfo(computed).eps)


def agree(actual: Tensor, expected: Tensor, what: str, steps: int) -> None:
    """Finds wrong what differs from the for-loop by more than rounding. NaN equals NaN, Inf equals Inf."""
    demand(actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    bound = tolerance(actual.dtype, steps)
    wide = torch.complex128 if actual.is_complex() else torch.float64
    close = torch.isclose(actual.to(wide), expected.to(wide), rtol=bound, atol=bound, equal_nan=True)
    if not bool(close.all()):
        apart = (actual.to(wide) - expected.to(wide)).abs().nan_to_num().max().item()
        raise Wrong(f"{what} is {apart:.3g} from the for-loop's after {steps} steps, which is more than {bound:.1g}")


def identical(actual: Tensor, expected: Tensor, what: str) -> None:
    """Finds wrong what differs in a bit. NaN equals NaN."""
    demand(actual.dtype == expected.dtype, f"{what} has dtype {actual.dtype}, not {expected.dtype}")
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    equal = torch.equal(actual, expected) or (
        torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())
    )
    demand(equal, f"{what} is not the same, bit for bit")


def states_of(optimizer: Optimizer, param: Tensor) -> dict[str, Tensor]:
    """The state tensors of a parameter, the count of steps among them."""
    state = optimizer.state.get(param, {})
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def agree_with_truth(
    kit: Kit,
    cls: str,
    start: Sequence[Tensor],
    steps: int,
    gradients: Gradients,
    make_params: Callable[[], list[Tensor]] | None = None,
    **options: Any,
) -> tuple[Optimizer, list[Tensor]]:
    """Trains the implementation, and the for-loop on plain copies; compares parameters and states.

    Args:
        kit: the implementation.
        cls: name of the class.
        start: values of the parameters.
        steps: how many.
        gradients: of each step and parameter; the for-loop gets contiguous copies.
        make_params: the parameters in the layout under test, of the values of ``start``; None: plain ones.
        options: of both optimizers.

    Returns:
        The implementation's optimizer and parameters.
    """
    params: list[Tensor] = make_params() if make_params else [nn.Parameter(value.clone()) for value in start]
    optimizer = kit.make(cls, params, **options)
    train(optimizer, params, steps, gradients)
    plain: list[Tensor] = [nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format)) for value in start]
    truth = truth_kit(kit.device).make(cls, plain, **options)

    def plain_gradients(step: int, index: int) -> Tensor | None:
        grad = gradients(step, index)
        return None if grad is None else grad.to(plain[index].dtype).clone(memory_format=torch.contiguous_format)

    train(truth, plain, steps, plain_gradients)
    for index, (param, expected) in enumerate(zip(params, plain, strict=True)):
        agree(param, expected, f"parameter {index}", steps)
        theirs, ours = states_of(truth, expected), states_of(optimizer, param)
        demand(set(ours) == set(theirs), f"the state has {sorted(ours)}, the for-loop's {sorted(theirs)}")
        for name, value in theirs.items():
            agree(ours[name].to(value.dtype), value, f"{name} of parameter {index}", steps)
    return optimizer, params
