"""FusedOptimizer: what all optimizers share - groups, lazy state, closure, hooks, AMP, checkpoints - around one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends import Backend, choose_backend, find_backend
from .rules import Rule
from .table import Row, Table, local

ParamsT: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

# How many steps pass between looks at whether the state still holds the tensors that the table points into.
IDENTITY_CHECK_PERIOD = 64

_increment_version = torch.autograd.graph.increment_version


class FusedOptimizer(Optimizer):
    """The base of all optimizers here; not for use by itself."""

    _rule: ClassVar[Rule]
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(self, params: ParamsT, defaults: dict[str, Any], backend: str | None) -> None:
        """Takes parameters and defaults as ``torch.optim.Optimizer`` does, and the name of a backend or None."""
        find_backend(backend)
        self._requested_backend = backend
        self._forget_tables()
        super().__init__(params, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, in one launch per device.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or a state does not fit its parameter; nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._launch()
        return loss

    def refresh(self) -> None:
        """Looks at all tensors again: after a change of state tensors that no method of the optimizer made."""
        self._forget_tables()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as ``torch.optim.Optimizer.add_param_group``."""
        super().add_param_group(param_group)
        self._forget_tables()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` of this class or of torch's returned. State tensors keep their dtype."""
        super().load_state_dict(state_dict)
        self._forget_tables()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: tables are rebuilt when next needed."""
        state: dict[str, Any] = super().__getstate__()
        state["_requested_backend"] = self._requested_backend
        state["_started"] = {param: step for param, step in self._hidden_steps.items() if param in self.state}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what pickle, deepcopy and ``load_state_dict`` bring."""
        state = dict(state)
        self._hidden_steps = state.pop("_started", {})
        self._requested_backend = state.pop("_requested_backend", getattr(self, "_requested_backend", None))
        super().__setstate__(state)
        self._forget_tables()

    def _fill_groups(self, **defaults: Any) -> None:
        for group in self.param_groups:
            for key, value in defaults.items():
                group.setdefault(key, value)

    def _forget_tables(self) -> None:
        self._tables: list[tuple[Table, Backend]] | None = None
        self._steps_until_check = IDENTITY_CHECK_PERIOD
        if not hasattr(self, "_hidden_steps"):
            self._hidden_steps: dict[Tensor, Tensor] = {}

    @torch._disable_dynamo
    def _launch(self) -> None:
        tables = self._current_tables()
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for table, backend in tables:
            backend.launch(table, _on(table.device, grad_scale), _on(table.device, found_inf))
        for table, _ in tables:
            _increment_version(table.live_params())

    def _current_tables(self) -> list[tuple[Table, Backend]]:
        """The tables, true to what parameters, gradients, states and groups are now."""
        self._steps_until_check -= 1
        if self._steps_until_check <= 0 and self._tables is not None:
            self._steps_until_check = IDENTITY_CHECK_PERIOD
            if not all(table.is_current() for table, _ in self._tables):
                self._forget_tables()
        if self._tables is not None and all([table.refresh() for table, _ in self._tables]):
            return self._tables
        self._tables = self._build_tables()
        for table, _ in self._tables:
            table.refresh()
        return self._tables

    @torch.no_grad()
    def _build_tables(self) -> list[tuple[Table, Backend]]:
        rows: dict[torch.device, list[Row]] = {}
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for k, param in enumerate(group["params"]):
                on_device = rows.setdefault(local(param).device, [])
                name = f"parameter '{names[k]}'" if names else f"parameter {k} of group {g}"
                on_device.append(Row(len(on_device), g, name, param))
        return [
            (
                Table(self._rule, device, self.param_groups, device_rows, self.state, self._hidden_steps),
                choose_backend(self._requested_backend, device),
            )
            for device, device_rows in rows.items()
        ]


def _on(device: torch.device, scalar: Tensor | None) -> Tensor | None:
    """A scalar of the gradient scaler, float32 on a table's device."""
    if scalar is None:
        return None
    return scalar.to(device=device, dtype=torch.float32, non_blocking=True)
