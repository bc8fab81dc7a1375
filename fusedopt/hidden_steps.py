"""Counts of steps that torch does not keep in the state: those of SGD, whose first step is unlike the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor


class HiddenSteps:
    """The count of each parameter: float32, 0-dim, on its device.

    Args:
        known: counts by parameter.
    """

    def __init__(self, known: Mapping[Tensor, Tensor] | None = None) -> None:
        """See the class."""
        self._known = dict(known or {})
        self._begun: list[tuple[Sequence[Tensor], Tensor]] = []

    def begin(self, params: Sequence[Tensor], counts: Tensor) -> None:
        """Takes note of counts in one tensor. A first step need not make a tensor of each: few ask for one."""
        self._begun.append((params, counts))

    def keep_only(self, params: Sequence[Tensor]) -> None:
        """Lets go of the counts of all other parameters."""
        if self._begun or self._known:
            present = set(params)
            self._known = {param: count for param, count in self.known.items() if param in present}

    @property
    def known(self) -> dict[Tensor, Tensor]:
        """All counts by parameter."""
        for params, counts in self._begun:
            self._known.update(zip(params, counts.unbind(), strict=True))
        self._begun.clear()
        return self._known
