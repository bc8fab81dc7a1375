"""Precision modes of a group: how its states (``state_dtype``, ``state_block``) and parameters (``master``) are kept.

A mode is a storage of a slot: the rule does not know of it. A group has the keys only where they were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .blocks import FLOAT8, block_count, coded, decoded, random_bits
from .memory import check_own_memory
from .rules import MODE_KEYS, Group, Rule
from .sharded import (
    by_rank,
    by_rank_shape,
    check_even,
    check_in_order,
    check_together,
    like_local,
    local,
    most_elements,
)
from .storages import CODE_STORAGES, FLOAT8_SQUARE, KEPT_STORAGES

StateDtype: TypeAlias = torch.dtype | Mapping[str, torch.dtype] | None

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = (torch.int8, FLOAT8)  # as a state_dtype: 8 bits an element and a scale for each block
BLOCKS = (32, 64, 128, 256)
DEFAULT_BLOCK = 128
ROUNDING_KEY = "rounding_key"  # in a parameter's state: which random bits are its own
ROUNDING_KEYS = 1 << 24  # of a group; they stay what they are where a checkpoint is loaded


# What each mode of ``master`` keeps: its key in the state, and its dtype; None: the parameter's.
MASTERS: dict[str, tuple[str, torch.dtype | None]] = {
    "fp32": ("master", torch.float32),
    "split": ("low_bits", torch.int16),
    "kahan": ("compensation", None),
}
MASTER_KEYS = tuple(key for key, _ in MASTERS.values())


def modes(
    state_dtype: StateDtype, state_block: int | None, master: str | None, rounding: str | None = None
) -> dict[str, Any]:
    """The keys of the modes that were asked for, as an optimizer's defaults want them."""
    if state_dtype is None is state_block and master is None is rounding:
        return {}  # almost always
    asked = {"state_dtype": state_dtype, "state_block": state_block, "master": master, "rounding": rounding}
    return {key: value for key, value in asked.items() if value is not None}


def has_modes(group: Group) -> bool:
    """Whether a group asks for any mode."""
    get = group.get  # asked for every row: no loop
    return not (get("state_dtype") is None is get("state_block") and get("master") is None is get("rounding"))


def check_modes(rule: Rule, group: Group) -> None:
    """Refuses modes that the rule cannot have."""
    if not has_modes(group):
        return
    if group.get("master") not in (None, *MASTERS):
        raise ValueError(f"master is {group['master']!r}; it must be {', '.join(map(repr, MASTERS))} or None")
    check_block(group)
    if group.get("rounding") not in (None, "stochastic"):
        raise ValueError(f"rounding is {group['rounding']!r}; it must be 'stochastic' or None")
    if group.get("rounding") and group.get("master"):
        raise ValueError(
            f"rounding={group['rounding']!r} and master={group['master']!r} exclude each other: "
            "what is kept exactly needs no random rounding"
        )
    wanted = group.get("state_dtype")
    by_name = wanted if isinstance(wanted, Mapping) else dict.fromkeys(rule.states, wanted)
    for name, dtype in by_name.items():
        if name not in rule.states:
            raise ValueError(f"state_dtype names '{name}'; the states are {', '.join(rule.states)}")
        if dtype not in (None, *CODES, *STATE_DTYPES):
            known = ", ".join(map(str, (*STATE_DTYPES, *CODES)))
            raise ValueError(f"state_dtype of {name} is {dtype}; it must be {known} or None")
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
    if dtype in (None, *CODES) or not takes_modes(param) or tensor.dtype == dtype:
        return tensor
    return tensor.to(dtype)


def takes_modes(param: Tensor) -> bool:
    """Whether a parameter's states may be of another dtype: float64 and complex ones are left as they are."""
    return param.dtype in STATE_DTYPES


def rounds_at_random(param: Tensor, group: Group) -> bool:
    """Whether a parameter is rounded at random: those of 16 bits are, wider ones need not be."""
    return group.get("rounding") is not None and param.dtype in (torch.bfloat16, torch.float16)


def make_rounding_key(place: int) -> int:
    """The key of a parameter's random bits, by its place among all parameters."""
    return int(random_bits(torch.tensor(place, device="cpu"), 0, 0x85EBCA6B)) % ROUNDING_KEYS


def row_mode(param: Tensor, group: Group, state: Mapping[str, Any]) -> int:
    """The mode of a row of the table: csrc/table.h."""
    bits = block_of(group).bit_length() - 1
    return bits | 1 << 4 | int(state[ROUNDING_KEY]) << 8 if rounds_at_random(param, group) else bits


def check_rounding(name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Refuses parameters that are not rounded at random yet, and keys that are none."""
    if group.get("rounding") is None:
        return
    check_in_order(f"rounding={group['rounding']!r}: {name}", param)
    key = state.get(ROUNDING_KEY, 0)
    if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < ROUNDING_KEYS:
        raise ValueError(f"{ROUNDING_KEY} of {name} is {key!r}; it must be a count below {ROUNDING_KEYS}")


def check_block(group: Group) -> None:
    """Refuses a ``state_block`` that no kernel takes."""
    if not isinstance(group.get("state_block"), (int, type(None))) or group.get("state_block") not in (None, *BLOCKS):
        raise ValueError(f"state_block is {group['state_block']!r}; it must be {', '.join(map(str, BLOCKS))} or None")


def block_of(group: Group) -> int:
    """How many elements of a state share a scale."""
    return int(group.get("state_block") or DEFAULT_BLOCK)


def scale_key(name: str) -> str:
    """What a state dict calls the scales of a state's blocks."""
    return f"{name}_scale"


def is_coded(param: Tensor, group: Group, name: str) -> bool:
    """Whether a group asks for codes of a state."""
    return takes_modes(param) and state_dtype_of(group, name) in CODES


def coded_states(rule: Rule, param: Tensor, group: Group) -> tuple[str, ...]:
    """The states of a parameter that are kept as codes."""
    if group.get("state_dtype") is None:
        return ()
    return tuple(name for name in rule.states_of(group) if is_coded(param, group, name))


def code_dtype(rule: Rule, group: Group, name: str) -> torch.dtype:
    """The dtype of a state's codes."""
    if state_dtype_of(group, name) == FLOAT8:
        return FLOAT8
    return torch.uint8 if name in rule.squares else torch.int8


def kept_storage(rule: Rule, name: str, dtype: torch.dtype) -> int:
    """The storage of a state, or of anything else that is kept: csrc/storage/storage.h."""
    return FLOAT8_SQUARE if dtype == FLOAT8 and name in rule.squares else KEPT_STORAGES[dtype]


def blank_codes(rule: Rule, param: Tensor, group: Group, name: str) -> dict[str, Tensor]:
    """Codes and scales of a state before its first step. Blocks are counted in row-major order: so codes lie."""
    codes = torch.zeros(local(param).shape, dtype=code_dtype(rule, group, name), device=local(param).device)
    return _over_devices(name, param, group, codes, codes.new_zeros(blocks_of(param, group), dtype=torch.float32))


def as_codes(rule: Rule, group: Group, name: str, tensor: Tensor, param: Tensor) -> dict[str, Tensor]:
    """Codes and scales of a state that is there in floating point. Those of a DTensor are of its local tensor."""
    made = recoded(rule, group, name, local(tensor.detach()).to(torch.float32), step=0)
    return _over_devices(name, param, group, made[name], made[scale_key(name)])


def _over_devices(name: str, param: Tensor, group: Group, codes: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """Codes and scales of a local tensor as parts of those of all: a DTensor's scales have a row for each rank."""
    return {name: like_local(codes, param), scale_key(name): by_rank(scales, param, blocks_of(param, group))}


def blocks_of(param: Tensor, group: Group) -> int:
    """How many blocks a parameter's states have, on the rank that has the most of them."""
    return block_count(most_elements(param), block_of(group))


def recoded(rule: Rule, group: Group, name: str, values: Tensor, step: int) -> dict[str, Tensor]:
    """Codes and scales of a state's values, float32, at a step."""
    dtype, is_square = code_dtype(rule, group, name), name in rule.squares
    codes, scales = coded(values, dtype, block=block_of(group), step=step, is_square=is_square)
    return {name: codes, scale_key(name): scales}


def widened(state: Mapping[str, Any], name: str, group: Group) -> Tensor:
    """A state in float32, whatever it is kept in."""
    tensor: Tensor = state[name]
    if tensor.dtype in CODE_STORAGES:
        scales = local(state[scale_key(name)]).reshape(-1)
        return like_local(decoded(local(tensor), scales, block=block_of(group)), tensor)
    return tensor.float()


def check_codes(rule: Rule, name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Refuses codes that the group did not ask for, or those of another block size."""
    if coded_states(rule, param, group):
        check_even(f"states in 8 bits: {name}", param)
    for key in rule.states:
        tensor = state.get(key)
        if not isinstance(tensor, Tensor) or tensor.dtype not in CODE_STORAGES:
            continue
        if not is_coded(param, group, key) or tensor.dtype != code_dtype(rule, group, key):
            asked = f"but state_dtype is {state_dtype_of(group, key)}"
            why = asked if takes_modes(param) else f"which a parameter of {param.dtype} cannot have"
            raise ValueError(
                f"{key} of {name} is codes of {tensor.dtype}, {why}; "
                "state_dict_torch() of the optimizer that saved it is free of modes"
            )
        check_scales(key, name, param, group, state)


def check_scales(key: str, name: str, param: Tensor, group: Group, state: Mapping[str, Any]) -> None:
    """Refuses codes whose scales are not those of the group's blocks, by which nothing could decode them.

    Args:
        key: of a state that is codes.
        name: what its parameter is called.
        param: the parameter, or anything that lies as it does: the codes themselves.
        group: the parameter's.
        state: the parameter's.
    """
    check_block(group)
    codes, scales, what = state[key], state.get(scale_key(key)), f"{scale_key(key)} of {name}"
    if not isinstance(scales, Tensor):
        raise ValueError(f"{key} of {name} is codes of {codes.dtype}, but there is no '{scale_key(key)}'")
    check_together(what, scales, param)
    blocks = by_rank_shape(param, blocks_of(param, group))
    if scales.shape != blocks or scales.dtype != torch.float32:
        raise ValueError(
            f"{what} has shape {tuple(scales.shape)} and dtype {scales.dtype}; it must have {blocks} and "
            f"{torch.float32} where state_block is {block_of(group)}"
        )
    check_own_memory(what, scales)


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
            mode = group.get("master")
            is_asked = mode is not None and MASTERS[mode][0] == other
            why = f"which a parameter of {param.dtype} cannot have" if is_asked else f"but master is {mode!r}"
            raise ValueError(
                f"the state of {name} has '{other}', {why}; "
                "state_dict_torch() of the optimizer that saved it is free of modes"
            )
        if not isinstance(kept, Tensor):
            raise TypeError(f"{other} of {name} must be a tensor, but it is {kept!r}")
        if kept.shape != param.shape or kept.dtype != master_dtype(param, key):
            raise ValueError(
                f"{other} of {name} has shape {tuple(kept.shape)} and dtype {kept.dtype}; it must have "
                f"{tuple(param.shape)} and {master_dtype(param, key)}"
            )
        check_own_memory(f"{other} of {name}", kept)


def check_no_double(rule: Rule, name: str, param: Tensor, group: Group, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuses float64 beside a mode whose kernels compute in float32. The tensors are those of a parameter, by name."""
    double = [what for what, tensor in tensors.items() if tensor is not None and tensor.dtype == torch.float64]
    if not double:
        return
    modes = [f"master={group['master']!r}"] if master_key(param, group) else []
    modes += [f"rounding={group['rounding']!r}"] if rounds_at_random(param, group) else []
    modes += [f"state_dtype={state_dtype_of(group, key)} of {key}" for key in coded_states(rule, param, group)]
    if modes:
        raise TypeError(f"{double[0]} of {name} has dtype torch.float64, which {modes[0]} cannot have")


def keep_modes(saved: dict[str, Any], group: Group) -> None:
    """Gives a loaded group the modes of the group that it takes the place of."""
    for key in MODE_KEYS:
        saved.pop(key, None)
        if key in group:
            saved[key] = group[key]
