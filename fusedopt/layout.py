"""How the slots of one tensor lie in memory beside each other: dense in one order, or by strides."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Strides = tuple[int, ...]


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements fill one stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share memory, as those of an expanded tensor do."""
    extent = 1
    undecided = False
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride == 0:
            return tensor.numel() > 0
        undecided |= stride < extent
        extent += (size - 1) * stride
    return undecided and tensor.numel() > 0 and _collides(tensor.shape, tensor.stride())


def _collides(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Decides by looking at every offset: for the rare strides that interleave without a rule."""
    offsets = [0]
    for size, stride in zip(shape, strides, strict=True):
        offsets = [offset + k * stride for offset in offsets for k in range(size)]
    return len(set(offsets)) != len(offsets)


def strided_layout(shape: Sequence[int], slots: Sequence[Strides | None]) -> list[int]:
    """The layout that a row of the table carries, empty where all slots are dense in the same order.

    Args:
        shape: of the tensor.
        slots: strides of each element slot, in elements; None where the slot is absent.

    Returns:
        ``[ndim, sizes..., strides of slot 0..., strides of slot 1..., ...]``, dimensions merged where every slot
        allows it (csrc/table.h: ``TensorTable::layouts``).
    """
    kept = [d for d, size in enumerate(shape) if size != 1]
    sizes = [shape[d] for d in kept]
    columns = [None if strides is None else [strides[d] for d in kept] for strides in slots]
    present = [column for column in columns if column is not None]
    if all(column == present[0] for column in present) and is_dense(sizes, present[0]):
        return []
    for d in range(len(sizes) - 2, -1, -1):
        if all(column[d] == sizes[d + 1] * column[d + 1] for column in present):
            sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
            for column in present:
                del column[d]
    layout = [len(sizes), *sizes]
    for column in columns:
        layout += column if column is not None else [0] * len(sizes)
    return layout
