"""Trains a small GPT on Python's standard library with torch's AdamW and with fusedopt's, and compares them.

    python examples/train_charlm.py                    # both
    python examples/train_charlm.py --optimizer all    # torch's for-loop and foreach as well
    python examples/train_charlm.py --device cuda --width 512 --layers 8 --batch 64 --block 256

All optimizers start from the same weights and see the same batches, in turns. Written to the output folder:
`charlm.png` (loss curves, their difference, and where a step's time goes) and `charlm.json` (every number).
On a GPU some of torch's own backward kernels add in no fixed order: there, part of the difference is theirs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import sys
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from charlm import Config, OptimizerFactory, Result, Run, Text, build_text, train_together
from figures import COLOURS, panels, save
from matplotlib.axes import Axes
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import fusedopt

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "torch": partial(torch.optim.AdamW, fused=True),
    "fusedopt": fusedopt.AdamW,
    "torch-foreach": partial(torch.optim.AdamW, foreach=True),
    "torch-loop": partial(torch.optim.AdamW, foreach=False, fused=False),
}
SETS = {"both": ["torch", "fusedopt"], "all": list(OPTIMIZERS), **{name: [name] for name in OPTIMIZERS}}

PHASES = ("forward", "backward", "optimizer")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line: `--optimizer`, `--backend`, `--out` and one option for each field of `Config`."""
    parser = argparse.ArgumentParser(
        description="Trains a small GPT with torch's and fusedopt's AdamW and compares the two.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--optimizer",
        choices=list(SETS),
        default="both",
        help="what to train with; `torch` is its fastest AdamW, fused=True",
    )
    parser.add_argument(
        "--backend",
        choices=fusedopt.available_backends(),
        help="fusedopt backend; when not given, the best for the device",
    )
    parser.add_argument("--out", type=Path, default=Path("out/charlm"), help="folder for the picture and the numbers")
    for option in dataclasses.fields(Config):
        parser.add_argument(
            f"--{option.name.replace('_', '-')}",
            type=type(option.default),
            default=option.default,
            help=option.metadata["help"],
        )
    return parser.parse_args(arguments)


def chosen_optimizers(names: list[str], backend: str | None) -> dict[str, OptimizerFactory]:
    """The named factories, fusedopt's bound to `backend` where one is asked for."""
    chosen = {name: OPTIMIZERS[name] for name in names}
    if backend and "fusedopt" in chosen:
        chosen["fusedopt"] = partial(fusedopt.AdamW, backend=backend)
    return chosen


def train_with_progress(factories: Mapping[str, OptimizerFactory], config: Config, text: Text) -> dict[str, Result]:
    """`train_together` under a progress bar that shows the latest losses."""
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[losses]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=config.steps, losses="")

        def show(runs: dict[str, Run]) -> None:
            step = next(iter(runs.values())).steps
            if step % 10 == 0:  # reading a loss waits for a GPU
                losses = "  ".join(f"{name} {float(run.losses[step - 1]):.4f}" for name, run in runs.items())
                progress.update(task, losses=losses)
            progress.advance(task)

        return train_together(factories, config, text, show)


# ---- what came out ----------------------------------------------------------------------------------------


def differences(results: Mapping[str, Result]) -> dict[str, list[float]]:
    """|loss - loss of fusedopt| of each step for every other optimizer; empty where fusedopt did not run."""
    if "fusedopt" not in results:
        return {}
    ours = results["fusedopt"].losses
    return {
        name: [abs(a - b) for a, b in zip(result.losses, ours, strict=True)]
        for name, result in results.items()
        if name != "fusedopt"
    }


def paired_ratio(theirs: Result, ours: Result) -> float:
    """Median over the steps of their optimizer's time against ours."""
    return statistics.median(a / b for a, b in zip(theirs.optimizer_ms, ours.optimizer_ms, strict=True))


def batch_noise(result: Result) -> float:
    """How far a batch's loss strays by chance, from neighbours in the last quarter: stdev(b - a) / √2."""
    last = result.losses[-max(3, len(result.losses) // 4) :]
    steps = [b - a for a, b in pairwise(last)]
    return statistics.stdev(steps) / 2**0.5 if len(steps) > 1 else 0.0


def summary(results: Mapping[str, Result]) -> dict[str, Any]:
    """The closing numbers, as they go into the table and the JSON."""
    rows: dict[str, Any] = {}
    for name, result in results.items():
        last, ms = result.evaluations[-1], result.median_ms()
        rows[name] = {
            "final_train_loss": last.train,
            "final_val_loss": last.val,
            "median_ms": ms,
            "optimizer_share": ms["optimizer"] / ms["step"],
        }
    against = {}
    for name, difference in differences(results).items():
        largest = max(difference)
        against[name] = {
            "largest_difference": largest,
            "at_step": difference.index(largest),
            "first_difference_at_step": next((i for i, d in enumerate(difference) if d), None),
            "final_val_loss_difference": rows[name]["final_val_loss"] - rows["fusedopt"]["final_val_loss"],
            "optimizer_time_ratio": paired_ratio(results[name], results["fusedopt"]),
            "batch_noise": batch_noise(results["fusedopt"]),
        }
    return {"runs": rows, "against_fusedopt": against}


def machine(config: Config, backend: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = torch.device(config.device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedopt": fusedopt.__version__,
        "backend": backend or "the best for the device",
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else (platform.processor() or platform.machine()),
        "threads": torch.get_num_threads(),
    }


def print_table(console: Console, results: Mapping[str, Result], closing: Mapping[str, Any], config: Config) -> None:
    """The closing table and what it does and does not show."""
    first = next(iter(results.values()))
    console.print(
        f"AdamW, {first.parameters:,} parameters in {first.tensors} tensors, {config.steps} steps,"
        f" {config.dtype}, {config.device}, {torch.get_num_threads()} CPU threads"
    )
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("")
    for heading in ("train", "val", *PHASES, "step", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in closing["runs"].items():
        losses = [f"{row[f'final_{part}_loss']:.4f}" for part in ("train", "val")]
        times = [f"{row['median_ms'][phase]:.2f}" for phase in (*PHASES, "step")]
        table.add_row(name, *losses, *times, f"{row['optimizer_share']:.1%}")
    console.print(table)
    console.print("train, val: final loss over fixed windows, nats a character. Times: medians over the steps.")
    console.print("share: the optimizer's part of the step; forward and backward are torch's in every row.")
    for name, row in closing["against_fusedopt"].items():
        ratio = f"{row['optimizer_time_ratio']:.2f}x"
        console.print(f"{name} against fusedopt")
        console.print(f"  time of optimizer.step(): {ratio} fusedopt's (median of the steps' pairs)")
        console.print(f"  loss curves: {_agreement(row)}")


def _agreement(row: Mapping[str, Any]) -> str:
    if row["first_difference_at_step"] is None:
        return "equal to the last bit"
    return (
        f"equal to the last bit before step {row['first_difference_at_step']};"
        f" largest difference {row['largest_difference']:.1e}, at step {row['at_step']},"
        f" where one batch's own noise is {row['batch_noise']:.1e};"
        f" final validation loss {row['final_val_loss_difference']:+.1e}"
    )


# ---- picture ----------------------------------------------------------------------------------------------


def draw(results: Mapping[str, Result], closing: Mapping[str, Any], path: Path) -> Path:
    """Loss curves, their difference, and the split of a step's time."""
    figure, (losses, difference, times) = panels(3)
    colours = dict(zip(OPTIMIZERS, COLOURS, strict=False))
    for name in sorted(results, key="fusedopt".__eq__):  # fusedopt last, dashed, so that what it covers shows
        result, style = results[name], "--" if name == "fusedopt" else "-"
        losses.plot(result.losses, color=colours[name], alpha=0.3, linewidth=0.8, linestyle=style)
        steps, values = zip(*((e.step, e.val) for e in result.evaluations), strict=True)
        losses.plot(steps, values, color=colours[name], label=f"{name}, validation", linestyle=style)
    losses.set(title="Loss (faint: each batch's)", xlabel="step", ylabel="nats a character")
    losses.legend()
    _draw_differences(difference, results, colours)
    _draw_times(times, closing["runs"])
    return save(figure, path)


def _draw_differences(axes: Axes, results: Mapping[str, Result], colours: Mapping[str, str]) -> None:
    axes.set(title="|loss − fusedopt's loss|, each batch", xlabel="step", ylabel="nats a character")
    curves = differences(results)
    if not any(map(any, curves.values())):
        message = "equal to the last bit" if curves else "nothing to compare"
        axes.text(0.5, 0.5, message, ha="center", transform=axes.transAxes)
        return
    for name, curve in curves.items():  # a zero has no place on a logarithmic axis
        axes.plot([d or float("nan") for d in curve], ".", markersize=2, color=colours[name], label=name)
    axes.axhline(batch_noise(results["fusedopt"]), color="grey", linewidth=0.8, label="a batch's own noise")
    axes.set_yscale("log")
    axes.legend()


def _draw_times(axes: Axes, rows: Mapping[str, Any]) -> None:
    names = list(rows)
    left = [0.0] * len(names)
    for phase, colour in zip(PHASES, ("#cccccc", "#999999", "#d55e00"), strict=True):
        width = [rows[name]["median_ms"][phase] for name in names]
        axes.barh(names, width, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, width, strict=True)]
    for y, name in enumerate(names):
        share = f"optimizer {rows[name]['median_ms']['optimizer']:.2f} ms, {rows[name]['optimizer_share']:.1%}"
        axes.annotate(share, (0, y), xytext=(6, 0), textcoords="offset points", va="center")
    axes.grid(visible=False, axis="y")
    axes.set(title="Where a step's time goes", xlabel="ms, medians", ylim=(len(names) - 0.4, -1.0))
    axes.legend(ncols=len(PHASES), loc="upper left")


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints the table, writes the picture and the numbers."""
    options = vars(parse_arguments(arguments))
    optimizer, backend, out = (options.pop(name) for name in ("optimizer", "backend", "out"))
    try:
        config = Config(**options)
        text = build_text(config)
    except ValueError as error:
        print(f"train_charlm.py: {error}", file=sys.stderr)
        return 2
    results = train_with_progress(chosen_optimizers(SETS[optimizer], backend), config, text)
    closing = summary(results)
    console = Console()
    print_table(console, results, closing, config)
    picture = draw(results, closing, out / "charlm.png")
    numbers = out / "charlm.json"
    record = {
        "machine": machine(config, backend),
        "config": dataclasses.asdict(config),
        "summary": closing,
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
    }
    numbers.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"wrote {picture} and {numbers}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
