"""Codes for 8-bit states, compared: error of the update against float32 states, and training loss, by code and block.

    python -m bench.codes --steps 300 --seeds 2

AdamW in plain torch on the character model of `examples/`; after each step the states go through a code and back.
Beside them float32 states see the same gradients. The error is that of the last update: mean |difference| to mean
|update|.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.train import example_package

Code = Callable[[Tensor], Tensor]  # [blocks, block] to what comes back of it


def linear(x: Tensor) -> Tensor:
    """127 steps to either side of 0, all alike."""
    scale = _largest(x)
    return (x / scale * 127).round() / 127 * scale


def companded(x: Tensor) -> Tensor:
    """127 steps to either side of 0 for the signed root: a value is scale·y·|y|."""
    scale = _largest(x)
    y = ((x / scale).abs().sqrt() * 127).round() / 127
    return (y * y * scale).copysign(x)


@cache
def dynamic_values(signed: bool) -> Tensor:
    """The dynamic tree of T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, section 1.3."""
    bits = 7 if signed else 8
    values = [0.0, 1.0]
    for zeros in range(bits):
        steps = 2 ** (bits - 1 - zeros)
        edges = torch.linspace(0.1, 1, steps + 1)
        values += ((edges[1:] + edges[:-1]) / 2 * 10.0**-zeros).tolist()
    positive = torch.tensor(values)
    return torch.cat([-positive[1:], positive]).sort().values if signed else positive.sort().values


def dynamic(x: Tensor, *, signed: bool) -> Tensor:
    """The nearest value of the dynamic tree."""
    values, scale = dynamic_values(signed), _largest(x)
    place = torch.bucketize(x / scale, (values[1:] + values[:-1]) / 2)
    return values[place] * scale


def of_root(x: Tensor, power: int, *, least: int = 1) -> Tensor:
    """255 steps for the root of a mean of squares (power 2) or the root of that (4); never 0 of what is not."""
    root = x ** (1 / power)
    scale = _largest(root)
    codes = (root / scale * 255).round()
    return (torch.where(x > 0, codes.clamp(min=least), codes) / 255 * scale) ** power


def dithered_root(x: Tensor, power: int) -> Tensor:
    """The same, rounded up with the probability of the rest."""
    root = x ** (1 / power)
    scale = _largest(root)
    codes = (root / scale * 255 + torch.rand_like(x)).floor().clamp(max=255)
    return (torch.where(x > 0, codes.clamp(min=1), codes) / 255 * scale) ** power


def kept(x: Tensor) -> Tensor:
    """No code."""
    return x


FIRST: dict[str, Code] = {
    "float32": kept,
    "linear": linear,
    "companded": companded,
    "dynamic": partial(dynamic, signed=True),
}
SECOND: dict[str, Code] = {
    "float32": kept,
    "linear": partial(of_root, power=1),
    "root, 0 allowed": partial(of_root, power=2, least=0),
    "root": partial(of_root, power=2),
    "root, dithered": partial(dithered_root, power=2),
    "4th root": partial(of_root, power=4),
    "dynamic": partial(dynamic, signed=False),
}
PAIRS = (
    ("float32", "float32", 128),
    *((first, "float32", 128) for first in ("linear", "companded", "dynamic")),
    *(("float32", second, 128) for second in [*SECOND][1:]),
    *(("companded", "root", block) for block in (32, 64, 128, 256, 2048)),
    *(("companded", "4th root", block) for block in (128, 2048)),
    ("dynamic", "dynamic", 256),
    ("dynamic", "dynamic", 2048),
)


@dataclass
class Moments:
    """The two moments of one parameter, as coded and as they would be in float32."""

    coded: list[Tensor]
    exact: list[Tensor]


class CodedAdamW(torch.optim.Optimizer):
    """AdamW whose states go through codes, and what that does to its last update."""

    def __init__(self, params: Iterable[Any], lr: float, codes: tuple[Code, Code], block: int) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "betas": (0.9, 0.999)})
        self.codes, self.block, self.steps = codes, block, 0
        self.error = self.size = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter."""
        self.steps += 1
        self.error = self.size = 0.0
        for group in self.param_groups:
            for param in group["params"]:
                moments = self.state[param].setdefault(
                    "moments", Moments([torch.zeros_like(param) for _ in "mv"], [torch.zeros_like(param) for _ in "mv"])
                )
                update = self._advance(moments.coded, param.grad, group["betas"])
                exact = self._advance(moments.exact, param.grad, group["betas"])
                self.error += float((update - exact).abs().sum())
                self.size += float(exact.abs().sum())
                param.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * update)
                for state, code in zip(moments.coded, self.codes, strict=True):
                    state.copy_(_through(state, code, self.block))

    def _advance(self, moments: list[Tensor], grad: Tensor, betas: tuple[float, float]) -> Tensor:
        (m, v), (beta1, beta2) = moments, betas
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        corrected = (v / (1 - beta2**self.steps)).sqrt() + 1e-8
        return m / (1 - beta1**self.steps) / corrected


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax(dim=1, keepdim=True).clamp(min=1e-38)


def _through(state: Tensor, code: Code, block: int) -> Tensor:
    flat = state.reshape(-1)
    padded = torch.zeros(-(-flat.numel() // block) * block)
    padded[: flat.numel()] = flat
    return code(padded.reshape(-1, block)).reshape(-1)[: flat.numel()].reshape(state.shape)


def compare(steps: int, seeds: int, console: Console) -> None:
    """Trains with every pair of codes and prints a table."""
    charlm = example_package()
    table = Table("exp_avg", "exp_avg_sq", "block", "error of the update", "validation loss")
    for first, second, block in PAIRS:
        losses, errors = [], []
        for seed in range(seeds):
            config = charlm.Config(steps=steps, width=64, layers=2, seed=seed, eval_every=steps)
            optimizers: list[CodedAdamW] = []

            def make(params: Any, lr: float, found: list[CodedAdamW] = optimizers, **_: Any) -> CodedAdamW:
                found.append(CodedAdamW(params, lr, (FIRST[first], SECOND[second]), block))  # noqa: B023
                return found[-1]

            result = charlm.train_together({"it": make}, config)["it"]
            losses.append(result.evaluations[-1].val)
            errors.append(optimizers[0].error / optimizers[0].size)
        mean = sum(losses) / seeds
        table.add_row(first, second, str(block), f"{sum(errors) / seeds:.2%}", f"{mean:.4f}")
        print(
            f"{first} | {second} | {block} | {sum(errors) / seeds:.2%} | {mean:.4f} {losses}",
            file=sys.stderr,
            flush=True,
        )
    console.print(table)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    compare(options.steps, options.seeds, Console())


if __name__ == "__main__":
    main()
