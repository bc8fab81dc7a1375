"""Builds the tensor table of one device and keeps it true: rows, states, storages, layouts.

A row is made when its parameter first has a gradient, and again when something about its tensors changed;
in between, the compiled table only reads gradients again. All checks happen here, before anything is written.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import holds
from .check import (
    check_flags,
    check_gradient,
    check_groups,
    check_hyperparameters,
    check_parameter,
    check_state,
    check_step,
    local,
    real_dtype,
)
from .core import Core, addresses_apart, make_core, make_plain_core
from .hidden_steps import HiddenSteps
from .lasting import Lasting
from .layout import crossings, is_same_memory, may_share_memory, neighbours, strided_layout
from .memory import is_wrapper
from .phase import EMA, LEAF, MOST_LEAVES, NOTHING, WHOLE_STEP, Phase, average_dtype, check_cleared, check_copy
from .precision import (
    DEFAULT_BLOCK,
    ROUNDING_KEY,
    as_asked,
    as_codes,
    blank_codes,
    check_codes,
    check_master,
    check_no_double,
    check_rounding,
    coded_states,
    has_modes,
    kept_storage,
    make_master,
    make_rounding_key,
    master_key,
    rounds_at_random,
    row_mode,
    scale_key,
    state_dtype_of,
    takes_modes,
)
from .reference import REPORT_COLUMNS
from .rules import Group, Rule
from .sharded import Spread, is_sharded, like_local, places_of, settled, settled_by_rank, spread_of
from .storages import CODE_STORAGES

__all__ = ["Row", "Table", "local", "real_dtype", "real_view", "separate"]

PLAIN_MODE = DEFAULT_BLOCK.bit_length() - 1  # precision.row_mode of a group without modes
ELEMENT_SLOTS = 8  # parameter, gradient, three states, master, ema, copy: csrc/table.h
STATES_AT, STATE_SLOTS, PLACE_SLOTS = 2, 3, 3


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


@dataclass(eq=False, slots=True)
class Begun:
    """Rows whose states were just made: their indices, of which the stepped ones have a count each in ``steps``."""

    rows: Sequence[int]
    stepped: Sequence[int]
    steps: Tensor


def name_of(groups: Sequence[Group], group: int, place: int) -> str:
    """What error messages call the parameter at a place of a group."""
    names = groups[group].get("param_names")
    if isinstance(names, Sequence) and place < len(names):
        return f"parameter '{names[place]}'"
    return f"parameter {place} of group {group}"


class Table:
    """The tensors of one optimizer on one device.

    Args:
        rule: the optimizer's rule.
        device: where all of these parameters are.
        groups: the optimizer's ``param_groups``.
        rows: the table's parameters, in order; None: those that ``core`` has.
        beside: the rows of all tables of the device, this one's among them; None: there are no others.
        state: the optimizer's ``state``.
        hidden_steps: counts of rules that keep none in their state.
        lasting: what it takes over from the table that it takes the place of.
        phase: what else a step does.
        results: float64 on the device: where the count of skipped steps goes, and the norms.
        spreads: the ways in which the optimizer's parameters lie over ranks. The rows of a norm follow one another,
            among these those of a spread: see ``part_of``.
        core: the compiled table of all parameters, where there is one already: then none needs a closer look.
        live: its rows that have a gradient.
    """

    stage = WHOLE_STEP
    reported: Sequence[Tensor] = ()  # the parameters that it tells of
    ema_decay: float | Tensor | None = None  # as the next launch reads it
    parts: Sequence[int] = (0,)  # the first row of each
    _begun: Begun | None = None

    def __init__(
        self,
        rule: Rule,
        device: torch.device,
        groups: list[dict[str, Any]],
        rows: list[Row] | None,
        beside: Sequence[Row] | None,
        state: dict[Tensor, dict[str, Any]],
        hidden_steps: HiddenSteps,
        lasting: Lasting,
        phase: Phase = NOTHING,
        results: Tensor | None = None,
        spreads: Sequence[Spread] = (None,),
        core: Core | None = None,
        live: Sequence[int] = (),
    ) -> None:
        """See the class."""
        self.rule = rule
        self.device = device
        self.groups = groups
        self._rows = rows
        self._others = beside
        self._live = live
        self.lasting = lasting
        self.phase = phase
        self.results = results
        self._state = state
        self._hidden_steps = hidden_steps
        self.core: Core = self._make_core(spreads) if core is None else core
        holds.limit(self.core)

    @classmethod
    def of_plain(
        cls,
        rule: Rule,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        hidden_steps: HiddenSteps,
        phase: Phase,
    ) -> Table | None:
        """The one table of a first step of which nothing needs a closer look, as of almost all; None: something does.

        It has neither results nor anything lasting yet.
        """
        if not phase.leaves_rows_plain or phase.norm_by_group:
            return None
        made = make_plain_core(rule, groups, state, phase.watched_keys)
        if made is None:
            return None
        core, live = made
        device = core.params()[0].device
        return cls(rule, device, groups, None, None, state, hidden_steps, Lasting(), phase, core=core, live=live)

    def begin(self) -> None:
        """Makes every row of a new table: nothing is known of what any of them was."""
        if self._rows is None:
            self._begin(self._live)
            return
        self._adopt([row for row in self._rows if self._state.get(row.param)] if self._state else [])
        self._check_flags(self._read_groups())
        self._remake(self._rows)

    def _make_core(self, spreads: Sequence[Spread]) -> Core:
        if self.norms * len(spreads) > 1:
            parts = [part_of(row, self.phase, spreads) for row in self.rows]
            self.parts = [bisect_left(parts, part) for part in range(self.norms * len(spreads))]
        places = [(row.group, row.place, row.param) for row in self.rows]
        sizes = [len(group["params"]) for group in self.groups]
        return make_core(self.rule, self.device, places, sizes, self._state, self.parts, self.phase.watched_keys)

    @property
    def rows(self) -> list[Row]:
        """The table's parameters, in order. Those of a table that began plainly are made when somebody asks."""
        if self._rows is None:
            rows = []
            for index in range(self.core.rows):
                group, place, param, address, *_ = self.core.described(index)
                rows.append(Row(index, group, place, param, self.groups, address))
            self._take_begun(rows)
            self._rows = rows  # last: an interrupt leaves none
        return self._rows

    @property
    def _beside(self) -> Sequence[Row]:
        return self.rows if self._others is None else self._others

    def refresh(self) -> bool:
        """Reads gradients and hyperparameters again, and makes new rows where something changed.

        Returns:
            False where parameters came, went, were replaced or moved: the table must be built anew.
        """
        changed_groups = self._read_groups()
        if changed_groups == -1:
            return False
        if self.phase.norm_by_group:
            for index, group in enumerate(self.groups):
                self.phase.check_max_norm(index, group)
        self._check_flags(changed_groups)
        changed_rows = self.core.refresh()
        if changed_groups is None and changed_rows is None:
            return True
        groups, indices = set(changed_groups or ()), set(changed_rows or ())
        rows = [row for row in self.rows if row.index in indices or row.group in groups]
        if any(local(row.param).device != self.device for row in rows):
            return False
        moved = [row for row in rows if row.lies and local(row.param).data_ptr() != row.lies]
        if moved and (self.phase.copy_to is not None or _sharers(self.rows)):
            return False  # it was moved onto another parameter, or may have been onto a copy
        self._remake(rows)
        return True

    def announce(self, stage: int = WHOLE_STEP) -> None:
        """Tells the compiled table what else the next launch does."""
        self.stage = stage
        decay = self.ema_decay
        is_tensor = isinstance(decay, Tensor)
        address = decay.data_ptr() if isinstance(decay, Tensor) else 0
        self._make_room()
        room = self.lasting
        room.streams.record(self.device, (room.leaf_sums, room.joined, room.report, self.results))
        self.core.set_phase(
            self.phase.flags,
            stage,
            0.0 if decay is None or is_tensor else float(decay),
            address,
            self.norms,
            [self.phase.max_norm_of(group) for group in self.groups],
            0 if room.leaf_sums is None else room.leaf_sums.data_ptr(),
            0 if room.joined is None else room.joined.data_ptr(),
            0 if self.results is None else self.results.data_ptr(),
            0 if room.report is None else room.report.data_ptr(),
        )

    @property
    def norms(self) -> int:
        """How many norms there are: one, or one for each group."""
        return len(self.groups) if self.phase.norm_by_group else 1

    @property
    def partials(self) -> Tensor | None:
        """What the report keeps of every leaf: the columns of csrc/report.h."""
        report = self.lasting.report
        return None if report is None else report[:-1].view(REPORT_COLUMNS, -1)

    @property
    def last_was_skipped(self) -> Tensor | None:
        """Whether the last launch was skipped, where there is a report: 1 or 0, on the device."""
        return None if self.lasting.report is None else self.lasting.report[-1]

    def _make_room(self) -> None:
        """For what the phase writes about every leaf."""
        leaves, room = self.core.leaves, self.lasting
        if self.phase.reads_twice and leaves > MOST_LEAVES:
            raise ValueError(f"max_grad_norm and skip_nonfinite take up to {MOST_LEAVES * LEAF} elements on a device")
        if self.phase.reads_twice:
            if room.leaf_sums is None or room.leaf_sums.numel() != leaves:
                room.renew(leaf_sums=torch.empty(leaves, dtype=torch.float64, device=self.device))
            if room.joined is None or room.joined.numel() != len(self.parts):
                room.renew(joined=torch.empty(len(self.parts), dtype=torch.float64, device=self.device))
        size = REPORT_COLUMNS * leaves + 1
        if self.phase.report and (room.report is None or room.report.numel() != size):
            room.renew(report=torch.full((size,), math.nan, dtype=torch.float64, device=self.device))

    def is_current(self) -> bool:
        """Whether states and copies lie where the rows point. That states are the very ones, ``refresh`` watches."""
        return self.core.states_in_place()

    def state_of(self, row: Row) -> dict[str, Any]:
        """What the optimizer's state has for a row's parameter."""
        return self._state[row.param]

    def live_params(self) -> list[Tensor]:
        """The parameters that have a gradient, as of the last refresh."""
        return self.core.live_params()

    def live_rows(self) -> Iterable[Row]:
        """The rows that have a gradient now."""
        return (row for row in self.rows if row.param.grad is not None)

    def _read_groups(self) -> Any:
        try:
            return self.core.read_groups(self.groups)
        except Exception:
            check_groups(self.groups)  # these raise an error that names the one at fault
            check_hyperparameters(self.rule, self.groups)
            raise

    def _check_flags(self, groups: Iterable[int] | None) -> None:
        for group in groups or ():
            check_flags(foreach=False, fused=False, differentiable=bool(self.groups[group].get("differentiable")))

    def _holds(self, row: Row) -> bool:
        state = self._found(row)
        if not state and not row.states and row.step is None:
            return True
        if self._counts_in_state(row) and state.get("step") is not row.step:
            return False
        if any(state.get(name) is not row.states.get(name) for name in self._names(row)):
            return False
        return row.leaves > 0 and self.core.state_in_place(row.index)  # else it was never described

    def _adopt(self, rows: list[Row]) -> None:
        """Takes over what the optimizer's state already has: after a load, a move, or an outside change."""
        if not rows:
            return
        found = [self._present(row) for row in rows]
        kept = [self._kept(row) for row in rows]
        for row in rows:
            self._check_found(row)
            if self._counts_in_state(row):
                check_step(row.name, self._found(row), self.rule.states if self.rule.keeps_step else ())
        everything = [{**present, **master} for present, master in zip(found, kept, strict=True)]
        adopted = set(rows)
        others = [row for row in self._beside if row not in adopted]
        steps = [*map(self._found_step, rows), *(row.step for row in others)]
        settled_steps = [
            step if isinstance(step, Tensor) and is_settled_step(step, self.device) else None for step in steps
        ]
        _check_apart([*rows, *others], [*everything, *(row.states for row in others)], settled_steps)
        for row, present in zip(rows, everything, strict=True):
            row.states = {name: self._settle(row, name, tensor) for name, tensor in present.items()}
            self._code(row)
        self._adopt_steps(rows)

    def _found(self, row: Row) -> dict[str, Any]:
        """What the optimizer's state has for a row's parameter, if anything."""
        state = self._state.get(row.param, {})
        if not isinstance(state, dict):
            raise TypeError(f"the state of {row.name} must be a dict, but it is {state!r}")
        return state

    def _check_found(self, row: Row) -> None:
        """Refuses a state that does not fit the parameter as it is now."""
        group, state = self.groups[row.group], self._found(row)
        if not state and not has_modes(group):
            return
        for name in (*self.rule.states, *self.phase.states):
            if state.get(name) is not None:
                check_state(row.name, row.param, name, state[name], codes=name in self.rule.states)
        check_master(row.name, row.param, group, state)
        check_codes(self.rule, row.name, row.param, group, state)
        check_rounding(row.name, row.param, group, state)

    def _present(self, row: Row) -> dict[str, Tensor]:
        state = self._found(row)
        return {
            name: state[name] for name in (*self.rule.states, *self.phase.states) if isinstance(state.get(name), Tensor)
        }

    def _kept(self, row: Row) -> dict[str, Tensor]:
        """What is kept beside the parameter and its states, where its group asks for it."""
        state = self._found(row)
        return {key: state[key] for key in self._kept_names(row) if state.get(key) is not None}

    def _kept_names(self, row: Row) -> tuple[str, ...]:
        group = self.groups[row.group]
        if not has_modes(group):
            return ()
        key = master_key(row.param, group)
        scales = tuple(scale_key(name) for name in coded_states(self.rule, row.param, group))
        return scales if key is None else (*scales, key)

    def _names(self, row: Row) -> tuple[str, ...]:
        """All that the state holds for a row but its step."""
        return (*self.rule.states, *self.phase.states, *self._kept_names(row))

    def _settle(self, row: Row, name: str, tensor: Tensor) -> Tensor:
        """A state tensor, dense and where its parameter is; what the state then holds too."""
        place = settled_by_rank if name in map(scale_key, self.rule.states) else settled
        usable = place(resolved(tensor).to(local(row.param).device), row.param)
        if name in self.rule.states:
            usable = as_asked(usable, row.param, self.groups[row.group], name)
        if usable is not tensor:
            self._state[row.param][name] = usable
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
            self._state[row.param] |= made

    def _adopt_steps(self, rows: list[Row]) -> None:
        """Counts of any origin, as torch's fused optimizers keep them: float32, 0-dim, on the device.

        Each is a tensor of its own. Those that are not yet so become views of one buffer.
        """
        strange: list[tuple[Row, float]] = []
        taken: set[int] = set()
        given = self._given_velocities(rows)
        for row in rows:
            row.count = None
            step = 1.0 if row.index in given else self._found_step(row)
            if isinstance(step, Tensor) and is_settled_step(step, self.device) and step.data_ptr() not in taken:
                row.count = step
                taken.add(step.data_ptr())
            elif step is not None:
                strange.append((row, float(step)))
        counts = [count for _, count in strange]
        for (row, _), step in zip(strange, make_steps(counts, self.device), strict=True):
            self._keep_step(row, step)

    def _counts_in_state(self, row: Row) -> bool:
        return self.rule.counts_in_state(self.groups[row.group])

    def _found_step(self, row: Row) -> Any:
        step = self._state.get(row.param, {}).get("step") if self._counts_in_state(row) else None
        if step is not None or self.rule.keeps_step:
            return step
        return self._hidden_steps.known.get(row.param, 1.0) if self._present(row) else None

    def _given_velocities(self, rows: list[Row]) -> set[int]:
        """Indices of rows whose first step was skipped, and to which somebody else then gave a velocity."""
        if self.rule.keeps_step or (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return set()
        found = zip(rows, map(self._found_step, rows), strict=True)
        counts = [(row, step) for row, step in found if isinstance(step, Tensor) and step.numel() == 1]
        if not counts:
            return set()
        firsts = (torch.stack([step.reshape(()).to(self.device) for _, step in counts]) == 0.0).tolist()
        unstepped = [row for (row, _), is_first in zip(counts, firsts, strict=True) if is_first]
        states = ((row, name, state) for row in unstepped for name, state in self._present(row).items())
        return {row.index for row, name, state in states if name in self.rule.states and has_values(state)}

    def _keep_step(self, row: Row, step: Tensor) -> None:
        row.count = step
        if self._counts_in_state(row):
            self._state.setdefault(row.param, {})["step"] = step  # a dict that somebody put there makes no entries
        else:
            self._hidden_steps.known[row.param] = step

    def _remake(self, rows: list[Row]) -> None:
        """Describes rows anew. Nothing is changed where any of them is at fault."""
        leaves = [row.leaves for row in rows] if self.reported else []
        plain, are_apart = self._plain_rows(rows)
        begun = set(plain)
        others = [row for row in rows if row.index not in begun]
        strange = self._check_rows(others)
        if not (are_apart and len(plain) == len(self._beside)) and (
            plain or strange or any(row.leaves == 0 and row.param.grad is not None for row in others)
        ):
            self._check_gradients_apart()
        if others:
            self._describe(others, strange)
        self._begin(plain)
        if self.reported and leaves != [row.leaves for row in rows]:
            self.reported = ()  # what was kept is by leaves that no longer are these

    def _check_rows(self, rows: list[Row]) -> list[Row]:
        """Refuses what does not fit together; returns the rows whose state is not what they hold."""
        if not rows:
            return []
        for row in rows:
            if row.param.grad is not None:
                self._check_row(row, row.param.grad)
        if self.phase.zero_grads:
            self._check_cleared(rows)
        return [row for row in rows if not self._holds(row)]

    @torch.no_grad()
    def _describe(self, rows: list[Row], strange: list[Row]) -> None:
        """Takes over or makes the states of rows, and describes them."""
        self._adopt(strange)
        self._create_states([row for row in rows if row.param.grad is not None])
        for row in rows:
            row.stand_in = _stand_in(row.param)
            self._set_row(row)

    def _check_row(self, row: Row, grad: Tensor) -> None:
        """Refuses what does not fit together, by name."""
        check_parameter(row.name, row.param)
        self.phase.check_norm(row.name, row.param)
        check_gradient(row.name, row.param, grad, takes_sparse=self.rule.takes_sparse)
        self._check_found(row)
        if row.copy is not None:
            check_copy(row.name, row.param, row.copy)
        self._check_first_velocity(row)
        group, state = self.groups[row.group], self._found(row)
        if has_modes(group):
            kept = [name for name in self.rule.states if state_dtype_of(group, name) is None]
            wanted = {name: state.get(name) for name in (*kept, *self.phase.states)}
            check_no_double(self.rule, row.name, row.param, group, {"gradient": grad, "copy_to": row.copy, **wanted})

    def _check_first_velocity(self, row: Row) -> None:
        """Refuses a velocity that begins when an average or random bits have counted steps already.

        Torch does not dampen a first velocity; here the count of steps says which is the first.
        """
        group = self.groups[row.group]
        dampening = 0.0 if self.rule.keeps_step else float(group.get("dampening", 0.0))
        present = self._present(row)
        if dampening == 0.0 or all(name in present for name in self.rule.states_of(group)):
            return
        count = self._found_step(row)
        if count is not None and float(count) > 0.0:
            raise ValueError(
                f"{row.name} has taken {float(count):g} steps with an average or rounding='stochastic' and without a "
                f"velocity, which would begin dampened now: set dampening to 0, it is {dampening:g}"
            )

    def _check_gradients_apart(self) -> None:
        """Refuses gradients that lie where a launch writes: it reads them while it writes everything else.

        An element of the parameter itself is read before it is written, and what overlaps it otherwise is copied.
        """
        live = [row for row in self._beside if row.param.grad is not None]
        grads = [local(row.param.grad) for row in live if row.param.grad is not None]
        written = [(row, name, local(tensor)) for row in live for name, tensor in self._written(row)]
        if addresses_apart([*grads, *(tensor for _, _, tensor in written)]) is not None:
            return
        readers = [(row, grad) for row, grad in zip(live, grads, strict=True) if _storage_address(grad)]
        written = [each for each in written if _storage_address(each[2])]
        for one, other in crossings([grad for _, grad in readers], [tensor for *_, tensor in written]):
            (reader, grad), (writer, name, tensor) = readers[one], written[other]
            is_own = reader is writer and not name and not self.phase.zero_grads
            if is_own or not may_share_memory(grad, tensor):
                continue
            is_copied = _stand_in(reader.param) is not None  # before all launches of a step
            if is_copied or reader.is_at_odds_with(writer):
                what = f"{name} of {writer.name}" if name else writer.name
                raise ValueError(
                    f"gradient of {reader.name} (shape {tuple(grad.shape)}) and {what} (shape {tuple(tensor.shape)}) "
                    "share memory: a step would write to the gradient while it is read"
                )

    def _written(self, row: Row) -> Iterator[tuple[str, Tensor]]:
        """What a launch writes of a row besides the gradient: name, "" for the parameter, and tensor."""
        yield "", row.param
        if row.copy is not None:
            yield "copy_to", row.copy
        if not self._state.get(row.param):
            return  # what is made for it lies apart, as new memory does
        yield from (*self._present(row).items(), *self._kept(row).items())
        step = self._found_step(row)
        if isinstance(step, Tensor) and is_settled_step(step, self.device):
            yield "step", step

    def _plain_rows(self, rows: list[Row]) -> tuple[list[int], bool]:
        """Those that are new and of tensors that need no closer look, almost all of a first step; if they are apart."""
        if not self.phase.leaves_rows_plain:
            return [], False
        modes = [has_modes(group) for group in self.groups]
        return self.core.plain_rows(
            [row.index for row in rows if row.count is None and not row.states and not modes[row.group]]
        )

    def _begin(self, plain: Sequence[int]) -> None:
        """States of zeros for plain rows, and their description, in one call."""
        if not plain:
            return
        stepped = self.core.counted_rows(plain)
        steps = torch.zeros(len(stepped), device=self.device, dtype=torch.float32)
        if not self.rule.keeps_step:  # known before there are states, so that those of a call that fails count as new
            params = self.core.params()
            self._hidden_steps.begin(params if len(stepped) == len(params) else [params[row] for row in stepped], steps)
        in_state = steps.unbind() if self.rule.keeps_step else ()
        self.core.begin_rows(plain, steps, in_state, PLAIN_MODE, torch.empty_like)
        self._begun = Begun(plain, stepped, steps)
        if self._rows is not None:
            self._take_begun(self._rows)

    def _take_begun(self, rows: Sequence[Row]) -> None:
        """Gives rows that were begun what they hold now."""
        begun = self._begun
        if begun is None:
            return
        for index in begun.rows:
            *_, numel, entries = self.core.described(index)
            row = rows[index]
            row.states = {name: entries[name] for name in self.rule.states if name in entries}
            row.count = entries.get("step")
            row.stand_in = None
            row.is_dense = True
            row.leaves = -(-numel // LEAF)
        for place, index in enumerate(begun.stepped) if not self.rule.keeps_step else ():
            rows[index].count = (begun.steps, place)
        self._begun = None

    def _check_cleared(self, rows: list[Row]) -> None:
        live = self.live_rows()
        check_cleared([(row.name, row.param.grad) for row in live if row.param.grad is not None])
        for row in rows:
            if _stand_in(row.param) is not None:
                raise ValueError(f"zero_grads: gradient of {row.name} is not what the kernels read: it lies otherwise")

    def _create_states(self, rows: list[Row]) -> None:
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
                    row.states[name] = self._state.setdefault(row.param, {})[name] = tensor
            if EMA in self.phase.states and EMA not in row.states:
                average = row.param.detach().to(
                    average_dtype(row.param), copy=True, memory_format=torch.preserve_format
                )
                row.states[EMA] = self._state.setdefault(row.param, {})[EMA] = average

    def _create_kept(self, row: Row) -> None:
        """What the modes of a row's group keep: see ``precision``."""
        group, state = self.groups[row.group], self._state.setdefault(row.param, {})
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
        return self._counts_in_state(row) or bool(self.phase.states)

    def _set_row(self, row: Row) -> None:
        grad = row.gradient
        if grad is None:
            self._set_blank_row(row)
            return
        self._set_live_row(row, grad)
        self._watch(row)

    def _watch(self, row: Row) -> None:
        """From now on a refresh sees where the optimizer's state is no longer that of the row."""
        state = self._state.get(row.param)
        if state is not None:
            entries: dict[str, Any] = {name: row.states.get(name) for name in self._names(row)}
            if rounds_at_random(row.param, self.groups[row.group]):
                entries[ROUNDING_KEY] = state.get(ROUNDING_KEY)  # the row holds its bits
            if self._counts_in_state(row):
                entries["step"] = row.step
            self.core.watch_state(row.index, state, entries)

    def _set_blank_row(self, row: Row) -> None:
        """A row without gradient: the launch passes it over, whatever its parameter is, wherever it lies."""
        row.leaves = 0
        addresses, storages = [0] * (ELEMENT_SLOTS + 1 + STATE_SLOTS + PLACE_SLOTS), [0] * ELEMENT_SLOTS
        self.core.set_row(row.index, addresses, storages, 0, 0, row.group, [], row.param, None, False, None, [])

    def _set_live_row(self, row: Row, grad: Tensor) -> None:
        needed = self.rule.states_of(self.groups[row.group])
        states = [row.states.get(name) if name in needed else None for name in self.rule.states]
        states += [None] * (STATE_SLOTS - len(states))
        key = master_key(row.param, self.groups[row.group])
        states.append(None if key is None else row.states.get(key))
        ema = row.states.get(EMA) if EMA in self.phase.states else None
        tensors: list[Tensor | None] = [row.param, grad, *states, ema, row.copy]
        assert len(tensors) == ELEMENT_SLOTS  # in the order of csrc/table.h
        slots = [None if tensor is None else real_view(local(tensor)) for tensor in tensors]
        param = slots[0]
        assert param is not None  # the parameter is always there
        row.leaves = -(-param.numel() // LEAF)
        # Random bits are those of places in row-major order, whatever order memory has.
        in_order = rounds_at_random(row.param, self.groups[row.group])
        is_contiguous = all(slot is None or slot.is_contiguous() for slot in slots)
        layout = [] if is_contiguous else strided_layout(param.shape, _strides(slots), row_major=in_order)
        row.is_dense = not layout
        addresses = [_address(slot) for slot in slots]
        addresses.append(0 if row.step is None else row.step.data_ptr())
        scales = [row.states.get(scale_key(name)) if name in needed else None for name in self.rule.states]
        scales += [None] * (STATE_SLOTS - len(scales))
        addresses += [_address(None if scale is None else local(scale)) for scale in scales]
        addresses += places_of(row.param) if in_order else (0,) * PLACE_SLOTS
        names = dict(enumerate(self.rule.states, STATES_AT))
        storages = [
            0 if slot is None else kept_storage(self.rule, names.get(k, ""), slot.dtype) for k, slot in enumerate(slots)
        ]
        # Aliases: they go on owning this memory where `tensor.data = ...` gives a tensor other memory.
        keep = [
            tensor.detach()
            for tensor in (*states, *scales, ema, row.copy, row.step, row.stand_in)
            if tensor is not None
        ]
        self.core.set_row(
            row.index,
            addresses,
            storages,
            row_mode(row.param, self.groups[row.group], self._state.get(row.param, {})),
            param.numel(),
            row.group,
            layout,
            row.param,
            grad,
            is_sharded(row.param),
            row.copy,
            keep,
        )


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


def separate(rows: Sequence[Row]) -> list[list[Row]]:
    """Splits rows so that no two parameters of a part share memory, in as few parts as their order allows.

    Torch updates a parameter that is given twice, or two that are the same memory (tied weights), one after the other;
    so do launches that follow each other.

    Raises:
        ValueError: two parameters share some elements without being the same.
    """
    earlier = _sharers(rows) if len(rows) > 1 else {}
    if not earlier:
        for k, row in enumerate(rows):
            row.index, row.part = k, 0
        return [list(rows)]
    levels: dict[int, int] = {}
    for k in range(len(rows)):
        levels[k] = 1 + max((levels[other] for other in earlier.get(k, ())), default=-1)
    parts: list[list[Row]] = [[] for _ in range(max(levels.values(), default=-1) + 1)]
    for k, row in enumerate(rows):
        part = parts[levels[k]]
        row.index, row.part = len(part), levels[k]
        part.append(row)
    return parts


def _sharers(rows: Sequence[Row]) -> dict[int, list[int]]:
    """For each row, the earlier ones whose parameters may share memory with its own."""
    addresses = addresses_apart([row.param for row in rows])
    if addresses is not None:
        for row, address in zip(rows, addresses, strict=True):
            row.lies = address
        return {}
    tensors = [local(row.param) for row in rows]
    indices = [k for k, tensor in enumerate(tensors) if _storage_address(tensor)]
    for k in indices:
        rows[k].lies = tensors[k].data_ptr()
    sharers: dict[int, list[int]] = {}
    # Whatever their storages: two of them may be of one memory, as those of two views of a NumPy array are.
    for one, other in neighbours([tensors[k] for k in indices]):
        first, second = indices[one], indices[other]
        if may_share_memory(tensors[first], tensors[second]):
            _check_same(rows[first], rows[second])
            sharers.setdefault(second, []).append(first)
    return sharers


def _check_same(one: Row, other: Row) -> None:
    """Refuses parameters that overlap in part: moments of an element that has two are those of neither."""
    tensors = [local(row.param) for row in (one, other)]
    if not is_same_memory(*tensors):
        first, second = (f"shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype}" for t in tensors)
        raise ValueError(
            f"{one.name} ({first}) and {other.name} ({second}), which starts "
            f"{tensors[1].data_ptr() - tensors[0].data_ptr()} bytes after it, share some of their elements; parameters "
            "must be apart, as disjoint views of one tensor are, or the same"
        )


def _check_apart(rows: Sequence[Row], states: Sequence[dict[str, Tensor]], steps: Sequence[Tensor | None]) -> None:
    """Refuses states, steps and copies that share memory with each other or a parameter: one launch writes them all."""
    members: list[tuple[Row, str, Tensor]] = []  # row, name within it, tensor
    for row, present, step in zip(rows, states, steps, strict=True):
        members.append((row, "", local(row.param)))
        members += ((row, name, local(tensor)) for name, tensor in present.items())
        members += (
            (row, name, local(tensor)) for name, tensor in (("step", step), ("copy_to", row.copy)) if tensor is not None
        )
    if addresses_apart([tensor for *_, tensor in members]) is not None:
        return
    members = [member for member in members if _storage_address(member[2])]
    for first, second in neighbours([tensor for *_, tensor in members]):
        (row, name, tensor), (other_row, other, other_tensor) = members[first], members[second]
        if name == other == "" or (name == other == "step" and is_same_memory(tensor, other_tensor)):
            continue  # parameters are compared by `separate`, and a step that is another's comes to be its own
        if row.is_at_odds_with(other_row) and may_share_memory(tensor, other_tensor):
            one, two = (f"{key} of {r.name}" if key else r.name for key, r in ((name, row), (other, other_row)))
            raise ValueError(f"{one} and {two} share memory: an element would be written twice")


def _storage_address(tensor: Tensor) -> int:
    """Where a tensor's storage starts; 0: it has none."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or is_wrapper(tensor):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):
        return 0  # a subclass without memory, or a parameter without a shape yet: refused once it has a gradient


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


def resolved(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its values: itself, or a copy of one that is sparse or a lazy view."""
    if tensor.is_sparse:
        return tensor.to_dense()
    return tensor.resolve_conj().resolve_neg() if tensor.is_conj() or tensor.is_neg() else tensor


def _stand_in(param: Tensor) -> Tensor | None:
    """What the kernels read in place of a gradient that is sparse, lazy, placed otherwise or in the update's way."""
    grad = param.grad
    if grad is None:
        return None
    values = settled(resolved(grad), param)
    here, there = local(param), local(values)
    same = here.data_ptr() == there.data_ptr() and here.stride() == there.stride() and here.dtype == there.dtype
    if not same and _storage_address(here) == _storage_address(there) and may_share_memory(here, there):
        return values.clone()
    return None if values is grad else values


def _strides(slots: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    return [None if slot is None else slot.stride() for slot in slots]


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return tensor.data_ptr() if tensor.numel() else 1  # kEmptyGradient: a tensor of 0 elements has no address


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, as torch's optimizers take it."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def _state_dtype(rule: Rule, row: Row, group: Group, name: str) -> torch.dtype:
    """What the group asks for; else the parameter's; for SGD torch's first velocity's, which is a decayed gradient."""
    asked = state_dtype_of(group, name)
    if asked is not None and takes_modes(row.param):
        return asked
    if rule.keeps_step or row.param.grad is None:
        return row.param.dtype
    return row.param.grad.dtype
