"""``python -m tests.soak``: very many steps of small tensors; how far they drift from float64, torch fused beside them.

Gradients are noise that does not look at the parameters, so that nothing pulls an error back: a parameter's error is a
random walk of all roundings since the start. Writes docs/soak.md; ends with 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

from .mutate import describe_commit

PAGE = Path(__file__).resolve().parent.parent / "docs/soak.md"
STEPS = 100_000
SIZES = (257, 64, 1)
POOL = 251  # gradients that take turns: a prime, so that no optimizer falls into step with them
BOUND = 1.25  # times torch fused's mean drift: both are random walks, of which one may be unlucky


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, in a dtype."""

    name: str
    cls: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


CASES = (
    Case("SGD, momentum 0.9", "SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    Case("Adam", "Adam", {"lr": 1e-3}),
    Case("AdamW, AMSGrad", "AdamW", {"lr": 1e-3, "weight_decay": 1e-2, "amsgrad": True}),
    Case("Adam, bfloat16", "Adam", {"lr": 1e-2}, torch.bfloat16),
)


@dataclass(frozen=True)
class Drift:
    """The distance from float64 after some steps, in float32's or bfloat16's spacing at the parameters' scale.

    Attributes:
        steps: taken.
        mean: of the absolute differences of the parameters, fusedopt's.
        largest: of these.
        torch_mean: of torch fused's.
        count: what fusedopt's step tensors say; None: the optimizer has none.
    """

    steps: int
    mean: float
    largest: float
    torch_mean: float
    count: float | None


def gradients(dtype: torch.dtype, device: str) -> list[list[Tensor]]:
    """The pool: sizes apart by a factor of a thousand, exact in the dtype."""
    generator = torch.Generator().manual_seed(7)

    def one(size: int) -> Tensor:
        scale = 10.0 ** torch.randint(-3, 1, (size,), generator=generator)
        return (torch.randn(size, generator=generator) * scale).to(dtype).to(device)

    return [[one(size) for size in SIZES] for _ in range(POOL)]


def start(dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator).to(dtype).to(device) for size in SIZES]


def run(case: Case, steps: int, device: str, shown: Iterable[int], tick: Callable[[int], None]) -> list[Drift]:
    """Steps fusedopt, torch fused and torch in float64 side by side.

    Args:
        case: what to step.
        steps: how many.
        device: of the tensors.
        shown: counts of steps after which the drift is taken.
        tick: called with the count every thousand steps.
    """
    pool = gradients(case.dtype, device)
    wide_pool = [[grad.double() for grad in grads] for grads in pool]
    mine, theirs = ([Parameter(p) for p in start(case.dtype, device)] for _ in range(2))
    truth = [Parameter(p.double()) for p in start(case.dtype, device)]
    optimizer = getattr(fusedopt, case.cls)(mine, **case.options)
    fused = getattr(torch.optim, case.cls)(theirs, **case.options, fused=True)
    exact = getattr(torch.optim, case.cls)(truth, **case.options, foreach=True)
    every = [(mine, pool, optimizer), (theirs, pool, fused), (truth, wide_pool, exact)]
    drifts = []
    for count in range(1, steps + 1):
        for params, grads, stepped in every:
            for param, grad in zip(params, grads[count % POOL], strict=True):
                param.grad = grad
            stepped.step()
        if count in shown or count == steps:
            drifts.append(measure(count, mine, theirs, truth, optimizer))
        if count % 1000 == 0:
            tick(count)
    return drifts


def measure(count: int, mine: list[Any], theirs: list[Any], truth: list[Any], optimizer: Any) -> Drift:
    """The drift now."""
    right = torch.cat([p.detach() for p in truth])
    spacing = torch.finfo(mine[0].dtype).eps * float(right.abs().mean())

    def errors(params: list[Any]) -> Tensor:
        return (torch.cat([p.detach().double() for p in params]) - right).abs() / spacing

    counts = {float(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, counts
    error = errors(mine)
    return Drift(count, float(error.mean()), float(error.max()), float(errors(theirs).mean()), *(counts or {None}))


def problems(case: Case, drifts: list[Drift]) -> list[str]:
    """What is wrong, in words."""
    found = []
    for drift in drifts:
        if not drift.mean <= BOUND * drift.torch_mean:  # NaN is wrong too
            found.append(f"{case.name}: after {drift.steps} steps {drift.mean:.3g} against {drift.torch_mean:.3g}")
        if drift.count not in (None, float(drift.steps)):
            found.append(f"{case.name}: {drift.steps} steps were counted as {drift.count}")
    return found


HEAD = """# Soak

The last run of the long training in `make soak`: {steps:,} steps on {what}, {date}, commit {commit}, torch
{torch}, backend `{backend}`. Written by [tests/soak.py](../tests/soak.py).

Gradients are noise that does not look at the parameters, so nothing pulls an error back: what is shown is the sum of
all roundings since the start, against torch.optim in float64. The unit is the spacing of the dtype's numbers at the
mean size of the parameters. The bound: the mean is at most {bound} times that of torch's fused optimizer.
Where that decays weights by the factor 1 − lr·λ, rounded to float32, the error of the factor points the same way in
every step (1.4e-8 for AdamW here); fusedopt rounds lr·λ, a small number, instead.

| optimizer | steps | mean drift | torch fused's | largest |
|---|---|---|---|---|
"""


def page(results: dict[str, list[Drift]], steps: int, device: str) -> str:
    """The text of docs/soak.md."""
    what = torch.cuda.get_device_name() if device == "cuda" else f"a CPU ({platform.machine()})"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    (backend, *_) = fusedopt.available_backends(device)
    head = HEAD.format(
        steps=steps,
        what=what,
        date=date,
        commit=describe_commit(),
        torch=torch.__version__,
        backend=backend,
        bound=BOUND,
    )
    rows = [
        f"| {name} | {drift.steps:,} | {drift.mean:.3g} | {drift.torch_mean:.3g} | {drift.largest:.3g} |"
        for name, drifts in results.items()
        for drift in drifts
    ]
    return head + "\n".join(rows) + "\n"


def main() -> int:
    """Runs all cases and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shown = {10**k for k in range(2, 9)} & set(range(1, arguments.steps))
    results: dict[str, list[Drift]] = {}
    wrong: list[str] = []
    for case in CASES:
        started = time.monotonic()

        def tick(count: int, name: str = case.name, since: float = started) -> None:
            print(f"\r{name}: {count:,} steps, {time.monotonic() - since:.0f} s", end="", flush=True, file=sys.stderr)

        results[case.name] = run(case, arguments.steps, arguments.device, shown, tick)
        print(file=sys.stderr)
        wrong += problems(case, results[case.name])
    arguments.out.write_text(page(results, arguments.steps, arguments.device))
    print("\n".join(wrong) or f"{arguments.steps:,} steps of {len(CASES)} optimizers: within bounds")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
