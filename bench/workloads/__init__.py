"""Workloads: lists of parameter shapes, kept as data beside this file or made from a name.

A name such as `1000x16` means 1000 tensors of 16 elements each; any two numbers will do. Every other name is
a file `NAME.json` in this folder. A file holds groups, and a group holds runs `[count, shape]` of equal
shapes in the model's own order; `build.py` writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
GRID_NAME = re.compile(r"(\d+)x(\d+)")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}


@dataclass(frozen=True)
class Group:
    """One parameter group of a workload.

    Attributes:
        runs: `(count, shape)` pairs, in the model's order.
        dtype: Name of the dtype this group is bound to; None where the benchmark's `--dtype` decides.
        lr_scale: Factor on the learning rate, so that groups differ as they do in training.
    """

    runs: tuple[tuple[int, tuple[int, ...]], ...]
    dtype: str | None = None
    lr_scale: float = 1.0

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Every tensor's shape, runs written out."""
        for count, shape in self.runs:
            for _ in range(count):
                yield shape

    def torch_dtype(self, default: str) -> torch.dtype:
        """This group's dtype, `default` where the group leaves it open."""
        return DTYPES[self.dtype or default]


@dataclass(frozen=True)
class Workload:
    """A named list of shapes in parameter groups."""

    name: str
    description: str
    source: str
    groups: tuple[Group, ...]

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return sum(count for group in self.groups for count, _ in group.runs)

    @property
    def elements(self) -> int:
        """Number of elements in all tensors together."""
        return sum(count * prod(shape) for group in self.groups for count, shape in group.runs)

    def bytes_of(self, default_dtype: str) -> int:
        """Bytes of one copy of all parameters, where open groups have `default_dtype`."""
        return sum(
            count * prod(shape) * group.torch_dtype(default_dtype).itemsize
            for group in self.groups
            for count, shape in group.runs
        )

    def allocate(self, default_dtype: str, device: str) -> list[list[Tensor]]:
        """Uninitialised tensors, one list per group."""
        return [
            [torch.empty(shape, dtype=group.torch_dtype(default_dtype), device=device) for shape in group.shapes()]
            for group in self.groups
        ]


def names() -> list[str]:
    """The workloads kept as files, smallest first."""
    return sorted((path.stem for path in FOLDER.glob("*.json")), key=lambda name: load(name).elements)


@cache
def load(name: str) -> Workload:
    """The workload called `name`.

    Raises:
        ValueError: no file has that name and it is not of the form COUNTxNUMEL with both at least 1.
    """
    grid = GRID_NAME.fullmatch(name)
    if grid:
        count, numel = int(grid[1]), int(grid[2])
        if count < 1 or numel < 1:
            raise ValueError(f"workload {name!r} has {count} tensors of {numel} elements; at least 1 of each is needed")
        return Workload(name, f"{count:,} tensors of {numel:,} elements", "synthetic", (Group(((count, (numel,)),)),))
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise ValueError(f"unknown workload {name!r}: expected COUNTxNUMEL or one of {', '.join(names())}")
    return _from_json(json.loads(path.read_text()))


def _from_json(data: dict[str, Any]) -> Workload:
    groups = tuple(
        Group(
            runs=tuple((count, tuple(shape)) for count, shape in group["tensors"]),
            dtype=group.get("dtype"),
            lr_scale=group.get("lr_scale", 1.0),
        )
        for group in data["groups"]
    )
    return Workload(data["name"], data["description"], data["source"], groups)
