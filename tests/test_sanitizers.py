"""The C++ below the binding under sanitizers: random tables on the CPU engine and on the emulated kernels.

Programs of tests/native/, built incrementally by the builder of the extension, with its flags and instruction sets.
Buffers have exactly the bytes that their elements reach, so that AddressSanitizer sees an access beside them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from build_support import extension, host, units
from build_support.ninja_file import NinjaFile
from build_support.settings import ROOT, Unavailable

CPU_SOURCES = ("csrc/host_table.cpp", "csrc/cpu/dispatch.cpp", "csrc/cpu/team.cpp")
EMULATOR_SOURCES = (
    "csrc/cuda/emulator.cpp",
    "csrc/cuda/launcher.cpp",
    "csrc/cuda/driver.cpp",
    "tests/native/no_images.cpp",
)

# Sanitizers end the program at the first thing they find.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}


@dataclass(frozen=True)
class Program:
    """A program of tests/native/, and the sanitizers that watch it."""

    name: str
    sanitizers: str
    sources: tuple[str, ...]
    defines: tuple[str, ...] = ()

    def build(self) -> Path:
        """Compiles what changed; the executable."""
        try:
            compiler = host.find_host_compiler()
        except Unavailable as problem:
            pytest.skip(str(problem))
        sanitize = [f"-fsanitize={self.sanitizers}"]
        require_sanitizers(compiler, sanitize)
        folder = ROOT / "build" / f"native-{self.sanitizers.replace(',', '-')}"
        # -O0: compiles in two thirds of the time of -Og, and nothing that a sanitizer could see is optimised away.
        plain = [flag for flag in host.CXX_FLAGS if not flag.startswith("-O")]
        flags = [*plain, "-O0", "-g1", "-Icsrc", "-Itests/native", "-fno-omit-frame-pointer", "-DFUSEDOPT_NO_MODES"]
        flags += self.defines
        link_flags = [flag for flag in host.LINK_FLAGS if flag != "-shared"]
        fatal = ["-fno-sanitize-recover=all"]
        ninja = NinjaFile(ROOT, folder, compiler, [*flags, *sanitize, *fatal], [*link_flags, *sanitize])
        for source in (*self.sources, f"tests/native/{self.name}.cpp"):
            ninja.add_object(ROOT / source)
        emulated = units.emulated_units(ROOT) if "csrc/cuda/emulator.cpp" in self.sources else []
        # Of the instruction sets the best has all variants: what the others have of their own is in each of theirs.
        for unit in [*emulated, *units.engine_units(ROOT, compiler.made_quick().isas)]:
            ninja.add_object(unit.source, unit.flags, unit.tag)
        program = folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        ninja_file = folder / f"{self.name}.ninja"
        ninja_file.write_text(ninja.text(program))
        command = [*ninja_command(), "-f", str(ninja_file.relative_to(ROOT)), "-j", jobs()]
        with extension.only_build(folder) as lock:  # programs share objects
            result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, pass_fds=[lock])
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
        return program

    def run(self, *arguments: object) -> str:
        """Builds and runs it; what it printed."""
        command = [str(self.build()), *(str(argument) for argument in arguments)]
        environment = {**os.environ, **OPTIONS}
        environment.pop("LD_PRELOAD", None)  # of `make sanitize`: one sanitizer in a process
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
            # ThreadSanitizer of older compilers can not live with today's randomised addresses.
            fixed = ["setarch", "-R", *command]
            result = subprocess.run(fixed, env=environment, capture_output=True, text=True)
            if "Operation not permitted" in result.stderr:
                pytest.skip(f"this compiler's sanitizer wants fixed addresses: {result.stderr.strip()}")
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-6000:]}"
        return result.stdout


def jobs() -> str:
    """Compilers at once: one, beside other test processes."""
    return "1" if os.environ.get("PYTEST_XDIST_WORKER") else str(len(os.sched_getaffinity(0)))


def ninja_command() -> list[str]:
    if shutil.which("ninja"):
        return ["ninja"]
    return [sys.executable, "-m", "ninja"]


def require_sanitizers(compiler: host.HostCompiler, flags: list[str]) -> None:
    """Skips where the compiler has no such library."""
    command = [*compiler.command, *flags, "-x", "c++", "-", "-o", os.devnull]
    result = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"{compiler.description} can not link {' '.join(flags)}: {result.stderr.strip().splitlines()[-1]}")


SWEEPS = Program("check_sweeps", "address,undefined", (*CPU_SOURCES, *EMULATOR_SOURCES))
BYTES = Program("check_bytes", "address,undefined", (*CPU_SOURCES, *EMULATOR_SOURCES))
LAUNCHER_SOURCES = ("csrc/cuda/emulator.cpp", "csrc/cuda/launcher.cpp", "tests/native/host_driver.cpp")
LAUNCHER = Program("check_launcher", "address,undefined", (*CPU_SOURCES, *LAUNCHER_SOURCES))
GRID = Program("check_grid", "address,undefined", ("csrc/cuda/emulator.cpp",))
# Threads share chunks and step counts in the same way whatever the loop over elements: one covers all tensors.
TEAM = Program("check_team", "thread", CPU_SOURCES, (host.ONE_VARIANT,))


def test_random_tables_plans_and_grids_agree_under_address_and_undefined_behaviour_sanitizers(
    record_property: Any,
) -> None:
    record_property("figure", f"address and undefined-behaviour sanitizers: {SWEEPS.run(1, 120).strip()}")


def test_the_launcher_gives_the_bits_of_the_cpu_whatever_changes_between_launches_and_replays(
    record_property: Any,
) -> None:
    record_property("figure", f"the launcher over a driver that works late: {LAUNCHER.run(1, 60).strip()}")


def test_a_kernel_moves_each_slot_once_in_the_widest_accesses(record_property: Any) -> None:
    record_property("figure", f"bytes that an element costs: {BYTES.run().strip()}")


def test_the_emulated_grid_keeps_the_rules_of_barriers_and_shuffles_and_tells_who_breaks_them() -> None:
    GRID.run(1, 12)


def test_threads_with_tables_of_their_own_share_the_team_under_the_thread_sanitizer(record_property: Any) -> None:
    record_property("figure", f"thread sanitizer: {TEAM.run(1, 8).strip()}")


def test_the_program_that_a_gpus_sanitizer_watches_is_right_itself() -> None:
    command = [sys.executable, "-m", "tests.gpu_program", "steps", "--device", "cpu", "--backend", "reference"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_many_more_random_tables_under_sanitizers(record_property: Any) -> None:
    record_property("figure", f"address and undefined-behaviour sanitizers: {SWEEPS.run(10_000, 5_000).strip()}")
    record_property("figure", f"thread sanitizer: {TEAM.run(10_000, 300).strip()}")
