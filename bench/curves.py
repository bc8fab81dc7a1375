"""What a run of `bench.quality` gave, and the picture of many: loss by step, and how far from float32 it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from bench import plots


@dataclass(frozen=True)
class Curve:
    """One run: validation loss and accuracy at some steps, and the mean share of lost updates where it is known."""

    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    lost: float | None


Runs = Mapping[str, Sequence[Curve]]
"""The seeds' curves by mode, float32 among them."""

BASE = "float32"
# Okabe and Ito's palette: a colour for what is kept of the parameter, a line style for the states.
COLOURS = {"float32": "#333333", "bfloat16": "#d55e00", "split": "#0072b2", "kahan": "#cc79a7", "stochastic": "#009e73"}
STYLES = {"": "-", "float32 states": "-", "int8 states": "--", "float8 states": ":"}
WIDE = 5.0
"""Largest loss to smallest, beyond which the axis is logarithmic."""

TITLES = {"charlm": "Character model", "digits": "Residual network on digits"}


def draw(curves: Mapping[str, Runs]) -> Figure:
    """A row for each model: losses by step, and how far the last ones lie from float32's of the same seed."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.5, 3.4 * len(curves) + 0.9), layout="constrained")
        rows = figure.subplots(len(curves), 2, squeeze=False)
        for (left, right), (model, runs) in zip(rows, curves.items(), strict=True):
            _draw_losses(left, runs)
            left.set(title=f"{TITLES.get(model, model)}: validation loss", xlabel="step")
            left.set_ylabel("nats, mean and range of the seeds")
            _draw_ends(right, runs)
            right.set(title="At the end, minus float32's of the same seed")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _look(mode: str) -> dict[str, str]:
    kept, _, states = mode.partition(", ")
    plain = mode == "bfloat16, float32 states"
    return {"color": COLOURS.get(kept, "#777777"), "linestyle": "-." if plain else STYLES.get(states, "-")}


def _draw_losses(axis: Axes, runs: Runs) -> None:
    widest = 1.0
    for mode, seeds in runs.items():
        by_step = list(zip(*(seed.losses for seed in seeds), strict=True))
        means = [mean(losses) for losses in by_step]
        axis.plot(seeds[0].steps, means, label=mode, linewidth=1.2, **_look(mode))
        low, high = ([pick(losses) for losses in by_step] for pick in (min, max))
        axis.fill_between(seeds[0].steps, low, high, color=_look(mode)["color"], alpha=0.06, linewidth=0)
        widest = max(widest, max(means) / min(means))
    if widest > WIDE:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())


def _draw_ends(axis: Axes, runs: Runs) -> None:
    """A line of dots for each mode; behind them the range of float32's own seeds."""
    ends = [base.losses[-1] for base in runs[BASE]]
    axis.axvspan(min(ends) - mean(ends), max(ends) - mean(ends), color="#000000", alpha=0.06, linewidth=0)
    axis.axvline(0, color=COLOURS[BASE], linewidth=0.8)
    names = [mode for mode in runs if mode != BASE][::-1]
    for height, mode in enumerate(names):
        apart = [run.losses[-1] - end for run, end in zip(runs[mode], ends, strict=True)]
        colour = _look(mode)["color"]
        axis.scatter(apart, [height] * len(apart), color=colour, s=14, alpha=0.5, linewidths=0)
        axis.scatter([mean(apart)], [height], color=colour, s=120, marker="|", linewidths=2)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.set_xlabel("nats: seeds and their mean; shaded: float32's own seeds")
