"""The optimizer phase: unscale and check, clip, step, average, clear - torch's best recipe against one fused launch.

Run it as ``python -m bench.phase --workload gpt2-124m``. Both sides take turns on the same gradients in one process;
the ratio is the median over the rounds, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from bench.workloads import load

DECAY = 0.999
MAX_NORM = 1.0
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}


@dataclass
class Side:
    """One of the two recipes.

    Attributes:
        name: of the recipe.
        run: one optimizer phase.
        params: what it updates; their gradients keep their memory.
    """

    name: str
    run: Callable[[], None]
    params: list[torch.nn.Parameter]


def make_params(shapes: Sequence[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    """Parameters of these shapes with gradients, the same every time."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    return params


def torch_side(params: list[torch.nn.Parameter]) -> Side:
    """What torch's documentation puts together, each at its fastest."""
    model = torch.nn.ParameterList(params)
    optimizer = torch.optim.AdamW(params, fused=True, **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros(()))  # what a backward pass would have begun with
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def run() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        optimizer.zero_grad(set_to_none=False)

    return Side("torch", run, params)


def fused_side(params: list[torch.nn.Parameter]) -> Side:
    """The same as options of one step."""
    optimizer = fusedopt.AdamW(
        params, max_grad_norm=MAX_NORM, skip_nonfinite=True, ema_decay=DECAY, zero_grads=True, **SETTINGS
    )

    def run() -> None:
        optimizer.step()

    return Side("fusedopt", run, params)


def fill(side: Side, grads: Sequence[Tensor]) -> None:
    """The gradients that a backward pass would have left."""
    for param, grad in zip(side.params, grads, strict=True):
        if param.grad is not None:
            param.grad.copy_(grad)


def measure(sides: Sequence[Side], grads: Sequence[Tensor], rounds: int) -> list[list[float]]:
    """Seconds of every phase, by round and side; the sides take turns, and so does which is first."""
    taken = []
    for k in range(rounds + 1):
        row = [0.0] * len(sides)
        for at in sorted(range(len(sides)), reverse=k % 2 == 1):
            fill(sides[at], grads)
            start = time.perf_counter()
            sides[at].run()
            row[at] = time.perf_counter() - start
        taken.append(row)
    return taken[1:]  # the first makes states


def main() -> None:
    """Reads the command line, measures, checks that both arrived at the same parameters, and prints."""
    parser = argparse.ArgumentParser(description="The optimizer phase: torch's best recipe against one fused launch.")
    parser.add_argument("--workload", default="gpt2-124m", help="COUNTxNUMEL or a name (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns that are measured (default: %(default)s)")
    arguments = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(arguments, name) < (2 if name == "rounds" else 1):
            parser.error(f"--{name} is {getattr(arguments, name)}: too few")
    try:
        load(arguments.workload)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    shapes = [shape for group in load(arguments.workload).groups for shape in group.shapes()]
    sides = [torch_side(make_params(shapes)), fused_side(make_params(shapes))]
    grads = [torch.randn_like(param) for param in sides[0].params]
    taken = measure(sides, grads, arguments.rounds)
    for one, other in zip(*(side.params for side in sides), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    low, ratio, high = statistics.quantiles([theirs / ours for theirs, ours in taken], n=4)
    times = [statistics.median(column) * 1e3 for column in zip(*taken, strict=True)]
    print(f"{arguments.workload}, {arguments.threads} threads, {arguments.rounds} rounds:")
    print(f"  torch's recipe {times[0]:.1f} ms, one fused launch {times[1]:.1f} ms")
    print(f"  ratio {ratio:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
