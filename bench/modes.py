"""Bytes of every precision mode beside other libraries: parameter and state, and what a step takes beside them.

    python -m bench.modes --workload gpt2-124m  # bytes of one model
    python -m bench.modes --time                # and the time of a step, in turns with torch fused in float32
    python -m bench.modes --only int8 torchao   # some rows

bfloat16 parameters but for the first rows. Bytes are counted in the tensors that the optimizer's state holds; the
peak is the high-water mark of resident memory while a step runs, above what was resident before it, where 0.00 says
that nothing is ever held decoded. Ratios of time are torch fused float32's to the mode's, the two taking turns by the
rules of bench/timing.py. Other libraries are measured where they are installed: none is required.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench import memory, present, script, timing
from bench.memory import peak_bytes, state_bytes
from bench.peers import HYPER, LEAN, Peer
from bench.side import Side
from bench.timing import Rules
from bench.workloads import Workload
from fusedopt.blocks import FLOAT8

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
STATE_BYTES = 12
"""An element's in states and what is kept beside the parameter, at most: two states and a master in float32."""


@dataclass(frozen=True)
class Mode:
    """An optimizer.

    Attributes:
        name: as it is shown.
        make: makes it of parameters.
        dtype: of the parameters.
        missing: why it is not to be had here; None: it is.
    """

    name: str
    make: Callable[[list[Any]], Any]
    dtype: torch.dtype = BF16
    missing: str | None = None


def ours(name: str, dtype: torch.dtype = BF16, **options: Any) -> Mode:
    """A mode of fusedopt."""
    return Mode(f"fusedopt: {name}", partial(fusedopt.AdamW, **options), dtype)


def theirs(peer: Peer) -> Mode:
    """A peer's optimizer."""
    return Mode(peer.name, lambda params: peer.make([{"params": params, "lr": 1e-3}], HYPER["adamw"]),
                missing=peer.missing("cpu"))  # fmt: skip


TORCH = Mode("torch fused, float32", partial(torch.optim.AdamW, fused=True), F32)
MODES = (
    TORCH,
    ours("float32", F32),
    ours("float32, int8 states", F32, state_dtype=I8),
    Mode("torch fused", partial(torch.optim.AdamW, fused=True)),
    ours("bfloat16"),
    ours("float32 states, fp32", state_dtype=F32, master="fp32"),
    ours("float32 states, split", state_dtype=F32, master="split"),
    ours("float32 states, kahan", state_dtype=F32, master="kahan"),
    ours("float32 states, stochastic", state_dtype=F32, rounding="stochastic"),
    ours("bfloat16 states, split", state_dtype=BF16, master="split"),
    ours("bfloat16 states, kahan", state_dtype=BF16, master="kahan"),
    ours("int8 states", state_dtype=I8),
    ours("int8 states, fp32", state_dtype=I8, master="fp32"),
    ours("int8 states, split", state_dtype=I8, master="split"),
    ours("int8 states, kahan", state_dtype=I8, master="kahan"),
    ours("int8 states, stochastic", state_dtype=I8, rounding="stochastic"),
    ours("float8 states", state_dtype=FLOAT8),
    ours("float8 states, split", state_dtype=FLOAT8, master="split"),
    ours("float8 states, stochastic", state_dtype=FLOAT8, rounding="stochastic"),
    *map(theirs, LEAN.values()),
)


class Case:
    """A mode on tensors of its own, after two steps: what is compiled or made at first is there."""

    def __init__(self, mode: Mode, workload: Workload) -> None:
        tensors = [torch.zeros(shape, dtype=mode.dtype) for group in workload.groups for shape in group.shapes()]
        self.params = [torch.nn.Parameter(tensor) for tensor in tensors]
        for param in self.params:
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer = mode.make(self.params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries' compilation
            for _ in range(2):
                self.optimizer.step()

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(param.numel() for param in self.params)

    def bytes_per_element(self) -> float:
        """Of parameters and states."""
        total = (state_bytes(self.optimizer) or 0) + sum(param.nbytes for param in self.params)
        return total / self.elements

    def peak_per_element(self) -> float | None:
        """Of a step, beside parameters, gradients and states."""
        peak = peak_bytes(self.optimizer.step, "cpu")
        return None if peak is None else peak / self.elements


def bytes_of(mode: Mode, workload: Workload) -> int:
    """Parameters, gradients and all that is kept beside them, at most."""
    return (2 * mode.dtype.itemsize + STATE_BYTES) * workload.elements


def interval(base: Case, case: Case, rounds: int) -> str:
    """The ratio of the base's time to a mode's, in turns."""
    sides = [Side("base", base.optimizer.step), Side("mode", case.optimizer.step)]
    found = timing.run_rounds(sides, timing.CpuClock(), Rules().exactly(rounds), "base")
    return present.interval(vars(timing.bootstrap(timing.paired(found["base"].device, found["mode"].device))))


def measure(modes: Sequence[Mode], workload: Workload, rounds: int) -> Iterator[tuple[str, ...]]:
    """A row of the table for each mode, one after the other; `rounds` of 0 time nothing.

    Raises:
        ValueError: what times are compared with does not fit the memory.
    """
    if rounds:
        memory.require(bytes_of(TORCH, workload), "cpu")
    base = Case(TORCH, workload) if rounds else None
    for mode in script.track(modes, len(modes), workload.name):
        missing = mode.missing or _unfit(mode, workload)
        if missing is not None:
            yield mode.name, "not measured", missing, ""
            continue
        case = Case(mode, workload)
        peak = case.peak_per_element()
        yield (
            mode.name,
            f"{case.bytes_per_element():.2f}",
            "not measured" if peak is None else f"{peak:.2f}",
            interval(base, case, rounds) if base else "not measured",
        )
        del case
        gc.collect()  # optimizers refer to themselves: the next one needs the memory


def _unfit(mode: Mode, workload: Workload) -> str | None:
    """Why a mode does not fit, or None."""
    try:
        memory.require(bytes_of(mode, workload), "cpu")
    except ValueError as error:
        return str(error)
    return None


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.modes")
    script.add_workload(parser, "16x1048576")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows with one of these words; left out: all")
    parser.add_argument("--time", action="store_true", help="time steps as well")
    script.add_rounds(parser, 15)
    options = script.parsed(parser, words)
    chosen = [mode for mode in MODES if not options.only or any(word in mode.name for word in options.only)]
    if not chosen:
        parser.error(f"no row has {' or '.join(options.only)} in its name")
    table = Table("mode", "B/parameter", "peak of a step, B/parameter", "speed against torch fused float32")
    with script.refusals(parser):
        for row in measure(chosen, options.workload, options.rounds if options.time else 0):
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
