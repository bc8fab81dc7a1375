"""The averages that ``ema_decay`` keeps: in the parameters' place for a while; none begins anew unnoticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .phase import EMA
from .rows import name_of
from .rules import Group


@contextmanager
def swapped_in(groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]]) -> Iterator[None]:
    """Gives parameters the values of their averages, and at the end their own back, whatever happened within.

    Args:
        groups: the optimizer's ``param_groups``.
        state: the optimizer's ``state``.
    """
    averaged = list(_averaged(groups, state))
    held = [(name, param, param.detach().clone()) for name, param, _ in averaged]
    try:
        try:
            with torch.no_grad():
                for _, param, average in averaged:
                    param.copy_(average)
            yield
        finally:
            _put_back(held)
    finally:
        _put_back(held)  # what an interrupt of that left


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


def _averaged(groups: Sequence[Group], state: Mapping[Tensor, dict[str, Any]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, parameter and average of each parameter that has one."""
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
            yield name_of(groups, g, k), param, average


@torch.no_grad()
def _put_back(held: list[tuple[str, Tensor, Tensor]]) -> None:
    """Gives every parameter its value, whatever shape another has got, and takes it off the list."""
    lost: list[str] = []
    while held:
        name, param, value = held[-1]
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
