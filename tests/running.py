"""The ways to run a step - backend, device, threads, instruction set, grid, grouping, order - and how to set them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fusedopt import backends

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Run:
    """One way to run a step.

    Attributes:
        backend: that launches.
        device: of the tensors.
        isa: of the CPU engine; empty: the best.
        threads: of torch and the CPU engine.
        grid: blocks and threads of the emulated GPU.
        seed: of the emulated GPU's order of blocks and threads.
        inline_columns: whether groups and gradients ride in the emulated launch itself.
        order: 0 keeps the order of the tensors; anything else is the seed of another one.
        merged: tensors with the same options share a group; else each has its own.
    """

    backend: str
    device: str = "cpu"
    isa: str = ""
    threads: int = 1
    grid: tuple[int, int] = (3, 64)
    seed: int = 0
    inline_columns: bool = True
    order: int = 0
    merged: bool = True

    @property
    def id(self) -> str:
        """The run in words."""
        words = [self.backend]
        if self.device != "cpu":
            words.append(self.device)
        if self.isa:
            words.append(self.isa)
        if self.threads > 1:
            words.append(f"{self.threads}threads")
        if self.backend == "emulated":
            words.append("{}x{}".format(*self.grid) + f"seed{self.seed}" + ("" if self.inline_columns else "far"))
        if self.order:
            words.append(f"order{self.order}")
        if not self.merged:
            words.append("groups")
        return "-".join(words)


# Instruction sets of the CPU engine, by processor; a build or a processor that lacks one skips its runs.
ISAS = {"x86_64": ("avx512", "avx2", "baseline"), "aarch64": ("neon",)}.get(platform.machine(), ("baseline",))

CPU_RUNS = tuple(
    Run("cpu", isa=isa, threads=threads, order=(threads - 1) * (k + 1), merged=(threads + k) % 2 == 0)
    for k, isa in enumerate(ISAS)
    for threads in (1, 2, 3)
)

EMULATED_RUNS = (
    Run("emulated"),
    Run("emulated", grid=(1, 256), seed=1, inline_columns=False),
    Run("emulated", grid=(7, 32), seed=2, order=4, merged=False),
    Run("emulated", grid=(2, 96), seed=3, inline_columns=False, merged=False),
)

GPU_RUNS = tuple(
    Run(backend, "cuda", order=order, merged=order == 0) for backend in ("cuda", "triton") for order in (0, 1)
)

RUNS = (Run("reference"), Run("cpu"), *CPU_RUNS, *EMULATED_RUNS, Run("triton"), *GPU_RUNS)

# One of each backend and device.
ONE_RUN_EACH = (
    Run("reference"),
    Run("cpu", threads=2),
    Run("emulated"),
    Run("triton"),
    Run("cuda", "cuda"),
    Run("triton", "cuda"),
)


def as_params(runs: Iterable[Run]) -> list[Any]:
    """Runs as pytest parameters, those on a GPU marked.

    Triton on the CPU wants a process of its own, in which its interpreter is on: tests/test_triton_interpreter.py.
    """
    kept = [run for run in runs if INTERPRETED or (run.backend, run.device) != ("triton", "cpu")]
    return [pytest.param(run, id=run.id, marks=[pytest.mark.gpu] if run.device == "cuda" else []) for run in kept]


@contextmanager
def settings_of(run: Run) -> Iterator[None]:
    """Sets the number of threads, the instruction set and the emulated grid for a while; skips what is not here."""
    device = torch.device(run.device, 0) if run.device == "cuda" else torch.device(run.device)
    try:
        backends.choose_backend(run.backend, device)
    except RuntimeError as reason:
        if "does not load" in str(reason):  # what was built is broken, not absent
            raise
        pytest.skip(str(reason))
    sets = backends.compiled.instruction_sets() if backends.compiled else []
    if run.isa and run.isa not in sets:
        pytest.skip(f"instruction set {run.isa} is not here; there are {', '.join(sets)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    with pytest.MonkeyPatch.context() as patch:
        if run.isa:
            patch.setattr(backends.cpu, "isa", run.isa)
        patch.setattr(backends.Emulated, "blocks", run.grid[0])
        patch.setattr(backends.Emulated, "threads", run.grid[1])
        patch.setattr(backends.Emulated, "seed", run.seed)
        patch.setattr(backends.Emulated, "inline_columns", run.inline_columns)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
