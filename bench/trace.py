"""Kernels of a step, from the profiler's trace: how many, how long, which."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile, record_function

WINDOW = "bench.window"
"""Name of the annotation around a step and the synchronisation after it."""

PAD_S = 100e-6
"""Idle time at both ends of a window, more than the clocks of host and device are apart."""


class Steppable(Protocol):
    """What can be stepped."""

    def prepare(self) -> None:
        """Untimed work before a step."""

    def step(self) -> None:
        """The work to look at."""


@dataclass
class Kernels:
    """Device work of one step, averaged over the windows of a trace.

    Attributes:
        launches: Kernels started.
        copies: Copies and memory sets started.
        seconds: Sum of the durations of kernels, copies and sets; gaps between them do not count.
        by_name: `name: (launches, seconds)` of each kernel, longest first.
    """

    launches: float = 0.0
    copies: float = 0.0
    seconds: float = 0.0
    by_name: dict[str, tuple[float, float]] = field(default_factory=dict)


def kernels_of(work: Steppable, steps: int, before: Callable[[], None] = lambda: None) -> Kernels:
    """Profiles `steps` steps on the GPU; `before` runs untimed ahead of each one."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            work.prepare()
            before()
            torch.cuda.synchronize()
            time.sleep(PAD_S)
            with record_function(WINDOW):
                time.sleep(PAD_S)
                work.step()
                torch.cuda.synchronize()
                time.sleep(PAD_S)
    return read_kernels(trace_events(profiler))


def trace_events(profiler: profile) -> list[dict[str, Any]]:
    """The events of a finished profile, as in its Chrome trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def read_kernels(events: list[dict[str, Any]]) -> Kernels:
    """Device work inside the windows of a trace, per window. Times of a trace are in microseconds.

    A window is found by time and not by correlation id, so that replays of a graph and launches through the
    driver count too.

    Raises:
        ValueError: the trace has no window.
    """
    windows = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == WINDOW and event.get("cat") == "user_annotation"
    ]
    if not windows:
        raise ValueError(f"the trace has no {WINDOW!r} annotation")
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    found = Kernels()
    for event in events:
        kind = event.get("cat")
        if kind not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        if not any(start <= event["ts"] <= end for start, end in windows):
            continue
        found.seconds += event["dur"] * 1e-6 / len(windows)
        if kind == "kernel":
            found.launches += 1 / len(windows)
            counts[event["name"]] += 1
            seconds[event["name"]] += event["dur"] * 1e-6
        else:
            found.copies += 1 / len(windows)
    found.by_name = {
        name: (counts[name] / len(windows), seconds[name] / len(windows))
        for name in sorted(seconds, key=seconds.__getitem__, reverse=True)
    }
    return found
