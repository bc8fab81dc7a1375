"""The HTML report: one self-contained file with every figure and table of some results."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

from bench import plots, present, records, roofline, timing
from bench.case import Case
from bench.peers import is_ours
from bench.records import Record

TEMPLATE = Path(__file__).with_name("report.html.j2")
PNG_DPI = 130


def save_png(figure: Figure, path: Path) -> Path:
    """Writes a figure as PNG, making the folder, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(plots.STYLE):
        figure.savefig(path, dpi=PNG_DPI, metadata={"Software": None})
    return path


def _data_url(figure: Figure) -> str:
    """A figure as an SVG inside its own address."""
    buffer = io.BytesIO()
    with mpl.rc_context(plots.STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _case_view(case: Case, found: Sequence[Record]) -> dict[str, Any]:
    rows = [{"ours": is_ours(r["peer"]), "cells": present.cells(r)} for r in found if r["status"] == "ok"]
    return {
        "title": present.title(case, found),
        "standing": present.standing(found),
        "rows": rows,
        "remarks": present.remarks(found),
    }


def held_rows(found: Sequence[Record]) -> list[list[str]]:
    """The roofline model's predictions beside the measurements, as text."""
    return [
        [
            records.case_of(held.record).label(),
            held.record["peer"],
            present.seconds(held.predicted),
            present.seconds(held.measured),
            present.digits(held.measured / held.predicted),
            held.basis,
        ]
        for held in roofline.hold_against(found)
        if present.roof_counts(held.record)
    ]


def render(found: Sequence[Record], phases: Sequence[Record] = ()) -> str:
    """The report of some records, as HTML.

    Args:
        found: Records of steps.
        phases: Records of the optimizer phase.

    Raises:
        ValueError: the records come from more than one machine.
    """
    machines = {record["machine"]["name"] for record in (*found, *phases)}
    if len(machines) != 1:
        raise ValueError(f"a report is about one machine, these results are from {', '.join(sorted(machines))}")
    grouped = records.by_case(found)
    drawn = [(heading, draw(grouped)) for heading, draw in plots.FIGURES.items()]
    used = [record for members in grouped.values() for record in members]
    runs = sorted(records.runs_of((*used, *phases)), key=lambda record: str(record["date"]))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.globals["amount"] = present.amount
    return environment.from_string(TEMPLATE.read_text()).render(
        machine={"driver": None, **runs[-1]["machine"]},
        runs=[{"run": None, **run} for run in runs],
        closing=present.closing(grouped),
        figures=[(heading, _data_url(figure)) for heading, figure in drawn if figure],
        held=held_rows(used),
        phase_headings=present.PHASE_HEADINGS,
        phases=[present.phase_cells(record) for record in phases],
        headings=present.HEADINGS,
        cases=[_case_view(case, group) for case, group in grouped.items()],
        tie=timing.TIE,
    )


def write(found: Sequence[Record], path: Path, phases: Sequence[Record] = ()) -> Path:
    """Writes the report and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found, phases))
    return path
