"""The host side of the build: C++ compiler, Python's headers, flags, and the engine's instruction sets."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .settings import QUICK_NOTE, Settings, Unavailable

# Contraction and relaxed arithmetic would change bits between backends. -fno-math-errno and
# -fno-trapping-math drop errno and the trap flags alone, never a rounding. -Wno-psabi: no vector crosses a call from
# one instruction set's code to another's.
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -pthread -fvisibility=hidden -fvisibility-inlines-hidden "
    "-ffp-contract=off -fno-math-errno -fno-trapping-math -Wall -Wextra -Wno-psabi -Werror=return-type"
).split()
# What no speed depends on: half the time to compile.
COLD_FLAGS = ["-O1"]
LINK_FLAGS = "-shared -pthread -ldl".split()

# The CPU engine is compiled once for each of these. The order is also the link order, lowest first:
# where two objects hold the same inline library function, the linker keeps the first, which runs everywhere.
# There is no -mfma: the engine must not fuse, and a flag that only permits it would still invite it.
ONE_VARIANT = "-DFUSEDOPT_ONE_VARIANT"
# A quarter of the time to compile, and as fast on large tensors as -O3; a step over small ones takes an eighth longer.
SOON_FLAGS = "-O1 -ftree-loop-vectorize -ftree-slp-vectorize".split()
ENGINE_ISAS: dict[str, dict[str, list[str]]] = {
    "x86_64": {
        "baseline": [ONE_VARIANT, *SOON_FLAGS],
        "avx2": ["-mavx2", "-mf16c"],
        "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512".split(),
    },
    "aarch64": {"neon": []},
}

CXX_REMEDY = "unset CXX, or name a C++17 compiler by it"
PROBE = "#include <cstdint>\n#include <vector>\nstd::vector<std::int64_t> probe() { return {1}; }\n"


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler that was tried and works.

    Attributes:
        command: how to call it.
        description: first line of its ``--version``.
        machine: what it compiles for, such as "x86_64".
        quick: whether it is to compile soon rather than well.
    """

    command: tuple[str, ...]
    description: str
    machine: str
    quick: bool = False

    @property
    def isas(self) -> dict[str, list[str]]:
        """Instruction sets of the engine, lowest first, each with the flags that enable it."""
        isas = ENGINE_ISAS.get(self.machine, {"baseline": []})
        if not self.quick:
            return isas
        *lower, best = isas
        return {**{isa: [*isas[isa], ONE_VARIANT] for isa in lower}, best: isas[best]}

    def made_quick(self) -> HostCompiler:
        """The same compiler, to compile soon rather than well."""
        return replace(self, description=f"{self.description}{QUICK_NOTE}", quick=True)


def find_host_compiler() -> HostCompiler:
    """Return a C++17 compiler that works.

    Raises:
        Unavailable: there is none, or the platform is not supported.
    """
    if sys.platform != "linux":
        raise Unavailable(f"the extension is written for Linux, this is {sys.platform}", "use Linux or WSL")
    command = _compiler_command()
    _probe(command)
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    target = subprocess.run([*command, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    return HostCompiler(tuple(command), version.splitlines()[0].strip(), target.split("-")[0].strip())


def require_python_headers() -> list[str]:
    """Return the include folders of the running Python.

    Raises:
        Unavailable: ``Python.h`` is not installed.
    """
    folders = list(dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude")))
    if any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders):
        return folders
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise Unavailable(
        f"Python's C headers are missing: there is no {folders[0]}/Python.h",
        f"sudo apt-get install python{version}-dev (or python3-dev; Fedora: dnf install python3-devel)",
    )


def compile_flags(settings: Settings) -> list[str]:
    """Flags of every C++ file; a later -O overrides an earlier one."""
    return CXX_FLAGS + (_sanitizer_flags(settings) or ["-g0"]) + ["-O0"] * settings.quick


def cold_flags(settings: Settings) -> list[str]:
    """Flags beside them of files that no speed depends on."""
    return [] if settings.quick or settings.sanitize else COLD_FLAGS


def link_flags(settings: Settings) -> list[str]:
    """Flags of the link; the symbols are stripped unless a sanitizer needs them for its reports."""
    return LINK_FLAGS + (_sanitizer_flags(settings) or ["-s"])


def _sanitizer_flags(settings: Settings) -> list[str]:
    if not settings.sanitize:
        return []
    # -O1 overrides the -O3 of CXX_FLAGS, with which sanitized code takes the compiler several times as long.
    checks = [f"-fsanitize={settings.sanitize}", "-fno-sanitize-recover=all"]
    return [*checks, "-fno-omit-frame-pointer", "-g", "-O1"]


def _compiler_command() -> list[str]:
    asked = shlex.split(os.environ.get("CXX", ""))
    candidates = [asked] if asked else [["g++"], ["c++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    if asked:
        raise Unavailable(f"there is no C++ compiler: CXX={os.environ['CXX']!r} names no program", CXX_REMEDY)
    tried = ", ".join(command[0] for command in candidates)
    raise Unavailable(
        f"there is no C++ compiler: {tried} not found",
        "sudo apt-get install g++ (Fedora: dnf install gcc-c++; conda: conda install gxx)",
    )


def _probe(command: list[str]) -> None:
    """Compile and link a few lines, so that a broken compiler is named before ninja meets it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        call = [
            *command,
            "-std=c++17",
            "-fPIC",
            *LINK_FLAGS,
            str(source),
            "-o",
            os.path.join(folder, "probe.so"),
        ]
        result = subprocess.run(call, capture_output=True, text=True)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        why = lines[0].strip() if lines else f"exit status {result.returncode}"
        remedy = CXX_REMEDY if os.environ.get("CXX") else "sudo apt-get install g++"
        raise Unavailable(f"{shlex.join(command)} cannot build a C++17 library: {why}", remedy)
