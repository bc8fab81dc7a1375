"""Correctness before timing: a peer whose result is not float64's up to rounding is wrong and is not ranked.

Two checks. On the workload itself, a few steps, at sampled elements of every tensor (its ends and some
between): this sees skipped tails, overflowing offsets, mixed-up tensors. And on a small problem, 100 steps
with new gradients
each: this gives the accuracy column, and sees errors that need time. The yardstick is torch's own for-loop in
the dtype under test, so a peer may be a few times less accurate than that, not more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, count

import torch
from torch import Tensor

from bench.case import Case
from bench.contender import Contender, fill
from bench.peers import HYPER, Hyper, Peer
from bench.peers.torch_optim import CLASSES

CHECKED_STEPS = 3
ACCURACY_STEPS = 100
ACCURACY_SIZES = (1, 3, 16, 17, 255, 1000, 4097, 10_007)
SAMPLES = 200_000
"""Elements sampled over a workload, spread over its tensors, at least `SAMPLES_EACH` of each."""
SAMPLES_EACH = 64

SLACK = 4.0
"""A peer may have this many times the for-loop's error, and this many ulps on top."""

FRACTION_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
SMALLEST_EXPONENT = {torch.float64: -1074, torch.float32: -149, torch.float16: -24, torch.bfloat16: -133}


def ulps(value: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Largest distance in ulps of `dtype` at the reference; inf where a value is not finite.

    Args:
        value: What was computed, any floating dtype.
        reference: The truth, float64.
        dtype: Whose units in the last place.
    """
    if not value.numel():
        return 0.0
    value, reference = value.double(), reference.double()
    _, exponent = torch.frexp(reference)  # reference = mantissa · 2^exponent with mantissa in [0.5, 1)
    last_place = (exponent - 1 - FRACTION_BITS[dtype]).clamp(min=SMALLEST_EXPONENT[dtype])
    last_place = last_place.where(reference != 0, SMALLEST_EXPONENT[dtype])
    distance = torch.ldexp((value - reference).abs(), -last_place.double())
    return float(distance.nan_to_num(torch.inf).max())


# ---- reference --------------------------------------------------------------------------------------------


def loop_steps(
    params: Sequence[Tensor],
    gradients: Callable[[int], Sequence[Tensor | None]],
    hypers: Sequence[Hyper],
    steps: int,
    dtype: torch.dtype,
    stored: Sequence[torch.dtype] | None = None,
    first: bool = False,
) -> list[Tensor]:
    """Runs torch's for-loop optimizer.

    Args:
        params: Start values.
        gradients: Gradients of step 0, 1, …; None where one is missing.
        hypers: Hyperparameters of each parameter.
        steps: How many.
        dtype: Type to compute in.
        stored: If given, parameter and state are rounded to these types after each step, as if kept in them.
        first: Whether every step is the first one of a new optimizer.

    Returns:
        The updated parameters.
    """
    working = [p.to(dtype, copy=True).requires_grad_(True) for p in params]
    groups = [{"params": [p], **hyper.keywords()} for p, hyper in zip(working, hypers, strict=True)]
    make = CLASSES[hypers[0].optimizer]
    optimizer = make(groups, foreach=False)
    for step in range(steps):
        if first:
            optimizer = make(groups, foreach=False)
        for p, grad in zip(working, gradients(step), strict=True):
            p.grad = None if grad is None else grad.to(dtype)
        optimizer.step()
        for p, kept in zip(working, stored or (), strict=False):
            _round_to(p.data, kept)
            for state in optimizer.state.get(p, {}).values():
                if state is not None and state.dim():
                    _round_to(state, kept)
    return [p.detach() for p in working]


def _round_to(tensor: Tensor, dtype: torch.dtype) -> None:
    tensor.copy_(tensor.to(dtype))


# ---- on the workload --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Outcome of a check: the error found, the error allowed, both in ulps, and what else was noticed."""

    error: float
    allowed: float
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.allowed

    @property
    def fault(self) -> str:
        """How far it is off, in words."""
        return f"off by {self.error:.3g} ulp, allowed {self.allowed:.3g}"


def _sampled(sizes: Sequence[int]) -> list[Tensor]:
    """Indices into each flat tensor: both ends and a random draw between."""
    generator = torch.Generator().manual_seed(0)
    each = max(SAMPLES_EACH, SAMPLES // len(sizes))
    picks = []
    for size in sizes:
        if size <= each:
            picks.append(torch.arange(size))
            continue
        ends = torch.arange(each // 4)
        middle = torch.randint(size, (each // 2,), generator=generator)
        picks.append(torch.cat([ends, middle, size - 1 - ends]).unique())
    return picks


def _take(tensors: Sequence[Tensor], picks: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().reshape(-1)[pick.to(t.device)].cpu() for t, pick in zip(tensors, picks, strict=True)]


class WorkloadCheck:
    """Checks contenders of one case against float64 at sampled elements."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.dtypes = [g.torch_dtype(case.dtype) for g in case.shapes.groups for _ in g.shapes()]
        groups = zip(case.shapes.groups, case.learning_rates, strict=True)
        self.rates = [lr for group, lr in groups for _ in group.shapes()]
        self._reference: list[Tensor] | None = None
        self._allowed = 0.0

    def run(self, contender: Contender) -> Check:
        """Steps a contender that was just built and compares its parameters."""
        case, gradients = self.case, contender.gradients
        picks = _sampled([p.numel() for p in contender.params])
        start, wanted = _take(contender.params, picks), _take(gradients.flat, picks)
        wrote = False
        for _ in range(CHECKED_STEPS):
            contender.prepare()
            contender.step()
            changed = case.gradients != "fresh" and not _equal(_take(gradients.flat, picks), wanted)
            if changed:
                gradients.refill()
                wrote = True
        if self._reference is None:
            self._prepare_reference(start, wanted)
        assert self._reference is not None
        found = _take(contender.params, picks)
        error = max(ulps(*values) for values in zip(found, self._reference, self.dtypes, strict=True))
        return Check(error, self._allowed, "writes into the gradients" if wrote else "")

    def _prepare_reference(self, params: list[Tensor], gradients: list[Tensor]) -> None:
        """The truth and the for-loop's own error, for elements that are joined into one vector per kind."""
        kinds = [
            (dtype, lr, self.case.gradients == "toggle" and index % 2 == 1)
            for dtype, lr, index in zip(self.dtypes, self.rates, count(), strict=False)
        ]
        members: dict[tuple[torch.dtype, float, bool], list[int]] = {}
        for index, kind in enumerate(kinds):
            members.setdefault(kind, []).append(index)
        joined = [torch.cat([params[i] for i in indices]) for indices in members.values()]
        joined_gradients = [torch.cat([gradients[i] for i in indices]) for indices in members.values()]
        hypers = [replace(self.case.hyper, lr=lr) for _, lr, _ in members]
        dtypes = [dtype for dtype, _, _ in members]

        def at(step: int) -> list[Tensor | None]:
            toggled = [kind[2] for kind in members]
            return [None if skips and step % 2 else g for skips, g in zip(toggled, joined_gradients, strict=True)]

        def only(index: int, step: int) -> list[Tensor | None]:
            return at(step)[index : index + 1]

        first = self.case.gradients == "first"
        truth = loop_steps(joined, at, hypers, CHECKED_STEPS, torch.float64, stored=dtypes, first=first)
        loops = [
            loop_steps([p], partial(only, k), hypers[k : k + 1], CHECKED_STEPS, dtypes[k], first=first)
            for k, p in enumerate(joined)
        ]
        self._allowed = _allowed(max(ulps(loop[0], t, d) for loop, t, d in zip(loops, truth, dtypes, strict=True)))
        self._reference = [torch.empty(0)] * len(params)
        for indices, values in zip(members.values(), truth, strict=True):
            for i, part in zip(indices, values.split([params[i].numel() for i in indices]), strict=True):
                self._reference[i] = part


def _equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _allowed(loop_error: float) -> float:
    """What a peer may be off, given the for-loop's error; the slack alone where the for-loop fails itself."""
    return SLACK * (loop_error if loop_error < float("inf") else 0.0) + SLACK


# ---- 100 steps --------------------------------------------------------------------------------------------


class Accuracy:
    """Errors against float64 after 100 steps on a small problem; each peer is run once per kind of case."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str, str, str], Check] = {}
        self._truths: dict[tuple[str, str], tuple[list[Tensor], float]] = {}

    def run(self, peer: Peer, optimizer: str, dtype: torch.dtype, device: str) -> Check:
        """The peer's largest error in ulps of `dtype`, and what is allowed."""
        key = (peer.name, optimizer, str(dtype), device)
        if key not in self._known:
            self._known[key] = self._measure(peer, optimizer, dtype, device)
        return self._known[key]

    def _measure(self, peer: Peer, optimizer: str, dtype: torch.dtype, device: str) -> Check:
        hyper = HYPER[optimizer]
        truth, loop_error = self._truth(optimizer, dtype)
        params = [p.to(device).requires_grad_(True) for p in _problem(dtype)]
        for p in params:
            p.grad = torch.empty_like(p)
        stepper = peer.make([{"params": params, "lr": hyper.lr}], hyper)
        for step in range(ACCURACY_STEPS):
            for p, grad in zip(params, _problem_gradients(step, dtype), strict=True):
                assert p.grad is not None
                p.grad.copy_(grad)
            stepper.step()
        error = max(ulps(p.detach().cpu(), t, dtype) for p, t in zip(params, truth, strict=True))
        return Check(error, _allowed(loop_error))

    def _truth(self, optimizer: str, dtype: torch.dtype) -> tuple[list[Tensor], float]:
        key = (optimizer, str(dtype))
        if key not in self._truths:
            hypers = [HYPER[optimizer]] * len(ACCURACY_SIZES)
            start = _problem(dtype)

            def at(step: int) -> list[Tensor]:
                return _problem_gradients(step, dtype)

            truth = loop_steps(start, at, hypers, ACCURACY_STEPS, torch.float64)
            loop = loop_steps(start, at, hypers, ACCURACY_STEPS, dtype)
            error = max(ulps(found, t, dtype) for found, t in zip(loop, truth, strict=True))
            self._truths[key] = truth, error
        return self._truths[key]


def _problem(dtype: torch.dtype) -> list[Tensor]:
    params = [torch.empty(size, dtype=dtype) for size in ACCURACY_SIZES]
    fill(params, 3, signed=False)
    return params


def _problem_gradients(step: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of one step, other ones each step."""
    generator = torch.Generator().manual_seed(100 + step)
    values = torch.rand(sum(ACCURACY_SIZES), generator=generator) + 0.5
    values *= torch.randint(2, values.shape, generator=generator) * 2 - 1
    ends = list(accumulate(ACCURACY_SIZES))
    return [values[end - size : end].to(dtype) for size, end in zip(ACCURACY_SIZES, ends, strict=True)]
