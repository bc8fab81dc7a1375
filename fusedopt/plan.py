"""What each precision mode takes for a model, before anything is allocated.

Example:
    >>> import torch, fusedopt
    >>> with torch.device("meta"):
    ...     model = torch.nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)
    >>> plans = fusedopt.plan_memory(model, budget=9_000_000, verbose=False)
    >>> [plan.name for plan in plans if plan.fits and "int8" in plan.name]
    ['int8 states', 'int8 states, split', 'int8 states, kahan', 'int8 states, stochastic']
    >>> plans[-2].state_bytes
    4062508
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import FusedOptimizer
from .blocks import FLOAT8, block_count
from .optimizers.adam import AdamW
from .precision import block_of, is_coded, master_dtype, master_key, state_dtype_of, takes_modes
from .rules import Group, Rule

# In this order they are shown.
MODES: dict[str, dict[str, Any]] = {
    "as torch": {},
    "float32 states": {"state_dtype": torch.float32},
    "float32 states, fp32": {"state_dtype": torch.float32, "master": "fp32"},
    "float32 states, split": {"state_dtype": torch.float32, "master": "split"},
    "float32 states, kahan": {"state_dtype": torch.float32, "master": "kahan"},
    "float32 states, stochastic": {"state_dtype": torch.float32, "rounding": "stochastic"},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "bfloat16 states, split": {"state_dtype": torch.bfloat16, "master": "split"},
    "bfloat16 states, kahan": {"state_dtype": torch.bfloat16, "master": "kahan"},
    "as torch, stochastic": {"rounding": "stochastic"},
    "int8 states": {"state_dtype": torch.int8},
    "int8 states, fp32": {"state_dtype": torch.int8, "master": "fp32"},
    "int8 states, split": {"state_dtype": torch.int8, "master": "split"},
    "int8 states, kahan": {"state_dtype": torch.int8, "master": "kahan"},
    "int8 states, stochastic": {"state_dtype": torch.int8, "rounding": "stochastic"},
    "float8 states": {"state_dtype": FLOAT8},
    "float8 states, split": {"state_dtype": FLOAT8, "master": "split"},
    "float8 states, stochastic": {"state_dtype": FLOAT8, "rounding": "stochastic"},
}


@dataclass(frozen=True)
class ModePlan:
    """What a mode takes, in bytes.

    Attributes:
        name: of the mode.
        options: that the optimizer is constructed with.
        param_bytes: of the parameters.
        grad_bytes: of their gradients, if all are kept.
        state_bytes: of all that the optimizer keeps: states, scales, masters, steps.
        elements: of all parameters.
        budget: for parameters, gradients and states; None: no limit.
    """

    name: str
    options: dict[str, Any]
    param_bytes: int
    grad_bytes: int
    state_bytes: int
    elements: int
    budget: int | None

    @property
    def total_bytes(self) -> int:
        """Parameters, gradients and states. A step needs no temporary memory beside them."""
        return self.param_bytes + self.grad_bytes + self.state_bytes

    @property
    def fits(self) -> bool:
        """Whether that is within the budget."""
        return self.budget is None or self.total_bytes <= self.budget

    @property
    def bytes_per_element(self) -> float:
        """Of parameters and states, as papers count."""
        return (self.param_bytes + self.state_bytes) / max(self.elements, 1)


def plan_memory(
    model: torch.nn.Module | Iterable[Tensor],
    budget: int | None = None,
    *,
    optimizer: type[FusedOptimizer] = AdamW,
    verbose: bool = True,
    **options: Any,
) -> list[ModePlan]:
    """Prints what each precision mode takes for a model; nothing is allocated, a model on the meta device will do.

    Args:
        model: a module, or its parameters.
        budget: bytes for parameters, gradients and states; None: no limit.
        optimizer: the class that is to train it.
        verbose: whether to print.
        options: of the optimizer, such as ``amsgrad=True``: what decides which states there are.

    Returns:
        A plan for each mode.

    Raises:
        ValueError: the budget is below 0, or an option is out of its range.
    """
    if budget is not None and budget < 0:
        raise ValueError(f"budget is {budget}; it must be a number of bytes, at least 0")
    tensors = model.parameters() if isinstance(model, torch.nn.Module) else model
    params = [param for param in dict.fromkeys(tensors) if param.requires_grad]
    found = [_plan(name, mode, params, optimizer, budget, options) for name, mode in MODES.items()]
    if verbose:
        print(table(found))
    return found


def table(plans: list[ModePlan]) -> str:
    """The plans as text."""
    lines = [f"{'mode':<26}{'B/parameter':>12}{'parameters':>13}{'gradients':>13}{'states':>13}{'together':>13}"]
    for plan in plans:
        sizes = (plan.param_bytes, plan.grad_bytes, plan.state_bytes, plan.total_bytes)
        columns = "".join(f"{size / 1e6:>10.1f} MB" for size in sizes)
        lines.append(f"{plan.name:<26}{plan.bytes_per_element:>12.2f}{columns}{'' if plan.fits else '  too much'}")
    return "\n".join(lines)


def _plan(
    name: str,
    mode: dict[str, Any],
    params: list[Tensor],
    optimizer: type[FusedOptimizer],
    budget: int | None,
    options: dict[str, Any],
) -> ModePlan:
    group = optimizer([torch.nn.Parameter(torch.empty(0))], **{**options, **mode}).defaults
    dtype_bytes = sum(param.numel() * param.element_size() for param in params)
    state_bytes = sum(_state_bytes(optimizer._rule, param, group) for param in params)
    elements = sum(param.numel() for param in params)
    return ModePlan(name, mode, dtype_bytes, dtype_bytes, state_bytes, elements, budget)


def _state_bytes(rule: Rule, param: Tensor, group: Group) -> int:
    """What a parameter's state takes: its tensors as the table makes them."""
    total = 0
    for name in rule.states_of(group):
        dtype = state_dtype_of(group, name)
        if is_coded(param, group, name):
            total += param.numel() + 4 * block_count(param.numel(), block_of(group))
        elif dtype is not None and takes_modes(param):
            total += param.numel() * dtype.itemsize
        else:
            total += param.numel() * param.element_size()
    key = master_key(param, group)
    kept = 0 if key is None else param.numel() * master_dtype(param, key).itemsize
    return total + kept + (4 if rule.states_of(group) or rule.counts_in_state(group) else 0)
