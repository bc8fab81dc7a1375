"""Every figure of the benchmark, drawn from records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from math import ceil
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import present, roofline
from bench.case import Case
from bench.peers import BASELINE, PEERS, REFERENCE, is_ours
from bench.records import Record
from bench.workloads import GRID_NAME

Grouped = dict[Case, list[Record]]

OURS = {
    "fusedopt-cpu": "#d55e00",
    "fusedopt-cuda": "#d55e00",
    "fusedopt-triton": "#0072b2",
    "fusedopt-reference": "#c9a227",
}
TORCH = {
    "torch-loop": "#d0d3d6",
    "torch-foreach": "#a9aeb3",
    "torch-fused": "#6c737a",
    "torch-fused-graph": "#454b51",
    "torch-compiled": "#8d99a5",
}
PALETTE = ("#009e73", "#cc79a7", "#7a5195", "#3b7a78", "#6b8e23", "#8c6d31", "#56b4e9", "#b55d60")
"""Okabe and Ito's palette first, which colour-blind readers can tell apart; greys are torch's own."""


STYLE: Any = {
    "axes.edgecolor": "#888888",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "fusedopt",
    "xtick.color": "#555555",
    "ytick.color": "#333333",
}


def colour(peer: str) -> str:
    """A peer's colour, the same in every figure; with more peers than colours, some share one."""
    named = {**OURS, **TORCH}
    others = zip((name for name in PEERS if name not in named), cycle(PALETTE), strict=False)
    return {**named, **dict(others)}.get(peer, "#222222")


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    rows = ceil(count / columns)
    figure = Figure(figsize=(width * min(columns, count), height * rows + 0.6), layout="constrained")
    axes = [figure.add_subplot(rows, min(columns, count), index + 1) for index in range(count)]
    return figure, axes


def _timed(records: Sequence[Record], leave_out: Sequence[str] = ()) -> list[Record]:
    return [r for r in records if r["status"] == "ok" and r["peer"] not in leave_out]


# ---- bars -------------------------------------------------------------------------------------------------


def picture(grouped: Grouped) -> Figure | None:
    """The main picture: a panel of bars per case, time of a step by peer, at the most threads."""
    most = max((case.threads for case in grouped), default=0)
    shown = {case: _timed(records, (REFERENCE,)) for case, records in grouped.items() if case.threads == most}
    shown = {case: records for case, records in shown.items() if records}
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        rows = len({case.optimizer for case in shown})
        columns = min(4, ceil(len(shown) / rows))
        longest = max(map(len, shown.values()))
        figure, axes = _panels(len(shown), columns, 3.6, 0.62 + 0.3 * longest)
        ordered = sorted(shown, key=lambda case: list(dict.fromkeys(c.optimizer for c in shown)).index(case.optimizer))
        for axis, case in zip(axes, ordered, strict=True):
            _bars(axis, case, shown[case])
        first = next(iter(shown.values()))[0]
        where = first["machine"]["gpu"] or f"{first['machine']['cpu']}, {most} threads"
        figure.suptitle(f"Time of one optimizer step, {where}", x=0.01, ha="left", fontsize=12, fontweight="bold")
        labels = f"medians, speed against torch fused · torch {first['versions']['torch']} · {first['date'][:10]}"
        figure.supxlabel(labels, x=0.01, ha="left", fontsize=8, color="#666666")
    return figure


def _bars(axis: Axes, case: Case, records: Sequence[Record]) -> None:
    ordered = list(records)[::-1]
    times = [record["seconds"]["median"] for record in ordered]
    positions = list(range(len(ordered)))
    axis.barh(positions, times, color=[colour(record["peer"]) for record in ordered], height=0.72)
    for position, record in enumerate(ordered):
        ratio = (
            f"  {present.digits(record['ratio']['median'])}×"
            if record.get("ratio") and record["peer"] != BASELINE
            else ""
        )
        axis.annotate(
            present.seconds(record["seconds"]["median"]) + ratio,
            (times[position], position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if is_ours(record["peer"]) else "normal",
        )
    axis.set_yticks(positions, [record["peer"] for record in ordered])
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.set_xlim(0, max(times) * 1.45)
    kind = f"{case.optimizer}, {case.dtype}" if case.dtype != "float32" else case.optimizer
    fresh = "" if case.gradients == "kept" else f", {case.gradients} gradients"
    axis.set_title(f"{case.workload}, {kind}{fresh}", x=-0.36)


def ratios(grouped: Grouped) -> Figure | None:
    """Speed against torch fused of every peer in every case, with bootstrap intervals."""
    shown = {case: [r for r in _timed(records, (REFERENCE,)) if r.get("ratio")] for case, records in grouped.items()}
    shown = {case: records for case, records in shown.items() if records}
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 1.2 + 0.36 * len(shown)), layout="constrained")
        axis = figure.subplots()
        seen: set[str] = set()
        for position, records in enumerate(list(shown.values())[::-1]):
            for record in records:
                _ratio_mark(axis, position, record, record["peer"] not in seen)
                seen.add(record["peer"])
        axis.set_yticks(range(len(shown)), [_tick(case) for case in list(shown)[::-1]])
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        axis.grid(axis="both")
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.set_title("Speed against torch fused (right is faster; bars are 95 % intervals)")
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _ratio_mark(axis: Axes, position: int, record: Record, first: bool) -> None:
    ratio, ours = record["ratio"], is_ours(record["peer"])
    axis.errorbar(
        ratio["median"],
        position,
        xerr=[[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]],
        fmt="D" if ours else "o",
        markersize=7 if ours else 5,
        color=colour(record["peer"]),
        label=record["peer"] if first else None,
        zorder=3 if ours else 2,
    )


def _tick(case: Case) -> str:
    threads = f", {case.threads} thr." if case.device == "cpu" else ""
    gradients = "" if case.gradients == "kept" else f", {case.gradients}"
    dtype = "" if case.dtype == "float32" else f" {case.dtype}"
    return f"{case.workload} {case.optimizer}{dtype}{gradients}{threads}"


# ---- curves -----------------------------------------------------------------------------------------------


def _families(grouped: Grouped) -> dict[tuple[str, str, str], Grouped]:
    """Cases with kept gradients by optimizer, dtype, and one tensor or lists of them; at the most threads."""
    most = max((case.threads for case in grouped), default=0)
    families: dict[tuple[str, str, str], Grouped] = {}
    for case, records in grouped.items():
        if case.threads == most and case.gradients == "kept" and _timed(records):
            kind = "one tensor" if case.shapes.tensors == 1 else "lists of tensors"
            families.setdefault((case.optimizer, case.dtype, kind), {})[case] = records
    return {kind: family for kind, family in families.items() if len({c.shapes.elements for c in family}) > 1}


def _curves(axis: Axes, family: Grouped, x: Callable[[Record], float], y: Callable[[Record], float]) -> None:
    """Points of each peer in order of x, joined by a line where all workloads are of the kind COUNTxNUMEL."""
    points: dict[str, list[tuple[float, float]]] = {}
    for records in family.values():
        for record in _timed(records, (REFERENCE,)):
            points.setdefault(record["peer"], []).append((x(record), y(record)))
    alike = all(GRID_NAME.fullmatch(case.workload) for case in family)
    for peer, values in points.items():
        xs, ys = zip(*sorted(values), strict=True)
        width = (2.2 if is_ours(peer) else 1.4) if alike else 0
        axis.plot(xs, ys, marker="o", markersize=4, color=colour(peer), label=peer, linewidth=width)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(which="major")


def _figure_of_families(grouped: Grouped, draw: Callable[[Axes, Grouped], None]) -> Figure | None:
    families = _families(grouped)
    if not families:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(families), 2, 5.6, 3.6)
        for axis, (names, family) in zip(axes, families.items(), strict=True):
            draw(axis, family)
            axis.set_title(", ".join(names))
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


def speed_against_size(grouped: Grouped) -> Figure | None:
    """Time of a step against the number of elements."""

    def draw(axis: Axes, family: Grouped) -> None:
        _curves(axis, family, lambda r: float(r["elements"]), lambda r: float(r["seconds"]["median"]) * 1e3)
        axis.set(xlabel="elements", ylabel="ms a step")

    return _figure_of_families(grouped, draw)


def roofline_figure(grouped: Grouped) -> Figure | None:
    """Bandwidth against bytes moved, under the measured roof and the model's curve."""

    def draw(axis: Axes, family: Grouped) -> None:
        _curves(
            axis,
            family,
            lambda r: float(r["bytes_moved"]),
            lambda r: float(r["bytes_moved"]) / float(r["seconds"]["median"]) / 1e9,
        )
        records = [r for rs in family.values() for r in _timed(rs)]
        roofs = [r["roof_bytes_per_s"] for r in records if r.get("roof_bytes_per_s")]
        if roofs:
            _roof_and_model(axis, records, float(np.median(roofs)))
        axis.set(xlabel="bytes a step has to move", ylabel="GB/s")

    return _figure_of_families(grouped, draw)


def _roof_and_model(axis: Axes, records: Sequence[Record], roof: float) -> None:
    """The measured roof as a line, and the model's prediction at that bandwidth."""
    cuda = records[0]["device"] == "cuda"
    sizes = np.geomspace(min(r["bytes_moved"] for r in records), max(r["bytes_moved"] for r in records), 60)
    predicted = [size / roofline.predict(size, roof, 1.0, launches=1 if cuda else 0) / 1e9 for size in sizes]
    axis.axhline(roof / 1e9, color="#000000", linewidth=1, label="roof of this machine, measured")
    if cuda:
        axis.plot(sizes, predicted, color="#000000", linewidth=1, linestyle=(0, (4, 3)), label="model")
    else:
        cache = records[0]["machine"]["cache_bytes"]
        axis.axvspan(
            sizes[0],
            min(cache, sizes[-1]),
            color="#000000",
            alpha=0.05,
            linewidth=0,
            label="fits the last cache",
        )


def host_time(grouped: Grouped) -> Figure | None:
    """Host time of a step against the number of tensors, by way of making gradients."""
    kinds = [gradients for gradients in ("kept", "fresh") if any(case.gradients == gradients for case in grouped)]
    small = {case: records for case, records in grouped.items() if case.shapes.elements <= 64 * case.shapes.tensors}
    panels = {kind: {c: r for c, r in small.items() if c.gradients == kind} for kind in kinds}
    panels = {
        f"{kind} gradients, {optimizer}": {c: r for c, r in family.items() if c.optimizer == optimizer}
        for kind, family in panels.items()
        for optimizer in dict.fromkeys(case.optimizer for case in family)
    }
    most = max((case.threads for case in grouped), default=0)
    panels = {name: {c: r for c, r in family.items() if c.threads == most} for name, family in panels.items()}
    panels = {name: family for name, family in panels.items() if len(family) > 1}
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _panels(len(panels), 2, 5.6, 3.6)
        for axis, (name, family) in zip(axes, panels.items(), strict=True):
            _curves(
                axis,
                family,
                lambda r: float(r["tensors"]),
                lambda r: float(r["host_seconds"]["median"]) * 1e6,
            )
            axis.set(xlabel="tensors", ylabel="µs on the host")
            axis.set_title(name)
        handles = {
            label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    return figure


FIGURES: dict[str, Callable[[Grouped], Figure | None]] = {
    "Time of a step": picture,
    "Speed against torch fused": ratios,
    "Time against size": speed_against_size,
    "Roofline": roofline_figure,
    "Host time against the number of tensors": host_time,
}
"""The report's figures, in order, by heading."""
