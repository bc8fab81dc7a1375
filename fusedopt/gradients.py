"""A row's gradient: what the kernels read in its place, and that no launch writes where it lies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .apart import storage_address
from .core import addresses_apart
from .layout import crossings, may_share_memory
from .memory import resolved
from .rows import Row
from .sharded import local, settled
from .states import States


def stand_in(param: Tensor) -> Tensor | None:
    """What the kernels read in place of a gradient that is sparse, lazy, placed otherwise or in the update's way."""
    grad = param.grad
    if grad is None:
        return None
    values = settled(resolved(grad), param)
    here, there = local(param), local(values)
    same = here.data_ptr() == there.data_ptr() and here.stride() == there.stride() and here.dtype == there.dtype
    # Of one storage or of two: views that NumPy has made of one array have a storage each.
    if not same and storage_address(here) and storage_address(there) and may_share_memory(here, there):
        return values.clone()
    return None if values is grad else values


def check_gradients_apart(live: Sequence[Row], states: States, *, clears: bool) -> None:
    """Refuses gradients that lie where a launch writes: it reads them while it writes everything else.

    An element of the parameter itself is read before it is written, and what overlaps it otherwise is copied.

    Args:
        live: the rows of all tables of a device that have a gradient.
        states: what the optimizer's state has for them.
        clears: whether a launch clears the gradients too.
    """
    grads = [local(row.param.grad) for row in live if row.param.grad is not None]
    written = [(row, name, local(tensor)) for row in live for name, tensor in states.written(row)]
    if addresses_apart([*grads, *(tensor for _, _, tensor in written)]) is not None:
        return
    readers = [(row, grad) for row, grad in zip(live, grads, strict=True) if storage_address(grad)]
    written = [each for each in written if storage_address(each[2])]
    for one, other in crossings([grad for _, grad in readers], [tensor for *_, tensor in written]):
        (reader, grad), (writer, name, tensor) = readers[one], written[other]
        is_own = reader is writer and not name and not clears
        if is_own or not may_share_memory(grad, tensor):
            continue
        is_copied = stand_in(reader.param) is not None  # before all launches of a step
        if is_copied or reader.is_at_odds_with(writer):
            what = f"{name} of {writer.name}" if name else writer.name
            raise ValueError(
                f"gradient of {reader.name} (shape {tuple(grad.shape)}) and {what} (shape {tuple(tensor.shape)}) "
                "share memory: a step would write to the gradient while it is read"
            )
