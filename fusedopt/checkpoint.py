"""What ``load_state_dict`` makes of a state_dict: groups and state for these parameters, checked beforehand.

Torch casts state to the parameter's dtype (https://github.com/pytorch/pytorch/issues/43706); here it keeps its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .check import check_flags, check_hyperparameters, check_state, check_step
from .phase import Phase
from .precision import (
    MASTER_KEYS,
    ROUNDING_KEY,
    STATE_DTYPES,
    check_codes,
    check_master,
    check_rounding,
    check_scales,
    keep_modes,
    scale_key,
    widened,
)
from .rules import MODE_KEYS, Rule
from .sharded import local
from .storages import CODE_STORAGES

StateDict = dict[str, Any]


def read(
    rule: Rule,
    phase: Phase,
    groups: Sequence[dict[str, Any]],
    state_dict: Mapping[str, Any],
    name_of: Callable[[int, int], str],
    fill: Callable[[list[dict[str, Any]]], None],
) -> StateDict:
    """Reads what ``state_dict`` of this package or of torch returned.

    Args:
        rule: of the optimizer that loads.
        phase: what else its steps do.
        groups: its ``param_groups``, which stay as they are.
        state_dict: what was saved.
        name_of: what error messages call parameter ``place`` of group ``index``, as ``name_of(index, place)``.
        fill: adds the options that older versions did not save to groups, in place.

    Returns:
        ``state`` and ``param_groups`` as an optimizer holds them. Tensors that are right already are not copied.

    Raises:
        ValueError: it is that of another model or of another optimizer, or its groups have options that none here can.
        RuntimeError: it asks for options that exclude each other.
    """
    _check_form(state_dict)
    saved_groups: list[dict[str, Any]] = deepcopy(state_dict["param_groups"])
    _check_sizes(groups, saved_groups)
    ids = list(chain.from_iterable(group["params"] for group in saved_groups))
    places = [(g, k) for g, group in enumerate(groups) for k in range(len(group["params"]))]
    place_of = _place_of(ids, places, groups, name_of)
    for group, saved in zip(groups, saved_groups, strict=True):
        saved["params"] = group["params"]
        keep_modes(saved, group)
        for key in ("param_names", "max_grad_norm"):  # which one of torch's may not have: a load takes neither away
            if key in group:
                saved.setdefault(key, group[key])
    fill(saved_groups)
    _check_groups(rule, phase, saved_groups)
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for key, value in state_dict["state"].items():
        if key not in place_of:
            _check_stranger((*rule.states, *phase.states, *MASTER_KEYS, ROUNDING_KEY), key, value)
            state[key] = value  # not of a parameter: kept as it is, as torch does
            continue
        g, k = place_of[key]
        state[groups[g]["params"][k]] = _fitted(
            rule, phase.states, name_of(g, k), groups[g]["params"][k], groups[g], value
        )
    return {"state": state, "param_groups": saved_groups}


def without_modes(rule: Rule, state_dict: StateDict, name_of: Callable[[int, int], str]) -> StateDict:
    """A state_dict as ``torch.optim`` keeps it: states in float32 at least, groups without the keys of modes.

    Args:
        rule: of the optimizer that it is of.
        state_dict: what ``state_dict`` returned.
        name_of: as for :func:`read`.

    Raises:
        ValueError: codes of 8 bits have other blocks than those of their group's ``state_block``.
    """
    groups = [
        {key: value for key, value in group.items() if key not in MODE_KEYS} for group in state_dict["param_groups"]
    ]
    state = dict(state_dict["state"])
    for g, group in enumerate(state_dict["param_groups"]):
        for k, param in enumerate(group["params"]):
            if param in state:
                state[param] = widened_state(rule, name_of(g, k), state[param], group)
    return {**state_dict, "state": state, "param_groups": groups}


def as_step(step: Any, device: torch.device) -> Tensor:
    """A step count of any origin as torch's fused optimizers keep it: float32, 0-dim, on the parameter's device."""
    if isinstance(step, Tensor):
        return step.detach().to(dtype=torch.float32, device=device).reshape(())
    return torch.tensor(float(step), dtype=torch.float32, device=device)


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Refuses what no optimizer can have saved: parts that are missing, or of another type."""
    expect("loaded state dict", state_dict, Mapping)
    expect("'state' of the loaded state dict", _part("loaded state dict", state_dict, "state"), Mapping)
    groups = _part("loaded state dict", state_dict, "param_groups")
    expect("'param_groups' of the loaded state dict", groups, Sequence)
    for index, group in enumerate(groups):
        name = f"group {index} of the loaded state dict"
        expect(name, group, dict)
        params = _part(name, group, "params")
        expect(f"'params' of {name}", params, Sequence)
        for key in params:
            expect(f"a parameter of {name}", key, Hashable)


def _part(name: str, whole: Mapping[str, Any], key: str) -> Any:
    if key not in whole:
        raise ValueError(f"{name} has no '{key}'")
    return whole[key]


def expect(name: str, value: Any, kind: type) -> None:
    """Refuses a value of another type, by name."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be a {kind.__name__}, but it is a {type(value).__name__}")


def _check_sizes(groups: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]]) -> None:
    if len(groups) != len(saved):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved)}, where the optimizer has {len(groups)}"
        )
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(other['params'])} parameters, where the optimizer's has "
                f"{len(group['params'])}"
            )


def _place_of(
    ids: Sequence[Any],
    places: Sequence[tuple[int, int]],
    groups: Sequence[dict[str, Any]],
    name_of: Callable[[int, int], str],
) -> dict[Any, tuple[int, int]]:
    """Group and place of the parameter that each saved one is now."""
    place_of: dict[Any, tuple[int, int]] = {}
    for key, place in zip(ids, places, strict=True):
        first = place_of.setdefault(key, place)
        if groups[first[0]]["params"][first[1]] is not groups[place[0]]["params"][place[1]]:
            raise ValueError(
                f"loaded state dict has {key!r} for {name_of(*first)} and for {name_of(*place)}, which are not the same"
            )
    return place_of


def _check_stranger(names: Sequence[str], key: Any, value: Any) -> None:
    """Refuses the state of a parameter that no group has, as where JSON has made text of the numbers."""
    if isinstance(value, Mapping) and any(name in value for name in names):
        raise ValueError(f"loaded state dict has a state of a parameter {key!r}, which is in none of its groups")


def _check_groups(rule: Rule, phase: Phase, groups: Sequence[dict[str, Any]]) -> None:
    try:
        check_hyperparameters(rule, groups)
    except KeyError as error:
        raise ValueError(f"loaded state dict is that of another optimizer: {error.args[0]}") from error
    for index, group in enumerate(groups):
        try:
            check_flags(foreach=False, fused=False, differentiable=group.get("differentiable", False))
        except RuntimeError as error:
            raise RuntimeError(f"group {index} of the loaded state dict: {error}") from error
        try:
            phase.check_group(index, group)
        except ValueError as error:
            raise ValueError(f"loaded state dict: {error}") from error


def _fitted(
    rule: Rule, more: Sequence[str], name: str, param: Tensor, group: Mapping[str, Any], value: Mapping[str, Any]
) -> dict[str, Any]:
    """The state of one parameter, on its device."""
    expect(f"loaded state of {name}", value, Mapping)
    for key in (*rule.states, *more):
        if value.get(key) is not None:
            check_state(name, param, key, value[key], codes=key in rule.states)
    if rule.counts_in_state(group):
        check_step(name, value, rule.states if rule.keeps_step else ())
    check_master(name, param, group, value)
    check_codes(rule, name, param, group, value)
    check_rounding(name, param, group, value)
    device = local(param).device
    fitted: dict[str, Any] = {key: _moved(item, device) for key, item in value.items() if key != "step"}
    if "step" not in value:
        return fitted
    step = as_step(value["step"], device) if rule.counts_in_state(group) else _moved(value["step"], device)
    return {key: step if key == "step" else fitted[key] for key in value}


def widened_state(rule: Rule, param: str, state: Any, group: Mapping[str, Any]) -> Any:
    """The state of a parameter as ``torch.optim`` keeps it, in float32 at least; ``param`` is what it is called.

    Which random bits come next stays in it: ``rounding_key``, and the count of steps of a rule that torch counts none
    for. torch carries both along and reads neither. A count of 0 is left out: torch would never raise it, and what it
    has stepped would come back as not stepped yet.
    """
    if not isinstance(state, dict):
        return state
    dtypes = {name: getattr(state.get(name), "dtype", None) for name in rule.states}
    for name in (name for name, dtype in dtypes.items() if dtype in CODE_STORAGES):
        check_scales(name, param, state[name], group, state)
    known = (*STATE_DTYPES, *CODE_STORAGES)
    wide = {name: widened(state, name, group) for name, dtype in dtypes.items() if dtype in known}
    is_unstepped = not rule.keeps_step and "step" in state and float(state["step"]) == 0.0
    left_out = (*MASTER_KEYS, *map(scale_key, rule.states), *(("step",) if is_unstepped else ()))
    return {key: value for key, value in {**state, **wide}.items() if key not in left_out}


def _moved(value: Any, device: torch.device) -> Any:
    """A value of a state with its tensors on a device. They keep their dtype."""
    if isinstance(value, Tensor):
        return value.to(device=device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return type(value)(_moved(item, device) for item in value)
    return value
