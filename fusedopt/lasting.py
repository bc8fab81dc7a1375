"""What outlives a table: memory on its device that a captured graph goes on reading and writing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph captures what is given to a device now, whichever device is the current one."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():  # changing the device takes some microseconds
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Refuses to make memory during a capture: its first values would be written by the graph's replays alone.

    Raises:
        RuntimeError: a CUDA graph captures.
    """
    if is_capturing(device):
        raise RuntimeError(
            "the optimizer's tensors, or what a step does with them, changed since its last step: run one step like it "
            "before the capture"
        )


class StreamUse:
    """Tells torch's allocator on which streams launches use memory that was made on another.

    Else memory that is given up goes to whoever asks for some on the stream that it was made on, at once, while a
    launch on the other may still read or write it.
    """

    _last: Any = None  # the stream of the last launch

    def record(self, device: torch.device, tensors: Iterable[Tensor | None]) -> None:
        """Says what the next launch on a device uses; of a capture, whose memory stays, nothing."""
        if device.type != "cuda":
            return
        stream = torch.cuda.current_stream(device)
        if stream == self._last or is_capturing(device):
            return
        self._last = stream
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)


@dataclass(eq=False)
class Lasting:
    """What the tables of one device that follow one another have in common.

    Attributes:
        launcher: what the backend keeps; None before the first launch.
        leaf_sums: float64, what every leaf joins to, and behind them groups of leaves: csrc/phase.h; None: no norm is
            wanted.
        joined: float64, what the leaves of each part come to; then, at its begin, of each norm.
        report: float64, the columns of csrc/report.h and one behind; None: nothing is reported.
    """

    launcher: Any = None
    leaf_sums: Tensor | None = None
    joined: Tensor | None = None
    report: Tensor | None = None
    _captured: tuple[Tensor, ...] = ()

    @cached_property
    def streams(self) -> StreamUse:
        """Where launches use these."""
        return StreamUse()

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
            self._captured += (tensor,)
