"""What g++ compiles: each C++ file of the extension, once, or anew for each rule and instruction set."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINE = "csrc/cpu/engine.cpp"  # for each instruction set and rule
MEASURE = "csrc/cpu/measure.cpp"  # for each instruction set
EMULATED = "csrc/cuda/emulated.cpp"  # for each rule
RULES = "csrc/rules/all.h"


@dataclass(frozen=True)
class Unit:
    """One object to make.

    Attributes:
        source: the file.
        flags: beside those of every file.
        tag: tells apart the objects of one source; "" where there is but one.
        is_hot: whether speed depends on it.
    """

    source: Path
    flags: tuple[str, ...] = ()
    tag: str = ""
    is_hot: bool = True


def rule_stems(root: Path) -> list[str]:
    """The rules, by stem: those that ``csrc/rules/all.h`` lists."""
    return re.findall(r"^ *X\((\w+), \w+\)", (root / RULES).read_text(), re.MULTILINE)


def plain_units(root: Path) -> list[Unit]:
    """Every file that is compiled once, in a fixed order."""
    manifold = {root / source for source in (ENGINE, MEASURE, EMULATED)}
    return [Unit(source) for source in sorted(set((root / "csrc").rglob("*.cpp")) - manifold)]


def emulated_units(root: Path, *, emulates: bool = True) -> list[Unit]:
    """The kernels for the emulator, of each rule; where a build is not to emulate, what says so instead."""
    without, tag = ((), "") if emulates else (("-DFUSEDOPT_NO_EMULATION",), ".none")
    return [
        Unit(root / EMULATED, (*without, *_of_rule(rule)), f"{rule}{tag}", is_hot=False) for rule in rule_stems(root)
    ]


def engine_units(root: Path, isas: Mapping[str, Sequence[str]]) -> list[Unit]:
    """The CPU engine.

    Args:
        root: repository root.
        isas: instruction sets, lowest first, which is the order to link in; each with the flags that enable it.

    Returns:
        For each instruction set what is the same for every rule, and a unit of each rule.
    """
    units = []
    for isa, enable in isas.items():
        flags = (f"-DFUSEDOPT_ISA={isa}", *enable)
        units.append(Unit(root / MEASURE, flags, isa))
        units += [Unit(root / ENGINE, (*flags, *_of_rule(rule)), f"{isa}.{rule}") for rule in rule_stems(root)]
    return units


def _of_rule(rule: str) -> tuple[str, ...]:
    return (f"-DFUSEDOPT_RULE={rule}", "-include", f"rules/{rule}.h")
