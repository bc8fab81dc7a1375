"""A short gate for CI: fusedopt against torch fused in one process, on the CPU unless `--device` says otherwise.

Built not to fail by chance: only paired ratios count; a row fails only if the whole interval lies under its
floor; and it must do so `ATTEMPTS` times in a row. Floors leave room under the targets for busy machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from bench import present
from bench.case import Case
from bench.peers import BASELINE, PEERS, Peer
from bench.records import Record
from bench.run import Runner
from bench.timing import Rules, Spread

ATTEMPTS = 3

RULES = Rules(budget_s=2.0, min_rounds=9, max_rounds=30, block_s=0.01)


@dataclass(frozen=True)
class Floor:
    """The least speed against torch fused, on one workload."""

    workload: str
    optimizer: str
    gradients: str
    least: float


FLOORS = {
    "cpu": (
        Floor("1000x16", "adamw", "kept", 12.0),
        Floor("1000x16", "adamw", "fresh", 8.0),
        Floor("1000x16", "sgd", "kept", 4.0),
        Floor("1x16", "adamw", "kept", 1.2),
        Floor("resnet50", "adamw", "kept", 0.9),
        Floor("resnet50", "sgd", "kept", 0.9),
    ),
    "cuda": (
        Floor("1000x16", "adamw", "kept", 1.5),
        Floor("resnet50", "adamw", "kept", 0.95),
        Floor("gpt2-124m", "adamw", "kept", 0.95),
    ),
}
"""By device type. The targets are higher; see docs/benchmark.md."""

Measure = Callable[[Case, Sequence[Peer]], list[Record]]


def attempt(floor: Floor, case: Case, peer: Peer, measure: Measure) -> tuple[bool, str]:
    """One row: passed or not, and what was found in the last attempt."""
    found = ""
    for _ in range(ATTEMPTS):
        record = next(r for r in measure(case, [PEERS[BASELINE], peer]) if r["peer"] == peer.name)
        if record["status"] != "ok":
            return False, f"{record['status']}: {record['reason']}"
        found = present.interval(record.get("ratio"))
        if "ratio" not in record:
            return False, f"{BASELINE} has no times to compare with"
        if Spread(**record["ratio"]).high >= floor.least:
            return True, found
    return False, found


def gate(device: str, backend: str, console: Console, measure: Measure | None = None) -> int:
    """Checks every floor of a device type.

    Args:
        device: `cpu` or `cuda`.
        backend: fusedopt's backend.
        console: Where the table goes.
        measure: Times a case; by default a runner with short rules.

    Returns:
        0 if all hold, 1 if one does not.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    peer = PEERS.get(f"fusedopt-{backend}")
    if peer is None:
        known = [name.removeprefix("fusedopt-") for name in PEERS if name.startswith("fusedopt-")]
        raise ValueError(f"unknown backend {backend!r}: expected one of {', '.join(known)}")
    reason = peer.missing(device)
    if reason:
        raise ValueError(f"the gate cannot run with {peer.name} on {device}: {reason}")
    measure = measure or Runner(replace(RULES, max_steps=20) if device == "cuda" else RULES, device).run
    shown = Table(
        "workload",
        "optimizer",
        "gradients",
        "floor",
        "speed against torch fused",
        "",
        title=f"{peer.name}, {device}",
    )
    passed_all = True
    for floor in FLOORS[device]:
        case = Case(floor.workload, floor.optimizer, "float32", device, torch.get_num_threads(), floor.gradients)
        passed, found = attempt(floor, case, peer, measure)
        passed_all = passed_all and passed
        mark = "[green]holds[/]" if passed else "[bold red]does not hold[/]"
        shown.add_row(floor.workload, floor.optimizer, floor.gradients, f"{floor.least}×", found, mark)
    console.print(shown)
    return 0 if passed_all else 1
