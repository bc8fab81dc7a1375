"""End to end: time of real models to a given loss, torch.optim against fusedopt, and the optimizer's share.

The character model is the one of `examples/`; the vision model is in `digits.py`. All optimizers start from
the same weights and see the same batches, step by step in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import digits, plots, present, records, report, timing

EXAMPLES = Path(__file__).parent.parent / "examples"
SEED = 0
PHASES = ("forward", "backward", "optimizer")

Factory = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Plan:
    """One model to train.

    Attributes:
        title: What it is.
        steps: Training steps unless told otherwise.
        loss: Validation loss to reach unless told otherwise.
        eval_every: Steps between two evaluations.
        prepare: Given device, steps and factories by name, makes the runs and their endless batches.
    """

    title: str
    steps: int
    loss: float
    eval_every: int
    prepare: Callable[[str, int, Mapping[str, Factory]], tuple[dict[str, Any], Iterator[Any]]]


# ---- models -----------------------------------------------------------------------------------------------


def example_package() -> Any:
    """The examples' `charlm` package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import charlm

    return charlm


def prepare_charlm(device: str, steps: int, factories: Mapping[str, Factory]) -> tuple[dict[str, Any], Iterator[Any]]:
    """The character model under each optimizer."""
    charlm = example_package()
    config = charlm.Config(steps=steps, device=device, seed=SEED)
    text = charlm.build_text(config)
    return {name: charlm.Run(factory, config, text) for name, factory in factories.items()}, text.batches(config)


def prepare_digits(device: str, steps: int, factories: Mapping[str, Factory]) -> tuple[dict[str, Any], Iterator[Any]]:
    """The vision model under each optimizer."""
    images = digits.load(device, SEED)
    training = sys.modules[example_package().Run.__module__]

    class DigitsRun(training.Run):  # type: ignore[misc, name-defined]
        """The example's timed training loop around another model."""

        def __init__(self, factory: Factory) -> None:
            self.model = digits.build(device, SEED)
            self.optimizer = factory(self.model.parameters(), lr=2e-3)
            self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
            self.eval_sets = [[images.seen], [images.val]]
            self.clock = training.Clock(device)
            self.losses = torch.zeros(steps, device=device)
            self.steps = 0
            self.evaluations: list[Any] = []

        def loss(self, batch: digits.Batch) -> torch.Tensor:
            return digits.loss(self.model, batch)

        def evaluate(self) -> None:
            self.model.eval()
            super().evaluate()
            self.model.train()

    return {name: DigitsRun(factory) for name, factory in factories.items()}, images.batches(SEED)


PLANS = {
    "charlm": Plan("character model, AdamW", 600, 2.4, 20, prepare_charlm),
    "digits": Plan("residual network on digits, AdamW", 200, 0.1, 10, prepare_digits),
}


def optimizers(backend: str | None) -> dict[str, Factory]:
    """Who trains: torch as one gets it, torch fused, fusedopt."""
    import fusedopt

    return {
        "torch (default)": torch.optim.AdamW,
        "torch fused": partial(torch.optim.AdamW, fused=True),
        "fusedopt": partial(fusedopt.AdamW, backend=backend),
    }


# ---- training ---------------------------------------------------------------------------------------------


def train_in_turns(
    plan: Plan, device: str, steps: int, factories: Mapping[str, Factory], console: Console
) -> dict[str, Any]:
    """Trains all runs step by step in turns, the order reversed every other step; results by name."""
    runs, batches = plan.prepare(device, steps, factories)
    ordered = list(runs.values())
    for step in track(range(steps), description=plan.title, console=console, transient=True):
        batch = next(batches)
        for run in ordered[:: 1 if step % 2 == 0 else -1]:
            if step % plan.eval_every == 0:
                run.evaluate()
            run.step(batch)
    for run in ordered:
        run.evaluate()
    return {name: run.result() for name, run in runs.items()}


def summarise(results: Mapping[str, Any], goal: float) -> dict[str, dict[str, Any]]:
    """The numbers of each run: time and steps to the goal, median times, the optimizer's share of a step."""
    ours = results["fusedopt"]
    rows = {}
    for name, result in results.items():
        ms = result.median_ms()
        reached = next((e.step for e in result.evaluations if e.val <= goal), None)
        pairs = [a / b for a, b in zip(result.optimizer_ms, ours.optimizer_ms, strict=True)]
        whole = [a / b for a, b in zip(result.step_ms, ours.step_ms, strict=True)]
        rows[name] = {
            "seconds_to_goal": result.seconds_to(goal),
            "steps_to_goal": reached,
            "median_ms": ms,
            "optimizer_share": ms["optimizer"] / ms["step"],
            "optimizer_time_against_fusedopt": vars(timing.bootstrap(pairs)),
            "step_time_against_fusedopt": vars(timing.bootstrap(whole)),
            "final_val_loss": result.evaluations[-1].val,
            "parameters": result.parameters,
            "tensors": result.tensors,
        }
    return rows


def train(options: argparse.Namespace, console: Console) -> int:
    """Trains the chosen models, prints a table each, writes JSON and a picture."""
    if options.steps is not None and options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    factories = optimizers(options.backend)
    lines, drawn = [], {}
    for name in options.model:
        plan = PLANS[name]
        goal = plan.loss if options.loss is None else options.loss
        results = train_in_turns(plan, options.device, options.steps or plan.steps, factories, console)
        rows = summarise(results, goal)
        console.print(result_table(plan, goal, rows))
        drawn[name] = (goal, results, rows)
        threads = torch.get_num_threads()
        lines.append(
            {**records.head(options.device, "train"), "model": name, "goal": goal, "threads": threads, "runs": rows}
        )
    label = "train-" + "-".join(options.model)
    stem = options.out / f"bench-{label}" if options.out else records.default_stem(options.device, label)
    written = [
        records.write(lines, stem.with_suffix(".json")),
        report.save_png(draw(drawn), stem.with_suffix(".png")),
    ]
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def result_table(plan: Plan, goal: float, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """One model's numbers."""
    first = next(iter(rows.values()))
    size = f"{first['parameters']:,} parameters in {first['tensors']} tensors"
    shown = Table(title=f"{plan.title}: {size}; time to validation loss {goal:g}", title_justify="left")
    headings = ("", "to goal", "steps", "a step", "optimizer", "share", "its time ÷ fusedopt's", "final loss")
    for heading in headings:
        shown.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        shown.add_row(
            name,
            present.seconds(row["seconds_to_goal"]),
            str(row["steps_to_goal"] or present.MISSING),
            present.seconds(row["median_ms"]["step"] / 1e3),
            present.seconds(row["median_ms"]["optimizer"] / 1e3),
            f"{row['optimizer_share']:.1%}",
            present.interval(row["optimizer_time_against_fusedopt"]),
            f"{row['final_val_loss']:.4f}",
        )
    return shown


COLOURS = {
    "torch (default)": plots.TORCH["torch-loop"],
    "torch fused": plots.TORCH["torch-fused"],
    "fusedopt": "#d55e00",
}


def draw(drawn: Mapping[str, tuple[float, Mapping[str, Any], Mapping[str, Mapping[str, Any]]]]) -> Figure:
    """For each model: validation loss over training time, and where a step's time goes."""
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(9.6, 3.2 * len(drawn)), layout="constrained")
        axes = figure.subplots(len(drawn), 2, squeeze=False)
        for (curves, bars), (name, (goal, results, rows)) in zip(axes, drawn.items(), strict=True):
            for who, result in results.items():
                times = [sum(result.step_ms[: e.step]) / 1e3 for e in result.evaluations]
                curves.plot(times, [e.val for e in result.evaluations], color=COLOURS[who], label=who)
            curves.axhline(goal, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
            curves.set(xlabel="seconds of training", ylabel="validation loss", title=name, yscale="log")
            curves.legend()
            _draw_phases(bars, rows)
    return figure


def _draw_phases(axis: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    names = list(rows)[::-1]
    left = [0.0] * len(names)
    for phase, shade in zip(PHASES, ("#d0d3d6", "#a9aeb3", "#d55e00"), strict=True):
        width = [rows[name]["median_ms"][phase] for name in names]
        axis.barh(names, width, left=left, color=shade, label=phase)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for position, name in enumerate(names):
        label = f" {rows[name]['median_ms']['optimizer']:.2f} ms, {rows[name]['optimizer_share']:.1%}"
        axis.annotate(label, (left[position], position), va="center", fontsize=8)
    axis.set(xlabel="ms a step, medians", title="Where a step's time goes", xlim=(0, max(left) * 1.3))
    axis.set_ylim(-0.6, len(names) + 0.1)
    axis.legend(ncols=3, loc="upper left")
