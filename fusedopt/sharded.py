"""DTensors: which tensors are one, and how a gradient or a state comes to lie over the devices as its parameter does.

The kernels read and write local tensors, past DTensor's dispatch. That is right only where local tensors of a row
are the same part of the whole, so everything else is redistributed first, or refused by name.
Nothing of torch.distributed is imported: where there is a DTensor, its own methods suffice.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# A mesh of devices and the dimensions of it over which a tensor is cut; None: each device has all of it.
Spread = tuple[Any, tuple[int, ...]] | None


def spread_of(tensor: Tensor) -> Spread:
    """How a tensor lies over devices."""
    placements = _placements(tensor) if is_sharded(tensor) else ()
    cut = tuple(k for k, placement in enumerate(placements) if not placement.is_replicate())
    return (_mesh(tensor), cut) if cut else None


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The tensor whose memory is on this device: a DTensor's local tensor, anything else itself."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


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
