"""The self-test of about a second: a few steps on every backend here, bit for bit those of the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import available_backends
from .base import FusedOptimizer
from .optimizers.adam import Adam, AdamW
from .optimizers.sgd import SGD

STEPS = 3
# Elements of each tensor: none, one, around a vector, and a leaf with a rest.
SIZES = (0, 1, 33, 2051)


@dataclass(frozen=True)
class Check:
    """An optimizer on tensors of one dtype."""

    name: str
    optimizer: Callable[..., FusedOptimizer]
    options: dict[str, Any]
    dtype: torch.dtype


# Options worth a look; every optimizer is checked with its defaults too.
CHECKS = (
    Check("SGD float32", SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, torch.float32),
    Check("SGD float64", SGD, {"momentum": 0.9, "dampening": 0.5}, torch.float64),
    Check("Adam bfloat16", Adam, {"amsgrad": True, "weight_decay": 0.1}, torch.bfloat16),
    Check("AdamW float32", AdamW, {"weight_decay": 0.1}, torch.float32),
    Check("AdamW float16", AdamW, {"maximize": True, "eps": 1e-4}, torch.float16),
)


@dataclass(frozen=True)
class Outcome:
    """What came of the checks on one backend and device.

    Attributes:
        backend: its name.
        device: where the tensors were.
        passed: whether every check gave the reference's bits.
        checks: how many were made.
        seconds: they took, compiling included.
        failures: one line for each check that did not pass.
    """

    backend: str
    device: str
    passed: bool
    checks: int
    seconds: float
    failures: tuple[str, ...]


def devices() -> list[torch.device]:
    """The CPU and every CUDA (or ROCm) device that torch sees."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def every_check() -> list[Check]:
    """The rows above, and every optimizer of fusedopt with its defaults."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return [
        *CHECKS,
        *(
            Check(f"{optimizer.__name__} {name}, defaults", optimizer, {}, dtype)
            for optimizer in _subclasses(FusedOptimizer)
            for name, dtype in dtypes.items()
        ),
    ]


def self_test() -> list[Outcome]:
    """Runs every check on every backend of every device here, against the reference on the CPU.

    Returns:
        One outcome for each backend and device. A backend that raises has failed; nothing is raised here.

    Example:
        >>> all(outcome.passed for outcome in self_test())
        True
    """
    cpu, checks = torch.device("cpu"), every_check()
    expected: dict[str, list[Tensor]] = {}
    reference = _test_backend("reference", cpu, checks, expected)
    if not reference.passed:
        return [reference]
    return [
        _test_backend(backend, device, checks, expected)
        for device in devices()
        for backend in available_backends(device)
        if (backend, device) != ("reference", cpu)
    ]


def run(check: Check, backend: str, device: torch.device) -> list[Tensor]:
    """A few steps of one optimizer.

    Args:
        check: the optimizer, its options and the dtype.
        backend: that makes the steps.
        device: where the tensors are.

    Returns:
        Parameters and states afterwards, on the CPU, in a fixed order.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = [_numbers((size,), check.dtype, generator) for size in SIZES]
    tensors.append(_numbers((5, 7), check.dtype, generator).t())  # not contiguous
    params = [nn.Parameter(tensor.to(device)) for tensor in tensors]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.05}]
    optimizer: FusedOptimizer = check.optimizer(groups, **check.options, backend=backend)
    for step in range(STEPS):
        for index, param in enumerate(params):
            grad = _numbers(param.shape, check.dtype, generator)
            param.grad = None if index == step else grad.to(device)  # each without a gradient once
        optimizer.step()
    states = [optimizer.state[param] for param in params]
    return [tensor.detach().cpu() for tensor in (*params, *(state[name] for state in states for name in sorted(state)))]


def _subclasses(of: type[FusedOptimizer]) -> list[type[FusedOptimizer]]:
    """Those of fusedopt, theirs after them; none of a user's."""
    own = [each for each in of.__subclasses__() if each.__module__.startswith("fusedopt.")]
    return [cls for each in own for cls in (each, *_subclasses(each))]


def _numbers(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of very different size, some of them denormal and some of them zeros of either sign."""
    exponents = torch.randint(-30, 3, shape, generator=generator)
    numbers = torch.randn(shape, dtype=torch.float64, generator=generator) * 2.0**exponents
    tiny = torch.rand(shape, generator=generator) < 0.1
    return torch.where(tiny, numbers * torch.finfo(dtype).tiny, numbers).to(dtype)


def _test_backend(
    backend: str, device: torch.device, checks: Sequence[Check], expected: dict[str, list[Tensor]]
) -> Outcome:
    """Runs the checks on one backend. What comes first of a check is what the others are compared with."""
    started = time.perf_counter()
    failures = []
    for check in checks:
        try:
            found = run(check, backend, device)
            failure = _difference(found, expected.setdefault(check.name, found))
        except Exception as error:  # whatever it is, the other backends are looked at too
            failure = f"{type(error).__name__}: {error}"
        if failure:
            failures.append(f"{check.name}: {failure}")
    seconds = time.perf_counter() - started
    return Outcome(backend, str(device), not failures, len(checks), seconds, tuple(failures))


def _difference(found: list[Tensor], expected: list[Tensor]) -> str:
    """What differs; empty: no bit does."""
    if [(t.shape, t.dtype) for t in found] != [(t.shape, t.dtype) for t in expected]:
        return "other tensors than the reference's"
    pairs = zip(found, expected, strict=True)
    differing = sum(not torch.equal(_bits(one), _bits(other)) for one, other in pairs)
    return f"{differing} of {len(found)} tensors differ from the reference" if differing else ""


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
