"""Random words are the same in C++, Triton and torch, beyond 2³² elements too, where no test has a tensor."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from build_support import host
from build_support.settings import ROOT, Unavailable
from fusedopt import blocks

from .running import INTERPRETED, Run, as_params

PLACES = (0, 1, 2, 2047, 2048, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33 + 12_345, 2**40 + 7)
SEEDS = ((0, 1), (0, 2), (0x7FFF, 1), (0x00AB_CDEF, 100_000))


if INTERPRETED:
    import triton
    import triton.language as tl

    from fusedopt.triton_kernels.blocks import random_stream

    @triton.jit  # type: ignore[untyped-decorator]
    def draw(places, numbers, words, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        k = tl.arange(0, COUNT)
        drawn = random_stream(tl.load(places + k), tl.load(numbers), tl.load(numbers + 1))
        tl.store(words + k, drawn.to(tl.int64))


def expected(seed: int, step: int) -> list[int]:
    words: list[int] = blocks.stream(torch.tensor(PLACES), seed, step).tolist()
    return words


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize(("seed", "step"), SEEDS)
def test_words_of_cpp_are_those_of_torch(seed: int, step: int, tmp_path: Path) -> None:
    try:
        compiler = host.find_host_compiler()
    except Unavailable as problem:
        pytest.skip(str(problem))
    program = tmp_path / "check_random"
    source = ROOT / "tests/native/check_random.cpp"
    subprocess.run([*compiler.command, "-std=c++17", "-Icsrc", str(source), "-o", str(program)], cwd=ROOT, check=True)
    asked = [str(number) for number in (seed, step, *PLACES)]
    printed = subprocess.run([str(program), *asked], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in printed.split()] == expected(seed, step)


@pytest.mark.skipif(not INTERPRETED, reason="wants Triton's interpreter")
@pytest.mark.parametrize(("seed", "step"), SEEDS)
@pytest.mark.parametrize("run", as_params([Run("triton")]))
def test_words_of_triton_are_those_of_torch(run: Run, seed: int, step: int) -> None:
    places = torch.tensor([*PLACES, *[0] * (16 - len(PLACES))])
    words = torch.zeros_like(places)
    draw[(1,)](places, torch.tensor([seed, step]), words, 16)
    assert words[: len(PLACES)].tolist() == expected(seed, step)
