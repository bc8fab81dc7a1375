"""The optimizer phase: unscale and check, clip, step, average, clear - torch's best recipe against one fused launch.

Run it as ``python -m bench.phase --workload gpt2-124m``. Both sides and the roof take turns in one process, the sides
on the same gradients; the ratio is the median over the rounds, with the quartiles. The floor is what must be moved:
44 bytes a parameter, of which 4 for norm and check, 28 for Adam in float32, 8 for the average, 4 for clearing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from bench import records
from bench.roofs import roofs_for
from bench.workloads import load

DECAY = 0.999
MAX_NORM = 1.0
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}
FLOOR = 4 + 28 + 8 + 4  # bytes a parameter


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


def make_params(shapes: Sequence[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    """Parameters of these shapes with gradients, the same every time."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for param in params:
        param.grad = torch.empty_like(param)
    return params


def torch_side(params: list[torch.nn.Parameter]) -> Side:
    """What torch's documentation puts together, each at its fastest."""
    device = params[0].device
    model = torch.nn.ParameterList(params)
    optimizer = torch.optim.AdamW(params, fused=True, **SETTINGS)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device=device))  # what a backward pass would have begun with
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
    device = params[0].device
    optimizer = fusedopt.AdamW(
        params, max_grad_norm=MAX_NORM, skip_nonfinite=True, ema_decay=DECAY, zero_grads=True, **SETTINGS
    )
    scaler = fusedopt.amp.GradScaler(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device=device))

    def run() -> None:
        scaler.step(optimizer)
        scaler.update()

    return Side("fusedopt", run, params)


def fill(side: Side, grads: Sequence[Tensor]) -> None:
    """The gradients that a backward pass would have left."""
    for param, grad in zip(side.params, grads, strict=False):  # the roof has none
        if param.grad is not None:
            param.grad.copy_(grad)


def roof_side(device: str) -> tuple[Side, int]:
    """The best of the roofs of `bench.roofs` that is one pass over large buffers, and the bytes that it moves."""
    roof = next(roof for roof in roofs_for(device, "adamw") if roof.name == "roof-add")
    return Side("roof", roof.step, []), roof.bytes


def measure(sides: Sequence[Side], grads: Sequence[Tensor], rounds: int) -> list[list[float]]:
    """Seconds of every phase, by round and side; the sides take turns, and so does which is first."""
    wait = torch.cuda.synchronize if grads[0].is_cuda else lambda: None
    taken = []
    for k in range(rounds + 1):
        row = [0.0] * len(sides)
        for at in sorted(range(len(sides)), reverse=k % 2 == 1):
            fill(sides[at], grads)
            wait()
            start = time.perf_counter()
            sides[at].run()
            wait()
            row[at] = time.perf_counter() - start
        taken.append(row)
    return taken[1:]  # the first makes states


def check_equal(sides: Sequence[Side], steps: int) -> None:
    """Fails where the sides did not arrive at the same parameters.

    Each rounds a parameter once a step, by half a unit in the last place, and has an update of the size of the learning
    rate with fewer than 64 roundings.
    """
    eps = torch.finfo(torch.float32).eps
    for one, other in zip(sides[0].params, sides[1].params, strict=True):
        torch.testing.assert_close(one, other, rtol=steps * eps, atol=steps * 64 * eps * SETTINGS["lr"])


def compare(workload: str, threads: int, rounds: int, device: str) -> dict[str, Any]:
    """Measures one workload: medians in seconds, the ratio with its quartiles, bandwidths in bytes a second."""
    torch.set_num_threads(threads)
    shapes = [shape for group in load(workload).groups for shape in group.shapes()]
    sides = [torch_side(make_params(shapes, device)), fused_side(make_params(shapes, device))]
    roof, roof_bytes = roof_side(device)
    grads = [torch.randn_like(param) for param in sides[0].params]
    taken = measure([*sides, roof], grads, rounds)
    check_equal(sides, rounds + 1)
    low, ratio, high = statistics.quantiles([row[0] / row[1] for row in taken], n=4)
    theirs, ours, bare = (statistics.median(column) for column in zip(*taken, strict=True))
    elements = sum(param.numel() for param in sides[0].params)
    return {
        "workload": workload,
        "threads": threads,
        "rounds": rounds,
        "seconds": {"torch": theirs, "fusedopt": ours},
        "ratio": {"median": ratio, "low": low, "high": high},
        "floor_bytes": FLOOR * elements,
        "bytes_per_s": FLOOR * elements / ours,
        "roof_bytes_per_s": roof_bytes / bare,
    }


def main() -> None:
    """Reads the command line, measures, checks that both arrived at the same parameters, and prints."""
    parser = argparse.ArgumentParser(description="The optimizer phase: torch's best recipe against one fused launch.")
    parser.add_argument("--workload", default="gpt2-124m", help="COUNTxNUMEL or a name (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns that are measured (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON lines file that the result is added to")
    arguments = parser.parse_args()
    for name in ("threads", "rounds"):
        if getattr(arguments, name) < (2 if name == "rounds" else 1):
            parser.error(f"--{name} is {getattr(arguments, name)}: too few")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU")
    try:
        load(arguments.workload)
    except ValueError as error:
        parser.error(str(error))
    found = compare(arguments.workload, arguments.threads, arguments.rounds, arguments.device)
    seconds, ratio = found["seconds"], found["ratio"]
    share = found["bytes_per_s"] / found["roof_bytes_per_s"]
    print(f"{arguments.workload}, {arguments.device}, {arguments.threads} threads, {arguments.rounds} rounds:")
    print(f"  torch's recipe {seconds['torch'] * 1e3:.1f} ms, one fused launch {seconds['fusedopt'] * 1e3:.1f} ms")
    print(f"  ratio {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    print(f"  floor {FLOOR} bytes a parameter: {found['bytes_per_s'] / 1e9:.1f} GB/s, {100 * share:.0f} % of the roof")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps({**records.head(arguments.device), **found}) + "\n")


if __name__ == "__main__":
    main()
