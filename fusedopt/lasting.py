"""What outlives a table: memory on its device that a captured graph goes on reading and writing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class Lasting:
    """What the tables of one device that follow one another have in common.

    Attributes:
        launcher: what the backend keeps; None before the first launch.
        leaf_sums: float64, what every leaf joins to: csrc/phase.h; None: no norm is wanted.
        joined: float64, what the leaves of each part come to; then, at its begin, of each norm.
        report: float64, the columns of csrc/report.h and one behind; None: nothing is reported.
    """

    launcher: Any = None
    leaf_sums: Tensor | None = None
    joined: Tensor | None = None
    report: Tensor | None = None
    _captured: list[Tensor] = field(default_factory=list)

    @property
    def has_captures(self) -> bool:
        """Whether a CUDA graph holds addresses of these."""
        return self.launcher is not None and self.launcher.captures > 0

    def renew(self, **made: Tensor) -> None:
        """Puts tensors in the place of others, which live on where a graph may use them."""
        for name, tensor in made.items():
            self.keep(getattr(self, name))
            setattr(self, name, tensor)

    def keep(self, tensor: Tensor | None) -> None:
        """Keeps what is about to be given up, where a graph may use it."""
        if tensor is not None and self.has_captures:
            self._captured.append(tensor)
