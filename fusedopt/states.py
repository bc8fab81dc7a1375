"""The optimizer's state of a table's rows: what it has is taken over, what is missing is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .apart import check_states_apart
from .check import check_state, check_step
from .hidden_steps import HiddenSteps
from .memory import resolved
from .phase import EMA, average_dtype
from .precision import (
    ROUNDING_KEY,
    as_asked,
    as_codes,
    blank_codes,
    check_codes,
    check_master,
    check_rounding,
    coded_states,
    has_modes,
    make_master,
    make_rounding_key,
    master_key,
    rounds_at_random,
    scale_key,
    state_dtype_of,
    takes_modes,
)
from .rows import Row
from .rules import Group, Rule
from .sharded import like_local, local, settled, settled_by_rank
from .storages import CODE_STORAGES


@dataclass(eq=False)
class States:
    """What the optimizer's state has for the rows of a table.

    Attributes:
        rule: the optimizer's rule.
        device: where all of the rows' parameters are.
        groups: the optimizer's ``param_groups``.
        state: the optimizer's ``state``.
        hidden_steps: counts of rules that keep none in their state.
        added: names of the states that the phase adds to the rule's.
    """

    rule: Rule
    device: torch.device
    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    hidden_steps: HiddenSteps
    added: tuple[str, ...]

    def found(self, row: Row) -> dict[str, Any]:
        """What the optimizer's state has for a row's parameter, if anything."""
        state = self.state.get(row.param, {})
        if not isinstance(state, dict):
            raise TypeError(f"the state of {row.name} must be a dict, but it is {state!r}")
        return state

    def present(self, row: Row) -> dict[str, Tensor]:
        """The state tensors that it has for a row, by name."""
        state = self.found(row)
        return {name: state[name] for name in (*self.rule.states, *self.added) if isinstance(state.get(name), Tensor)}

    def kept(self, row: Row) -> dict[str, Tensor]:
        """What is kept beside the parameter and its states, where its group asks for it."""
        state = self.found(row)
        return {key: state[key] for key in self._kept_names(row) if state.get(key) is not None}

    def names(self, row: Row) -> tuple[str, ...]:
        """All that the state holds for a row but its step."""
        return (*self.rule.states, *self.added, *self._kept_names(row))

    def written(self, row: Row) -> Iterator[tuple[str, Tensor]]:
        """What a launch writes of a row besides the gradient: name, "" for the parameter, and tensor."""
        yield "", row.param
        if row.copy is not None:
            yield "copy_to", row.copy
        if not self.state.get(row.param):
            return  # what is made for it lies apart, as new memory does
        yield from (*self.present(row).items(), *self.kept(row).items())
        step = self.found_step(row)
        if isinstance(step, Tensor) and is_settled_step(step, self.device):
            yield "step", step

    def counts_in_state(self, row: Row) -> bool:
        """Whether the state is to have the count of the row's steps."""
        return self.rule.counts_in_state(self.groups[row.group])

    def found_step(self, row: Row) -> Any:
        """The count of the row's steps as it is kept; None: there is none yet."""
        step = self.state.get(row.param, {}).get("step") if self.counts_in_state(row) else None
        if step is not None or self.rule.keeps_step:
            return step
        return self.hidden_steps.known.get(row.param, 1.0) if self.present(row) else None

    def check_found(self, row: Row) -> None:
        """Refuses a state that does not fit the parameter as it is now."""
        group, state = self.groups[row.group], self.found(row)
        if not state and not has_modes(group):
            return
        for name in (*self.rule.states, *self.added):
            if state.get(name) is not None:
                check_state(row.name, row.param, name, state[name], codes=name in self.rule.states)
        check_master(row.name, row.param, group, state)
        check_codes(self.rule, row.name, row.param, group, state)
        check_rounding(row.name, row.param, group, state)

    def check_first_velocity(self, row: Row) -> None:
        """Refuses a velocity that begins when an average or random bits have counted steps already.

        Torch does not dampen a first velocity; here the count of steps says which is the first.
        """
        group = self.groups[row.group]
        dampening = 0.0 if self.rule.keeps_step else float(group.get("dampening", 0.0))
        present = self.present(row)
        if dampening == 0.0 or all(name in present for name in self.rule.states_of(group)):
            return
        count = self.found_step(row)
        if count is not None and float(count) > 0.0:
            raise ValueError(
                f"{row.name} has taken {float(count):g} steps with an average or rounding='stochastic' and without a "
                f"velocity, which would begin dampened now: set dampening to 0, it is {dampening:g}"
            )

    def adopt(self, rows: list[Row], beside: Sequence[Row]) -> None:
        """Takes over what the optimizer's state already has: after a load, a move, or an outside change.

        Args:
            rows: the rows that it has something for.
            beside: the rows of all tables of the device, these among them.
        """
        if not rows:
            return
        found = [self.present(row) for row in rows]
        kept = [self.kept(row) for row in rows]
        for row in rows:
            self.check_found(row)
            if self.counts_in_state(row):
                check_step(row.name, self.found(row), self.rule.states if self.rule.keeps_step else ())
        everything = [{**present, **master} for present, master in zip(found, kept, strict=True)]
        adopted = set(rows)
        others = [row for row in beside if row not in adopted]
        steps = [*map(self.found_step, rows), *(row.step for row in others)]
        settled_steps = [
            step if isinstance(step, Tensor) and is_settled_step(step, self.device) else None for step in steps
        ]
        check_states_apart([*rows, *others], [*everything, *(row.states for row in others)], settled_steps)
        for row, present in zip(rows, everything, strict=True):
            row.states = {name: self._settle(row, name, tensor) for name, tensor in present.items()}
            self._code(row)
        self._adopt_steps(rows)

    def create(self, rows: list[Row]) -> None:
        """Zeros for what is missing. The steps of all of these rows are views of one buffer."""
        if not rows:
            return
        names = {g: self.rule.states_of(self.groups[g]) for g in {row.group for row in rows}}
        with_step = [row for row in rows if row.step is None and (names[row.group] or self._wants_step(row))]
        for row, step in zip(with_step, make_steps([0.0] * len(with_step), self.device), strict=True):
            self._keep_step(row, step)
        for row in rows:
            group = self.groups[row.group]
            if has_modes(group):
                self._create_kept(row)
            for name in names[row.group]:
                if name not in row.states:
                    dtype = _state_dtype(self.rule, row, group, name)
                    tensor = torch.zeros_like(row.param, dtype=dtype, memory_format=torch.preserve_format)
                    row.states[name] = self.state.setdefault(row.param, {})[name] = tensor
            if EMA in self.added and EMA not in row.states:
                average = row.param.detach().to(
                    average_dtype(row.param), copy=True, memory_format=torch.preserve_format
                )
                row.states[EMA] = self.state.setdefault(row.param, {})[EMA] = average

    def _kept_names(self, row: Row) -> tuple[str, ...]:
        group = self.groups[row.group]
        if not has_modes(group):
            return ()
        key = master_key(row.param, group)
        scales = tuple(scale_key(name) for name in coded_states(self.rule, row.param, group))
        return scales if key is None else (*scales, key)

    def _settle(self, row: Row, name: str, tensor: Tensor) -> Tensor:
        """A state tensor, dense and where its parameter is; what the state then holds too."""
        place = settled_by_rank if name in map(scale_key, self.rule.states) else settled
        usable = place(resolved(tensor).to(local(row.param).device), row.param)
        if name in self.rule.states:
            usable = as_asked(usable, row.param, self.groups[row.group], name)
        if name == EMA:  # torch, loading it, casts it to the dtype of the parameter
            usable = usable.to(torch.promote_types(usable.dtype, average_dtype(row.param)))
        if usable is not tensor:
            self.state[row.param][name] = usable
        return usable

    def _code(self, row: Row) -> None:
        """Makes codes of the states that are there in floating point but are to be kept in 8 bits."""
        group = self.groups[row.group]
        for name in coded_states(self.rule, row.param, group):
            tensor = row.states.get(name)
            if tensor is None:
                continue
            if tensor.dtype not in CODE_STORAGES:
                made = as_codes(self.rule, group, name, tensor, row.param)
            elif not local(tensor).is_contiguous():
                made = {name: like_local(local(tensor).contiguous(), row.param)}
            else:
                continue
            row.states |= made
            self.state[row.param] |= made

    def _adopt_steps(self, rows: list[Row]) -> None:
        """Counts of any origin, as torch's fused optimizers keep them: float32, 0-dim, on the device.

        Each is a tensor of its own. Those that are not yet so become views of one buffer.
        """
        strange: list[tuple[Row, float]] = []
        taken: set[int] = set()
        given = self._given_velocities(rows)
        for row in rows:
            row.count = None
            step = 1.0 if row.index in given else self.found_step(row)
            if isinstance(step, Tensor) and is_settled_step(step, self.device) and step.data_ptr() not in taken:
                row.count = step
                taken.add(step.data_ptr())
            elif step is not None:
                strange.append((row, float(step)))
        counts = [count for _, count in strange]
        for (row, _), step in zip(strange, make_steps(counts, self.device), strict=True):
            self._keep_step(row, step)

    def _given_velocities(self, rows: list[Row]) -> set[int]:
        """Indices of rows whose first step was skipped, and to which somebody else then gave a velocity."""
        if self.rule.keeps_step:
            return set()
        found = zip(rows, map(self.found_step, rows), strict=True)
        counts = [(row, step) for row, step in found if isinstance(step, Tensor) and step.numel() == 1]
        if not counts:
            return set()
        firsts = (torch.stack([step.reshape(()).to(self.device) for _, step in counts]) == 0.0).tolist()
        unstepped = [row for (row, _), is_first in zip(counts, firsts, strict=True) if is_first]
        states = ((row, name, state) for row in unstepped for name, state in self.present(row).items())
        return {row.index for row, name, state in states if name in self.rule.states and has_values(state)}

    def _keep_step(self, row: Row, step: Tensor) -> None:
        row.count = step
        if self.counts_in_state(row):
            self.state.setdefault(row.param, {})["step"] = step  # a dict that somebody put there makes no entries
        else:
            self.hidden_steps.known[row.param] = step

    def _create_kept(self, row: Row) -> None:
        """What the modes of a row's group keep: see ``precision``."""
        group, state = self.groups[row.group], self.state.setdefault(row.param, {})
        key = master_key(row.param, group)
        if key is not None and key not in row.states:
            row.states[key] = state[key] = make_master(row.param, key)
        if rounds_at_random(row.param, group):
            place = sum(len(group["params"]) for group in self.groups[: row.group]) + row.place
            state.setdefault(ROUNDING_KEY, make_rounding_key(place))
        for name in coded_states(self.rule, row.param, group):
            if name not in row.states:
                made = blank_codes(self.rule, row.param, group, name)
                row.states |= made
                state |= made

    def _wants_step(self, row: Row) -> bool:
        """Whether a row without states counts its steps all the same."""
        return self.counts_in_state(row) or bool(self.added)


def has_values(state: Tensor) -> bool:
    """Whether a state is anything else than zeros."""
    return bool(local(state).count_nonzero())


def make_steps(counts: Sequence[float], device: torch.device) -> Sequence[Tensor]:
    """Step counts as float32 on a device: 0-dim views of one buffer."""
    if not counts:
        return ()
    made = torch.tensor(counts, dtype=torch.float32, device=device) if any(counts) else None
    return (torch.zeros(len(counts), device=device, dtype=torch.float32) if made is None else made).unbind()


def is_settled_step(step: Tensor, device: torch.device) -> bool:
    """Whether kernels can count in a tensor as it is."""
    return step.dtype == torch.float32 and step.device == device and step.dim() == 0 and type(step) is Tensor


def _state_dtype(rule: Rule, row: Row, group: Group, name: str) -> torch.dtype:
    """What the group asks for; else the parameter's; for SGD torch's first velocity's, which is a decayed gradient."""
    asked = state_dtype_of(group, name)
    if asked is not None and takes_modes(row.param):
        return asked
    if rule.keeps_step or row.param.grad is None:
        return row.param.dtype
    return row.param.grad.dtype
