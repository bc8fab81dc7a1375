"""What a run of `bench.quality` gave, and the picture of many: loss by step, and how far it lies from float32's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

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
    """A row for each model: losses of all modes, and beside them the distance to float32's of the same seed."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(10.0, 3.4 * len(curves) + 0.9), layout="constrained")
        rows = figure.subplots(len(curves), 2, squeeze=False)
        for (left, right), (model, runs) in zip(rows, curves.items(), strict=True):
            title = TITLES.get(model, model)
            _draw_losses(left, runs)
            left.set(title=f"{title}: validation loss", ylabel="nats, mean of the seeds")
            _draw_distances(right, runs)
            right.set(title="Minus float32's from the same seed", ylabel="nats, mean and range of the seeds")
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
        losses = [mean(values) for values in zip(*(seed.losses for seed in seeds), strict=True)]
        axis.plot(seeds[0].steps, losses, label=mode, **_look(mode))
        widest = max(widest, max(losses) / min(losses))
    axis.set_xlabel("step")
    if widest > WIDE:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())


def _draw_distances(axis: Axes, runs: Runs) -> None:
    for mode, seeds in runs.items():
        pairs = zip(seeds, runs[BASE], strict=True)
        apart = [[a - b for a, b in zip(seed.losses, base.losses, strict=True)] for seed, base in pairs]
        by_step = list(zip(*apart, strict=True))
        steps = seeds[0].steps
        axis.plot(steps, [mean(values) for values in by_step], **_look(mode))
        low, high = ([pick(values) for values in by_step] for pick in (min, max))
        axis.fill_between(steps, low, high, color=_look(mode)["color"], alpha=0.08, linewidth=0)
    axis.set_xlabel("step")
