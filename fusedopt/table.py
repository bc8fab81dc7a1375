"""Builds the tensor table of one device and keeps it true: rows, states, storages, layouts.

A row is made when its parameter first has a gradient, and again when something about its tensors changed; in between,
the compiled table only reads gradients again. All checks happen here, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .core import STORAGES, Core, make_core
from .layout import is_dense, overlaps_itself, strided_layout
from .rules import Group, Rule

ELEMENT_SLOTS = 5  # parameter, gradient, three states: csrc/table.h
STATE_SLOTS = 3


@dataclass
class Row:
    """One parameter of a table.

    Attributes:
        index: of the row.
        group: index of its group.
        name: what error messages call it.
        param: the parameter.
        states: its state tensors by name; empty until the first gradient.
        step: float32 count of its steps; None for a rule that needs no count here.
    """

    index: int
    group: int
    name: str
    param: Tensor
    states: dict[str, Tensor] = field(default_factory=dict)
    step: Tensor | None = None


class Table:
    """The tensors of one optimizer on one device.

    Args:
        rule: the optimizer's rule.
        device: where all of these parameters are.
        groups: the optimizer's ``param_groups``.
        rows: parameters on this device, in order.
        state: the optimizer's ``state``.
        hidden_steps: counts of rules that keep none in their state.
    """

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        groups: list[dict[str, Any]],
        rows: list[Row],
        state: Mapping[Tensor, dict[str, Any]],
        hidden_steps: dict[Tensor, Tensor],
    ) -> None:
        """See the class."""
        self.rule = rule
        self.device = device
        self.groups = groups
        self.rows = rows
        self.launcher: Any = None  # what a backend keeps for this table
        self._state = state
        self._hidden_steps = hidden_steps
        self.core: Core = make_core(rule, device)
        self.core.resize(len(rows), [len(group["params"]) for group in groups])
        for row in rows:
            check_parameter(row.name, row.param)
        check_apart(rows)
        for row in rows:
            self._adopt_state(row)

    def refresh(self) -> bool:
        """Reads gradients and hyperparameters again, and makes new rows where something changed.

        Returns:
            False where parameters came or went: the table must be built anew.
        """
        changed_groups = self.core.read_groups(self.groups)
        if changed_groups == -1:
            return False
        if changed_groups is not None:
            self._reconsider_groups(changed_groups)
        changed_rows = self.core.refresh()
        if changed_rows is not None:
            self._remake([self.rows[index] for index in changed_rows])
        return True

    def is_current(self) -> bool:
        """Whether the optimizer's state still holds the very tensors that the rows point into."""
        return all(self._holds(row) for row in self.rows)

    def live_params(self) -> list[Tensor]:
        """The parameters that have a gradient, as of the last refresh."""
        return self.core.live_params()

    def live_rows(self) -> Iterable[Row]:
        """The rows that have a gradient now."""
        return (row for row in self.rows if row.param.grad is not None)

    def _holds(self, row: Row) -> bool:
        state = self._state.get(row.param, {})
        step = state.get("step") if self.rule.keeps_step else row.step
        if step is not row.step:
            return False
        return all(state.get(name) is tensor for name, tensor in row.states.items())

    def _adopt_state(self, row: Row) -> None:
        """Takes over what the optimizer's state already has: after a load, a move, or an outside change."""
        state = self._state.get(row.param)
        if not state:
            self.core.set_row(row.index, *_bare_row(row), row.param, None, _is_wrapped(row.param), [])
            return
        present = {name: state[name] for name in self.rule.states if isinstance(state.get(name), Tensor)}
        for name, tensor in present.items():
            check_state(row, name, tensor)
            if tensor.device != row.param.device:
                present[name] = state[name] = tensor.to(row.param.device)
        row.states = present
        if self.rule.keeps_step:
            row.step = state["step"] = as_step(state.get("step", 0.0), row)
        elif present:
            row.step = self._hidden_steps.setdefault(row.param, as_step(1.0, row))
        self.core.set_row(row.index, *_bare_row(row), row.param, None, _is_wrapped(row.param), [])

    def _reconsider_groups(self, changed: Sequence[int]) -> None:
        """A flag or a zero changed, and with it perhaps the states that a row needs."""
        groups = set(changed)
        self._remake([row for row in self.rows if row.group in groups and row.param.grad is not None])

    def _remake(self, rows: list[Row]) -> None:
        for row in rows:
            check_parameter(row.name, row.param)
            if row.param.grad is not None:
                check_gradient(row.name, row.param, row.param.grad)
        self._create_states([row for row in rows if row.param.grad is not None])
        for row in rows:
            self._set_row(row)

    def _create_states(self, rows: list[Row]) -> None:
        """Zeros for what is missing. The steps of all of these rows are views of one buffer."""
        with_step = [row for row in rows if row.step is None and self._wants_step(row)]
        steps = torch.zeros(len(with_step), dtype=torch.float32, device=self.device).unbind() if with_step else ()
        for row, step in zip(with_step, steps, strict=True):
            row.step = step
            if self.rule.keeps_step:
                self._state[row.param]["step"] = step
            else:
                self._hidden_steps[row.param] = step
        for row in rows:
            for name in self.rule.states_of(self.groups[row.group]):
                if name not in row.states:
                    tensor = torch.zeros_like(row.param, dtype=_state_dtype(self.rule, row), memory_format=torch.preserve_format)
                    row.states[name] = self._state[row.param][name] = tensor.detach()

    def _wants_step(self, row: Row) -> bool:
        return self.rule.keeps_step or bool(self.rule.states_of(self.groups[row.group]))

    def _set_row(self, row: Row) -> None:
        grad = row.param.grad
        if grad is None:
            self.core.set_row(row.index, *_bare_row(row), row.param, None, _is_wrapped(row.param), [])
            return
        needed = self.rule.states_of(self.groups[row.group])
        states = [row.states.get(name) if name in needed else None for name in self.rule.states]
        states += [None] * (STATE_SLOTS - len(states))
        slots = [None if tensor is None else real_view(local(tensor)) for tensor in (row.param, grad, *states)]
        param = slots[0]
        assert param is not None  # the parameter is always there
        layout = strided_layout(param.shape, [None if slot is None else slot.stride() for slot in slots])
        addresses = [_address(slot) for slot in slots]
        addresses.append(0 if row.step is None else row.step.data_ptr())
        storages = [0 if slot is None else STORAGES[slot.dtype] for slot in slots]
        keep = [tensor for tensor in (*states, row.step) if tensor is not None]
        self.core.set_row(
            row.index, addresses, storages, param.numel(), row.group, layout, row.param, grad, _is_wrapped(row.param), keep
        )


def _bare_row(row: Row) -> tuple[list[int], list[int], int, int, list[int]]:
    """A row without gradient: a launch passes it over."""
    param = real_view(local(row.param))
    layout = [] if is_dense(param.shape, param.stride()) else strided_layout(param.shape, [param.stride()] * ELEMENT_SLOTS)
    storage = STORAGES[param.dtype]
    return [_address(param), 0, 0, 0, 0, 0], [storage] * ELEMENT_SLOTS, param.numel(), row.group, layout


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return tensor.data_ptr() if tensor.numel() else 1  # kEmptyGradient: a tensor of 0 elements has no address


def _is_wrapped(tensor: Tensor) -> bool:
    return hasattr(tensor, "_local_tensor")


def local(tensor: Tensor) -> Tensor:
    """The tensor whose memory is on this device: a DTensor's local shard, anything else itself."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, as torch's optimizers take it."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def _state_dtype(rule: Rule, row: Row) -> torch.dtype:
    """The parameter's; for SGD what torch's first velocity has, which is a decayed gradient."""
    if rule.keeps_step or row.param.grad is None:
        return row.param.dtype
    return row.param.grad.dtype


def as_step(step: Any, row: Row) -> Tensor:
    """A step count of any origin as torch's fused optimizers keep it: float32, on the parameter's device, 0-dim."""
    device = local(row.param).device
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise ValueError(f"step of {row.name} must have 1 element, but it has {step.numel()}")
        if step.dtype == torch.float32 and step.device == device and step.dim() == 0:
            return step
        return step.detach().to(dtype=torch.float32, device=device).reshape(())
    return torch.tensor(float(step), dtype=torch.float32, device=device)


def check_parameter(name: str, param: Tensor) -> None:
    """Refuses a parameter that no kernel could update, by name."""
    tensor = local(param)
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} is {tensor.layout}; its layout must be {torch.strided}")
    if tensor.is_meta:
        raise RuntimeError(f"{name} is on the meta device, where there is no memory to update; materialise it first")
    if real_dtype(tensor) not in STORAGES:
        known = ", ".join(str(dtype) for dtype in STORAGES)
        raise TypeError(f"{name} has dtype {tensor.dtype}; fusedopt updates {known} and complex numbers of these")
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} has elements that share memory; "
            "update the tensor that it is a view of"
        )


def check_gradient(name: str, param: Tensor, grad: Tensor) -> None:
    """Refuses a gradient that does not fit its parameter, by name and with both values."""
    if grad.is_sparse or grad.layout != torch.strided:
        raise RuntimeError(f"gradient of {name} is {grad.layout}; fusedopt takes dense gradients only (torch.strided)")
    if grad.shape != param.shape:
        raise ValueError(f"gradient of {name} has shape {tuple(grad.shape)}, the parameter {tuple(param.shape)}")
    if grad.device != param.device:
        raise ValueError(f"gradient of {name} is on {grad.device}, the parameter on {param.device}")
    if real_dtype(grad) not in STORAGES or grad.is_complex() != param.is_complex():
        raise TypeError(f"gradient of {name} has dtype {grad.dtype}, the parameter {param.dtype}")
    if grad.is_conj() or grad.is_neg():
        raise RuntimeError(f"gradient of {name} is a lazily conjugated or negated view; call resolve_conj or resolve_neg on it")


def check_state(row: Row, name: str, tensor: Tensor) -> None:
    """Refuses a state tensor that does not fit its parameter: that of another model, most likely."""
    if tensor.shape != row.param.shape:
        raise ValueError(f"{name} of {row.name} has shape {tuple(tensor.shape)}, the parameter {tuple(row.param.shape)}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} of {row.name} is {tensor.layout}; its layout must be {torch.strided}")
    if real_dtype(local(tensor)) not in STORAGES or tensor.is_complex() != row.param.is_complex():
        raise TypeError(f"{name} of {row.name} has dtype {tensor.dtype}, the parameter {row.param.dtype}")


def check_apart(rows: Sequence[Row]) -> None:
    """Refuses two parameters that share an element; disjoint views of one storage are fine."""
    spans = []
    for row in rows:
        tensor = real_view(local(row.param))
        if tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), row, tensor))
    spans.sort(key=lambda span: span[:2])
    for (_, end, row, tensor), (start, _, other_row, other) in zip(spans, spans[1:], strict=False):
        if start < end and _share_bytes(tensor, other):
            raise ValueError(f"{row.name} and {other_row.name} share memory: an element would be updated twice")


def _share_bytes(one: Tensor, other: Tensor) -> bool:
    if is_dense(one.shape, one.stride()) and is_dense(other.shape, other.stride()):
        return True
    return bool(_bytes_of(one) & _bytes_of(other))


def _bytes_of(tensor: Tensor) -> set[int]:
    places = [tensor.data_ptr()]
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = [place + k * stride * tensor.element_size() for place in places for k in range(size)]
    return {place + k for place in places for k in range(tensor.element_size())}


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a tensor's real numbers."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


RowName = Callable[[int, int], str]
GroupsT = Sequence[Group]
