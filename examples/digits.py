"""SGD with momentum against Adam on scikit-learn's digits: training loss, test accuracy, over several seeds.

    python examples/digits.py --seeds 8 --out out/digits

Each seed draws its own split, weights and batches, the same for both optimizers. Each optimizer gets the
learning rate with the best mean accuracy on validation images; test images have no say in it. Written: a
table, `digits.png` and `digits.json`. About half a minute on a CPU. Both optimizers are fusedopt's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import torch
from figures import COLOURS, panels, save
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import ttest_rel
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import fusedopt

MOMENTUM, ADAM = "SGD, momentum 0.9", "Adam"
MAKERS: dict[str, Callable[..., Optimizer]] = {
    MOMENTUM: partial(fusedopt.SGD, momentum=0.9),
    ADAM: fusedopt.Adam,
}
LEARNING_RATES = {
    MOMENTUM: [0.01, 0.03, 0.1, 0.3, 1.0],
    ADAM: [0.001, 0.003, 0.01, 0.03, 0.1],
}
PARTS = {"train": 1097, "val": 300, "test": 400}
"""Images in each part; they add up to the 1797 there are."""

WIDTH = 64
BATCH = 64


@dataclass(frozen=True)
class Outcome:
    """One training: mean training loss and accuracies after each epoch, accuracies as shares."""

    train_loss: list[float]
    val_accuracy: list[float]
    test_accuracy: list[float]


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (n, 64) in 0..1 and their labels (n,)."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def split(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels of each part, drawn by `seed`."""
    images, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen = zip(PARTS, order.split(list(PARTS.values())), strict=True)
    return {part: (images[index], labels[index]) for part, index in chosen}


def train(make: Callable[..., Optimizer], lr: float, seed: int, epochs: int) -> Outcome:
    """Trains one small network; the same seed means the same split, weights and batches."""
    parts = split(seed)
    images, labels = parts["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    generator = torch.Generator().manual_seed(seed)
    optimizer = make(model.parameters(), lr=lr)
    outcome = Outcome([], [], [])
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            outcome.train_loss.append(float(cross_entropy(model(images), labels)))
            outcome.val_accuracy.append(accuracy(model, *parts["val"]))
            outcome.test_accuracy.append(accuracy(model, *parts["test"]))
    return outcome


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose label the model gives the highest score."""
    return float((model(images).argmax(1) == labels).double().mean())


Outcomes = dict[str, dict[float, list[Outcome]]]
"""Per optimizer and learning rate, one outcome for each seed."""


def run_all(seeds: int, epochs: int, console: Console) -> Outcomes:
    """Trains every optimizer at every learning rate with every seed."""
    work = [(name, lr, seed) for name in MAKERS for lr in LEARNING_RATES[name] for seed in range(seeds)]
    outcomes: Outcomes = {name: {lr: [] for lr in LEARNING_RATES[name]} for name in MAKERS}
    for name, lr, seed in track(work, "training", console=console):
        outcomes[name][lr].append(train(MAKERS[name], lr, seed, epochs))
    return outcomes


def best_learning_rate(by_lr: dict[float, list[Outcome]]) -> float:
    """The learning rate with the best mean accuracy on the validation images, after the last epoch."""
    return max(by_lr, key=lambda lr: statistics.fmean(outcome.val_accuracy[-1] for outcome in by_lr[lr]))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean, and standard deviation over the seeds (0 for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


# ---- what came out ----------------------------------------------------------------------------------------


def verdict(outcomes: Outcomes, best: dict[str, float]) -> str:
    """What the seeds allow to be said about test accuracy: a paired t-test at the 5 % level."""
    adam, momentum = ([100 * run.test_accuracy[-1] for run in outcomes[n][best[n]]] for n in (ADAM, MOMENTUM))
    if len(adam) < 3:
        return f"{len(adam)} seeds: too few to tell the two apart."
    mean, spread = mean_and_spread([a - b for a, b in zip(adam, momentum, strict=True)])
    p = float(ttest_rel(adam, momentum).pvalue)
    difference = (
        f"Test accuracy, Adam less momentum, seed by seed: {mean:+.2f} points, standard error"
        f" {spread / len(adam) ** 0.5:.2f}, p = {p:.2f}."
    )
    if p < 0.05:
        return f"{difference} {ADAM if mean > 0 else MOMENTUM} came out ahead on these seeds."
    return f"{difference} These seeds do not tell the two apart."


def print_table(console: Console, outcomes: Outcomes, best: dict[str, float], epochs: int) -> None:
    """Every learning rate's loss and accuracies, mean ± standard deviation over the seeds."""
    seeds = len(outcomes[ADAM][best[ADAM]])
    table = Table(title=f"After {epochs} epochs, mean ± standard deviation over {seeds} seeds")
    for heading in ("optimizer", "lr", "training loss", "validation %", "test %"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, by_lr in outcomes.items():
        for lr, runs in by_lr.items():
            loss = "{:.4f} ± {:.4f}".format(*mean_and_spread([run.train_loss[-1] for run in runs]))
            val, test = (
                "{:.2f} ± {:.2f}".format(*mean_and_spread([100 * getattr(run, f"{part}_accuracy")[-1] for run in runs]))
                for part in ("val", "test")
            )
            chosen = lr == best[name]
            table.add_row(name, f"{lr:g}{' *' if chosen else ''}", loss, val, test, style="bold" if chosen else None)
    console.print(table)
    console.print("* chosen by validation accuracy")


def draw(outcomes: Outcomes, best: dict[str, float], path: Path) -> Path:
    """Training loss and test accuracy by epoch, and accuracy against the learning rate."""
    figure, (loss, test, rates) = panels(3)
    for (name, by_lr), colour in zip(outcomes.items(), COLOURS, strict=False):
        label = f"{name}, lr {best[name]:g}"
        _draw_band(loss, [run.train_loss for run in by_lr[best[name]]], colour, label)
        _draw_band(test, [[100 * a for a in run.test_accuracy] for run in by_lr[best[name]]], colour, label)
        errors = [[100 * (1 - run.test_accuracy[-1]) for run in runs] for runs in by_lr.values()]
        means, spreads = zip(*map(mean_and_spread, errors), strict=True)
        rates.errorbar(list(by_lr), means, spreads, fmt="o-", markersize=4, capsize=2, color=colour, label=name)
    seeds = len(outcomes[ADAM][best[ADAM]])
    loss.set(title="Training loss", xlabel="epoch", ylabel=f"mean and range of {seeds} seeds", yscale="log")
    test.set(title="Test accuracy, %", xlabel="epoch")
    test.set_ylim(bottom=max(80, test.get_ylim()[0]))
    rates.set(title="Test error, %, mean ± stdev", xlabel="learning rate", xscale="log", yscale="log")
    rates.set_yticks([2, 5, 10, 20, 50], labels=["2", "5", "10", "20", "50"])
    rates.set_yticks([], minor=True)
    for axes in (loss, test, rates):
        axes.legend()
    return save(figure, path)


def _draw_band(axes: Axes, curves: list[list[float]], colour: str, label: str) -> None:
    values = torch.tensor(curves, dtype=torch.float64)
    epochs = range(1, values.shape[1] + 1)
    axes.plot(epochs, values.mean(0), color=colour, label=label)
    axes.fill_between(epochs, values.amin(0), values.amax(0), color=colour, alpha=0.2, linewidth=0)


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints the table, writes the picture and the numbers."""
    parser = argparse.ArgumentParser(
        description="SGD with momentum against Adam on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=8, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=25, help="passes over the training images")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="folder for the picture and the numbers")
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    torch.set_num_threads(1)  # faster: a network this small has no work for two
    outcomes = run_all(options.seeds, options.epochs, Console(stderr=True))
    best = {name: best_learning_rate(by_lr) for name, by_lr in outcomes.items()}
    console = Console()
    print_table(console, outcomes, best, options.epochs)
    console.print(verdict(outcomes, best))
    picture = draw(outcomes, best, options.out / "digits.png")
    numbers = options.out / "digits.json"
    runs = {name: {lr: [asdict(run) for run in runs] for lr, runs in by_lr.items()} for name, by_lr in outcomes.items()}
    numbers.write_text(json.dumps({"best_lr": best, "verdict": verdict(outcomes, best), "runs": runs}) + "\n")
    console.print("wrote", picture, "and", numbers, soft_wrap=True)


if __name__ == "__main__":
    main()
