"""Roofs: what the memory of this machine gives, measured in the same rounds as the optimizers.

On a CPU the roof is the in-place `a.add_(b)`, 12 bytes an element. On a GPU it is the best of `copy_`, `add_`
and a kernel that moves the same streams as the optimizer without its math.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.peers import STATES
from bench.timing import Measured

ELEMENTS = {"cpu": 2**26, "cuda": 2**28}
"""float32 elements of each buffer: far beyond any cache."""

PREFIX = "roof-"


class Roof:
    """A stream over large buffers. Implements `timing.Timed`; the buffers are shared between roofs.

    Attributes:
        bytes: Bytes a step moves.
    """

    prepares = False
    streams = 0
    """Memory streams in and out; each is one buffer's worth of bytes."""

    def __init__(self, name: str, buffers: list[Tensor]) -> None:
        self.name = PREFIX + name
        self.buffers = buffers
        self.bytes = self.streams * buffers[0].numel() * buffers[0].element_size()

    @contextmanager
    def present(self) -> Iterator[None]:
        """The buffers are always there."""
        yield

    def prepare(self) -> None:
        """Nothing to prepare."""

    def step(self) -> None:
        """One pass over the buffers."""
        raise NotImplementedError


class Add(Roof):
    """`a.add_(b)`."""

    streams = 3

    def step(self) -> None:
        """One pass."""
        self.buffers[0].add_(self.buffers[1])


class Copy(Roof):
    """`a.copy_(b)`."""

    streams = 2

    def step(self) -> None:
        """One pass."""
        self.buffers[0].copy_(self.buffers[1])


class SameStreams(Roof):
    """The optimizer's traffic, hardly any math: parameter and states in and out, gradient in."""

    def __init__(self, states: int, buffers: list[Tensor]) -> None:
        self.states = states
        self.streams = 3 + 2 * states
        super().__init__("streams", buffers)

    def step(self) -> None:
        """One launch."""
        from bench.stream_kernel import launch

        launch(self.states, self.buffers)


def roofs_for(device: str, optimizer: str) -> list[Roof]:
    """The roofs of a device for one optimizer, on buffers of their own."""
    states = STATES[optimizer]
    count = 2 if device == "cpu" else 2 + states
    buffers = [torch.zeros(ELEMENTS[device], device=device) for _ in range(count)]
    if device == "cpu":
        return [Add("add", buffers)]
    return [Copy("copy", buffers), Add("add", buffers), SameStreams(states, buffers)]


def best_by_round(roofs: Sequence[Roof], measured: Mapping[str, Measured]) -> dict[int, float]:
    """Bytes a second of the best roof in each round."""
    best: dict[int, float] = {}
    for roof in roofs:
        for round_, seconds in measured[roof.name].device.items():
            best[round_] = max(best.get(round_, 0.0), roof.bytes / seconds)
    return best


def bytes_of_buffers(device: str, optimizer: str) -> int:
    """Memory that the roofs' buffers take."""
    return ELEMENTS[device] * 4 * (2 if device == "cpu" else 2 + STATES[optimizer])
