"""What the CUDA backend makes of a GPU, with a driver that only pretends to have one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import host
from build_support.settings import ROOT, Unavailable
from fusedopt import core

QUESTION = """
import torch
from fusedopt.backends import Cuda
print(Cuda().why_not(torch.device("cuda", 0)))
"""


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the fake driver."""
    try:
        compiler = host.find_host_compiler()
    except Unavailable as problem:
        pytest.skip(str(problem))
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = ROOT / "tests/native/fake_driver.cpp"
    command = [*compiler.command, "-std=c++17", "-shared", "-fPIC", "-Icsrc", str(source), "-o", str(library)]
    subprocess.run(command, cwd=ROOT, check=True)
    return library.parent


def why_not(fake: Path, capability: int) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), "FAKE_CAPABILITY": str(capability)}
    result = subprocess.run([sys.executable, "-c", QUESTION], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def images() -> list[tuple[str, int, bool, int]]:
    if core.compiled is None:
        pytest.skip("the extension is not built")
    found: list[tuple[str, int, bool, int]] = core.compiled.build_info()["images"]
    if not found:
        pytest.skip("this build has no device code")
    return found


def test_a_gpu_that_the_build_has_code_for_is_served(fake: Path) -> None:
    for sm in sorted({sm for _, sm, ptx, _ in images() if not ptx}):
        assert why_not(fake, sm) == ""


def test_a_gpu_older_than_all_code_of_the_build_is_passed_over(fake: Path) -> None:
    images()
    assert "this build has no kernels for compute capability 52 (it has: " in why_not(fake, 52)


def test_a_gpu_newer_than_the_build_is_served_by_ptx_alone(fake: Path) -> None:
    has_ptx = any(ptx for _, _, ptx, _ in images())
    words = why_not(fake, 990)
    assert words == "" if has_ptx else "rebuild with FUSEDOPT_CUDA_ARCHS=990" in words
