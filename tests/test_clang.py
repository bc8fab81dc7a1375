"""The CPU engine is compiled by Clang too, for x86-64 and ARM: by that of the package `ziglang`, where it is there.

What g++ accepts may be GNU's alone, and no ARM machine is needed to see that NEON code compiles.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import host, units
from build_support.settings import ROOT

ISAS = [(machine, isa) for machine, isas in host.ENGINE_ISAS.items() for isa in isas]


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "isa"), ISAS)
def test_the_engine_compiles_without_a_warning(machine: str, isa: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("the package ziglang is not installed")
    clang = [sys.executable, "-m", "ziglang", "c++", "-target", f"{machine}-linux-gnu"]
    environment = {**os.environ, "ZIG_LOCAL_CACHE_DIR": str(tmp_path), "ZIG_GLOBAL_CACHE_DIR": str(tmp_path)}
    for unit in units.engine_units(ROOT, {isa: host.ENGINE_ISAS[machine][isa]}):
        flags = [*host.CXX_FLAGS, *unit.flags, "-Icsrc", "-Werror"]
        command = [*clang, *flags, "-c", str(unit.source), "-o", str(tmp_path / "unit.o")]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
