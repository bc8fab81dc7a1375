"""What a report costs: a step of AdamW with ``report=True`` against one without, in turns in one process.

    python -m bench.reported --workload gpt2-124m
    python -m bench.reported --workload gpt2-124m --dtype bfloat16 --out

By the rules of bench/timing.py. Both sides have parameters and gradients of their own, equal at the start; before they
are timed they must arrive at the same bits. A ratio above 1 is what the report costs.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

import fusedopt
from bench import memory, present, script, timing
from bench.records import Record
from bench.side import Parameters, Side, gradients
from bench.timing import Rules
from bench.workloads import DTYPES, Workload

CHECKED_STEPS = 3
COPIES = 2 * 4 + 1
"""Of all parameters: parameter, gradient and two states on each side, and the gradients to copy from."""
SIDES = {"plain": False, "report": True}


def sides_of(workload: Workload, dtype: str, device: str) -> list[Side]:
    """A step without and one with a report, after a few steps that brought them to the same bits.

    Raises:
        AssertionError: they did not arrive there.
    """
    values = gradients(workload, dtype, device)
    sides, arrived = [], []
    for name, report in SIDES.items():
        params = Parameters(workload, dtype, device)
        params.refill(values)  # a step leaves gradients as they are
        side = Side(name, fusedopt.AdamW(params.groups, report=report).step)
        for _ in range(CHECKED_STEPS):
            side.step()
        sides.append(side)
        arrived.append(params.flat)
    for one, other in zip(*arrived, strict=True):
        assert torch.equal(one, other), "the sides did not arrive at the same parameters"
    return sides


def compare(workload: Workload, dtype: str, rounds: int, device: str) -> Record:
    """Measures one workload: times with quartiles, and the ratios of a reporting step's to a plain one's.

    Raises:
        ValueError: it does not fit the memory.
    """
    memory.require(COPIES * workload.bytes_of(dtype), device)
    sides = sides_of(workload, dtype, device)
    with script.progress(f"{workload.name}, {rounds} rounds") as show:
        measured = timing.run_rounds(
            sides, timing.clock_for(device), Rules.on(device).exactly(rounds), sides[0].name, show
        )
    plain, report = (measured[name] for name in SIDES)
    return {
        "workload": workload.name,
        "dtype": "mixed" if all(group.dtype for group in workload.groups) else dtype,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds": {name: asdict(timing.spread([*measured[name].device.values()])) for name in SIDES},
        "host_seconds": {name: asdict(timing.spread([*measured[name].host.values()])) for name in SIDES},
        "ratio": asdict(timing.bootstrap(timing.paired(report.device, plain.device))),
        "host_ratio": asdict(timing.bootstrap(timing.paired(report.host, plain.host))),
    }


def lines(found: Record) -> list[str]:
    """What was found, in words."""
    threads = f", {found['threads']} threads" if found["device"] == "cpu" else ""
    told = [f"{found['workload']}, {found['dtype']}, {found['device']}{threads}, {found['rounds']} rounds:"]
    places = {"": ""} if found["device"] == "cpu" else {"": "on the device: ", "host_": "on the host: "}
    for key, place in places.items():
        plain, report = (present.seconds(found[f"{key}seconds"][name]["median"]) for name in SIDES)
        told.append(f"  {place}a step {plain}, with a report {report}, ratio {present.interval(found[f'{key}ratio'])}")
    return told


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.reported")
    script.add_workload(parser, "gpt2-124m")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the parameters (default: %(default)s)")
    script.add_device(parser)
    script.add_rounds(parser, 31)
    script.add_out(parser)
    options = script.parsed(parser, words)
    with script.refusals(parser):
        found = compare(options.workload, options.dtype, options.rounds, options.device)
    print("\n".join(lines(found)))
    script.keep(options, found, "reported")


if __name__ == "__main__":
    main()
