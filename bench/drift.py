"""How far each precision mode lies from float64 after 1, 100 and 10,000 steps of AdamW, and what rounding lost.

    python -m bench.drift
    python -m bench.drift --spread 3 --only int8    # sizes of gradients over three decades within each block

Every mode takes the same steps from the same weights, with gradients that bfloat16 holds exactly: noise of a size of
its own for each element, and a mean of a tenth of it. The error is that of what a mode keeps, low bits and copies
included: root mean square of the distance to float64, to that of the way that float64 went. `stored` is the error of
the parameter as the model sees it. `way made` is the part of float64's way that the stored parameter went along it.
`unmoved` is the share of elements that a step left as they were, mean of all steps; at random rounding makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fusedopt
from bench import script
from bench.quality import BF16, F32, I8, MODES, Mode
from fusedopt import exact
from fusedopt.blocks import FLOAT8
from fusedopt.precision import MASTER_KEYS

F16 = torch.float16

ALL_MODES = {
    **MODES,
    "fp32, float32 states": Mode(BF16, {"master": "fp32", "state_dtype": F32}),
    "float32, bfloat16 states": Mode(F32, {"state_dtype": BF16}),
    "split, bfloat16 states": Mode(BF16, {"master": "split", "state_dtype": BF16}),
    "kahan, bfloat16 states": Mode(BF16, {"master": "kahan", "state_dtype": BF16}),
    "fp32, int8 states": Mode(BF16, {"master": "fp32", "state_dtype": I8}),
    "kahan, int8 states": Mode(BF16, {"master": "kahan", "state_dtype": I8}),
    "float16": Mode(F16, {}),
    "float16, kahan, float32 states": Mode(F16, {"master": "kahan", "state_dtype": F32}),
    "float16, stochastic, float32 states": Mode(F16, {"rounding": "stochastic", "state_dtype": F32}),
    "float32, exp_avg in int8": Mode(F32, {"state_dtype": {"exp_avg": I8}}),
    "float32, exp_avg in float8": Mode(F32, {"state_dtype": {"exp_avg": FLOAT8}}),
    "float32, exp_avg_sq in int8": Mode(F32, {"state_dtype": {"exp_avg_sq": I8}}),
    "float32, exp_avg_sq in float8": Mode(F32, {"state_dtype": {"exp_avg_sq": FLOAT8}}),
    "float32, exp_avg in float8, exp_avg_sq in int8": Mode(F32, {"state_dtype": {"exp_avg": FLOAT8, "exp_avg_sq": I8}}),
    "float32, exp_avg in int8, exp_avg_sq in float8": Mode(F32, {"state_dtype": {"exp_avg": I8, "exp_avg_sq": FLOAT8}}),
}
MARKS = (1, 100, 10_000)
ELEMENTS = 4096
LR = 1e-4
SIZE = 0.05
"""Standard deviation of the weights: half a gap of bfloat16 there is as large as a step, and larger."""


class Run:
    """One tensor in one mode."""

    def __init__(self, mode: Mode, start: Tensor) -> None:
        self.param = torch.nn.Parameter(start.to(mode.dtype))
        self.optimizer = fusedopt.AdamW([self.param], lr=LR, **mode.options)
        self.kept = self.param.detach().float().clone()
        self.unmoved = 0.0

    def step(self, grad: Tensor) -> None:
        """One update, and how many elements it left as they were."""
        self.param.grad = grad.to(self.param.dtype)
        self.optimizer.step()
        before, self.kept = self.kept, self._kept()
        self.unmoved += float((before == self.kept).float().mean())

    def _kept(self) -> Tensor:
        state = self.optimizer.state[self.param]
        for key in MASTER_KEYS:
            if key in state:
                return exact.join(self.param.detach(), key, state[key])
        return self.param.detach().float().clone()


def gradients(steps: int, spread: float, generator: torch.Generator) -> Iterator[Tensor]:
    """Gradients in bfloat16, of sizes over `spread` decades up to 0.1."""
    sizes = 10 ** (-1 - spread * torch.rand(ELEMENTS, generator=generator))
    means = 0.1 * torch.randn(ELEMENTS, generator=generator)
    for _ in range(steps):
        yield (sizes * (means + torch.randn(ELEMENTS, generator=generator))).to(BF16)


def measure(
    modes: Mapping[str, Mode], marks: Sequence[int] = MARKS, *, spread: float = 1.0, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """For each mode its `errors` at the marks, and of the last: `stored`, `made` and `unmoved`."""
    generator = torch.Generator().manual_seed(seed)
    start = (SIZE * torch.randn(ELEMENTS, generator=generator)).to(BF16).double()
    runs = {name: Run(mode, start) for name, mode in modes.items()}
    truth = torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([truth], lr=LR)
    errors: dict[str, list[float]] = {name: [] for name in runs}
    steps = marks[-1]
    for step, grad in enumerate(script.track(gradients(steps, spread, generator), steps, "steps"), 1):
        truth.grad = grad.double()
        reference.step()
        for run in runs.values():
            run.step(grad)
        if step in marks:
            way = truth.detach() - start
            for name, run in runs.items():
                errors[name].append(float((run.kept.double() - truth.detach()).norm() / way.norm()))
    found = {}
    for name, run in runs.items():
        stored = run.param.detach().double()
        found[name] = {
            "errors": errors[name],
            "stored": float((stored - truth.detach()).norm() / way.norm()),
            "made": float((stored - start) @ way / (way @ way)),
            "unmoved": run.unmoved / steps,
        }
    return found


def table(found: Mapping[str, Mapping[str, Any]], marks: Sequence[int]) -> Table:
    """The numbers, in percent."""
    shown = Table("mode", *(f"error, {mark:,} steps" for mark in marks), "stored", "way made", "unmoved")
    for name, row in found.items():
        errors = (f"{100 * error:.2g} %" for error in row["errors"])
        shown.add_row(name, *errors, f"{row['stored']:.2%}", f"{row['made']:.2%}", f"{row['unmoved']:.1%}")
    return shown


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.drift")
    parser.add_argument(
        "--spread", type=script.finite, default=1.0, metavar="X", help="decades between the sizes of gradients"
    )
    parser.add_argument(
        "--marks",
        type=script.count,
        nargs="+",
        default=MARKS,
        metavar="N",
        help="steps to look after (default: 1 100 10000)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and gradients")
    parser.add_argument("--only", metavar="WORD", default="", help="modes with this word in their name; left out: all")
    options = script.parsed(parser, words)
    chosen = {name: mode for name, mode in ALL_MODES.items() if options.only in name}
    if not chosen:
        parser.error(f"no mode has {options.only} in its name")
    marks = sorted(set(options.marks))
    found = measure(chosen, marks, spread=options.spread, seed=options.seed)
    Console(width=120).print(table(found, marks))


if __name__ == "__main__":
    main()
