"""Codes for 8-bit states, compared: error of the update against float32 states, and training loss, by code and block.

    python -m bench.codes --steps 250 --seeds 2

AdamW in plain torch on the character model of `examples/`; after each step the states go through a code and back.
Beside them float32 states see the same gradients. The error is that of the last update: mean |difference| to mean
|update|. int8 and float8 are the codes of fusedopt, by its reference; all others were tried and not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import script
from bench.train import example_package
from fusedopt import blocks

Code = Callable[[Tensor], Tensor]  # [blocks, block] to what comes back of it


def shipped(x: Tensor, dtype: torch.dtype, *, is_square: bool = False) -> Tensor:
    """A code of fusedopt itself; where it rounds at random, by the bits of a step drawn here."""
    step = int(torch.randint(2**31, ()))
    codes, scales = blocks.coded(x, dtype, block=x.shape[1], step=step, is_square=is_square)
    return blocks.decoded(codes, scales, block=x.shape[1])


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


def kept(x: Tensor) -> Tensor:
    """No code."""
    return x


FIRST: dict[str, Code] = {
    "float32": kept,
    "int8": partial(shipped, dtype=torch.int8),
    "float8": partial(shipped, dtype=blocks.FLOAT8),
    "companded": companded,
    "dynamic": partial(dynamic, signed=True),
}
SECOND: dict[str, Code] = {
    "float32": kept,
    "int8": partial(shipped, dtype=torch.uint8),
    "float8": partial(shipped, dtype=blocks.FLOAT8, is_square=True),
    "float8, to nearest": partial(shipped, dtype=blocks.FLOAT8),
    "linear": partial(of_root, power=1),
    "root, 0 allowed": partial(of_root, power=2, least=0),
    "root, to nearest": partial(of_root, power=2),
    "4th root": partial(of_root, power=4),
    "dynamic": partial(dynamic, signed=False),
}
BLOCKS = (32, 64, 128, 256)
PAIRS = (
    ("float32", "float32", 128),
    *((first, "float32", 128) for first in [*FIRST][1:]),
    *(("float32", second, 128) for second in [*SECOND][1:]),
    *((code, code, block) for code in ("int8", "float8") for block in BLOCKS),
    ("int8", "float8", 128),
    ("float8", "int8", 128),
    ("companded", "4th root", 2048),
    ("dynamic", "dynamic", 256),
    ("dynamic", "dynamic", 2048),
)
"""What is measured: codes of `exp_avg` and `exp_avg_sq`, elements of a block."""


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


def train(first: str, second: str, block: int, steps: int, seed: int) -> tuple[float, float]:
    """Error of the last update and validation loss of one run."""
    charlm = example_package()
    config = charlm.Config(steps=steps, width=64, layers=2, seed=seed, eval_every=steps)
    made: list[CodedAdamW] = []

    def make(params: Any, lr: float, **_: Any) -> CodedAdamW:
        made.append(CodedAdamW(params, lr, (FIRST[first], SECOND[second]), block))
        return made[-1]

    torch.manual_seed(seed)
    result = charlm.train_together({"it": make}, config)["it"]
    return made[0].error / made[0].size, result.evaluations[-1].val


def compare(steps: int, seeds: int, pairs: Sequence[tuple[str, str, int]] = PAIRS) -> Table:
    """Trains with every pair of codes; a row each: error, loss, and how far seeds lie apart."""
    table = Table("exp_avg", "exp_avg_sq", "block", "error of the update", "of the seeds", "validation loss")
    for first, second, block in script.track(pairs, len(pairs), "pairs of codes"):
        found = [train(first, second, block, steps, seed) for seed in range(seeds)]
        errors, losses = zip(*found, strict=True)
        each = ", ".join(f"{error:.2%}" for error in errors)
        shown = "" if first == second == "float32" else str(block)
        table.add_row(first, second, shown, f"{mean(errors):.2%}", each, f"{mean(losses):.4f}")
    return table


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.codes")
    parser.add_argument("--steps", type=script.count, default=250, metavar="N", help="training steps of each run")
    parser.add_argument("--seeds", type=script.count, default=2, metavar="N", help="runs of each pair: seeds 0, 1, ...")
    options = script.parsed(parser, words)
    Console(width=120).print(compare(options.steps, options.seeds))


if __name__ == "__main__":
    main()
