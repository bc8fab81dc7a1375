"""What the CUDA backend makes of a GPU, with a driver that only pretends to have one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from build_support import host
from build_support.settings import ROOT, Unavailable
from fusedopt import core
from fusedopt.backends import Cuda

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


def why_not(fake: Path, capability: int, version: int = 99990) -> str:
    told = {"FAKE_CAPABILITY": str(capability), "FAKE_VERSION": str(version)}
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake), **told}
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


def toolkit() -> tuple[int, int]:
    """Major and minor version of the CUDA that the build's kernels are of."""
    images()
    assert core.compiled is not None
    major, minor = core.compiled.build_info()["device_compiler"].split()[1].split(".")[:2]
    return int(major), int(minor)


def test_a_driver_of_the_toolkits_major_version_loads_its_cubins(fake: Path) -> None:
    sm = max(sm for _, sm, ptx, _ in images() if not ptx)
    assert why_not(fake, sm, version=1000 * toolkit()[0]) == ""


def test_a_driver_older_than_the_toolkit_is_passed_over_and_both_versions_are_named(fake: Path) -> None:
    sm = max(sm for _, sm, ptx, _ in images() if not ptx)
    major, minor = toolkit()
    words = why_not(fake, sm, version=1000 * (major - 1) + 80)
    assert f" {major}.{minor}" in words
    assert f"the driver knows CUDA {major - 1}.8; update the driver" in words


def test_ptx_wants_a_driver_no_older_than_its_toolkit(fake: Path) -> None:
    if not any(ptx for _, _, ptx, _ in images()):
        pytest.skip("this build has no PTX")
    major, minor = toolkit()
    assert why_not(fake, 990, version=1000 * major + 10 * minor) == ""
    assert "the driver knows CUDA" in why_not(fake, 990, version=1000 * major + 10 * minor - 10)


class Starved:
    """A compiled table for whose launches there is no memory at first."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.called: list[tuple[Any, ...]] = []

    def launch_cuda(self, *arguments: Any) -> None:
        assert core.compiled is not None
        self.left -= 1
        if self.left >= 0:
            raise core.compiled.OutOfMemory("cuMemAlloc failed: out of memory (2)")
        self.called.append(arguments)

    update_captures = launch_cuda


@pytest.fixture
def given_back(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever torch is told to give back the memory that it keeps."""
    if core.compiled is None:
        pytest.skip("the extension is not built")
    times: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: times.append("once"))
    return times


def table_of(core: Starved) -> Any:
    lasting = SimpleNamespace(launcher=SimpleNamespace(captures=1))
    return SimpleNamespace(device=torch.device("cuda", 0), core=core, lasting=lasting)


CALLS: dict[str, Callable[[Any], None]] = {
    "a launch": lambda table: Cuda().launch(table, None, None),
    "new numbers for captured steps": lambda table: Cuda().update_captures(table),
}
each_call = pytest.mark.parametrize("call", CALLS)


@each_call
def test_a_call_without_memory_is_made_again_once_torch_has_given_back_what_it_keeps(
    call: str, given_back: list[str]
) -> None:
    starved = Starved(1)
    CALLS[call](table_of(starved))
    assert given_back == ["once"]
    assert len(starved.called) == 1


@each_call
def test_a_call_that_finds_no_memory_raises_torchs_error(call: str, given_back: list[str]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="cuMemAlloc failed: out of memory"):
        CALLS[call](table_of(Starved(2)))
    assert given_back == ["once"]


def test_a_capture_that_finds_no_memory_has_torch_give_back_nothing(
    given_back: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(torch.OutOfMemoryError):
        CALLS["a launch"](table_of(Starved(1)))
    assert given_back == []
