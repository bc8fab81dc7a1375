"""The averages that ``ema_decay`` keeps: in the parameters' place for a while; none begins anew unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .phase import EMA
from .rows import name_of
from .rules import Group


class Held(NamedTuple):
    """A parameter whose average takes its place for a while, and the value that it will have again."""

    name: str
    param: Tensor
    average: Tensor
    value: Tensor


def held_values(groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]]) -> list[Held]:
    """Copies of the values of all parameters that have an average.

    Args:
        groups: the optimizer's ``param_groups``.
        state: the optimizer's ``state``.

    Raises:
        RuntimeError: a parameter has another shape than its average.
    """
    held = []
    for g, group in enumerate(groups):
        for k, param in enumerate(group["params"]):
            average = state.get(param, {}).get(EMA)
            if average is None:
                continue
            if average.shape != param.shape:
                raise RuntimeError(
                    f"the average of {name_of(groups, g, k)} has shape {tuple(average.shape)}, and the parameter "
                    f"{tuple(param.shape)}: they can not change places"
                )
            held.append(Held(name_of(groups, g, k), param, average, param.detach().clone()))
    return held


@torch.no_grad()
def swap_in(held: Sequence[Held]) -> None:
    """Gives every parameter the value of its average."""
    for each in held:
        each.param.copy_(each.average)


@torch.no_grad()
def put_back(held: list[Held]) -> None:
    """Gives every parameter its value, whatever shape another has got, and takes it off the list.

    Raises:
        RuntimeError: some keep what they have, by name; all others have got theirs.
    """
    lost: list[str] = []
    while held:
        name, param, _, value = held[-1]
        if param.shape == value.shape:
            try:
                param.copy_(value)
            except RuntimeError as error:  # one that is on the meta device now, or was made in inference mode
                lost.append(f"{name} can not be given its value: {error}")
        else:
            lost.append(f"{name} had shape {tuple(value.shape)} before swap_ema() and has {tuple(param.shape)} now")
        held.pop()
    if lost:
        raise RuntimeError(f"{'; '.join(lost)}: it keeps what it has")


def check_not_replaced(
    groups: Sequence[Group], states: Iterable[tuple[Tensor, dict[str, Any]]], earlier: Iterable[Tensor]
) -> None:
    """Refuses a parameter that took the place of another: its average would begin anew, and nobody say so.

    One that was there before, and has its first gradient late, took nobody's place.

    Args:
        groups: the optimizer's ``param_groups``.
        states: the state of every parameter that has one.
        earlier: the parameters that the optimizer has had so far.
    """
    averaged = {param for param, state in states if EMA in state}
    present = {param for group in groups for param in group["params"]}
    left = {param.shape for param in averaged - present}
    known = averaged.union(earlier)
    for g, group in enumerate(groups) if left else ():
        for k, param in enumerate(group["params"]):
            if param not in known and param.shape in left:
                raise RuntimeError(
                    f"{name_of(groups, g, k)} has no average, and there is one of a parameter of its shape "
                    f"{tuple(param.shape)} that is in no group: it was replaced. Give the new one the state of the "
                    "old, optimizer.state[new] = optimizer.state.pop(old), or delete that"
                )
