"""Which tensors of a table share memory: parameters that do are stepped one after the other, the rest is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .core import addresses_apart
from .layout import is_same_memory, may_share_memory, neighbours
from .memory import is_wrapper
from .rows import Row
from .sharded import local


def separate(rows: Sequence[Row]) -> list[list[Row]]:
    """Splits rows so that no two parameters of a part share memory, in as few parts as their order allows.

    Torch updates a parameter that is given twice, or two that are the same memory (tied weights), one after the other;
    so do launches that follow each other.

    Raises:
        ValueError: two parameters share some elements without being the same.
    """
    earlier = sharers(rows) if len(rows) > 1 else {}
    if not earlier:
        for k, row in enumerate(rows):
            row.index, row.part = k, 0
        return [list(rows)]
    levels: dict[int, int] = {}
    for k in range(len(rows)):
        levels[k] = 1 + max((levels[other] for other in earlier.get(k, ())), default=-1)
    parts: list[list[Row]] = [[] for _ in range(max(levels.values(), default=-1) + 1)]
    for k, row in enumerate(rows):
        part = parts[levels[k]]
        row.index, row.part = len(part), levels[k]
        part.append(row)
    return parts


def sharers(rows: Sequence[Row]) -> dict[int, list[int]]:
    """For each row, the earlier ones whose parameters may share memory with its own."""
    addresses = addresses_apart([row.param for row in rows])
    if addresses is not None:
        for row, address in zip(rows, addresses, strict=True):
            row.lies = address
        return {}
    tensors = [local(row.param) for row in rows]
    indices = [k for k, tensor in enumerate(tensors) if storage_address(tensor)]
    for k in indices:
        rows[k].lies = tensors[k].data_ptr()
    earlier: dict[int, list[int]] = {}
    # Whatever their storages: two of them may be of one memory, as those of two views of a NumPy array are.
    for one, other in neighbours([tensors[k] for k in indices]):
        first, second = indices[one], indices[other]
        if may_share_memory(tensors[first], tensors[second]):
            _check_same(rows[first], rows[second])
            earlier.setdefault(second, []).append(first)
    return earlier


def _check_same(one: Row, other: Row) -> None:
    """Refuses parameters that overlap in part: moments of an element that has two are those of neither."""
    tensors = [local(row.param) for row in (one, other)]
    if not is_same_memory(*tensors):
        first, second = (f"shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype}" for t in tensors)
        raise ValueError(
            f"{one.name} ({first}) and {other.name} ({second}), which starts "
            f"{tensors[1].data_ptr() - tensors[0].data_ptr()} bytes after it, share some of their elements; parameters "
            "must be apart, as disjoint views of one tensor are, or the same"
        )


def check_states_apart(
    rows: Sequence[Row], states: Sequence[dict[str, Tensor]], steps: Sequence[Tensor | None]
) -> None:
    """Refuses states, steps and copies that share memory with each other or a parameter: one launch writes them all."""
    members: list[tuple[Row, str, Tensor]] = []  # row, name within it, tensor
    for row, present, step in zip(rows, states, steps, strict=True):
        members.append((row, "", local(row.param)))
        members += ((row, name, local(tensor)) for name, tensor in present.items())
        members += (
            (row, name, local(tensor)) for name, tensor in (("step", step), ("copy_to", row.copy)) if tensor is not None
        )
    if addresses_apart([tensor for *_, tensor in members]) is not None:
        return
    members = [member for member in members if storage_address(member[2])]
    for first, second in neighbours([tensor for *_, tensor in members]):
        (row, name, tensor), (other_row, other, other_tensor) = members[first], members[second]
        if name == other == "" or (name == other == "step" and is_same_memory(tensor, other_tensor)):
            continue  # parameters are compared by `separate`, and a step that is another's comes to be its own
        if row.is_at_odds_with(other_row) and may_share_memory(tensor, other_tensor):
            one, two = (f"{key} of {r.name}" if key else r.name for key, r in ((name, row), (other, other_row)))
            raise ValueError(f"{one} and {two} share memory: an element would be written twice")


def storage_address(tensor: Tensor) -> int:
    """Where a tensor's storage starts; 0: it has none."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or is_wrapper(tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):
        return 0  # a subclass without memory, or a parameter without a shape yet: refused once it has a gradient
