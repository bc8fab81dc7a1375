"""What every case must come to: fusedopt.reference applied tensor by tensor, with no table and no backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import tensors
from .cases import Case


@dataclass(frozen=True)
class Snapshot:
    """A tensor's slots after a step, by name, and its count of steps."""

    values: dict[str, Tensor]
    step: float


def compute_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """float64 where any slot is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def start_values(case: Case, made: tensors.CaseTensors) -> dict[str, Tensor]:
    """Parameter and states before the first step, contiguous; a state that is not there yet is 0."""
    values = {"param": made.param.view.cpu().contiguous().clone()}
    for name, dtype in case.state_dtypes().items():
        if name in made.states:
            values[name] = made.states[name].view.cpu().contiguous().clone()
        else:
            values[name] = torch.zeros(values["param"].shape, dtype=dtype)
    return values


def update(
    case: Case, values: dict[str, Tensor], grad: Tensor, step: int, grad_scale: float | None = None
) -> dict[str, Tensor]:
    """One step: computed in float32 or float64, each slot rounded once to what it is kept in."""
    compute = compute_dtype([grad.dtype, *(tensor.dtype for tensor in values.values())])
    wide = {name: tensor.to(compute) for name, tensor in values.items()}
    group = case.rule.group(case.option)
    result = case.rule.rule.update(wide.pop("param"), grad.to(compute), wide, step, group, grad_scale)
    # float64 goes to 16 bits through float32: no processor has the direct conversion of both formats.
    return {name: _round(result[name], tensor.dtype) for name, tensor in values.items()}


def _round(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert tensor is not None
    return tensor.to(torch.float32).to(dtype) if dtype.itemsize == 2 else tensor.to(dtype)


def trajectory(cases: list[Case], steps: int, grad_scale: float | None = None) -> list[list[Snapshot]]:
    """For each step, the snapshots of all cases."""
    result: list[list[Snapshot]] = [[] for _ in range(steps)]
    for case in cases:
        made = tensors.make(case, steps)
        values = start_values(case, made)
        step = float(made.step)
        for k in range(steps):
            grad = made.grads[k].view.contiguous()
            values = update(case, values, grad, int(step) + 1, grad_scale)
            step = float(torch.tensor(step, dtype=torch.float32) + 1)
            result[k].append(Snapshot(values, step))
    return result
