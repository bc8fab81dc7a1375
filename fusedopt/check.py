"""The checks of hyperparameters and tensors, in torch's words where torch has them; errors name what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .core import STORAGES
from .layout import overlaps_itself, span
from .rules import Group, Rule
from .sharded import check_placements, check_together, is_pending
from .sharded import local as local
from .storages import CODE_STORAGES


def check_lr(lr: float | Tensor, *, foreach: bool | None, capturable: bool) -> None:
    """Refuses a learning rate below 0, and a tensor of it where torch refuses that."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but it has {lr.numel()} elements")
    check_at_least_0("learning rate", lr)


def check_at_least_0(name: str, value: float | Tensor) -> None:
    """Refuses a value below 0, and NaN. A tensor on a GPU is not looked at: that would wait for the GPU."""
    if type(value) is float and value >= 0.0:  # almost always
        return
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, but it has {value.numel()} elements")
    check_number(name, value)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not value >= 0.0:
        what = name if name == "learning rate" else f"{name} value"
        raise ValueError(f"Invalid {what}: {value}")


def check_number(name: str, value: object) -> None:
    """Refuses what is neither a real number nor a tensor of them with memory."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number or a tensor of 1 element, but it is {value!r}")


def check_betas(
    betas: tuple[float | Tensor, float | Tensor], *, foreach: bool | None, capturable: bool
) -> tuple[float | Tensor, float | Tensor]:
    """Refuses decay rates outside [0, 1), and tensors of them where torch refuses that.

    Returns:
        The decay rates, tensors of one element as 0-dim tensors, as torch keeps them.
    """
    if not isinstance(betas, (tuple, list)):
        raise TypeError(f"betas must be 2 decay rates, but they are {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"betas must be 2 decay rates, but there are {len(betas)}")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element, but it has {beta.numel()} elements")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta)
        on_device = isinstance(beta, Tensor) and beta.device.type != "cpu"
        if not on_device and not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    kinds = [isinstance(beta, Tensor) for beta in betas]
    if not (all(kinds) or all(isinstance(beta, float) for beta in betas)):
        raise ValueError(f"betas must be either both floats or both Tensors, but they are {_types(betas)}")
    if any(kinds) and foreach and not capturable:
        raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
    return (_to_scalar(betas[0]), _to_scalar(betas[1]))


def check_flags(*, foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuses what a fused optimizer of torch refuses."""
    if differentiable:
        raise RuntimeError("`fused` does not support `differentiable`: a fused update has no derivative")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_hyperparameters(rule: Rule, groups: Sequence[Group]) -> None:
    """Refuses hyperparameters that no step could use, by group and name. Their ranges are not looked at."""
    for index, group in enumerate(groups):
        for key in [*dict.fromkeys(key for key, _ in rule.hypers), *(key for key, _ in rule.flags)]:
            if key not in group:
                raise KeyError(f"group {index} has no '{key}'")
        for key, item in rule.hypers:
            name = f"'{key}' of group {index}" if item < 0 else f"'{key}'[{item}] of group {index}"
            try:
                value = group[key] if item < 0 else group[key][item]
                if isinstance(value, str):
                    raise TypeError("text is no number")
                if isinstance(value, Tensor) and value.is_meta:
                    raise TypeError("there is no memory on the meta device")
                is_scalar = not isinstance(value, Tensor) or value.numel() == 1
                if is_scalar and not (isinstance(value, Tensor) and value.device.type != "cpu"):
                    float(value)
            except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
                wanted = "must be a number or a tensor of 1 element"
                raise TypeError(f"{name} {wanted}, but it is {group[key]!r}") from error
            if not is_scalar:
                raise ValueError(f"{name} must have 1 element, but it has {value.numel()}")


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses a parameter that no kernel could update, by name."""
    tensor = local(param)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}; its layout must be {torch.strided}")
    if tensor.is_meta:
        raise RuntimeError(f"{name} is on the meta device, where there is no memory to update")
    if is_wrapper(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which wraps other tensors; the kernels need a tensor with "
            "memory of its own, or a DTensor"
        )
    if tensor.is_inference():
        raise RuntimeError(f"{name} is an inference tensor; clone it outside inference_mode")
    if real_dtype(tensor) not in STORAGES:
        known = ", ".join(str(dtype) for dtype in STORAGES)
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {known} or complex numbers of these")
    if tensor.is_conj() or tensor.is_neg():
        kind = "conjugate" if tensor.is_conj() else "negative"
        raise ValueError(
            f"{name} is a lazy view, whose memory holds the {kind} of its values; make it of tensor.resolve_conj()"
            ".resolve_neg()"
        )
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} has elements that share "
            "memory; update the tensor that it is a view of"
        )
    check_memory(name, param)
    check_placements(name, param)


def check_gradient(name: str, param: Tensor, grad: Tensor, *, takes_sparse: bool) -> None:
    """Refuses a gradient that does not fit its parameter, by name and with both values."""
    if grad.is_sparse and not takes_sparse:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead: "
            f"gradient of {name} is {grad.layout}"
        )
    if grad.layout != torch.strided and not grad.is_sparse:
        raise RuntimeError(f"gradient of {name} is {grad.layout}; it must be torch.strided or torch.sparse_coo")
    check_together(f"gradient of {name}", grad, param)
    if grad.shape != param.shape:
        shapes = f"{tuple(grad.shape)}, the parameter {tuple(param.shape)}"
        raise ValueError(f"gradient of {name} has shape {shapes}")
    if grad.device != param.device:
        raise ValueError(f"gradient of {name} is on {grad.device}, the parameter on {param.device}")
    if real_dtype(grad) not in STORAGES or grad.is_complex() != param.is_complex():
        raise TypeError(f"gradient of {name} has dtype {grad.dtype}, the parameter {param.dtype}")
    if is_wrapper(local(grad)) and not is_pending(local(grad)):
        raise TypeError(f"gradient of {name} is a {type(grad).__name__}, which wraps other tensors")
    check_memory(f"gradient of {name}", grad)


def check_memory(name: str, tensor: Tensor) -> None:
    """Refuses a tensor that reaches past its storage, which was freed or shrunk under it (``storage.resize_``)."""
    tensor = local(tensor)
    if tensor.layout != torch.strided or is_pending(tensor) or tensor.numel() == 0:
        return
    storage = tensor.untyped_storage()
    end = tensor.data_ptr() + tensor.nbytes if tensor.is_contiguous() else span(tensor)[1]
    reach = end - storage.data_ptr()
    if reach > storage.nbytes():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype} needs a storage of {reach} bytes, but its "
            f"storage has {storage.nbytes()}: it was freed or shrunk"
        )


def check_state(row: str, param: Tensor, name: str, tensor: Tensor) -> None:
    """Refuses a state tensor that does not fit its parameter: that of another model, most likely."""
    check_together(f"{name} of {row}", tensor, param)
    if tensor.shape != param.shape:
        shapes = f"{tuple(tensor.shape)}, the parameter {tuple(param.shape)}"
        raise ValueError(f"{name} of {row} has shape {shapes}")
    if tensor.layout != torch.strided and not tensor.is_sparse:
        raise TypeError(f"{name} of {row} is {tensor.layout}; its layout must be {torch.strided}")
    if tensor.is_meta or is_wrapper(local(tensor)):
        kind = f"{type(tensor).__name__} on {tensor.device}"
        raise TypeError(f"{name} of {row} has no memory of its own: it is a {kind}")
    known = real_dtype(local(tensor)) in (*STORAGES, *CODE_STORAGES)
    if not known or tensor.is_complex() != param.is_complex():
        raise TypeError(f"{name} of {row} has dtype {tensor.dtype}, the parameter {param.dtype}")
    if not tensor.is_sparse and overlaps_itself(local(tensor)):
        raise ValueError(
            f"{name} of {row} of shape {tuple(tensor.shape)} and strides {tensor.stride()} has elements that "
            "share memory"
        )
    check_memory(f"{name} of {row}", tensor)


def check_step(row: str, state: Mapping[str, Any], states: Sequence[str]) -> None:
    """Refuses a count that is none, and moments without a count or a count without moments."""
    present = [name for name in states if isinstance(state.get(name), Tensor)]
    step = state.get("step")
    if step is None:
        if present:
            raise ValueError(f"the state of {row} has {' and '.join(present)}, but no step")
        return
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise ValueError(f"step of {row} must have 1 element, but it has {step.numel()}")
        check_memory(f"step of {row}", step)
        if step.device.type != "cpu":
            return  # to look at it would wait for the device
    if not _is_number(step):
        raise ValueError(f"step of {row} must be a count, but it is {step!r}")
    count = float(step)
    if not (count >= 0.0 and count.is_integer()):
        raise ValueError(f"step of {row} must be a count, but it is {count}")
    missing = [name for name in states[:2] if name not in present]
    if count > 0.0 and missing:
        raise ValueError(f"the state of {row} has taken {int(count)} steps, but has no {' and no '.join(missing)}")


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor is a subclass that keeps its values in other tensors, or in none."""
    kind = type(tensor)
    if kind is torch.nn.Parameter or kind is Tensor:
        return False
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    fake = kind.__name__ in ("FakeTensor", "FunctionalTensor")
    return bool(fake or is_traceable_wrapper_subclass(tensor))


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor's real numbers."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _is_number(value: object) -> bool:
    """Whether a value is a real number or a tensor of one. A tensor on a GPU is not looked at: that would wait."""
    if type(value) in (float, int):
        return True
    if isinstance(value, Tensor):
        return not value.is_meta and not value.is_complex()
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return not isinstance(value, (str, bytes, bytearray))


def _to_scalar(value: float | Tensor) -> float | Tensor:
    return value.squeeze() if isinstance(value, Tensor) and value.dim() else value


def _types(values: Sequence[object]) -> str:
    return " and ".join(type(value).__name__ for value in values)
