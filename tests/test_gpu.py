"""What only a GPU can show: very many tensors, groups and elements, two streams at once, and compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt

from .running import Run, as_params
from .tensors import same_bits
from .test_sizes import MANY_BYTES, counters, step_counters, step_many

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent

each_run = pytest.mark.parametrize("run", as_params([Run("cuda", "cuda"), Run("triton", "cuda")]))


@each_run
def test_twenty_thousand_tensors_are_updated_in_one_launch(run: Run, settings: Run) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    step_counters([counters(k % 41, dtypes[k % 2], k % 7 == 0, "cuda") for k in range(20_000)], run, per_group=5_000)


@each_run
def test_two_thousand_groups_have_each_their_own_learning_rate(run: Run, settings: Run) -> None:
    params = [Parameter(torch.zeros(1 + k % 9, device="cuda")) for k in range(2_000)]
    groups = [{"params": [param], "lr": float(k)} for k, param in enumerate(params)]
    optimizer = fusedopt.SGD(groups, lr=1.0, backend=run.backend)
    for taken in (1, 2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        firsts = torch.stack([param.detach()[0] for param in params]).cpu()
        assert torch.equal(firsts, -taken * torch.arange(2_000.0))


@each_run
def test_memory_that_held_poison_shows_in_no_result(run: Run, settings: Run) -> None:
    """States, tables and counters are made in memory that was full of NaN; parameters lie among it."""
    results = []
    for poisoned in (False, True):
        torch.cuda.empty_cache()
        if poisoned:
            held = [torch.full((1 << k,), float("nan"), device="cuda") for k in range(4, 25)]
            del held
        generator = torch.Generator().manual_seed(3)
        sizes = (1, 5, 2049, 70_001)
        params = [Parameter(torch.randn(n, generator=generator).cuda()) for n in sizes]
        optimizer = fusedopt.AdamW(params, lr=0.1, amsgrad=True, backend=run.backend)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).cuda()
            optimizer.step()
        results.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    for clean, dirty in zip(*results, strict=True):
        assert same_bits(clean.detach(), dirty.detach()).all()


@each_run
def test_optimizers_on_two_streams_at_once_do_not_disturb_each_other(run: Run, settings: Run) -> None:
    def make(seed: int) -> tuple[list[Parameter], Any]:
        generator = torch.Generator().manual_seed(seed)
        params = [Parameter(torch.randn(n, generator=generator).cuda()) for n in (1 << 20, 5, 2049)]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).cuda()
        return params, fusedopt.AdamW(params, lr=0.01, backend=run.backend)

    alone = [make(seed) for seed in (0, 1)]
    for _, optimizer in alone:
        for _ in range(200):
            optimizer.step()
    torch.cuda.synchronize()
    beside = [make(seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in beside]
    torch.cuda.synchronize()
    for _ in range(200):
        for (_, optimizer), stream in zip(beside, streams, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for (mine, _), (expected, _) in zip(beside, alone, strict=True):
        for one, other in zip(mine, expected, strict=True):
            assert same_bits(one.detach(), other.detach()).all()


@each_run
def test_more_than_two_to_the_31_elements(run: Run, settings: Run) -> None:
    if torch.cuda.mem_get_info()[0] < MANY_BYTES:
        pytest.skip(f"this GPU has no {MANY_BYTES:,} bytes free")
    step_many(run)


SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
OPTIONS = {
    "memcheck": ("--leak-check", "no"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}


@pytest.mark.skipif(not os.access(SANITIZER, os.X_OK), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("tool", "part"), [*((tool, "steps") for tool in OPTIONS), ("memcheck", "graph")], ids=lambda value: value
)
def test_compute_sanitizer_finds_nothing(tool: str, part: str) -> None:
    command = [SANITIZER, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "9"]
    # Only our kernels: what else torch launches is not looked at, which saves most of the time.
    command += ["--kernel-regex", "kns=fusedopt_", sys.executable, "-m", "tests.gpu_program", part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if part == "steps":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that a tensor ends where its memory ends
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "0 errors" in result.stdout, result.stdout[-2000:]
