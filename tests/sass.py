"""Reads NVIDIA's machine code, as cuobjdump prints it: kernels, their resources, their loops."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in its kernel, in bytes.
        opcode: with its suffixes, such as "LDG.E.128"; the predicate is left out.
        operands: what follows.
    """

    address: int
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch or a call goes, if that is said."""
        found = re.search(r"\b0x([0-9a-f]+)\b", self.operands)
        return int(found[1], 16) if found and self.opcode.startswith(("BRA", "CALL")) else None


@dataclass(frozen=True)
class Kernel:
    """One kernel of an image.

    Attributes:
        name: of its entry point.
        registers: of a thread.
        stack: bytes of a thread's stack, to which registers are spilled.
        local: bytes of a thread's local memory.
        instructions: all, subroutines of division and root at the end included.
    """

    name: str
    registers: int
    stack: int
    local: int
    instructions: tuple[Instruction, ...]

    @cached_property
    def innermost_loops(self) -> list[Loop]:
        """The loops that hold no other: from the target of a branch backwards to the branch."""
        spans = [
            (i.target, i.address) for i in self.instructions if i.target is not None and not i.opcode.startswith("CALL")
        ]
        spans = [(first, last) for first, last in spans if first <= last]
        inner = [
            span for span in spans if not any(span != other and inside(other, span) for other in spans)
        ]  # a branch to itself behind the end of a kernel is a loop of one instruction
        return [Loop(self, first, last) for first, last in inner if first < last]


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel, from address to address."""

    kernel: Kernel
    first: int
    last: int

    @cached_property
    def opcodes(self) -> list[str]:
        """Of the loop's own instructions."""
        return [i.opcode for i in self._between(self.first, self.last)]

    @cached_property
    def opcodes_called(self) -> list[str]:
        """Of the subroutines that it calls: from where a call goes to the first return.

        ptxas also leaves a loop by a call to what follows it, on sm_80: that is no subroutine.
        """
        found: list[str] = []
        calls = [i for i in self._between(self.first, self.last) if i.opcode.startswith("CALL")]
        behind = min(i.address for i in self.kernel.instructions if i.address > self.last)
        for start in {i.target for i in calls} - {behind}:
            assert start is not None, calls
            for instruction in self._between(start, 1 << 62):
                found.append(instruction.opcode)
                if instruction.opcode.startswith("RET"):
                    break
        return found

    def count(self, pattern: str) -> int:
        """How many of the loop's own opcodes are like this, from their first letter to their last."""
        return sum(re.fullmatch(pattern, opcode) is not None for opcode in self.opcodes)

    def _between(self, first: int, last: int) -> list[Instruction]:
        return [i for i in self.kernel.instructions if first <= i.address <= last]


def inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    """Whether a span of addresses lies in another."""
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def find_cuobjdump() -> str | None:
    """The path of cuobjdump: the one in Triton's package, or a CUDA toolkit's."""
    spec = importlib.util.find_spec("triton")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [Path(home, "bin/cuobjdump") for home in homes]
    if spec and spec.origin:
        candidates.insert(0, Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((str(path) for path in candidates if path.exists()), None) or shutil.which("cuobjdump")


def read_kernels(cubin: Path, tool: str) -> dict[str, Kernel]:
    """The kernels of a cubin, by name."""
    usage = _output([tool, "-res-usage", str(cubin)])
    code = _output([tool, "-sass", str(cubin)])
    resources = {
        name: (int(registers), int(stack), int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    kernels = {}
    for part in re.split(r"Function : ", code)[1:]:
        name = part.split()[0]
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", part)
        instructions = tuple(Instruction(int(address, 16), *rest) for address, *rest in lines)
        kernels[name] = Kernel(name, *resources[name], instructions)
    return kernels


def _output(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
    return result.stdout
