"""Unscale, check, clip, update, average, copy and clear in one launch, and what its report says.

    python examples/phase.py --steps 400 --out out/phase

Trains a small network on scikit-learn's digits twice, with parameters in float32 and in bfloat16, every option of the
phase on. A batch in the middle has a broken image: its gradients are NaN, the step changes nothing and the report
names it. Written: a table, `phase.png` and `phase.json`. A few seconds on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from figures import COLOURS, panels, save
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fusedopt

WIDTH = 64
BATCH = 64
TRAIN = 1400  # images; the others are for the test
MAX_GRAD_NORM = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class History:
    """What the reports of one run said.

    ``norms`` are of all gradients before they are clipped, ``ratios`` the size of an update relative to its parameter
    by parameter, ``lost`` the share of elements whose update was lost to rounding; ``accuracy`` is that on the test
    images with the parameters, with their averages, and with their copies in bfloat16.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)
    broken_at: int = 0
    at_fault: tuple[str, ...] = ()
    skipped: float = 0.0


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (n, 64) in 0..1 and their labels (n,), in an order of their own."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def network(dtype: torch.dtype) -> nn.Sequential:
    """A perceptron with two hidden layers, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        return nn.Sequential(*layers).to(dtype)


def train(dtype: torch.dtype, steps: int, console: Console) -> History:
    """Trains with every option on, and keeps what the reports say."""
    images, labels = digits()
    model = network(dtype)
    light = copy.deepcopy(model).to(torch.bfloat16)
    optimizer = fusedopt.AdamW(
        model.named_parameters(),
        lr=3e-3,
        max_grad_norm=MAX_GRAD_NORM,
        skip_nonfinite=True,
        ema_decay=0.99,
        ema_warmup=True,
        copy_to=list(light.parameters()),
        zero_grads=True,
        report=True,
    )
    scaler = fusedopt.amp.GradScaler("cpu", init_scale=1024.0)
    history = History(broken_at=steps // 2)
    generator = torch.Generator().manual_seed(0)
    for step in track(range(1, steps + 1), f"training in {dtype}", console=console):
        chosen = torch.randint(TRAIN, (BATCH,), generator=generator)
        batch = images[chosen].to(dtype)
        if step == history.broken_at:
            batch[0, 0] = math.nan
        loss = cross_entropy(model(batch).float(), labels[chosen])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        note(history, step, float(loss.detach()), optimizer)
    history.skipped = float(optimizer.skipped_steps)
    test = images[TRAIN:], labels[TRAIN:]
    history.accuracy = {"parameters": accuracy(model, *test), "copies": accuracy(light, *test)}
    with optimizer.swap_ema():
        history.accuracy["averages"] = accuracy(model, *test)
    return history


def note(history: History, step: int, loss: float, optimizer: fusedopt.AdamW) -> None:
    """Keeps the numbers of one step; of one that was skipped, whose gradients were at fault."""
    report = optimizer.report()
    if report.skipped:
        history.at_fault = report.at_fault
        return
    history.steps.append(step)
    history.losses.append(loss)
    history.norms.append(report.whole["grad_norm"])
    history.lost.append(report.whole["lost_share"])
    for row in report.rows:
        history.ratios.setdefault(row["name"], []).append(row["update_ratio"])


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose label the model gives the highest score."""
    dtype = next(model.parameters()).dtype
    return float((model(images.to(dtype)).argmax(1) == labels).double().mean())


def draw(histories: dict[str, History], path: Path) -> Path:
    """Loss, norms beside what they are clipped to, size of the updates, and the share that is lost to rounding."""
    figure, (losses, norms, ratios, lost) = panels(4, width=3.6)
    for (name, history), colour in zip(histories.items(), COLOURS, strict=False):
        losses.plot(history.steps, history.losses, color=colour, label=name, linewidth=1)
        norms.plot(history.steps, history.norms, color=colour, label=name, linewidth=1)
        lost.plot(history.steps, [100 * share for share in history.lost], color=colour, label=name, linewidth=1)
    first = next(iter(histories.values()))
    norms.axhline(MAX_GRAD_NORM, color="grey", linestyle="--", linewidth=1, label="clipped to")
    for axes in (losses, norms, ratios, lost):
        axes.axvline(first.broken_at, color="grey", linestyle=":", linewidth=1, label="broken image: skipped")
    weights = [name for name in first.ratios if name.endswith("weight")]
    for name, colour in zip(weights, COLOURS[2:], strict=False):
        ratios.plot(first.steps, first.ratios[name], color=colour, label=name, linewidth=1)
    losses.set(title="Loss of each batch", xlabel="step", yscale="log")
    norms.set(title="Norm of all gradients", xlabel="step", yscale="log")
    ratios.set(title="Update / parameter, float32", xlabel="step", yscale="log")
    lost.set(title="Updates lost to rounding, %", xlabel="step")
    for axes in (losses, norms, ratios, lost):
        axes.legend()
    return save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints the last report and the table, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(
        description="Everything around an update in one launch, and what its report says.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=400, help="steps of each run")
    parser.add_argument("--out", type=Path, default=Path("out/phase"), help="folder for the picture and the numbers")
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, got {options.steps}")
    torch.set_num_threads(1)  # faster: a network this small has no work for two
    histories = {name: train(dtype, options.steps, Console(stderr=True)) for name, dtype in DTYPES.items()}
    console = Console()
    for name, history in histories.items():
        shares = ", ".join(f"{100 * share:.1f} % with the {what}" for what, share in history.accuracy.items())
        at_fault = f"{history.skipped:.0f} step skipped, gradients not finite: {', '.join(history.at_fault)}"
        console.print(f"{name}: {shares}; {at_fault}")
    picture = draw(histories, options.out / "phase.png")
    numbers = options.out / "phase.json"
    numbers.write_text(json.dumps({name: asdict(history) for name, history in histories.items()}) + "\n")
    console.print("wrote", picture, "and", numbers, soft_wrap=True)


if __name__ == "__main__":
    main()
