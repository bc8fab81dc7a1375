"""Suites: named sets of cases, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from bench import timing, workloads
from bench.case import Case
from bench.peers import HYPER, is_ours

FLOAT32 = ("float32",)
BOTH_DTYPES = ("float32", "bfloat16")
BOTH = ("adamw", "sgd")
MODELS = ("resnet50", "vit-l", "bert-large", "gpt2-124m", "gpt2-1.5b", "moe-2b", "sdxl-unet")
LLAMA = ("llama3-8b-shard64", "llama3-8b-shard8", "llama3-8b")
SHAPES = ("1000x16", "1000x4097", "one-64x1024", "lora-448", "groups-465", "mixed-dtypes", "over-2-31")


@dataclass(frozen=True)
class Rows:
    """The product of some workloads, optimizers, dtypes and ways of making gradients."""

    workloads: tuple[str, ...]
    optimizers: tuple[str, ...] = BOTH
    dtypes: tuple[str, ...] = FLOAT32
    gradients: tuple[str, ...] = ("kept",)


@dataclass(frozen=True)
class Suite:
    """A named set of rows and what it is for.

    Attributes:
        description: What it is for.
        rows: Its cases.
        peers: Who takes part beside fusedopt unless others are named; empty for everybody.
    """

    description: str
    rows: tuple[Rows, ...]
    peers: tuple[str, ...] = ()

    def invites(self, peer: str) -> bool:
        """Whether a peer takes part without being named."""
        return not self.peers or is_ours(peer) or peer in self.peers


SUITES = {
    "main": Suite(
        "the main job: many tiny tensors, ResNet-50, GPT-2 124M",
        (Rows(("1000x16",), gradients=("kept", "fresh")), Rows(("resnet50", "gpt2-124m"))),
        peers=("torch-loop", "torch-foreach", "torch-fused", "torch-fused-graph"),
    ),
    "models": Suite("parameter lists of real models", (Rows((*MODELS, *LLAMA), dtypes=BOTH_DTYPES),)),
    "shapes": Suite("lists that are hard in one way each", (Rows(SHAPES, dtypes=BOTH_DTYPES),)),
    "sizes": Suite(
        "one tensor of growing size, for the plots of speed and the roofline",
        (Rows(tuple(f"1x{2**k}" for k in range(8, 29, 2))),),
    ),
    "counts": Suite(
        "a growing number of small tensors, for the plot of host time",
        (Rows(tuple(f"{10**k}x16" for k in range(5)), gradients=("kept", "fresh")),),
    ),
    "host": Suite(
        "what a step costs around the kernel: absent gradients, many groups, construction, a tiny parameter",
        (
            Rows(("20000x16",), gradients=("kept", "toggle")),
            Rows(("groups-465",)),
            Rows(("1x16", "1000x16", "gpt2-124m"), gradients=("kept", "first")),
        ),
    ),
}
"""All suites by name; `all` stands for every one of them."""


def thread_counts(device: str, wanted: Sequence[str] = ("1", "all")) -> list[int]:
    """Numbers of CPU threads to measure with; on a GPU only torch's own number.

    Raises:
        ValueError: a count is neither `all` nor a number from 1 up to the machine's cores.
    """
    everything = torch.get_num_threads()
    counts = []
    for text in wanted:
        if text != "all" and not (text.isdecimal() and 1 <= int(text) <= everything):
            raise ValueError(f"threads must be `all` or a number from 1 to {everything}, got {text!r}")
        counts.append(everything if text == "all" else int(text))
    return [everything] if device == "cuda" else sorted(set(counts))


def cases_of(rows: Sequence[Rows], device: str, threads: Sequence[int]) -> list[Case]:
    """Every case of some rows, each once, in order.

    Raises:
        ValueError: a workload, optimizer, dtype or way of making gradients is unknown.
    """
    cases: dict[Case, None] = {}
    for row in rows:
        for name in row.workloads:
            workloads.load(name)
        _known("optimizer", row.optimizers, HYPER)
        _known("dtype", row.dtypes, workloads.DTYPES)
        _known("gradients", row.gradients, timing.GRADIENTS)
        for workload, optimizer, dtype, gradients, count in product(
            row.workloads, row.optimizers, row.dtypes, row.gradients, threads
        ):
            bound = all(group.dtype for group in workloads.load(workload).groups)
            case = Case(workload, optimizer, "mixed" if bound else dtype, device, count, gradients)
            cases[case] = None
    return list(cases)


def _known(what: str, names: Sequence[str], allowed: Iterable[str]) -> None:
    known = list(allowed)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: expected one of {', '.join(known)}")
