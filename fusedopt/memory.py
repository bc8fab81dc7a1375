"""Whether a tensor has memory of its own: not freed, shrunk, shared among its elements, or another tensor's."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import overlaps_itself, span
from .sharded import is_pending, local


def check_own_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that has no memory of its own for each of its elements."""
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} is {layout_of(tensor)}; its layout must be {torch.strided}")
    if tensor.is_meta or is_wrapper(local(tensor)):
        raise TypeError(f"{name} has no memory of its own: it is a {type(tensor).__name__} on {tensor.device}")
    if overlaps_itself(local(tensor)):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} has elements that share memory"
        )
    if tensor.is_inference():
        raise RuntimeError(f"{name} is an inference tensor; clone it outside inference_mode")
    check_memory(name, tensor)


def check_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that reaches past its storage, which was freed or shrunk under it (``storage.resize_``)."""
    tensor = local(tensor)
    if tensor.layout != torch.strided or is_pending(tensor) or tensor.numel() == 0:
        return
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError as error:
        raise TypeError(f"{name} has no memory of its own, as within torch.vmap or torch.func.grad: {error}") from error
    if tensor._is_zerotensor():
        raise TypeError(f"{name} has no memory of its own: it is zeros that torch did not write; clone it")
    end = tensor.data_ptr() + tensor.nbytes if tensor.is_contiguous() else span(tensor)[1]
    reach = end - storage.data_ptr()
    if reach > storage.nbytes():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype} needs a storage of {reach} bytes, but its "
            f"storage has {storage.nbytes()}: it was freed or shrunk"
        )


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is a subclass that keeps its values in other tensors, or in none."""
    kind = type(tensor)
    if kind is torch.nn.Parameter or kind is Tensor:
        return False
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    fake = kind.__name__ in ("FakeTensor", "FunctionalTensor")
    return bool(fake or is_traceable_wrapper_subclass(tensor))


def layout_of(tensor: Tensor) -> str:
    """What a tensor's layout is called; that of some nested tensors claims to be strided."""
    return "nested" if tensor.is_nested and tensor.layout == torch.strided else str(tensor.layout)


def resolved(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: itself, or a copy of one that is sparse or a lazy view."""
    if tensor.is_sparse:
        return tensor.to_dense()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor
