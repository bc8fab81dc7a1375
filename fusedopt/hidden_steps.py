"""Counts of steps that torch does not keep in the state: those of SGD, whose first step is unlike the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor


class Counts:
    """Counts of steps, float32, all 0 at first.

    Those of the host are bytes that become a tensor once somebody asks: few do, and to make and drop one takes a tenth
    of what an optimizer of one small tensor takes to be made and stepped.

    Args:
        count: how many, one or more.
        device: where.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        """See the class."""
        on_host = device.type == "cpu"
        self.memory = bytearray(4 * count) if on_host else torch.zeros(count, device=device, dtype=torch.float32)

    @cached_property
    def tensor(self) -> Tensor:
        """The counts, in their memory."""
        if isinstance(self.memory, Tensor):
            return self.memory
        with torch.inference_mode(mode=False):  # whoever asks: steps outside go on writing it
            return torch.frombuffer(self.memory, dtype=torch.float32)


class HiddenSteps:
    """The count of each parameter: float32, 0-dim, on its device.

    Args:
        known: counts by parameter.
    """

    def __init__(self, known: Mapping[Tensor, Tensor] | None = None) -> None:
        """See the class."""
        self._known = dict(known or {})
        self._begun: list[tuple[Sequence[Tensor], Counts]] = []

    def begin(self, params: Sequence[Tensor], counts: Counts) -> None:
        """Takes note of counts, one for each parameter. A first step need not make tensors of them."""
        if self._begun:
            self._known = self.known
        self._begun.append((params, counts))

    def keep_only(self, params: Sequence[Tensor]) -> None:
        """Lets go of the counts of all other parameters."""
        if self._begun or self._known:
            present = set(params)
            self._known = {param: count for param, count in self.known.items() if param in present}

    @property
    def known(self) -> dict[Tensor, Tensor]:
        """All counts by parameter."""
        with torch.inference_mode(mode=False):
            for params, counts in self._begun:
                self._known.update(zip(params, counts.tensor.unbind(), strict=True))
        self._begun.clear()
        return self._known
