"""What the host must know of a rule: its stem, where a group keeps its hyperparameters, which states it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Group = Mapping[str, Any]

MAXIMIZE = 1  # flag bit 0 of every rule: csrc/rules/rule.h
DIFFERENTIABLE = 1 << 31  # and bit 31, that no kernel ever sees: a table refuses such a group

MODE_KEYS = ("state_dtype", "state_block", "master", "rounding")  # what a group may ask for: precision.py


@dataclass(frozen=True, eq=False)
class Rule:
    """The host's side of csrc/rules/<stem>.h.

    Attributes:
        stem: the name that the rule has everywhere.
        hypers: for each hyperparameter, in the order of the rule's ``enum Hyper``: the group's key, and the item
            within that value or -1 for the value itself.
        flags: the group's keys that are flags, and their bits in the rule's ``enum Flag``.
        states: names of the state tensors, in the order of the table's state slots.
        keeps_step: whether the state has a ``step`` in every mode; else the count is kept beside it, out of the state.
        takes_sparse: whether torch takes sparse gradients for it; they are made dense, one parameter at a time.
        update: the rule in ``fusedopt.reference``, called with tensors, states by name, and hyperparameters.
        squares: names of the states that are means of squares: their range is twice a gradient's.
        asked_by: of the states that not every group's tensors need, the group's key that asks for them: a
            hyperparameter that is not 0, or a flag that is set.
    """

    stem: str
    hypers: tuple[tuple[str, int], ...]
    flags: tuple[tuple[str, int], ...]
    states: tuple[str, ...]
    keeps_step: bool
    takes_sparse: bool
    update: Callable[[Tensor, Tensor, Mapping[str, Tensor], int, Group, float | None], dict[str, Tensor | None]]
    squares: tuple[str, ...] = ()
    asked_by: Mapping[str, str] = field(default_factory=dict)

    def counts_in_state(self, group: Group) -> bool:
        """Whether the state of a group's tensors has a ``step``: always, or because random bits are of the step."""
        return self.keeps_step or group.get("rounding") is not None

    def items_of(self, key: str) -> int:
        """How many numbers a group's key holds, of which each is a hyperparameter."""
        return max(item for name, item in self.hypers if name == key) + 1

    def states_of(self, group: Group) -> tuple[str, ...]:
        """Names of the states that a group's tensors need."""
        return tuple(name for name in self.states if self._is_asked_for(name, group))

    def _is_asked_for(self, name: str, group: Group) -> bool:
        """Whether a group asks for a state, as csrc/python/schema.h has it.

        What a hyperparameter on a GPU is, is not looked at: that would wait for the GPU.
        """
        if name not in self.asked_by:
            return True
        key = self.asked_by[name]
        value = group[key]
        if any(key == flag for flag, _ in self.flags):
            return bool(value)
        return (isinstance(value, Tensor) and value.device.type != "cpu") or float(value) != 0.0
