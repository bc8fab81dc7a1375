"""Precision modes of a group: the dtypes of its states (``state_dtype``), what it keeps of its parameters (``master``).

A mode is a storage of a slot: the rule does not know of it. A group has the keys only where they were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .rules import Group, Rule

StateDtype: TypeAlias = torch.dtype | Mapping[str, torch.dtype] | None

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODE_KEYS = ("state_dtype",)  # of a group; they stay what they are where a checkpoint is loaded


def modes(state_dtype: StateDtype) -> dict[str, Any]:
    """The keys of the modes that were asked for, as an optimizer's defaults want them."""
    return {} if state_dtype is None else {"state_dtype": state_dtype}


def check_modes(rule: Rule, group: Group) -> None:
    """Refuses modes that the rule cannot have."""
    wanted = group.get("state_dtype")
    by_name = wanted if isinstance(wanted, Mapping) else dict.fromkeys(rule.states, wanted)
    for name, dtype in by_name.items():
        if name not in rule.states:
            raise ValueError(f"state_dtype names '{name}'; the states are {', '.join(rule.states)}")
        if dtype is not None and dtype not in STATE_DTYPES:
            raise ValueError(
                f"state_dtype of {name} is {dtype}; it must be {', '.join(map(str, STATE_DTYPES))} or None"
            )
        if dtype == torch.float16 and name in rule.squares:
            raise ValueError(
                f"state_dtype of {name} is {dtype}, in which the square of a gradient of 2e-4 is 0 and the update "
                "without bound; it must be torch.float32 or torch.bfloat16"
            )


def state_dtype_of(group: Group, name: str) -> torch.dtype | None:
    """What a group asks of the dtype of a state; None: nothing."""
    wanted = group.get("state_dtype")
    dtype: torch.dtype | None = wanted.get(name) if isinstance(wanted, Mapping) else wanted
    return dtype


def as_asked(tensor: Tensor, param: Tensor, group: Group, name: str) -> Tensor:
    """A state in the dtype that its group asks for; float64 and complex parameters keep theirs."""
    dtype = state_dtype_of(group, name)
    if dtype is None or not takes_modes(param) or tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype)


def takes_modes(param: Tensor) -> bool:
    """Whether a parameter's states may be of another dtype: float64 and complex ones are left as they are."""
    return param.dtype in STATE_DTYPES


def keep_modes(saved: dict[str, Any], group: Group) -> None:
    """Gives a loaded group the modes of the group that it takes the place of."""
    for key in MODE_KEYS:
        saved.pop(key, None)
        if key in group:
            saved[key] = group[key]
