"""How results are worded: numbers with units and rows of a case's table, for terminal and report alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import timing
from bench.case import Case
from bench.peers import is_ours
from bench.records import Record

MISSING = "–"
"""Shown for what was not measured."""

CACHES_PASSED = 4
"""A share of the roof is shown where a step moves this many times the CPU's last cache."""

HEADINGS = (
    "peer",
    "a step",
    "spread",
    "× torch fused",
    "host",
    "GB/s",
    "of roof",
    "launches",
    "state",
    "peak",
    "ulp",
    "rounds",
)


def seconds(value: float | None) -> str:
    """A time with a fitting unit: `3.85 ms`."""
    if value is None:
        return MISSING
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1 or unit == "µs":
            return f"{digits(value * factor)} {unit}"
    raise AssertionError("unreachable")


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def count(value: float) -> str:
    """A mean of whole numbers, with a fraction only where it has one: `1`, `1.5`, `1,000`."""
    text = digits(value)
    return text.rstrip("0").rstrip(".") if "." in text else text


def interval(found: Record | None) -> str:
    """A ratio with its interval: `20.1 [19.5, 20.8]`."""
    if not found:
        return MISSING
    return f"{digits(found['median'])} [{digits(found['low'])}, {digits(found['high'])}]"


def relative_spread(found: Record) -> str:
    """Half the distance of the quartiles in percent of the median: `±4%`."""
    return f"±{(found['high'] - found['low']) / (2 * found['median']):.0%}"


def amount(value: float | None) -> str:
    """Bytes with a fitting unit."""
    if value is None:
        return MISSING
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{digits(value / factor)} {unit}"
    return f"{value:.0f} B"


def roof_counts(record: Record) -> bool:
    """Whether a share of the memory's roof means something: cold caches, or more data than caches hold."""
    if record["gradients"] == "first":
        return False
    return bool(record["device"] == "cuda" or record["bytes_moved"] > CACHES_PASSED * record["machine"]["cache_bytes"])


def cells(record: Record) -> list[str]:
    """One peer's row under `HEADINGS`; a peer without times has its reason instead of them."""
    if record["status"] != "ok":
        return [record["peer"], record["status"]]
    roofed = roof_counts(record)
    share = record.get("roof_share")
    ulp = record.get("ulps_after_100")
    launches = record.get("launches")
    return [
        record["peer"],
        seconds(record["seconds"]["median"]),
        relative_spread(record["seconds"]),
        interval(record.get("ratio")),
        seconds(record["host_seconds"]["median"]),
        digits(record["bytes_moved"] / record["seconds"]["median"] / 1e9) if roofed else MISSING,
        f"{share['median']:.0%}" if share and roofed else MISSING,
        MISSING if launches is None else count(launches),
        amount(record.get("state_bytes")),
        amount(record.get("peak_bytes")),
        MISSING if ulp is None else digits(ulp),
        str(record["seconds"]["count"]),
    ]


def remarks(records: Sequence[Record]) -> list[tuple[str, str]]:
    """What a table cannot hold, with the peer's status: why it has no times, or what was noticed about it."""
    lines = []
    for record in records:
        if record["status"] != "ok":
            lines.append((record["status"], f"{record['peer']}: {record['status']}: {record['reason']}"))
            continue
        notes = [record.get("note")]
        if record.get("kernel_durations") and not by_kernels_alone(records):
            notes.append("time on the device is the sum of kernel durations: its host cannot be hidden behind a spin")
        if record.get("exposed_rounds"):
            notes.append(
                f"in {record['exposed_rounds']} of {record['seconds']['count']} rounds the device waited for it"
            )
        lines += [("ok", f"{record['peer']}: {note}") for note in notes if note]
    return lines


def by_kernels_alone(records: Sequence[Record]) -> bool:
    """Whether kernel durations stand for device time throughout a case."""
    timed = [record for record in records if record["status"] == "ok"]
    return bool(timed) and all(record.get("kernel_durations") for record in timed)


def title(case: Case, records: Sequence[Record]) -> str:
    """A case with its size, and the roof of its rounds."""
    first = records[0]
    tensors = "1 tensor" if first["tensors"] == 1 else f"{first['tensors']:,} tensors"
    size = f"{tensors}, {first['elements']:,} elements"
    groups = f" in {first['groups']} groups" if first["groups"] > 1 else ""
    roof = next((r["roof_bytes_per_s"] for r in records if r.get("roof_bytes_per_s")), None)
    kernels = "; sums of kernel durations" if by_kernels_alone(records) else ""
    return f"{case.label()}: {size}{groups}" + (f"; roof {digits(roof / 1e9)} GB/s" if roof else "") + kernels


PHASE_HEADINGS = (
    "workload",
    "threads",
    "torch's recipe",
    "one launch",
    "ratio",
    "torch's host",
    "launch's host",
    "ratio of host",
    "of roof",
    "rounds",
)


def phase_cells(record: Record) -> list[str]:
    """A row of the optimizer phase under `PHASE_HEADINGS`."""
    on_cpu = record["device"] == "cpu"
    times, hosts = (
        [seconds(record[key][name]["median"]) for name in ("torch", "fusedopt")] for key in ("seconds", "host_seconds")
    )
    host = [MISSING] * 3 if on_cpu else [*hosts, interval(record["host_ratio"])]
    return [
        record["workload"] + ("" if record["clears"] else ", not cleared"),
        str(record["threads"]) if on_cpu else MISSING,
        *times,
        interval(record["ratio"]),
        *host,
        f"{record['roof_share']['median']:.0%}",
        str(record["rounds"]),
    ]


# ---- who is ahead -----------------------------------------------------------------------------------------


def best_of_ours(records: Sequence[Record]) -> Record | None:
    """The fastest backend of fusedopt in a case."""
    ours = [r for r in records if r["status"] == "ok" and is_ours(r["peer"])]
    return min(ours, key=lambda r: float(r["seconds"]["median"])) if ours else None


def standing(records: Sequence[Record]) -> str | None:
    """`faster`, `tie` or `slower`: fusedopt's best backend against the best peer; None without either."""
    ours = best_of_ours(records)
    ratio: dict[str, Any] | None = ours.get("ratio_to_best_peer") if ours else None
    return timing.verdict(timing.Spread(**ratio)) if ratio else None


def closing(grouped: dict[Case, list[Record]]) -> list[str]:
    """The last lines of a run: in how many cases fusedopt is ahead, and where it is not."""
    outcomes = {case: standing(records) for case, records in grouped.items()}
    counted = [outcome for outcome in outcomes.values() if outcome]
    wrong = sorted({r["peer"] for records in grouped.values() for r in records if r["status"] == "wrong"})
    lines = []
    if counted:
        lines.append(
            f"fusedopt against the best peer: faster in {counted.count('faster')},"
            f" a tie in {counted.count('tie')}, slower in {counted.count('slower')} of {len(counted)} cases"
        )
    else:
        lines.append("fusedopt was not measured, or nothing beside it")
    lines += [f"a peer is faster: {case.label()}" for case, outcome in outcomes.items() if outcome == "slower"]
    if wrong:
        lines.append(f"wrong somewhere, and not ranked there: {', '.join(wrong)}")
    return lines
