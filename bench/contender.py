"""A contender: a peer with its own parameters and optimizer for one case, ready to be timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.peers import Optimizer, Peer

PATTERN = 1_000_003
"""Length of the random pattern tensors are filled with: a prime, so that repeats meet no round offset."""


def fill(tensors: Sequence[Tensor], seed: int, signed: bool) -> None:
    """Fills tensors with magnitudes of 0.5 to 1.5, of both signs where `signed`, the same for the same seed.

    The range keeps parameters away from zero, where an ulp means nothing, and keeps squared gradients normal
    numbers even in float16. Values repeat every `PATTERN` elements, which makes filling as fast as copying.
    """
    for device in {tensor.device for tensor in tensors}:
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.rand(PATTERN, generator=generator, device=device).add_(0.5)
        if signed:
            values *= torch.randint(2, (PATTERN,), generator=generator, device=device) * 2 - 1
        start = 0
        for tensor in (t for t in tensors if t.device == device):
            start = _fill_one(tensor.view(-1), values, start)


def _fill_one(flat: Tensor, values: Tensor, start: int) -> int:
    """Fills one flat tensor from `values`, beginning at `start`; returns where the next one begins."""
    done = 0
    while done < flat.numel():
        size = min(flat.numel() - done, PATTERN - start)
        flat[done : done + size] = values[start : start + size]
        done += size
        start = (start + size) % PATTERN
    return start


class Gradients:
    """The gradients of a case, shared by all contenders: nobody is asked to write them."""

    SEED = 1

    def __init__(self, case: Case) -> None:
        self.groups = case.shapes.allocate(case.dtype, case.device)
        self.flat = [tensor for group in self.groups for tensor in group]
        self.refill()

    def refill(self) -> None:
        """Writes the values anew."""
        fill(self.flat, self.SEED, signed=True)


class Contender:
    """A peer on a case. Implements `timing.Timed`.

    Args:
        peer: Whose optimizer.
        case: What on.
        gradients: The shared gradients.
        resident: Whether parameters and state stay in memory between blocks; if not, each block builds them
            anew, and steps once untimed.
    """

    SEED = 2

    def __init__(self, peer: Peer, case: Case, gradients: Gradients, resident: bool) -> None:
        self.peer = peer
        self.case = case
        self.gradients = gradients
        self.resident = resident
        self.params: list[Tensor] = []
        self.optimizer: Optimizer | None = None
        self._groups: list[dict[str, Any]] = []
        self._turn = 0

    @property
    def name(self) -> str:
        """The peer's name."""
        return self.peer.name

    @property
    def prepares(self) -> bool:
        """Kept gradients need nothing between steps."""
        return self.case.gradients != "kept"

    def build(self) -> None:
        """Allocates and fills parameters, sets gradients, makes the optimizer."""
        groups = self.case.shapes.allocate(self.case.dtype, self.case.device)
        self.params = [tensor for group in groups for tensor in group]
        fill(self.params, self.SEED, signed=False)
        for param, grad in zip(self.params, self.gradients.flat, strict=True):
            param.requires_grad_(True)
            param.grad = grad
        self._groups = [
            {"params": tensors, "lr": lr} for tensors, lr in zip(groups, self.case.learning_rates, strict=True)
        ]
        self._turn = 0
        self.make_optimizer()

    def make_optimizer(self) -> None:
        """Makes the optimizer; peers write into the groups they are given, so each gets copies."""
        self.optimizer = self.peer.make([dict(group) for group in self._groups], self.case.hyper)

    def free(self) -> None:
        """Lets go of everything."""
        self.optimizer = None
        self.params = []
        self._groups = []
        if self.case.device == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Holds parameters and state in memory while entered."""
        if not self.params:
            self.build()
            self.prepare()
            self.step()
        try:
            yield
        finally:
            if not self.resident:
                self.free()
            elif self.case.gradients == "fresh":
                self._drop_gradients()

    def prepare(self) -> None:
        """Makes the next step's gradients as the case wants them."""
        if self.case.gradients == "fresh":
            self._drop_gradients()
            torch.autograd.backward(self.params, self.gradients.flat)
        elif self.case.gradients == "toggle":
            self._turn += 1
            for param, grad in zip(self.params[1::2], self.gradients.flat[1::2], strict=True):
                param.grad = grad if self._turn % 2 else None
        elif self.case.gradients == "first":
            self.optimizer = None

    def _drop_gradients(self) -> None:
        for param in self.params:
            param.grad = None

    def step(self) -> None:
        """One update; where construction is timed too, of a new optimizer."""
        if self.optimizer is None:
            self.make_optimizer()
        assert self.optimizer is not None
        self.optimizer.step()
