"""Final losses of the character model in each precision mode, over several seeds, against float32 AdamW.

Example: python -m bench.quality --steps 300 --seeds 3 --out out/quality
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench.train import example_package

F32, I8 = torch.float32, torch.int8
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32": ("float32", {}),
    "float32, int8 states": ("float32", {"state_dtype": I8}),
    "bfloat16": ("bfloat16", {}),
    "split, float32 states": ("bfloat16", {"master": "split", "state_dtype": F32}),
    "split, int8 states": ("bfloat16", {"master": "split", "state_dtype": I8}),
    "kahan, float32 states": ("bfloat16", {"master": "kahan", "state_dtype": F32}),
    "stochastic, int8 states": ("bfloat16", {"rounding": "stochastic", "state_dtype": I8}),
}


def train(mode: str, seed: int, steps: int) -> list[tuple[int, float]]:
    """Step and validation loss of each evaluation of one run."""
    charlm = example_package()
    dtype, options = MODES[mode]
    every = max(1, steps // 6)
    config = charlm.Config(steps=steps, width=64, layers=2, seed=seed, eval_every=every, dtype=dtype)
    result = charlm.train_together({mode: partial(fusedopt.AdamW, **options)}, config)[mode]
    return [(evaluation.step, evaluation.val) for evaluation in result.evaluations]


def draw(curves: dict[str, list[list[tuple[int, float]]]], path: Path) -> None:
    """Mean of the seeds for each mode, and their spread."""
    import figures  # of examples/, on the path since example_package

    figure, (axes,) = figures.panels(1, height=4.5, width=7.0)
    for mode, runs in curves.items():
        steps = [step for step, _ in runs[0]][1:]
        losses = [[loss for _, loss in run][1:] for run in runs]
        means = [statistics.mean(values) for values in zip(*losses, strict=True)]
        (line,) = axes.plot(steps, means, label=mode)
        low, high = ([pick(values) for values in zip(*losses, strict=True)] for pick in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.1)
    axes.set(title="Validation loss: mean and range of the seeds", xlabel="step", ylabel="nats a character")
    axes.legend()
    figures.save(figure, path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/quality"))
    options = parser.parse_args()
    table = Table("mode", "validation loss", "of the seeds")
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    for mode in MODES:
        curves[mode] = [train(mode, seed, options.steps) for seed in range(options.seeds)]
        last = [run[-1][1] for run in curves[mode]]
        table.add_row(mode, f"{statistics.mean(last):.4f}", ", ".join(f"{loss:.4f}" for loss in last))
        print(mode, last, flush=True)
    Console(width=100).print(table)
    draw(curves, options.out / "quality.png")


if __name__ == "__main__":
    main()
