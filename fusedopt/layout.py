"""How tensors lie in memory: dense or by strides, apart from each other or not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

Strides = tuple[int, ...]

# Strides that interleave without a rule are decided by looking at every offset, up to this many elements.
MOST_OFFSETS = 1 << 20


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements fill one stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share memory, as in an expanded one; True where that is not known."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    extent = 1
    undecided = False
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride == 0:
            return True
        undecided |= stride < extent
        extent += (size - 1) * stride
    return undecided and (tensor.numel() > MOST_OFFSETS or _collides(tensor.shape, tensor.stride()))


def _collides(shape: Sequence[int], strides: Sequence[int]) -> bool:
    offsets = _offsets(shape, strides)
    return len(set(offsets)) != len(offsets)


def _offsets(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    offsets = [0]
    for size, stride in zip(shape, strides, strict=True):
        offsets = [offset + k * stride for offset in offsets for k in range(size)]
    return offsets


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor's memory, and the one after its last; equal where it has no elements."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    if tensor.numel() == 0:
        return start, start
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def may_share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common; True where that is not known.

    It is known where the one ends before the other starts, for slices of the same tensor, whose strides agree, and
    where the tensors are small enough to look at every byte.
    """
    (start, end), (other_start, other_end) = span(one), span(other)
    if end <= other_start or other_end <= start:
        return False
    dims = _common_strides(one, other)
    item = one.element_size()
    if dims is None or other.element_size() != item:
        return _may_meet(one, other)
    reach = item - 1  # how far the dimensions within can lead; less than one stride where strides count like digits
    for stride, size, other_size in reversed(dims):
        if reach >= stride:
            return _may_meet(one, other)
        reach += (max(size, other_size) - 1) * stride
    return _meet(dims, other_start - start, item)


def _may_meet(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have a byte in common, by looking at every one; True where these are too many."""
    if one.nbytes + other.nbytes > MOST_OFFSETS:
        return True
    places = []
    for tensor in (one, other):
        item = tensor.element_size()
        starts = (tensor.data_ptr() + offset * item for offset in _offsets(tensor.shape, tensor.stride()))
        places.append({start + byte for start in starts for byte in range(item)})
    return not places[0].isdisjoint(places[1])


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether every element of two tensors is the same one in memory."""
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _common_strides(one: Tensor, other: Tensor) -> list[tuple[int, int, int]] | None:
    """Stride in bytes and both sizes of each dimension, outermost first; None where strides differ."""
    if one.dim() != other.dim():
        return None
    dims = []
    for d in range(one.dim()):
        size, other_size = one.shape[d], other.shape[d]
        if size == other_size == 1:
            continue
        if size != 1 and other_size != 1 and one.stride(d) != other.stride(d):
            return None
        stride = one.stride(d) if size != 1 else other.stride(d)
        dims.append((stride * one.element_size(), size, other_size))
    return sorted(dims, reverse=True)


def _meet(dims: Sequence[tuple[int, int, int]], distance: int, item: int) -> bool:
    """Whether an element of the one lies ``distance`` bytes after one of the other, up to the size of an item."""
    if not dims:
        return abs(distance) < item
    (stride, size, other_size), *within = dims
    below = distance // stride
    return any(
        -other_size < steps < size and _meet(within, distance - steps * stride, item) for steps in (below, below + 1)
    )


def neighbours(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs of indices, the smaller first, of tensors whose spans of memory meet."""
    spans = sorted((*span(tensor), index) for index, tensor in enumerate(tensors))
    if all(end <= next_start for (_, end, _), (next_start, _, _) in pairwise(spans)):
        return  # as almost always
    spans = [each for each in spans if each[0] < each[1]]
    open_spans: list[tuple[int, int]] = []  # end, index
    for start, end, index in spans:
        open_spans = [(other_end, other) for other_end, other in open_spans if other_end > start]
        for _, other in open_spans:
            yield min(index, other), max(index, other)
        open_spans.append((end, index))


def crossings(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """Pairs of an index of each list, among them all of tensors whose spans of memory meet.

    Those of one list may meet at will: a gradient that all parameters share makes no pair by itself.
    """
    stretches: list[tuple[int, int, list[int]]] = []  # apart from each other, in order: start, end, who is there
    for start, end, index in sorted((*span(tensor), index) for index, tensor in enumerate(ones)):
        if start == end:
            continue
        if stretches and start < stretches[-1][1]:
            first, last, members = stretches[-1]
            members.append(index)
            stretches[-1] = first, max(last, end), members
        else:
            stretches.append((start, end, [index]))
    starts = [start for start, _, _ in stretches]
    for other, tensor in enumerate(others):
        start, end = span(tensor)
        at = max(bisect_right(starts, start) - 1, 0)
        while start < end and at < len(stretches) and starts[at] < end:
            if start < stretches[at][1]:
                yield from ((one, other) for one in stretches[at][2])
            at += 1


def strided_layout(shape: Sequence[int], slots: Sequence[Strides | None], *, row_major: bool = False) -> list[int]:
    """The layout that a row of the table carries, empty where all slots are dense in the same order.

    Args:
        shape: of the tensor.
        slots: strides of each element slot, in elements; None where the slot is absent.
        row_major: whether dense slots must be in row-major order to pass for dense.

    Returns:
        ``[ndim, sizes..., strides of slot 0..., strides of slot 1..., ...]``, dimensions merged where every slot
        allows it (csrc/table.h: ``TensorTable::layouts``).
    """
    if 0 in shape:
        return []  # there is nothing to reach
    if len(shape) == 1 and all(slot is None or slot == (1,) for slot in slots):
        return []
    kept = [d for d, size in enumerate(shape) if size != 1]
    sizes = [shape[d] for d in kept]
    columns = [None if slot is None else [slot[d] for d in kept] for slot in slots]
    present = [column for column in columns if column is not None]
    in_order = not row_major or present[0] == sorted(present[0], reverse=True)
    if all(column == present[0] for column in present) and is_dense(sizes, present[0]) and in_order:
        return []
    for d in range(len(sizes) - 2, -1, -1):
        if all(column[d] == sizes[d + 1] * column[d + 1] for column in present):
            sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
            for column in present:
                del column[d]
    layout = [len(sizes), *sizes]
    for strides in columns:
        layout += strides if strides is not None else [0] * len(sizes)
    return layout
