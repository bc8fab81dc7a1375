"""Hardware counters of one step from Nsight Compute, which profiles this file as a program of its own.

    ncu … python -m bench.ncu gpt2-124m adamw float32 kept fusedopt-cuda

Steps of one case, the last of them under the profiler; `python -m bench profile` calls it.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import script, timing, workloads
from bench.case import Case
from bench.contender import Contender, Gradients
from bench.peers import HYPER, PEERS, Peer

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM % of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}
"""Counters that are asked for, and how the table calls them."""

TIMEOUT_S = 240
WARMUP = 3


class NcuError(RuntimeError):
    """Nsight Compute ran and gave nothing: its own words."""


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, and its counters by metric, with units."""

    name: str
    values: dict[str, str]


def installed() -> bool:
    """Whether `ncu` is to be found."""
    return shutil.which("ncu") is not None


def measure(case: Case, peer: Peer) -> list[Kernel]:
    """Counters of every kernel of one step, in a process of its own.

    Raises:
        NcuError: ncu failed, as it does without permission to read counters, or saw no kernel.
    """
    words = ["ncu", "--csv", "--page", "raw", "--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    words += [
        sys.executable,
        "-m",
        "bench.ncu",
        case.workload,
        case.optimizer,
        case.dtype,
        case.gradients,
        peer.name,
    ]
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=root, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NcuError(str(error)) from error
    kernels = parse(done.stdout)
    if not kernels:
        told = (done.stdout + done.stderr).strip().splitlines()
        raise NcuError(told[-1] if told else f"exit status {done.returncode} and no output")
    return kernels


def parse(output: str) -> list[Kernel]:
    """Kernels from ncu's raw CSV: headings, units, then a line per launch; other lines are skipped."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    headings, units, launches = rows[0], rows[1], rows[2:]
    kernels = []
    for row in launches:
        if len(row) != len(headings):
            continue
        cells = {heading: (value, unit) for heading, value, unit in zip(headings, row, units, strict=True)}
        values = {metric: " ".join(filter(None, cells[metric])) for metric in METRICS if metric in cells}
        kernels.append(Kernel(cells["Kernel Name"][0], values))
    return kernels


def step_under_profiler(case: Case, peer: Peer) -> None:
    """Steps a few times, then once under the profiler."""
    contender = Contender(peer, case, Gradients(case), resident=True)
    with contender.present():
        for _ in range(WARMUP):
            contender.prepare()
            contender.step()
        contender.prepare()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        contender.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(words: list[str] | None = None) -> None:
    """The command line: the words of a case and a peer."""
    parser = script.parser(__doc__, "bench.ncu", threads=False)
    parser.add_argument("workload", type=script.workload, help="COUNTxNUMEL or a name")
    parser.add_argument("optimizer", choices=list(HYPER))
    parser.add_argument("dtype", choices=[*workloads.DTYPES, "mixed"])
    parser.add_argument("gradients", choices=timing.GRADIENTS)
    parser.add_argument("peer", choices=list(PEERS), metavar="peer", help="such as fusedopt-cuda or torch-fused")
    parser.set_defaults(device="cuda")
    options = script.parsed(parser, words)
    threads = torch.get_num_threads()
    case = Case(options.workload.name, options.optimizer, options.dtype, "cuda", threads, options.gradients)
    step_under_profiler(case, PEERS[options.peer])


if __name__ == "__main__":
    main()
