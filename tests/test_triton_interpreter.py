"""Triton's kernels under its interpreter: the tests of this folder that know backends, in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .faults import INTERPRETED_PARTS
from .running import INTERPRETED

FOLDER = Path(__file__).resolve().parent
# Modules, and which of their tests: the interpreter takes seconds where the compiler takes microseconds, so that whole
# matrices are among the long tests.
MODULES = [
    pytest.param("test_bits.py", "", id="test_bits", marks=pytest.mark.slow),
    pytest.param("test_bits.py", "not unscaled and (SGD-f32 or SGD-bf16)", id="test_bits, a part"),
    pytest.param("test_sizes.py", "", id="test_sizes"),
    pytest.param("test_codecs.py", "", id="test_codecs"),
    pytest.param("test_layouts.py", "", id="test_layouts"),
    pytest.param("test_step.py", "", id="test_step"),
    pytest.param("test_triton_capture.py", "", id="test_triton_capture"),
    pytest.param("test_phase.py", "", id="test_phase", marks=pytest.mark.slow),
    pytest.param("test_norm.py", "", id="test_norm", marks=pytest.mark.slow),
    pytest.param("test_amp.py", "", id="test_amp", marks=pytest.mark.slow),
    pytest.param("test_amp.py", "with_everything or without_the_scaler", id="test_amp, a part"),
    pytest.param("test_report.py", "", id="test_report", marks=pytest.mark.slow),
    pytest.param("test_blocks.py", "", id="test_blocks", marks=pytest.mark.slow),
    pytest.param("test_random.py", "", id="test_random"),
    pytest.param("test_precision.py", "", id="test_precision", marks=pytest.mark.slow),
    *(pytest.param(f"test_{stem}.py", some, id=f"test_{stem}, a part") for stem, some in INTERPRETED_PARTS.items()),
]


@pytest.mark.skipif(INTERPRETED, reason="this is the process with the interpreter")
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize(("module", "some"), MODULES)
def test_the_same_tests_pass_under_the_interpreter(module: str, some: str, record_property: Any) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDOPT_TEST_BACKENDS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu"]
    result = subprocess.run(
        [*command, "-p", "no:xdist", "-k", some, str(FOLDER / module)],
        env=environment,
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout[-2000:]
    compared = re.search(r"bit contract, tensors compared: ([\d,]+)", result.stdout)
    record_property("count:tests under Triton's interpreter", int(passed[1]))
    if compared:
        record_property("count:bit contract, tensors compared", int(compared[1].replace(",", "")))
