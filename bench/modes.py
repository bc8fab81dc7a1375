"""Bytes of every precision mode, measured: parameter and state per parameter, and what a step takes beside them.

    python -m bench.modes              # bytes, of 16 M parameters
    python -m bench.modes --time       # and the time of a step, in turns with torch fused in float32

bfloat16 parameters but for the first two rows. Bytes are counted in the tensors that the optimizer's state holds; the
peak is the high-water mark of resident memory while a step runs, above what was resident before it. Ratios of time are
medians over the rounds of torch fused float32's time to the mode's, each round taking every mode once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench.memory import peak_bytes, state_bytes

TENSORS = 16
F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8


@dataclass(frozen=True)
class Mode:
    """An optimizer as it is constructed, and the dtype of the parameters."""

    name: str
    make: Callable[..., Any]
    dtype: torch.dtype
    options: dict[str, Any]


MODES = (
    Mode("torch fused, float32", torch.optim.AdamW, F32, {"fused": True}),
    Mode("float32", fusedopt.AdamW, F32, {}),
    Mode("torch fused", torch.optim.AdamW, BF16, {"fused": True}),
    Mode("bfloat16", fusedopt.AdamW, BF16, {}),
    Mode("float32 states, fp32", fusedopt.AdamW, BF16, {"state_dtype": F32, "master": "fp32"}),
    Mode("float32 states, split", fusedopt.AdamW, BF16, {"state_dtype": F32, "master": "split"}),
    Mode("float32 states, kahan", fusedopt.AdamW, BF16, {"state_dtype": F32, "master": "kahan"}),
    Mode("int8 states", fusedopt.AdamW, BF16, {"state_dtype": I8}),
    Mode("int8 states, split", fusedopt.AdamW, BF16, {"state_dtype": I8, "master": "split"}),
    Mode("int8 states, stochastic", fusedopt.AdamW, BF16, {"state_dtype": I8, "rounding": "stochastic"}),
)


class Case:
    """A mode on tensors of its own."""

    def __init__(self, mode: Mode, elements: int) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(elements // TENSORS, dtype=mode.dtype)) for _ in range(TENSORS)]
        for param in self.params:
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer = mode.make(self.params, **mode.options)
        self.optimizer.step()

    def bytes_per_element(self) -> float:
        """Of parameters and states."""
        total = (state_bytes(self.optimizer) or 0) + sum(param.nbytes for param in self.params)
        return total / sum(param.numel() for param in self.params)

    def seconds(self) -> float:
        """Of one step."""
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--time", action="store_true", help="time steps as well")
    options = parser.parse_args()
    table = Table("mode", "B/parameter", "peak of a step, B/parameter", "time, torch fused float32 to it")
    cases = [Case(mode, options.elements) for mode in MODES]
    seconds = [[case.seconds() for case in cases] for _ in range(options.rounds if options.time else 0)]
    for k, (mode, case) in enumerate(zip(MODES, cases, strict=True)):
        peak = peak_bytes(case.optimizer.step, "cpu")
        ratio = statistics.median(row[0] / row[k] for row in seconds) if seconds else None
        table.add_row(
            mode.name,
            f"{case.bytes_per_element():.2f}",
            "not measured" if peak is None else f"{peak / options.elements:.2f}",
            "not measured" if ratio is None else f"{ratio:.2f}x",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
