"""Draws how SGD, momentum and Adam move: on a ravine, in the first steps, and on mini-batches.

    python examples/trajectories.py --out out/trajectories

Three pictures, each with its numbers printed: `ravine.png`, `bias_correction.png` and `minibatch.png`. A few
seconds on a CPU. All of it is run with fusedopt, in float64.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from figures import COLOURS, panels, save
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

import fusedopt

Cost = Callable[[Tensor], Tensor]
OptimizerFactory = Callable[..., Optimizer]

MAKERS: dict[str, OptimizerFactory] = {
    "SGD": fusedopt.SGD,
    "SGD, momentum 0.9": partial(fusedopt.SGD, momentum=0.9),
    "Adam": fusedopt.Adam,
}


LEARNING_RATES = [0.001 * 10 ** (i / 6) for i in range(21)]
"""From 0.001 to 2.2, six a decade: whatever is compared gets the best of these for itself."""


def descend(make: OptimizerFactory, cost: Cost, start: Sequence[float], steps: int, lr: float) -> Tensor:
    """Positions (steps + 1, dimensions) of a point that goes down `cost` from `start`."""
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = make([point], lr=lr)
    path = [point.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        cost(point).backward()
        optimizer.step()
        path.append(point.detach().clone())
    return torch.stack(path)


@dataclass(frozen=True)
class Descent:
    """Positions (steps + 1, dimensions), the cost at each (steps + 1,), and the learning rate."""

    path: Tensor
    costs: Tensor
    lr: float


def best_descent(path_at: Callable[[float], Tensor], cost: Cost) -> Descent:
    """The descent at the learning rate whose cost is lowest over the whole way, as the mean of its logarithm.

    The mean over the way, because the cost at its end alone would reward a lucky swing.
    """
    descents = [Descent(path, cost(path), lr) for lr in LEARNING_RATES for path in [path_at(lr)]]
    return min(descents, key=lambda descent: float(descent.costs.log().mean().nan_to_num(math.inf)))


# ---- 1. a ravine ------------------------------------------------------------------------------------------

CURVATURE = 50.0
"""How much steeper the ravine is across than along: the condition number of its Hessian."""

START = (-4.0, 1.0)
RAVINE_STEPS = 60


def ravine(angle: float) -> Cost:
    """The cost ½(u² + 50v²), where u and v are x and y turned by `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)

    def cost(point: Tensor) -> Tensor:
        x, y = point.unbind(-1)
        u, v = cos * x + sin * y, cos * y - sin * x
        return 0.5 * (u * u + CURVATURE * v * v)

    return cost


def turned(point: Sequence[float], angle: float) -> tuple[float, float]:
    """Where the point (u, v) of the ravine along x lies once the ravine is turned by `angle`."""
    u, v = point
    return u * math.cos(angle) - v * math.sin(angle), u * math.sin(angle) + v * math.cos(angle)


def draw_ravine(folder: Path, console: Console) -> Path:
    """SGD, momentum and Adam on a ravine along an axis and on the same ravine turned by 30°."""
    figure, (along, across, costs) = panels(3)
    table = Table("ravine", "optimizer", "best lr", f"cost after {RAVINE_STEPS} steps", title="Ravine")
    for axes, angle, style, label in (
        (along, 0.0, "-", "along x"),
        (across, math.pi / 6, "--", "turned by 30°"),
    ):
        cost, start = ravine(angle), turned(START, angle)
        _draw_contours(axes, cost)
        for (name, make), colour in zip(MAKERS.items(), COLOURS, strict=False):
            best = best_descent(partial(descend, make, cost, start, RAVINE_STEPS), cost)
            axes.plot(*best.path.T, ".-", markersize=3, linewidth=1, color=colour, label=f"{name}, lr {best.lr:.2g}")
            costs.plot(best.costs, style, color=colour, label=name if axes is along else None)
            table.add_row(label, name, f"{best.lr:.2g}", f"{best.costs[-1]:.1e}")
        axes.set(title=f"Ravine {label}, {RAVINE_STEPS} steps")
        axes.legend(loc="lower right")
    costs.set(title="Cost (solid: along x, dashed: turned)", xlabel="step", yscale="log")
    costs.legend()
    console.print(table)
    return save(figure, folder / "ravine.png")


def _draw_contours(axes: Axes, cost: Cost) -> None:
    x, y = torch.meshgrid(torch.linspace(-4.6, 1.6, 200), torch.linspace(-3.2, 2.0, 200), indexing="xy")
    levels = [0.1 * 2.5**i for i in range(9)]
    axes.contour(x, y, cost(torch.stack([x, y], -1)), levels=levels, colors="#bbbbbb", linewidths=0.6)
    axes.plot(0, 0, "k+")
    axes.set(xlabel="x", ylabel="y", aspect="equal")


# ---- 2. bias correction -----------------------------------------------------------------------------------

BETAS = (0.9, 0.999)
BIAS_STEPS = 3000
BIAS_LR = 0.1
BIAS_START = 2.0
BIAS_COST_STEPS = 100


class UncorrectedAdam:
    """Adam without bias correction, by giving fusedopt's Adam a learning rate that undoes it at each step.

    Adam moves by lr · (m / c₁) / (√v / c₂ + eps), c₁ = 1 - β₁ᵗ and c₂ = √(1 - β₂ᵗ). With lr · c₁ / c₂ for lr
    that is lr · m / (√v + eps · c₂): Adam without the correction, but for the size of eps.
    """

    def __init__(self, params: list[Tensor], lr: float) -> None:
        self.adam = fusedopt.Adam(params, lr=lr, betas=BETAS)
        self.lr, self.t = lr, 0
        self.zero_grad = self.adam.zero_grad

    def step(self) -> None:
        """One update, at the learning rate of its step."""
        self.t += 1
        beta1, beta2 = BETAS
        self.adam.param_groups[0]["lr"] = self.lr * (1 - beta1**self.t) / math.sqrt(1 - beta2**self.t)
        self.adam.step()


def draw_bias_correction(folder: Path, console: Console) -> Path:
    """How long the first steps are with and without bias correction, and where they lead."""
    figure, (sizes, positions) = panels(2, width=5.0)
    makers = {"with bias correction": partial(fusedopt.Adam, betas=BETAS), "without": UncorrectedAdam}
    table = Table("Adam", "first step", "longest step", "overshoot", title="Bias correction, in units of lr")
    for (name, make), colour in zip(makers.items(), COLOURS, strict=False):
        # On a slope of 1 the gradient never changes: a step ought to be lr long from first to last.
        slope = descend(make, lambda point: point.sum(), [0.0], BIAS_STEPS, BIAS_LR)
        step = -slope.diff(dim=0).flatten() / BIAS_LR
        sizes.plot(range(1, BIAS_STEPS + 1), step, color=colour, label=name)
        bowl = descend(make, lambda point: (0.5 * point * point).sum(), [BIAS_START], BIAS_COST_STEPS, BIAS_LR)
        positions.plot(bowl.flatten(), color=colour, label=name)
        overshoot = max(0.0, -float(bowl.min())) / BIAS_LR
        table.add_row(name, f"{step[0]:.3f}", f"{step.max():.2f}", f"{overshoot:.1f}")
    sizes.set(title="Length of a step on a constant slope", xlabel="step", ylabel="in units of lr", xscale="log")
    positions.axhline(0, color="grey", linewidth=0.8)
    positions.set(title=f"Down ½x² from x = {BIAS_START:g}, lr {BIAS_LR:g}", xlabel="step", ylabel="x")
    for axes in (sizes, positions):
        axes.legend()
    console.print(table)
    return save(figure, folder / "bias_correction.png")


# ---- 3. mini-batches --------------------------------------------------------------------------------------

EPOCHS = 12
BATCH = 8


@dataclass(frozen=True)
class Line:
    """A line to be fitted by least squares: points (n, 2) and noisy targets (n,)."""

    x: Tensor
    y: Tensor

    @classmethod
    def drawn(cls, examples: int, seed: int) -> Line:
        """Two inputs of unlike size, 1 and 0.3, as features that nobody scaled are."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(examples, 2, generator=generator, dtype=torch.float64)
        x *= torch.tensor([1.0, 0.3], dtype=torch.float64)
        noise = torch.randn(examples, generator=generator, dtype=torch.float64)
        return cls(x, x @ torch.tensor([1.5, -4.0], dtype=torch.float64) + 0.5 * noise)

    def cost(self, weights: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Half the mean squared error of the chosen examples at weights (..., 2)."""
        return 0.5 * (weights @ self.x[chosen].T - self.y[chosen]).square().mean(-1)

    def excess(self, weights: Tensor) -> Tensor:
        """Cost over all examples above the least there is, at weights (..., 2)."""
        return self.cost(weights) - self.cost(torch.linalg.lstsq(self.x, self.y[:, None]).solution[:, 0])


def batches(examples: int, size: int, seed: int) -> list[Tensor]:
    """Which examples each step sees: all of them once per epoch, each epoch in a new order."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(examples, generator=generator).split(size) for _ in range(EPOCHS)]
    return [chosen for epoch in epochs for chosen in epoch]


def fit(line: Line, chosen: Sequence[Tensor], decay: bool, lr: float) -> Tensor:
    """Weights (steps + 1, 2) of SGD that sees the chosen examples step by step.

    With `decay` the learning rate falls as 1/t after the first epoch, as Robbins and Monro ask: the sum of
    them all has no bound, that of their squares has one, and the noise of the batches averages out.
    """
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = fusedopt.SGD([weights], lr=lr)
    path = [weights.detach().clone()]
    for step, batch in enumerate(chosen, start=1):
        if decay:
            optimizer.param_groups[0]["lr"] = lr * min(1.0, len(chosen) / EPOCHS / step)
        optimizer.zero_grad()
        line.cost(weights, batch).backward()
        optimizer.step()
        path.append(weights.detach().clone())
    return torch.stack(path)


def draw_minibatch(folder: Path, console: Console, examples: int, seed: int) -> Path:
    """One batch's cost against the cost over all examples, and what a pass over the examples buys."""
    line = Line.drawn(examples, seed)
    small, whole = batches(examples, BATCH, seed), batches(examples, examples, seed)
    runs = {
        "full batch": (whole, False),
        f"batches of {BATCH}": (small, False),
        f"batches of {BATCH}, lr ~ 1/t": (small, True),
    }
    figure, (weights, noise, excess) = panels(3)
    table = Table("SGD", "steps", "best lr", "cost above the least, at the end", title="Mini-batches")
    for (name, (chosen, decay)), colour in zip(runs.items(), COLOURS, strict=False):
        best = best_descent(partial(fit, line, chosen, decay), line.excess)
        label = f"{name}, lr {best.lr:.2g}"
        weights.plot(*best.path.T, ".-", markersize=2, linewidth=0.7, color=colour, label=label)
        passes = torch.linspace(0, EPOCHS, len(best.path))
        excess.plot(passes, best.costs, color=colour, linewidth=0.9, label=name)
        table.add_row(name, str(len(chosen)), f"{best.lr:.2g}", f"{best.costs[-1]:.1e}")
        if chosen is small and not decay:
            _draw_noise(noise, line, best.path[:-1], small)
    weights.set(title="Weights", xlabel="first", ylabel="second")
    excess.set(title="Cost over all, above the least", xlabel="passes over the examples", yscale="log")
    for axes in (weights, excess):
        axes.legend()
    console.print(table)
    return save(figure, folder / "minibatch.png")


def _draw_noise(axes: Axes, line: Line, path: Tensor, chosen: Sequence[Tensor]) -> None:
    passes = torch.arange(len(path)) * BATCH / len(line.y)
    seen = torch.stack([line.cost(weights, batch) for weights, batch in zip(path, chosen, strict=True)])
    axes.plot(passes, seen, ".", markersize=3, color=COLOURS[1], alpha=0.4, label=f"over the step's {BATCH}")
    axes.plot(passes, line.cost(path), color="black", linewidth=1, label=f"over all {len(line.y)}")
    axes.set(title=f"Cost, batches of {BATCH}", xlabel="passes over the examples", yscale="log")
    axes.legend()


def main(arguments: list[str] | None = None) -> None:
    """Draws the three pictures and prints their numbers."""
    parser = argparse.ArgumentParser(
        description="Draws how SGD, momentum and Adam move.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("out/trajectories"), help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the examples and batches of minibatch.png")
    parser.add_argument("--examples", type=int, default=512, help="examples that minibatch.png fits a line to")
    options = parser.parse_args(arguments)
    if options.examples < BATCH:
        parser.error(f"--examples must be at least the batch of {BATCH}, got {options.examples}")
    console = Console()
    pictures = [
        draw_ravine(options.out, console),
        draw_bias_correction(options.out, console),
        draw_minibatch(options.out, console, options.examples, options.seed),
    ]
    console.print("wrote", *pictures, soft_wrap=True)


if __name__ == "__main__":
    main()
