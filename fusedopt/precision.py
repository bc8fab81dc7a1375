"""Precision modes of a group: the dtypes of its states (``state_dtype``), what it keeps of its parameters (``master``).

A mode is a storage of a slot: the rule does not know of it. A group has the keys only where they were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .rules import Group, Rule

StateDtype: TypeAlias = torch.dtype | Mapping[str, torch.dtype] | None

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODE_KEYS = ("state_dtype", "master")  # of a group; they stay what they are where a checkpoint is loaded


# What each mode of ``master`` keeps: its key in the state, and its dtype; None: the parameter's.
MASTERS: dict[str, tuple[str, torch.dtype | None]] = {
    "fp32": ("master", torch.float32),
    "split": ("low_bits", torch.int16),
    "kahan": ("compensation", None),
}
MASTER_KEYS = tuple(key for key, _ in MASTERS.values())


def modes(state_dtype: StateDtype, master: str | None) -> dict[str, Any]:
    """The keys of the modes that were asked for, as an optimizer's defaults want them."""
    asked = {"state_dtype": state_dtype, "master": master}
    return {key: value for key, value in asked.items() if value is not None}


def check_modes(rule: Rule, group: Group) -> None:
    """Refuses modes that the rule cannot have."""
    if group.get("master") not in (None, *MASTERS):
        raise ValueError(f"master is {group['master']!r}; it must be {', '.join(map(repr, MASTERS))} or None")
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


def master_key(param: Tensor, group: Group) -> str | None:
    """What a parameter's state calls what is kept beside it; None: nothing is, as for every float32 parameter."""
    mode = group.get("master")
    return MASTERS[mode][0] if mode and param.dtype in (torch.bfloat16, torch.float16) else None


def master_dtype(param: Tensor, key: str) -> torch.dtype:
    """The dtype of what is kept beside a parameter."""
    return dict(MASTERS.values())[key] or param.dtype


def make_master(param: Tensor, key: str) -> Tensor:
    """What is kept beside a parameter before its first step."""
    if key == "master":
        return param.detach().to(torch.float32)
    return torch.zeros_like(param, dtype=master_dtype(param, key), memory_format=torch.preserve_format).detach()


def check_master(name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Refuses a mode that a parameter's dtype cannot have, and what another mode has kept."""
    key = master_key(param, group)
    if key == "low_bits" and param.dtype != torch.bfloat16:
        raise ValueError(
            f"{name} has dtype {param.dtype}, which is no half of a float32: master='split' is for bfloat16"
        )
    for other in MASTER_KEYS:
        kept = state.get(other)
        if kept is None:
            continue
        if other != key:
            raise ValueError(
                f"the state of {name} has '{other}', but master is {group.get('master')!r}; "
                "state_dict_torch() of the optimizer that saved it is free of modes"
            )
        if kept.shape != param.shape or kept.dtype != master_dtype(param, key):
            raise ValueError(
                f"{other} of {name} has shape {tuple(kept.shape)} and dtype {kept.dtype}; it must have "
                f"{tuple(param.shape)} and {master_dtype(param, key)}"
            )


def check_no_double(name: str, param: Tensor, group: Group, tensors: Sequence[Tensor | None]) -> None:
    """Refuses float64 beside what is kept of a parameter, whose bits are those of a float32."""
    if master_key(param, group) and any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        raise TypeError(
            f"{name} has a gradient, a state or a copy of torch.float64, which master={group['master']!r} cannot have"
        )


def keep_modes(saved: dict[str, Any], group: Group) -> None:
    """Gives a loaded group the modes of the group that it takes the place of."""
    for key in MODE_KEYS:
        saved.pop(key, None)
        if key in group:
            saved[key] = group[key]
