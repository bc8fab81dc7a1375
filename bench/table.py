"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench import present, timing
from bench.case import Case
from bench.peers import is_ours
from bench.records import Record

STYLES = {"ok": "dim", "wrong": "bold red", "failed": "red", "skipped": "dim"}


NARROW = 110
"""A console with fewer columns gets no columns about memory."""


def case_table(case: Case, records: Sequence[Record], width: int) -> RenderableType:
    """One case for a console of `width` columns: a row per peer, and below it why some have no times."""
    timed = [record for record in records if record["status"] == "ok"]
    hidden = {"host"} if case.device == "cpu" else set()
    if width < NARROW:
        hidden |= {"spread", "state", "peak"}
    if not any(present.roof_counts(record) for record in timed):
        hidden |= {"GB/s", "of roof"}
    shown = [index for index, heading in enumerate(present.HEADINGS) if heading not in hidden]
    table = Table(title=present.title(case, records), title_justify="left", title_style="bold", pad_edge=False)
    for index in shown:
        table.add_column(present.HEADINGS[index], justify="left" if index == 0 else "right", no_wrap=True)
    for record in timed:
        cells = present.cells(record)
        table.add_row(*(cells[index] for index in shown), style="bold" if is_ours(record["peer"]) else "")
    lines = [Text(line, style=STYLES[status]) for status, line in present.remarks(records)]
    return Group(table, *lines, Text())


def summary_table(grouped: dict[Case, list[Record]]) -> Table:
    """All cases in one table: times by peer, the fastest in bold, and fusedopt's standing."""
    peers = list(
        dict.fromkeys(r["peer"] for records in grouped.values() for r in records if r["status"] in ("ok", "wrong"))
    )
    table = Table(title="Medians of a step's time; in brackets: speed against torch fused", title_justify="left")
    for heading in ("workload", "optimizer", "gradients", "threads"):
        table.add_column(heading)
    for peer in peers:
        table.add_column(peer, justify="right")
    table.add_column("fusedopt", justify="right")
    for case, records in grouped.items():
        found = {record["peer"]: record for record in records}
        timed = [record for record in records if record["status"] == "ok"]
        fastest = min(timed, key=lambda r: float(r["seconds"]["median"]), default=None)
        cells = [_summary_cell(found.get(peer), fastest) for peer in peers]
        kind = case.optimizer if case.dtype == "float32" else f"{case.optimizer} {case.dtype}"
        table.add_row(
            case.workload,
            kind,
            case.gradients,
            str(case.threads),
            *cells,
            present.standing(records) or present.MISSING,
        )
    return table


def _summary_cell(record: Record | None, fastest: Record | None) -> Text:
    if record is None or record["status"] == "skipped":
        return Text(present.MISSING, style="dim")
    if record["status"] != "ok":
        return Text(record["status"], style=STYLES[record["status"]])
    ratio = f" ({present.digits(record['ratio']['median'])}×)" if record.get("ratio") else ""
    return Text(present.seconds(record["seconds"]["median"]) + ratio, style="bold" if record is fastest else "")


def print_run(console: Console, grouped: dict[Case, list[Record]]) -> None:
    """The end of a run: the summary and the closing lines."""
    console.print(summary_table(grouped))
    for line in present.closing(grouped):
        console.print(line, markup=False)
    console.print(
        f"Times are medians over rounds in which all were timed in turns; [low, high] is a 95 % bootstrap"
        f" interval; a tie is at least {timing.TIE}×. ulp: largest error against float64 after 100 steps.",
        style="dim",
        markup=False,
    )
