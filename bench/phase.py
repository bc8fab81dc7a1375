"""The optimizer phase: unscale and check, clip, step, average, clear - torch's best recipe against one fused launch.

    python -m bench.phase --workload gpt2-124m
    python -m bench.phase --device cuda --workload gpt2-1.5b --out

Both sides and the roofs take turns in one process, by the rules of bench/timing.py, the sides on the same gradients;
before that they must arrive at the same parameters. The floor is what must be moved: 44 bytes a parameter, of which 4
for norm and check, 28 for Adam in float32, 8 for the average, 4 for clearing. Parameters are float32: torch's scaler
refuses gradients in float16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from bench import memory, present, roofs, script, timing
from bench.case import LEARNING_RATES
from bench.records import Record
from bench.side import Parameters, Side, gradients
from bench.timing import Measured, Rules
from bench.workloads import Workload

DECAY = 0.999
MAX_NORM = 1.0
DTYPE = "float32"
CHECKED_STEPS = 3
COPIES = 2 * 5 + 2
"""Of all parameters, at most: parameter, gradient, two states and an average on each side, the gradients to copy from
and a temporary."""

Step = Callable[[], None]


def floor_bytes(clears: bool) -> int:
    """Bytes that a phase has to move for each parameter."""
    return 4 + 28 + 8 + 4 * clears


def torch_step(params: Parameters, clears: bool) -> Step:
    """What torch's documentation puts together, each at its fastest."""
    device = params.flat[0].device
    model = torch.nn.ParameterList(params.flat)
    optimizer = torch.optim.AdamW(params.groups, fused=True, weight_decay=0.01)
    scaler = torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device=device))  # what a backward pass would have begun with
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))

    def step() -> None:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params.flat, MAX_NORM, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        average.update_parameters(model)
        if clears:
            optimizer.zero_grad(set_to_none=False)

    return step


def fused_step(params: Parameters, clears: bool) -> Step:
    """The same as options of one step."""
    device = params.flat[0].device
    optimizer = fusedopt.AdamW(
        params.groups,
        weight_decay=0.01,
        max_grad_norm=MAX_NORM,
        skip_nonfinite=True,
        ema_decay=DECAY,
        zero_grads=clears,
    )
    scaler = fusedopt.amp.GradScaler(device.type, init_scale=1.0, growth_interval=10**9)
    scaler.scale(torch.zeros((), device=device))

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


RECIPES: dict[str, Callable[[Parameters, bool], Step]] = {"torch": torch_step, "fusedopt": fused_step}


def check_equal(ones: Sequence[Tensor], others: Sequence[Tensor], steps: int) -> None:
    """Fails where the sides did not arrive at the same parameters.

    Each rounds a parameter once a step, by half a unit in the last place, and has an update of the size of the learning
    rate with fewer than 64 roundings.

    Raises:
        AssertionError: they are further apart than that.
    """
    eps, rate = torch.finfo(torch.float32).eps, LEARNING_RATES[torch.float32]
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, rtol=steps * eps, atol=steps * 64 * eps * rate)


def sides_of(workload: Workload, device: str, clears: bool) -> list[Side]:
    """Both recipes, after a few steps that brought them to the same parameters."""
    values = gradients(workload, DTYPE, device)
    all_params = {name: Parameters(workload, DTYPE, device) for name in RECIPES}
    sides = [
        Side(name, RECIPES[name](params, clears), before=partial(params.refill, values))
        for name, params in all_params.items()
    ]
    for side in sides:
        for _ in range(CHECKED_STEPS):
            side.prepare()
            side.step()
    check_equal(all_params["torch"].flat, all_params["fusedopt"].flat, CHECKED_STEPS)
    return sides


def compare(workload: Workload, rounds: int, device: str, clears: bool = True) -> Record:
    """Measures one workload: times with quartiles, ratios of torch's recipe to the launch, and the share of the roof.

    Raises:
        ValueError: it does not fit the memory, or has parameters of other dtypes.
    """
    if any(group.torch_dtype(DTYPE) != torch.float32 for group in workload.groups):
        raise ValueError(f"{workload.name} has parameters that are not in float32")
    memory.require(COPIES * workload.bytes_of(DTYPE) + roofs.bytes_of_buffers(device, "adamw"), device)
    sides = sides_of(workload, device, clears)
    bounds = roofs.roofs_for(device, "adamw")
    with script.progress(f"{workload.name}, {rounds} rounds") as show:
        measured = timing.run_rounds(
            [*sides, *bounds], timing.clock_for(device), Rules.on(device).exactly(rounds), sides[0].name, show
        )
    moved = floor_bytes(clears) * workload.elements
    return {
        "workload": workload.name,
        "tensors": workload.tensors,
        "elements": workload.elements,
        "groups": len(workload.groups),
        "device": device,
        "threads": torch.get_num_threads(),
        "clears": clears,
        "rounds": rounds,
        "floor_bytes": moved,
        **_described({side.name: measured[side.name] for side in sides}),
        **_beside_roof(measured["fusedopt"], moved, roofs.best_by_round(bounds, measured)),
    }


def _described(measured: dict[str, Measured]) -> dict[str, Any]:
    """Times on device and host by side, their ratios, and how device time was taken."""
    theirs, ours = measured["torch"], measured["fusedopt"]
    return {
        "seconds": {name: asdict(timing.spread([*each.device.values()])) for name, each in measured.items()},
        "host_seconds": {name: asdict(timing.spread([*each.host.values()])) for name, each in measured.items()},
        "ratio": asdict(timing.bootstrap(timing.paired(theirs.device, ours.device))),
        "host_ratio": asdict(timing.bootstrap(timing.paired(theirs.host, ours.host))),
        "kernel_durations": [name for name, each in measured.items() if each.by_kernels],
        "exposed_rounds": {name: each.exposed for name, each in measured.items() if each.exposed},
    }


def _beside_roof(ours: Measured, moved: int, roof: dict[int, float]) -> dict[str, Any]:
    """The roof, and the share of it that the launch reaches when counted by its floor."""
    rates = {round_: moved / seconds for round_, seconds in ours.device.items()}
    return {
        "roof_bytes_per_s": timing.spread([*roof.values()]).median,
        "roof_share": asdict(timing.bootstrap(timing.paired(rates, roof))),
    }


def lines(found: Record) -> list[str]:
    """What was found, in words."""
    threads = f", {found['threads']} threads" if found["device"] == "cpu" else ""
    cleared = "" if found["clears"] else ", gradients not cleared"
    told = [f"{found['workload']}, {found['device']}{threads}, {found['rounds']} rounds{cleared}:"]
    places = {"": ""} if found["device"] == "cpu" else {"": "on the device: ", "host_": "on the host: "}
    for key, place in places.items():
        theirs, ours = (present.seconds(found[f"{key}seconds"][name]["median"]) for name in RECIPES)
        ratio = present.interval(found[f"{key}ratio"])
        told.append(f"  {place}torch's recipe {theirs}, one fused launch {ours}, ratio {ratio}")
    rate = found["floor_bytes"] / found["seconds"]["fusedopt"]["median"] / 1e9
    share = found["roof_share"]["median"]
    floor = f"floor {floor_bytes(found['clears'])} bytes a parameter"
    told.append(f"  {floor}: {present.digits(rate)} GB/s, {share:.0%} of the roof")
    told += [f"  {name}: the device's time is the sum of kernel durations" for name in found["kernel_durations"]]
    told += [f"  {name}: the device waited for it in {n} rounds" for name, n in found["exposed_rounds"].items()]
    return told


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.phase")
    script.add_workload(parser, "gpt2-124m")
    script.add_device(parser)
    script.add_rounds(parser, 15)
    parser.add_argument("--keep-gradients", action="store_true", help="leave clearing out, on both sides: 40 bytes")
    script.add_out(parser)
    options = script.parsed(parser, words)
    with script.refusals(parser):
        found = compare(options.workload, options.rounds, options.device, clears=not options.keep_gradients)
    print("\n".join(lines(found)))
    script.keep(options, found, "phase")


if __name__ == "__main__":
    main()
