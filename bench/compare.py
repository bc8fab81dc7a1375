"""Compares two runs and says what got slower beyond noise.

A run's speeds are compared as ratios to torch fused of the same run, so that a machine that drifted, or
another machine, does not look like a change of the code. Where a run has no such ratio, plain times are
compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from bench import present, records, timing
from bench.peers import BASELINE, is_ours
from bench.records import Record
from bench.timing import Spread


@dataclass(frozen=True)
class Change:
    """One result in both runs.

    Attributes:
        record: The new one.
        speed: New speed over old speed, with its bootstrap interval; below 1 is slower.
        relative: Whether speeds are relative to torch fused.
        broken: What became of a peer that had times in the old run and has none in the new one.
    """

    record: Record
    speed: Spread | None
    relative: bool
    broken: str | None = None

    def outcome(self, tolerance: float) -> str:
        """`slower`, `faster`, `same`, or `broken`."""
        if self.broken or self.speed is None:
            return "broken"
        if self.speed.high < 1 - tolerance:
            return "slower"
        return "faster" if self.speed.low > 1 + tolerance else "same"


def change_of_speed(old: Sequence[float], new: Sequence[float]) -> Spread:
    """Ratio of two medians of speeds, resampled on either side: `new / old`."""
    ratio = np.median(new) / np.median(old)
    draws = timing.resampled_medians(new, seed=1) / timing.resampled_medians(old, seed=2)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Spread(float(ratio), float(low), float(high), min(len(old), len(new)))


def changes(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Every result of fusedopt that both runs have; where fusedopt is in neither, of every peer.

    Raises:
        ValueError: the runs have nothing in common.
    """
    before = {records.key(record): record for record in old if record["status"] == "ok"}
    after = {records.key(record): record for record in new}
    common = [key for key in before if key in after]
    if any(is_ours(after[key]["peer"]) for key in common):
        common = [key for key in common if is_ours(after[key]["peer"])]
    if not common:
        raise ValueError("the two runs have no timed case in common")
    return [_change(before[key], after[key]) for key in common]


def _change(old: Record, new: Record) -> Change:
    if new["status"] != "ok":
        return Change(new, None, False, f"{new['status']}: {new['reason']}")
    relative = new["peer"] != BASELINE and bool(old.get("ratio_samples")) and bool(new.get("ratio_samples"))
    if relative:
        return Change(new, change_of_speed(old["ratio_samples"], new["ratio_samples"]), True)
    speeds = [[1 / seconds for seconds in record["samples"]] for record in (old, new)]
    return Change(new, change_of_speed(*speeds), False)


def compare(old: Sequence[Record], new: Sequence[Record], tolerance: float, console: Console) -> int:
    """Prints every change and returns 1 if anything is slower or broken, else 0.

    Raises:
        ValueError: the tolerance is not from 0 up to below 1, or the runs have nothing in common.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"--tolerance must be at least 0 and below 1, got {tolerance}")
    found = changes(old, new)
    shown = Table("case", "peer", "speed, new ÷ old", "measured as", "outcome")
    for change in found:
        outcome = change.outcome(tolerance)
        style = {"slower": "bold red", "broken": "bold red", "faster": "green"}.get(outcome, "")
        speed = present.interval(vars(change.speed)) if change.speed else change.broken
        kind = "ratio to torch fused" if change.relative else "time"
        shown.add_row(records.case_of(change.record).label(), change.record["peer"], speed, kind, outcome, style=style)
    console.print(shown)
    outcomes = [change.outcome(tolerance) for change in found]
    bad = sum(outcome in ("slower", "broken") for outcome in outcomes)
    console.print(
        f"{bad} of {len(found)} slower or broken, {outcomes.count('faster')} faster"
        f" (tolerance {tolerance:.0%} beyond the interval)"
    )
    return 1 if bad else 0
