"""DTensors: which tensors are one, and how a gradient or a state comes to lie over the devices as its parameter does.

The kernels read and write local tensors, past DTensor's dispatch. That is right only where local tensors of a row
are the same part of the whole, so everything else is redistributed first, or refused by name.
Nothing of torch.distributed is imported before there is a DTensor, whose own methods mostly suffice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A mesh of devices and the dimensions of it over which a tensor is cut; None: each device has all of it.
Spread = tuple[Any, tuple[int, ...]] | None
TAKEN_AT_ONCE = 256  # elements: a multiple of what any kernel does


def spread_of(tensor: Tensor) -> Spread:
    """How a tensor lies over devices."""
    placements = _placements(tensor) if is_sharded(tensor) else ()
    cut = tuple(k for k, placement in enumerate(placements) if not placement.is_replicate())
    return (_mesh(tensor), cut) if cut else None


# torch's own types, of which almost all are: no need to look for attributes that they do not have.
_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "_local_tensor")


def is_any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether one of them is a DTensor."""
    return not _PLAIN.issuperset(map(type, tensors)) and any(map(is_sharded, tensors))


def local(tensor: Tensor) -> Tensor:
    """The tensor whose memory is on this device: a DTensor's local tensor, anything else itself."""
    return tensor if type(tensor) in _PLAIN else getattr(tensor, "_local_tensor", tensor)


def check_placements(name: str, param: Tensor) -> None:
    """Refuses a parameter of which each device holds only a summand: no device could update it by itself."""
    if is_sharded(param) and any(placement.is_partial() for placement in _placements(param)):
        raise TypeError(f"{name} lies over the devices as {_placements(param)}; it must be sharded or replicated")


def check_together(what: str, tensor: Tensor, param: Tensor) -> None:
    """Refuses a gradient or state that is a DTensor where its parameter is none, or one on other devices."""
    if is_sharded(tensor) != is_sharded(param):
        raise TypeError(f"{what} is {_kind(tensor)}, the parameter {_kind(param)}: both or neither must be DTensors")
    if is_sharded(param) and _mesh(tensor) != _mesh(param):
        raise ValueError(f"{what} is on {_mesh(tensor)}, the parameter on {_mesh(param)}")


def check_in_order(name: str, param: Tensor) -> None:
    """Refuses a parameter of which it is not known which elements of the whole its local tensor has: `places_of`."""
    if not is_sharded(param):
        return
    cut = {placement.dim for placement in _placements(param) if placement.is_shard()}
    if len(cut - {0}) > 1 or not _is_even(param):
        raise ValueError(
            f"{name} lies over the devices as {_placements(param)}, {tuple(local(param).shape)} of "
            f"{tuple(param.shape)}; it must be replicated or in even shards of its first and one more dimension"
        )


def check_even(name: str, param: Tensor) -> None:
    """Refuses a parameter whose shards are not those that ``torch.chunk`` makes."""
    if is_sharded(param) and not _is_even(param):
        raise ValueError(
            f"{name} lies over the devices as {_placements(param)}, {tuple(local(param).shape)} of "
            f"{tuple(param.shape)}; it must be replicated or in even shards"
        )


def places_of(param: Tensor) -> tuple[int, int, int]:
    """Where a local tensor has its elements in the whole, both in row-major order.

    Returns:
        The place of the first; how many follow each other there, 0: all do; how far two such runs are apart.
    """
    if not is_sharded(param):
        return 0, 0, 0
    extents = [_extent(param, dim) for dim in range(param.dim())]
    strides = [math.prod(param.shape[dim + 1 :]) for dim in range(param.dim())]
    first = sum(begin * stride for (begin, _), stride in zip(extents, strides, strict=True))
    count = local(param).numel()
    for dim in range(1, param.dim()):
        if 0 < extents[dim][1] < param.shape[dim]:
            return first, extents[dim][1] * strides[dim], param.shape[dim] * strides[dim]
    # One run, but told as such: where places pass 2^32 within what a kernel takes at a time, it looks at each.
    passes = first % TAKEN_AT_ONCE != 0 and first >> 32 != (first + count) >> 32
    return (first, count, count) if passes else (first, 0, 0)


def all_places(param: Tensor) -> Tensor:
    """The place in the whole of each element of a local tensor, int64 in its shape."""
    first, run, pitch = places_of(param)
    element = torch.arange(local(param).numel(), device="cpu").reshape(local(param).shape)
    return first + (element // run * pitch + element % run if run else element)


def most_elements(param: Tensor) -> int:
    """How many elements the largest local tensor of a parameter has: that of the first rank."""
    if not is_sharded(param):
        return param.numel()
    sizes = list(param.shape)
    for ranks, placement in zip(_mesh(param).shape, _placements(param), strict=True):
        if placement.is_shard():
            sizes[placement.dim] = -(-sizes[placement.dim] // ranks)
    return math.prod(sizes)


def like_local(values: Tensor, param: Tensor) -> Tensor:
    """A local tensor as part of a whole that lies over the devices as the parameter does."""
    if not is_sharded(param):
        return values
    stride = torch.empty(param.shape, device="meta").stride()
    whole: dict[str, Any] = {"shape": param.shape, "stride": stride, "run_check": False}
    return _from_local(param, values, _placements(param), whole)


def by_rank_shape(param: Tensor, count: int) -> tuple[int, ...]:
    """The shape of what each rank has ``count`` of: a row for each rank; of a plain tensor one row alone."""
    return (*_mesh(param).shape, count) if is_sharded(param) else (count,)


def by_rank(values: Tensor, param: Tensor, count: int) -> Tensor:
    """What this rank has, filled up to ``count``, as its row of what all ranks have; of a plain tensor itself."""
    if not is_sharded(param):
        return values
    mesh = _mesh(param)
    row = values.new_zeros(count)
    row[: values.numel()] = values
    return _from_local(param, row.reshape(*(1 for _ in mesh.shape), count), _a_row_each(mesh), {"run_check": False})


def settled_by_rank(tensor: Tensor, param: Tensor) -> Tensor:
    """The same, wherever its rows lie now."""
    placements = _a_row_each(_mesh(param)) if is_sharded(param) else ()
    if not is_sharded(param) or tuple(_placements(tensor)) == placements:
        return tensor
    found: Tensor = tensor.detach().redistribute(placements=placements)  # type: ignore[attr-defined]
    return found


def _a_row_each(mesh: Any) -> tuple[Any, ...]:
    from torch.distributed.tensor import Shard  # a DTensor has imported it already

    return tuple(Shard(dim) for dim in range(len(mesh.shape)))


def _from_local(param: Tensor, values: Tensor, placements: Any, whole: dict[str, Any]) -> Tensor:
    made: Tensor = type(param).from_local(values, _mesh(param), placements, **whole)  # type: ignore[attr-defined]
    return made


def _is_even(param: Tensor) -> bool:
    plain = {type(placement).__name__ for placement in _placements(param)} <= {"Shard", "Replicate"}
    return plain and tuple(local(param).shape) == tuple(_extent(param, dim)[1] for dim in range(param.dim()))


def _extent(param: Tensor, dim: int) -> tuple[int, int]:
    """Where a local tensor begins in a dimension of the whole and how much it has: split as ``torch.chunk`` does."""
    first, count = 0, param.shape[dim]
    places = _mesh(param).get_coordinate()
    for place, ranks, placement in zip(places, _mesh(param).shape, _placements(param), strict=True):
        if placement.is_shard() and placement.dim == dim:
            share = -(-count // ranks)
            begin = min(place * share, count)
            first, count = first + begin, min(share, count - begin)
    return first, count


def settled(tensor: Tensor, param: Tensor) -> Tensor:
    """A gradient or state whose local tensor is what its parameter's local tensor needs.

    Itself, mostly. Else its sum, its shard or its whole, as torch's optimizers find by dispatch; and the
    result of a collective that has not been waited for.
    """
    if not is_sharded(param):
        return _awaited(tensor)
    found = tensor.detach() if is_pending(local(tensor)) or not _lies_as(tensor, param) else tensor
    if not _lies_as(found, param):
        found = found.redistribute(placements=_placements(param))  # type: ignore[attr-defined]
    if is_pending(local(found)):
        whole: dict[str, Any] = {"shape": found.shape, "stride": found.stride(), "run_check": False}
        found = type(found).from_local(  # type: ignore[attr-defined]
            _awaited(local(found)), _mesh(found), _placements(found), **whole
        )
    return found


def _lies_as(tensor: Tensor, param: Tensor) -> bool:
    one, other = _spec(tensor), _spec(param)
    if one is other:
        return True
    order = (getattr(one, "shard_order", None), getattr(other, "shard_order", None))
    return bool(one.placements == other.placements and order[0] == order[1])


def _awaited(tensor: Tensor) -> Tensor:
    """A tensor itself; of a functional collective that runs, its result."""
    if not is_pending(tensor):
        return tensor
    result: Tensor = tensor.wait()  # type: ignore[attr-defined]
    return result


def is_pending(tensor: Tensor) -> bool:
    """Whether it is what a functional collective returned, which waits for its values when it is first used."""
    return type(tensor).__name__ == "AsyncCollectiveTensor"


def _spec(tensor: Tensor) -> Any:
    return tensor._spec  # type: ignore[attr-defined]


def _mesh(tensor: Tensor) -> Any:
    return tensor.device_mesh  # type: ignore[attr-defined]


def _placements(tensor: Tensor) -> Any:
    return tensor.placements  # type: ignore[attr-defined]


def _kind(tensor: Tensor) -> str:
    return f"a DTensor of {_placements(tensor)}" if is_sharded(tensor) else "a plain tensor"
