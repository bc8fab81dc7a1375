"""Final losses of two models in each precision mode, over several seeds, against float32 AdamW.

    python -m bench.quality --out out/quality
    python -m bench.quality --model digits --steps 100 --seeds 5

The models are the character model of `examples/` (width 64, 2 layers) and the residual network of `bench/digits.py`,
whose norms stay in float32. Modes see the same batches, from the same weights for a seed. Losses are those of the
parameters as they are stored, computed in float32 whatever the parameters' dtype. `lost` is the mean over every tenth
step of the share of updates that left a bfloat16 parameter as it was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import fusedopt
from bench import records, script
from bench.curves import Curve, draw
from bench.tasks import TASKS
from bench.train import example_package
from fusedopt.blocks import FLOAT8

F32, BF16, I8 = torch.float32, torch.bfloat16, torch.int8
REPORT_EVERY = 10


@dataclass(frozen=True)
class Mode:
    """Dtype of the parameters, options of the optimizer."""

    dtype: torch.dtype
    options: dict[str, Any]

    @property
    def reports(self) -> bool:
        """Whether updates may be lost to rounding."""
        return self.dtype == BF16


MODES = {
    "float32": Mode(F32, {}),
    "float32, int8 states": Mode(F32, {"state_dtype": I8}),
    "float32, float8 states": Mode(F32, {"state_dtype": FLOAT8}),
    "bfloat16": Mode(BF16, {}),
    "bfloat16, float32 states": Mode(BF16, {"state_dtype": F32}),
    "split, float32 states": Mode(BF16, {"master": "split", "state_dtype": F32}),
    "split, int8 states": Mode(BF16, {"master": "split", "state_dtype": I8}),
    "split, float8 states": Mode(BF16, {"master": "split", "state_dtype": FLOAT8}),
    "kahan, float32 states": Mode(BF16, {"master": "kahan", "state_dtype": F32}),
    "stochastic, float32 states": Mode(BF16, {"rounding": "stochastic", "state_dtype": F32}),
    "stochastic, int8 states": Mode(BF16, {"rounding": "stochastic", "state_dtype": I8}),
    "stochastic, float8 states": Mode(BF16, {"rounding": "stochastic", "state_dtype": FLOAT8}),
}


def train(model: str, mode: Mode, seed: int, steps: int, evaluations: int = 10) -> Curve:
    """One run."""
    extra = {"report": REPORT_EVERY} if mode.reports else {}
    task = TASKS[model](mode.dtype, partial(fusedopt.AdamW, **mode.options, **extra), seed, steps)
    every = max(1, steps // evaluations)
    at, found, lost = [0], [task.evaluate()], []
    for step in range(1, steps + 1):
        task.step()
        if mode.reports and step % REPORT_EVERY == 1:
            lost.append(task.optimizer.report().whole["lost_share"])
        if step % every == 0 or step == steps:
            at.append(step)
            found.append(task.evaluate())
    losses, accuracies = zip(*found, strict=True)
    return Curve(at, list(losses), list(accuracies), mean(lost) if lost else None)


def table(model: str, curves: dict[str, list[Curve]]) -> Table:
    """Final numbers of one model, and what the seeds gave."""
    shown = Table("mode", "loss", "to float32", "losses of the seeds", "accuracy", "lost", title=model)
    for mode, runs in curves.items():
        last = [run.losses[-1] for run in runs]
        apart = [loss - run.losses[-1] for loss, run in zip(last, curves["float32"], strict=True)]
        lost = [run.lost for run in runs if run.lost is not None]
        shown.add_row(
            mode,
            f"{mean(last):.4f}",
            f"{mean(apart):+.4f} ({min(apart):+.4f} to {max(apart):+.4f})",
            ", ".join(f"{loss:.4f}" for loss in last),
            f"{mean(run.accuracies[-1] for run in runs):.2%}",
            f"{mean(lost):.1%}" if lost else "",
        )
    return shown


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.quality")
    parser.add_argument("--model", nargs="+", choices=[*TASKS], default=[*TASKS], help="which to train; left out: all")
    parser.add_argument("--steps", type=script.count, default=200, metavar="N", help="training steps of each run")
    parser.add_argument("--seeds", type=script.count, default=3, metavar="N", help="runs of each mode: seeds 0, 1, ...")
    parser.add_argument(
        "--out", type=script.folder, metavar="FOLDER", default=Path("out/quality"), help="of curves and picture"
    )
    options = script.parsed(parser, words)
    curves: dict[str, dict[str, list[Curve]]] = {}
    for model in options.model:
        runs = script.track(MODES.items(), len(MODES), model)
        curves[model] = {
            name: [train(model, mode, seed, options.steps) for seed in range(options.seeds)] for name, mode in runs
        }
        Console(width=140).print(table(model, curves[model]))
    stem = options.out / ("quality-" + "-".join(options.model))
    lines = [
        {**records.head("cpu", "quality"), "model": model, "mode": mode, "seed": seed, **asdict(run)}
        for model, of in curves.items()
        for mode, runs in of.items()
        for seed, run in enumerate(runs)
    ]
    example_package()
    import figures  # of examples/, on the path by now

    picture = figures.save(draw(curves), stem.with_suffix(".png"))
    for path in (records.write(lines, stem.with_suffix(".jsonl")), picture):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
