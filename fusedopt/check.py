"""The checks of hyperparameters and tensors, in torch's words where torch has them; errors name what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Complex, Real
from typing import Any

import torch
from torch import Tensor

from .core import STORAGES
from .layout import overlaps_itself
from .memory import check_memory, check_own_memory, is_wrapper, layout_of
from .rules import Group, Rule
from .sharded import check_placements, check_together, is_pending, local
from .storages import CODE_STORAGES

USUAL = 1e300  # numbers below it are no larger than a float can be, whatever their type
MOST_SHOWN = 120  # characters of a value that an error message quotes


def check_lr(lr: float | Tensor, *, foreach: bool | None, capturable: bool) -> None:
    """Refuses a learning rate below 0, and a tensor of it where torch refuses that."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        _check_one_element("lr", lr)
    check_at_least_0("learning rate", lr)


def check_at_least_0(name: str, value: float | Tensor) -> None:
    """Refuses a value below 0, and NaN. A tensor on a GPU is not looked at: that would wait for the GPU."""
    if type(value) in (float, int) and 0 <= value < USUAL:  # almost always
        return
    check_number(name, value)
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not float(value) >= 0.0:
        what = name if " " in name else f"{name} value"
        raise ValueError(f"Invalid {what}: {value}")


def check_number(name: str, value: object) -> None:
    """Refuses what is neither a real number nor a tensor of one."""
    if type(value) in (float, int) and -USUAL < value < USUAL:  # type: ignore[operator]  # almost always
        return
    if isinstance(value, Tensor):
        _check_one_element(name, value)
        if value.layout == torch.strided and not value.is_meta:
            check_memory(name, value)  # first: to print what has no memory ends the process
    why = _why_no_number(value)
    if why is not None:
        raise TypeError(f"{name} must be a number or a tensor of 1 element, but it is {shown(value)}{why}")


def check_truth(name: str, value: object) -> None:
    """Refuses what is neither true nor false: a tensor of two elements, or what has no memory."""
    try:
        bool(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be true or false, but it is {shown(value)}") from error


def check_betas(
    betas: tuple[float | Tensor, float | Tensor], *, foreach: bool | None, capturable: bool
) -> tuple[float | Tensor, float | Tensor]:
    """Refuses decay rates outside [0, 1), and tensors of them where torch refuses that.

    Returns:
        The decay rates, tensors of one element as 0-dim tensors, as torch keeps them.
    """
    if type(betas) is tuple and len(betas) == 2 and all(type(b) is float and 0.0 <= b < 1.0 for b in betas):
        return betas  # almost always
    if not _is_sequence(betas):
        raise TypeError(f"betas must be 2 decay rates, but they are {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"betas must be 2 decay rates, but there are {len(betas)}")
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta)
        on_device = isinstance(beta, Tensor) and beta.device.type != "cpu"
        if not on_device and not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    kinds = [isinstance(beta, Tensor) for beta in betas]
    if not (all(kinds) or all(isinstance(beta, float) for beta in betas)):
        raise ValueError(f"betas must be either both floats or both Tensors, but they are {_types(betas)}")
    if any(kinds) and foreach and not capturable:
        raise ValueError("betas[0] as a Tensor is not supported for capturable=False and foreach=True")
    return (_to_scalar(betas[0]), _to_scalar(betas[1]))


def _is_sequence(value: Any) -> bool:
    """Whether a value has numbers one by one: a tuple or a list, or what passes for one, as an array or a config's."""
    is_other = isinstance(value, (str, bytes, Mapping, Tensor))
    return not is_other and hasattr(type(value), "__len__") and hasattr(type(value), "__getitem__")


def check_flags(*, foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuses what a fused optimizer of torch refuses."""
    if differentiable:
        raise RuntimeError("`fused` does not support `differentiable`: a fused update has no derivative")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_groups(groups: object) -> None:
    """Refuses what is no list of groups of parameters, as somebody may leave it who writes to ``param_groups``."""
    if not isinstance(groups, list):
        raise TypeError(f"param_groups must be a list of dicts, but it is {shown(groups)}")
    for index, group in enumerate(groups):
        if not isinstance(group, dict):
            raise TypeError(f"group {index} must be a dict, but it is {shown(group)}")
        if not isinstance(group.get("params"), list):
            raise TypeError(f"'params' of group {index} must be a list, but it is {shown(group.get('params'))}")
        for place, param in enumerate(group["params"]):
            if not isinstance(param, Tensor):
                raise TypeError(f"parameter {place} of group {index} must be a tensor, but it is {shown(param)}")


def check_hyperparameters(rule: Rule, groups: Sequence[Group]) -> None:
    """Refuses hyperparameters that no step could use, by group and name. Their ranges are not looked at."""
    for index, group in enumerate(groups):
        for key in [*dict.fromkeys(key for key, _ in rule.hypers), *(key for key, _ in rule.flags)]:
            if key not in group:
                raise KeyError(f"group {index} has no '{key}'")
        for key, item in rule.hypers:
            _check_hyperparameter(f"'{key}'", f"of group {index}", group[key], item)
        for key in dict.fromkeys(key for key, item in rule.hypers if item >= 0):
            if len(group[key]) != rule.items_of(key):
                wanted = f"must be {rule.items_of(key)} numbers"
                raise ValueError(f"'{key}' of group {index} {wanted}, but there are {len(group[key])}")
        for key, _ in rule.flags:
            check_truth(f"'{key}' of group {index}", group[key])


def _check_hyperparameter(key: str, of: str, value: Any, item: int) -> None:
    """Refuses a value, or an item of it where ``item`` is not below 0, that is no number."""
    if item < 0:
        return check_number(f"{key} {of}", value)
    if not _is_sequence(value) or len(value) <= item:
        wanted = "must be a number or a tensor of 1 element"
        raise TypeError(f"{key}[{item}] {of} {wanted}, but it is {shown(value)}")
    return check_number(f"{key}[{item}] {of}", value[item])


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses a parameter that no kernel could update, by name."""
    tensor = local(param)
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"{name} is {layout_of(tensor)}; its layout must be {torch.strided}")
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
    if not isinstance(grad, Tensor):
        raise TypeError(f"gradient of {name} must be a tensor, but it is {shown(grad)}")
    if grad.is_sparse and not takes_sparse:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead: "
            f"gradient of {name} is {grad.layout}"
        )
    if (grad.layout != torch.strided and not grad.is_sparse) or grad.is_nested:
        raise RuntimeError(f"gradient of {name} is {layout_of(grad)}; it must be torch.strided or torch.sparse_coo")
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


def check_state(row: str, param: Tensor, name: str, tensor: object, *, codes: bool) -> None:
    """Refuses a state tensor that does not fit its parameter: that of another model, most likely.

    Args:
        row: what the parameter is called.
        param: the parameter.
        name: of the state.
        tensor: the state.
        codes: whether it may be kept in 8 bits.

    Raises:
        TypeError: it is no tensor, has no memory, or is of a dtype that no kernel reads there.
        ValueError: it is of another shape, or its elements share memory.
    """
    what = f"{name} of {row}"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{what} must be a tensor, but it is {shown(tensor)}")
    check_together(what, tensor, param)
    if tensor.is_nested or tensor.shape != param.shape:
        shape = layout_of(tensor) if tensor.is_nested else tuple(tensor.shape)
        raise ValueError(f"{what} has shape {shape}, the parameter {tuple(param.shape)}")
    if not tensor.is_sparse:  # SGD's velocity may be; it is made dense
        check_own_memory(what, tensor)
    known = (*STORAGES, *CODE_STORAGES) if codes else STORAGES
    if real_dtype(local(tensor)) not in known or tensor.is_complex() != param.is_complex():
        raise TypeError(f"{what} has dtype {tensor.dtype}, the parameter {param.dtype}")


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
    why = _why_no_number(step)
    if why is not None:
        raise ValueError(f"step of {row} must be a count, but it is {shown(step)}{why}")
    if isinstance(step, Tensor) and step.device.type != "cpu":
        return  # to look at it would wait for the device
    count = float(step)
    if not (count >= 0.0 and count.is_integer()):
        raise ValueError(f"step of {row} must be a count, but it is {count}")
    missing = [name for name in states[:2] if name not in present]
    if count > 0.0 and missing:
        raise ValueError(f"the state of {row} has taken {int(count)} steps, but has no {' and no '.join(missing)}")


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor's real numbers."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def _check_one_element(name: str, value: Tensor) -> None:
    if value.numel() != 1 and name.startswith("'"):
        raise ValueError(f"{name} must have 1 element, but it has {value.numel()}")
    if value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, but it has {value.numel()} elements")


def _why_no_number(value: object) -> str | None:
    """Why a step could read no real number from a value, as far as it does not show; None: it can.

    What lies on a GPU is not looked at: that would wait for the GPU.
    """
    if type(value) is float:  # almost always
        return None
    if isinstance(value, Tensor):
        return _why_no_scalar(value)
    if isinstance(value, (str, bytes, bytearray)):
        return ", which is text"
    if isinstance(value, Complex) and not isinstance(value, Real):
        return ", which is complex"
    try:
        float(value)  # type: ignore[arg-type]
    except OverflowError:
        return ", which is too large"
    except (TypeError, ValueError):
        return ""
    return None


def _why_no_scalar(tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.is_nested:
        return f", which is {layout_of(tensor)}"
    if tensor.is_meta or type(tensor).__name__ == "FakeTensor":
        return ", which has no memory"
    if tensor.is_complex() or tensor.is_quantized:
        return f" of {tensor.dtype}"
    return ", which is a lazy view" if tensor.is_neg() else None


def shown(value: object) -> str:
    """A value for a message: not all of a large one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _to_scalar(value: float | Tensor) -> float | Tensor:
    return value.squeeze() if isinstance(value, Tensor) and value.dim() else value


def _types(values: Sequence[object]) -> str:
    return " and ".join(type(value).__name__ for value in values)
