"""A table's rows: one for each parameter, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .core import addresses_apart
from .phase import Phase
from .rules import Group
from .sharded import Spread, local, spread_of


@dataclass(eq=False, slots=True)
class Row:
    """One parameter of a table.

    Attributes:
        index: of the row.
        group: index of its group.
        place: its position among the group's parameters.
        param: the parameter.
        groups: the optimizer's ``param_groups``.
        lies: where the parameter lay when it was last compared with the others; 0: it has no memory.
        states: its state tensors by name; empty until the first gradient.
        count: of its steps, float32; or the tensor that it is in and its place there; None for a rule that needs no
            count here. ``step`` is the count itself.
        stand_in: what the kernels read in place of a gradient that they can not read; None: the gradient.
        copy: what the parameter is written to as it is updated; None: nothing.
        is_dense: whether all slots are dense and in the same order.
        leaves: that its elements make; 0: it never had a gradient.
        part: which of the tables of its device it is in, in the order of their launches: see ``separate``.
    """

    index: int
    group: int
    place: int
    param: Tensor
    groups: Sequence[Group]
    lies: int = 0
    states: dict[str, Tensor] = field(default_factory=dict)
    count: Tensor | tuple[Tensor, int] | None = None
    stand_in: Tensor | None = None
    copy: Tensor | None = None
    is_dense: bool = True
    leaves: int = 0
    part: int = 0

    def is_at_odds_with(self, other: Row) -> bool:
        """Whether the two are not stepped one after the other, the earlier first, as torch's for-loop does."""
        is_first = (self.group, self.place) < (other.group, other.place)
        return self.part == other.part or is_first != (self.part < other.part)

    @property
    def step(self) -> Tensor | None:
        """The count of its steps, a tensor once somebody asks."""
        if isinstance(self.count, tuple):
            steps, place = self.count
            self.count = steps[place]
        return self.count

    @property
    def name(self) -> str:
        """What error messages call it."""
        return name_of(self.groups, self.group, self.place)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient as the kernels read it."""
        return self.param.grad if self.stand_in is None else self.stand_in


def name_of(groups: Sequence[Group], group: int, place: int) -> str:
    """What error messages call the parameter at a place of a group."""
    names = groups[group].get("param_names")
    if isinstance(names, Sequence) and place < len(names):
        return f"parameter '{names[place]}'"
    return f"parameter {place} of group {group}"


def part_of(row: Row, phase: Phase, spreads: Sequence[Spread]) -> int:
    """The part of a table that a row is in: by norm, then by how its parameter lies over ranks."""
    norm = row.group if phase.norm_by_group else 0
    return norm * len(spreads) + (spreads.index(spread_of(row.param)) if len(spreads) > 1 else 0)


def rows_of(groups: Sequence[Group], copies: Mapping[Tensor, Tensor]) -> tuple[dict[torch.device, list[Row]], bool]:
    """New rows of all parameters, by device; and whether they are known to be of torch's own types and to lie apart.

    Args:
        groups: the optimizer's ``param_groups``.
        copies: of parameters that have one.
    """
    params = [param for group in groups for param in group["params"]]
    places = [(g, k) for g, group in enumerate(groups) for k in range(len(group["params"]))]
    addresses = addresses_apart(params)
    if params and addresses is not None:
        rows = [
            Row(index, g, k, param, groups, address)
            for index, ((g, k), param, address) in enumerate(zip(places, params, addresses, strict=True))
        ]
        by_device = {params[0].device: rows}
    else:
        by_device = {}
        for (g, k), param in zip(places, params, strict=True):
            rows = by_device.setdefault(local(param).device, [])
            rows.append(Row(len(rows), g, k, param, groups))
    for row in (row for rows in by_device.values() for row in rows) if copies else ():
        row.copy = copies.get(row.param)
    return by_device, addresses is not None
