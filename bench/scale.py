"""What a step would take on thousands of GPUs: docs/scale.md from a roofline model and this machine's host times.

    python -m bench.scale          measures the host, writes bench/results/scale.json and docs/scale.md
    python -m bench.scale --page   writes the page again from what was measured

Assumed of a step on every rank, each of which a measurement may refute:

* The device needs what bench/roofline.py says of the bytes of its shard; of torch's fused optimizer as well, which
  differs by its number of launches alone.
* The host needs a fixed time and a time for each tensor, as measured here; on a GPU's host the launches come on top.
* Host and device work at the same time, so that the longer of the two is what a step takes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch

import fusedopt
from bench import script, timing
from bench.records import RESULTS, machine
from bench.roofline import LAUNCH_S, MACHINES, predict
from bench.side import Side
from bench.timing import Rules

Shape = tuple[int, ...]
PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
RECORD = RESULTS / "scale.json"
GPU = MACHINES["H100 SXM"]
RANKS = (8, 64, 512, 4096, 16384)
COUNTS = (1, 1000)  # tensors; the fixed time is that of the first, the time for a tensor the slope
ADAM_BYTES = 28  # an element, all in float32: gradient in, parameter and two moments in and out
HELD_BYTES = 16  # an element: parameter, gradient, two moments
# Metadata of one launch of torch's fused optimizers built with CUDA 13 (32 KB): tensors, chunks of 65,536 elements.
TORCH_TENSORS, TORCH_CHUNKS, TORCH_CHUNK = 252, 2240, 65536


@dataclass(frozen=True)
class Model:
    """A model and the shapes of its parameters."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def parameters(self) -> int:
        """How many elements there are."""
        return sum(map(prod, self.shapes))


def llama(name: str, layers: int, hidden: int, feed_forward: int) -> Model:
    """Llama 3: 8 key-value heads of 128, a vocabulary of 128,256 (https://arxiv.org/abs/2407.21783, table 3)."""
    attention = [(hidden, hidden), (1024, hidden), (1024, hidden), (hidden, hidden)]
    layer = [*attention, (feed_forward, hidden), (feed_forward, hidden), (hidden, feed_forward), (hidden,), (hidden,)]
    return Model(name, ((128256, hidden), *(layer * layers), (hidden,), (128256, hidden)))


def mixture(layers: int = 51, experts: int = 128, hidden: int = 2048, expert: int = 768) -> Model:
    """The layers of Qwen3-30B-A3B (https://arxiv.org/abs/2505.09388), experts apart; as many as make 20,000 tensors."""
    each = [(expert, hidden), (expert, hidden), (hidden, expert)]
    rest = [(4096, hidden), (512, hidden), (512, hidden), (hidden, 4096), (128,), (128,), (hidden,), (hidden,)]
    layer = [*(each * experts), *rest, (experts, hidden)]
    return Model("mixture of experts", ((151936, hidden), *(layer * layers), (hidden,), (151936, hidden)))


MODELS = (
    llama("Llama 3 8B", 32, 4096, 14336),
    llama("Llama 3 70B", 80, 8192, 28672),
    llama("Llama 3 405B", 126, 16384, 53248),
    mixture(),
)


@dataclass(frozen=True)
class Host:
    """Host seconds of a step: fixed, and for each tensor."""

    fixed: float
    tensor: float

    def seconds(self, tensors: int) -> float:
        """Of a step of so many tensors."""
        return self.fixed + self.tensor * tensors


@dataclass(frozen=True)
class Share:
    """What the fullest rank updates: elements of each tensor that is not empty."""

    numels: tuple[int, ...]

    @property
    def bytes_moved(self) -> int:
        """By an ideal step."""
        return ADAM_BYTES * sum(self.numels)

    @property
    def torch_launches(self) -> int:
        """At least so many of torch's fused AdamW, without those that count steps."""
        chunks = sum(ceil(numel / TORCH_CHUNK) for numel in self.numels)
        return max(ceil(len(self.numels) / TORCH_TENSORS), ceil(chunks / TORCH_CHUNKS))

    def device_seconds(self, launches: int) -> float:
        """On the GPU of the page."""
        return predict(self.bytes_moved, GPU.bandwidth, launches=launches)


def fsdp2(model: Model, ranks: int) -> Share:
    """Every tensor is split along its first dimension; the first rank has the most rows of each."""
    return Share(tuple(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in model.shapes))


def zero1(model: Model, ranks: int) -> Share:
    """DeepSpeed's form: all parameters as one flat tensor, of which a rank has its part."""
    return Share((ceil(model.parameters / ranks),))


# ---- the page ---------------------------------------------------------------------------------------------


def fsdp2_rows(hosts: dict[str, Host]) -> Iterable[str]:
    """One row for each model and number of ranks."""
    for model in MODELS:
        for ranks in RANKS:
            share = fsdp2(model, ranks)
            held = HELD_BYTES * sum(share.numels)
            cells = [model.name, f"{ranks:,}", f"{len(share.numels):,}", f"{share.bytes_moved / 1e9:,.3g}"]
            if held > GPU.memory:
                yield row([*cells, f"needs {held / 1e9:,.0f} GB", *([""] * 5)])
                continue
            devices = (share.device_seconds(1), share.device_seconds(share.torch_launches))
            times = [hosts[name].seconds(len(share.numels)) for name in ("fusedopt", "torch fused")]
            steps = [max(pair) for pair in zip(devices, times, strict=True)]
            launches = f"{ms(devices[0])}, {share.torch_launches} launches: {ms(devices[1])}"
            yield row([*cells, launches, *map(ms, (*times, *steps)), f"{steps[1] / steps[0]:.2f}"])


def zero1_rows(hosts: dict[str, Host]) -> Iterable[str]:
    """One row for each model: the longer of host and device, in ms, by number of ranks."""
    for model in MODELS:
        cells = []
        for ranks in RANKS:
            share = zero1(model, ranks)
            # Weights and gradients in bfloat16 on every rank; their float32 copy and two moments in parts.
            held = 4 * model.parameters + 12 * sum(share.numels)
            names = ("fusedopt plain", "torch fused plain")
            pairs = [max(share.device_seconds(1), hosts[name].seconds(1)) for name in names]
            cells.append("does not fit" if held > GPU.memory else " / ".join(map(ms, pairs)))
        yield row([model.name, *cells])


def row(cells: Iterable[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    return f"{seconds * 1e3:.3g}"


def page(record: dict[str, Any]) -> str:
    """docs/scale.md."""
    hosts = {name: Host(**values) for name, values in record["hosts"].items()}
    measured = [row([name, *(f"{x * 1e6:.2f}" for x in (host.fixed, host.tensor))]) for name, host in hosts.items()]
    sizes = ",\n".join(f"{model.name} {model.parameters / 1e9:.2f}e9 in {len(model.shapes):,}" for model in MODELS)
    return f"""# Scale, on paper

**Nothing here was run on a GPU.** It is what a model says of AdamW in float32 on {GPU.name}, and it is there to be
refuted: `python -m bench.scale` writes this page, and says in its first lines what is assumed. Time on the
network is left out: it is the same for every optimizer.

Parameters, and the tensors they are in: {sizes}.

## Host, measured

One thread of {record["machine"]["cpu"]}, torch {record["torch"]}, {record["date"]}: µs of the host for a step of AdamW,
medians of {record["rounds"]} alternating rounds. The tensors have one element, and gradients are made anew before each
step. The CPU updates them: a launch on a GPU is not in these times. The update itself and the count of steps, which
torch does tensor by tensor on a CPU and in its launches on a GPU, are in its times, which are too long by that.

| | fixed | each tensor |
|---|---|---|
{chr(10).join(measured)}

Parameters and gradients are as FSDP2 makes them, "plain" ones ordinary tensors.

## FSDP2

The fullest rank. "Device" is fusedopt's one launch, then the launches that torch's fused optimizer takes at least.
"Step" is the longer of host and device.

| model | GPUs | tensors | GB moved | device, ms | host, ms | of torch fused | step, ms | of torch fused | ratio |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(fsdp2_rows(hosts))}

With few GPUs memory bandwidth decides, and the two are alike. With many, shards are small and the host decides.
Past as many ranks as a tensor has rows, shards no longer shrink: the first rank always has one row.

## ZeRO-1

DeepSpeed's flat partition: one tensor for each rank. ms of a step, fusedopt / torch fused, by number of GPUs.

| model | {" | ".join(f"{ranks:,}" for ranks in RANKS)} |
|---|{"---|" * len(RANKS)}
{chr(10).join(zero1_rows(hosts))}

One tensor leaves little to gain on the host. Where there is a table of parts instead, as in torch's
`ZeroRedundancyOptimizer`, the host's share is that of its tensors.
"""


# ---- the measurement --------------------------------------------------------------------------------------


class Bag(torch.nn.Module):
    """So many parameters of one element, whose gradients are 1."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(torch.ones(1) for _ in range(count))

    def forward(self) -> torch.Tensor:
        """The sum of all."""
        return torch.cat(list(self.all)).sum()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "fusedopt": fusedopt.AdamW,
    "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch foreach": lambda params: torch.optim.AdamW(params, foreach=True),
}


def measure(rounds: int) -> dict[str, Host]:
    """Host times of each optimizer on what FSDP2 makes of parameters and gradients, and on plain ones."""
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        hosts = {}
        for kind, prepare in {"": fully_shard, " plain": lambda bag: bag}.items():
            times = [step_times(prepare, count, rounds) for count in COUNTS]
            for name in OPTIMIZERS:
                slope = (times[-1][name] - times[0][name]) / (COUNTS[-1] - COUNTS[0])
                hosts[name + kind] = Host(times[0][name] - slope, slope)
        return hosts
    finally:
        destroy_process_group()


def side_of(name: str, bag: Any) -> Side:
    """An optimizer's step on a bag, whose gradients are made anew before each."""
    optimizer = OPTIMIZERS[name](bag.parameters())

    def before() -> None:
        optimizer.zero_grad()
        bag().backward()

    return Side(name, optimizer.step, before)


def step_times(prepare: Callable[[Bag], Any], count: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of so many tensors, by optimizer, in turns, one step each."""
    sides = [side_of(name, prepare(Bag(count))) for name in OPTIMIZERS]
    found = timing.run_rounds(sides, timing.CpuClock(), Rules(block_s=0.0).exactly(rounds), None)
    return {name: timing.spread([*measured.device.values()]).median for name, measured in found.items()}


def main(words: list[str] | None = None) -> None:
    """Measures unless told otherwise, and writes the page."""
    parser = script.parser(__doc__, "bench.scale", threads=False)
    parser.add_argument("--page", action="store_true", help="write the page from the record, and measure nothing")
    parser.add_argument("--rounds", type=script.count, default=15, metavar="N", help="measured steps of each optimizer")
    options = script.parsed(parser, words)
    if not options.page:
        torch.set_num_threads(1)
        hosts = {name: asdict(host) for name, host in measure(options.rounds).items()}
        found = {"machine": machine("cpu"), "torch": torch.__version__, "rounds": options.rounds}
        record = {"date": time.strftime("%Y-%m-%d"), **found, "hosts": hosts}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RECORD.read_text())))
    print(f"wrote {PAGE}; one launch is taken to cost {LAUNCH_S * 1e6:g} µs of the device")


if __name__ == "__main__":
    main()
