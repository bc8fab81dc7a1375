"""Each element exactly once: SGD with lr 1 and gradient 1 counts every element down by one, whatever the plan."""

from __future__ import annotations

import importlib
import itertools
import os
import random
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fusedopt

from . import tensors
from .running import Run, as_params, settings_of

LEAF = 2048  # csrc/table.h: kLeaf
CHUNKS = (2 * LEAF, 5 * LEAF, 16 * LEAF)  # chunk sizes that plans of these tests come to, the largest last

VECTORS = (4, 8, 16, 64)
EDGES = sorted({0, 1, 2, 3, *(n + d for n in (*VECTORS, LEAF, CHUNKS[0]) for d in (-1, 0, 1))})
LARGE = sorted({n + d for n in CHUNKS for d in (-1, 0, 1)} | {3 * CHUNKS[-1] + 17})

COUNTERS = {torch.float32: 1 << 20, torch.float64: 1 << 20, torch.bfloat16: 200, torch.float16: 2000}


def counters(numel: int, dtype: torch.dtype, offset: int, device: str) -> tensors.Placed:
    """Numbers that are exact in a dtype, and so are they less one; `offset` misaligns them by one element."""
    values = (torch.arange(numel) % COUNTERS[dtype] + 1).to(dtype)
    return tensors.place(values, "misaligned" if offset else "contiguous", dtype, device)


def ones_for(param: Tensor, index: int) -> Tensor:
    """A gradient of ones: of every second tensor as far off a boundary of 16 bytes as the parameter is."""
    offset = param.data_ptr() % 16 // param.element_size() if index % 2 else 0
    ones = torch.ones(param.numel() + offset, dtype=param.dtype, device=param.device)
    return ones[offset:].view(param.shape)


def step_counters(made: list[tensors.Placed], run: Run, per_group: int = 0) -> Any:
    """Steps counters by SGD with lr 1 and gradients of 1; checks each element and the bytes around."""
    params = [torch.nn.Parameter(placed.view) for placed in made]
    before = [param.detach().clone() for param in params]
    for index, param in enumerate(params):
        param.grad = ones_for(param, index)
    size = per_group or len(params)
    groups = [{"params": params[k : k + size]} for k in range(0, len(params), size)]
    optimizer = fusedopt.SGD(groups, lr=1.0, backend=run.backend)
    launches = fusedopt.launch_count()
    optimizer.step()
    assert fusedopt.launch_count() == launches + 1
    for index, (param, old, placed) in enumerate(zip(params, before, made, strict=True)):
        told = (old - param.detach()).flatten()
        times, counts = told.unique(return_counts=True)
        assert times.tolist() in ([], [1.0]), (
            f"tensor {index} of {param.numel()} {param.dtype}: updated {times.tolist()} times: {counts.tolist()}"
        )
        assert placed.guards_are_whole(), f"tensor {index} of {param.numel()} {param.dtype}: bytes around it changed"
    return optimizer


DTYPE_MIXES = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "mixed": (torch.float32, torch.bfloat16, torch.float16),
    "double": (torch.float64, torch.float32, torch.bfloat16),
}

RUNS = (
    Run("reference"),
    *(Run("cpu", isa=isa, threads=threads) for isa, threads in (("", 1), ("avx512", 3), ("avx2", 2), ("baseline", 2))),
    *(
        Run("emulated", grid=grid, seed=seed, inline_columns=bool(seed % 2))
        for seed, grid in enumerate(((1, 16), (1, 33), (2, 64), (5, 32), (3, 256), (40, 16)))
    ),
    Run("triton"),
    Run("cuda", "cuda"),
    Run("triton", "cuda"),
)


@pytest.mark.parametrize("mix", DTYPE_MIXES)
@pytest.mark.parametrize("run", as_params(RUNS))
def test_each_element_is_updated_once_at_every_edge(run: Run, mix: str, settings: Run) -> None:
    dtypes = DTYPE_MIXES[mix]
    rows = [(n, dtype, offset) for n in EDGES for dtype in dtypes for offset in (0, 1)]
    random.Random(run.seed).shuffle(rows)
    step_counters([counters(*row, run.device) for row in rows], run, per_group=7)


# The plan divides the elements of LARGE among threads, or among blocks times threads: 23 of them get chunks of 5
# leaves each, 58 of 2 leaves.
CHUNK_RUNS = (
    *(Run("cpu", threads=threads) for threads in (1, 3, 23, 58, 200)),
    *(Run("emulated", grid=grid, seed=9) for grid in ((1, 16), (1, 23), (2, 29), (16, 32))),
    Run("cuda", "cuda"),
    Run("triton", "cuda"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("run", as_params(CHUNK_RUNS))
def test_each_element_is_updated_once_whatever_the_chunk(run: Run, dtype: torch.dtype, settings: Run) -> None:
    step_counters([counters(n, dtype, n % 2, run.device) for n in LARGE], run)


@pytest.mark.parametrize("programs", [1, 2, 7, 40])
@pytest.mark.parametrize("run", as_params([Run("triton"), Run("triton", "cuda")]))
def test_each_element_is_updated_once_by_any_number_of_programs(
    run: Run, programs: int, settings: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = importlib.import_module("fusedopt.triton_kernels.launch")
    monkeypatch.setattr(launch, "resident_programs", lambda variant, device: programs)
    sizes = (3 * LEAF + 5, 1, 0, 2 * LEAF, 700, 2 * LEAF - 1, 33)
    step_counters([counters(n, torch.float32, n % 2, run.device) for n in sizes], run, per_group=3)


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_each_element_is_updated_once_on_any_grid(backend: str) -> None:
    """Any sizes, any number of blocks and of threads, which need not be whole warps."""

    @hypothesis.settings(max_examples=120, derandomize=True, deadline=None, database=None)
    @hypothesis.given(
        sizes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 5 * LEAF)), min_size=1, max_size=6),
        grid=st.tuples(st.integers(1, 20), st.integers(16, 100)),
        threads=st.integers(1, 90),
        seed=st.integers(0, 1 << 32),
    )
    def check(sizes: list[int], grid: tuple[int, int], threads: int, seed: int) -> None:
        run = Run(backend, threads=threads, grid=grid, seed=seed, inline_columns=bool(seed % 2))
        with settings_of(run):
            made = [counters(n, (torch.float32, torch.bfloat16)[n % 2], n % 3 == 0, "cpu") for n in sizes]
            step_counters(made, run, per_group=2)

    check()


def test_plans_of_many_chunk_sizes_are_tried() -> None:
    params = [torch.nn.Parameter(torch.zeros(n)) for n in LARGE]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer = fusedopt.SGD(params, backend="cpu")
    optimizer.step()
    ((table, _),) = optimizer._tables
    workers = {run.threads if run.backend == "cpu" else run.grid[0] * run.grid[1] for run in CHUNK_RUNS}
    sizes = {table.core.columns(count, False)["chunk_elements"] for count in workers}
    assert sizes >= {LEAF, *CHUNKS}


@pytest.mark.parametrize(
    "run",
    as_params(
        [
            Run("cpu", threads=1),
            Run("cpu", threads=3),
            Run("emulated", grid=(5, 16)),
            Run("emulated", grid=(3, 32), inline_columns=False),
            Run("triton"),
            Run("cuda", "cuda"),
            Run("triton", "cuda"),
        ]
    ),
)
def test_thousands_of_tensors_in_mixed_groups(run: Run, settings: Run) -> None:
    count = 200 if run.backend == "triton" and run.device == "cpu" else 3000  # the interpreter is slow
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float64, torch.float16))
    made = [counters(k % 23, next(dtypes), k % 3 == 0, run.device) for k in range(count)]
    step_counters(made, run, per_group=13)


@pytest.mark.parametrize("run", as_params([Run("cpu"), Run("emulated"), Run("triton"), Run("cuda", "cuda")]))
def test_gradients_that_come_and_go_update_their_own_tensor_only(run: Run, settings: Run) -> None:
    chance = random.Random(5)
    numels = [1, 5, LEAF + 1, 64, 0, 17, 3, 8]
    params = [torch.nn.Parameter(torch.zeros(n, device=run.device)) for n in numels]
    optimizer = fusedopt.SGD(params, lr=1.0, backend=run.backend)
    taken = [0] * len(params)
    for _ in range(12):
        for k, param in enumerate(params):
            param.grad = torch.ones_like(param) if chance.random() < 0.5 else None
            taken[k] += param.grad is not None
        optimizer.step()
    for param, steps in zip(params, taken, strict=True):
        assert torch.equal(param.detach(), torch.full_like(param, -float(steps)))


def all_parameters_unchanged(params: list[Tensor], before: list[Tensor]) -> bool:
    return all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


@pytest.mark.parametrize("run", as_params([Run("cpu"), Run("emulated"), Run("reference"), Run("cuda", "cuda")]))
def test_a_step_without_any_gradient_does_nothing(run: Run, settings: Run) -> None:
    params = [torch.nn.Parameter(torch.ones(n, device=run.device)) for n in (0, 1, 5000)]
    optimizer = fusedopt.AdamW(params, lr=1.0, backend=run.backend)
    optimizer.step()
    assert all_parameters_unchanged(params, [torch.ones_like(param) for param in params])
    assert not optimizer.state


MANY = (1 << 31) + 4099
MANY_BYTES = 6 * MANY  # parameter and gradient in bfloat16, and some room


def step_many(run: Run) -> None:
    """Steps one tensor of more than 2^31 elements: an index that overflows would be seen at either end."""
    param = torch.nn.Parameter(torch.empty(MANY, dtype=torch.bfloat16, device=run.device))
    block = 1 << 25
    for first in range(0, MANY, block):
        part = param.detach()[first : first + block]
        part.copy_(torch.arange(first, first + part.numel(), device=run.device) % 200)
    param.grad = torch.ones_like(param)
    fusedopt.SGD([param], lr=1.0, backend=run.backend).step()
    for first in range(0, MANY, block):
        part = param.detach()[first : first + block]
        wanted = torch.arange(first, first + part.numel(), device=run.device) % 200 - 1
        assert torch.equal(part, wanted.to(torch.bfloat16)), f"between elements {first} and {first + block}"


@pytest.mark.slow
@pytest.mark.parametrize("run", as_params([Run("cpu", threads=2)]))
def test_more_than_two_to_the_31_elements(run: Run, settings: Run) -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < MANY_BYTES:
        pytest.skip(f"{free:,} bytes of memory are free, {MANY_BYTES:,} are needed")
    step_many(run)
