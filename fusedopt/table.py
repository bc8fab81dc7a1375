"""Builds the tensor table of one device and keeps it true: rows, states, storages, layouts.

A row is made when its parameter first has a gradient, and again when something about its tensors changed;
in between, the compiled table only reads gradients again. All checks happen here, before anything is written.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import holds
from .apart import sharers
from .check import (
    check_flags,
    check_gradient,
    check_groups,
    check_hyperparameters,
    check_parameter,
)
from .core import Core, make_core, make_plain_core
from .gradients import check_gradients_apart, stand_in
from .hidden_steps import Counts, HiddenSteps
from .lasting import Lasting, refuse_capture
from .layout import strided_layout
from .phase import EMA, LEAF, LEAVES_OF_GROUP, MOST_LEAVES, NOTHING, WHOLE_STEP, Phase, check_cleared, check_copy
from .precision import (
    DEFAULT_BLOCK,
    ROUNDING_KEY,
    check_no_double,
    has_modes,
    kept_storage,
    master_key,
    rounds_at_random,
    row_mode,
    scale_key,
    state_dtype_of,
)
from .reference import PARAM_SQUARES, REPORT_COLUMNS
from .rows import Row, part_of
from .rules import Rule
from .sharded import Spread, is_sharded, local, places_of
from .states import States

PLAIN_MODE = DEFAULT_BLOCK.bit_length() - 1  # precision.row_mode of a group without modes
ELEMENT_SLOTS = 8  # parameter, gradient, three states, master, ema, copy: csrc/table.h
STATES_AT, STATE_SLOTS, PLACE_SLOTS = 2, 3, 3
UNWRITTEN = -1.0  # in a column of squares: no launch has written there


@dataclass(eq=False, slots=True)
class Begun:
    """Rows whose states were just made: their indices, of which the stepped ones have a count each in ``counts``.

    None: the counts are in the state.
    """

    rows: Sequence[int]
    stepped: Sequence[int]
    counts: Counts | None


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
    reported: Sequence[Tensor] = ()  # the parameters of the last launch that was to report
    finds_faults = False  # whether the last launch looked at all gradients itself
    ema_decay: float | Tensor | None = None  # as the next launch reads it
    parts: Sequence[int] = (0,)  # the first row of each
    _kept: Tensor | None = None  # the report of the last step taken by other parameters than `reported`
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

    def begin(self, *, leaves_fresh: bool = False) -> None:
        """Makes every row of a new table: nothing is known of what any of them was.

        Args:
            leaves_fresh: whether a launch on the CPU follows, which may clear large states that are new.

        Raises:
            RuntimeError: a CUDA graph captures.
        """
        refuse_capture(self.device)
        if self._rows is None:
            self._begin(self._live, leaves_fresh=leaves_fresh)
            return
        self._states.adopt(
            [row for row in self._rows if self._state.get(row.param)] if self._state else [], self._beside
        )
        self._check_flags(self._read_groups())
        self._remake(self._rows)

    @cached_property
    def _states(self) -> States:
        """What the optimizer's state has for the rows. A table that began plainly asks where rows are made anew."""
        return States(self.rule, self.device, self.groups, self._state, self._hidden_steps, self.phase.states)

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

        Raises:
            RuntimeError: there are new rows to make, and a CUDA graph captures.
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
            self._check_moved()
            return True
        groups, indices = set(changed_groups or ()), set(changed_rows or ())
        rows = [row for row in self.rows if row.index in indices or row.group in groups]
        if any(local(row.param).device != self.device for row in rows):
            return False
        moved = [row for row in rows if row.lies and local(row.param).data_ptr() != row.lies]
        if moved and (self.phase.copy_to is not None or sharers(self.rows)):
            return False  # it was moved onto another parameter, or may have been onto a copy
        if not rows:
            self._check_moved()
            return True
        refuse_capture(self.device)
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

    def note_reported(self, params: Sequence[Tensor]) -> None:
        """Takes note of whom the next launch is to report. It may be skipped: what was reported before is kept.

        Whether a leaf was written since is seen by itself, on the device, so that nothing waits.
        """
        partials = self.partials
        if partials is None or (self.reported and _same(params, self.reported)):
            return
        refuse_capture(self.device)
        if self.reported:
            none = torch.full_like(partials, UNWRITTEN) if self._kept is None else self._kept
            if self._kept is not None and self.device.type == "cuda":  # made on another stream perhaps
                self._kept.record_stream(torch.cuda.current_stream(self.device))
            self._kept = torch.where(_is_written(partials), partials, none)
        partials.fill_(UNWRITTEN)
        self.reported = params

    def forget_report(self) -> None:
        """There is nothing to tell of until the next launch that reports."""
        self.reported, self._kept = (), None

    def last_taken(self) -> Tensor:
        """The columns of csrc/report.h as the last step that was taken left them: a copy, on the CPU.

        UNWRITTEN are leaves of parameters that it did not update. Where none was taken, those of the parameters that
        the last launch was to report are NaN.
        """
        partials, kept = (
            None if columns is None else columns.to("cpu", copy=True) for columns in (self.partials, self._kept)
        )
        reported = set(self.reported)
        if partials is not None and _is_written(partials):
            for row, leaves in self.rows_with_leaves():
                if row.param not in reported:  # a graph's replay has written it
                    partials[:, leaves] = UNWRITTEN
            return partials
        if kept is not None and _is_written(kept):
            return kept
        found = torch.full((REPORT_COLUMNS, self.core.leaves), UNWRITTEN, dtype=torch.float64, device="cpu")
        for row, leaves in self.rows_with_leaves():
            if row.param in reported:
                found[:, leaves] = math.nan
        return found

    def is_told_of(self, row: Row, columns: Tensor) -> bool:
        """Whether these columns, of its leaves, are of a step that updated a row's parameter, or was to."""
        if columns.numel() == 0:
            return any(row.param is param for param in self.reported)
        return bool(columns[PARAM_SQUARES, 0] != UNWRITTEN)

    def rows_with_leaves(self) -> Iterator[tuple[Row, slice]]:
        """Every row, and where its leaves are among those of all."""
        first = 0
        for row in self.rows:
            yield row, slice(first, first + row.leaves)
            first += row.leaves

    @property
    def last_was_skipped(self) -> Tensor | None:
        """Whether the last launch was skipped, where there is a report: 1 or 0, on the device."""
        return None if self.lasting.report is None else self.lasting.report[-1]

    def _make_room(self) -> None:
        """For what the phase writes about every leaf."""
        leaves = self.core.leaves
        if self.phase.reads_twice and leaves > MOST_LEAVES:
            raise ValueError(f"max_grad_norm and skip_nonfinite take up to {MOST_LEAVES * LEAF} elements on a device")
        if self.phase.reads_twice:
            self._have_room("leaf_sums", leaves + leaves // LEAVES_OF_GROUP + len(self.parts))
            self._have_room("joined", len(self.parts))
        if self.phase.report:
            self._have_room("report", REPORT_COLUMNS * leaves + 1)

    def _have_room(self, name: str, size: int) -> None:
        room: Tensor | None = getattr(self.lasting, name)
        if room is None or room.numel() != size:
            refuse_capture(self.device)
            self.lasting.renew(**{name: torch.full((size,), math.nan, dtype=torch.float64, device=self.device)})

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
        state = self._states.found(row)
        if not state and not row.states and row.step is None:
            return True
        if self._states.counts_in_state(row) and state.get("step") is not row.step:
            return False
        if any(state.get(name) is not row.states.get(name) for name in self._states.names(row)):
            return False
        return row.leaves > 0 and self.core.state_in_place(row.index)  # else it was never described

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
            check_gradients_apart(
                [row for row in self._beside if row.param.grad is not None], self._states, clears=self.phase.zero_grads
            )
        if others:
            self._describe(others, strange)
        self._begin(plain)
        if self.reported and leaves != [row.leaves for row in rows]:
            self.forget_report()  # what was kept is by leaves that no longer are these

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
        self._states.adopt(strange, self._beside)
        self._states.create([row for row in rows if row.param.grad is not None])
        for row in rows:
            row.stand_in = stand_in(row.param)
            self._set_row(row)

    def _check_row(self, row: Row, grad: Tensor) -> None:
        """Refuses what does not fit together, by name."""
        check_parameter(row.name, row.param)
        self.phase.check_norm(row.name, row.param)
        check_gradient(row.name, row.param, grad, takes_sparse=self.rule.takes_sparse)
        self._states.check_found(row)
        if row.copy is not None:
            check_copy(row.name, row.param, row.copy)
        self._states.check_first_velocity(row)
        group, state = self.groups[row.group], self._states.found(row)
        if has_modes(group):
            kept = [name for name in self.rule.states if state_dtype_of(group, name) is None]
            wanted = {name: state.get(name) for name in (*kept, *self.phase.states)}
            check_no_double(self.rule, row.name, row.param, group, {"gradient": grad, "copy_to": row.copy, **wanted})

    def _plain_rows(self, rows: list[Row]) -> tuple[list[int], bool]:
        """Those that are new and of tensors that need no closer look, almost all of a first step; if they are apart."""
        if not self.phase.leaves_rows_plain:
            return [], False
        modes = [has_modes(group) for group in self.groups]
        return self.core.plain_rows(
            [row.index for row in rows if row.count is None and not row.states and not modes[row.group]]
        )

    def _begin(self, plain: Sequence[int], *, leaves_fresh: bool = False) -> None:
        """States of zeros for plain rows, and their description, in one call."""
        if not plain:
            return
        stepped = self.core.counted_rows(plain)
        counts = None
        steps: Tensor | bytearray = bytearray()
        in_state: Sequence[Tensor] = ()
        if self.rule.keeps_step:
            steps = torch.zeros(len(stepped), device=self.device, dtype=torch.float32)
            in_state = steps.unbind()
        elif stepped:
            counts = Counts(len(stepped), self.device)
            steps = counts.memory
            params = self.core.params()
            # Known before there are states, so that those of a call that fails count as new.
            self._hidden_steps.begin(
                params if len(stepped) == len(params) else [params[row] for row in stepped], counts
            )
        self.core.begin_rows(plain, steps, in_state, PLAIN_MODE, torch.empty_like, leaves_fresh)
        self._begun = Begun(plain, stepped, counts)
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
        if begun.counts is not None:
            for place, index in enumerate(begun.stepped):
                rows[index].count = (begun.counts.tensor, place)
        self._begun = None

    def _check_moved(self) -> None:
        """Refuses to clear gradients, where rows stay as they are, that have come to share memory."""
        if self.phase.zero_grads and self.core.gradients_moved():
            are_all_here = len(self._beside) == self.core.rows  # else some are in another table
            if not (are_all_here and self.core.gradients_apart()):
                self._check_cleared([])

    def _check_cleared(self, rows: list[Row]) -> None:
        check_cleared([(row.name, row.param.grad) for row in self._beside if row.param.grad is not None])
        for row in rows:
            if stand_in(row.param) is not None:
                raise ValueError(f"zero_grads: gradient of {row.name} is not what the kernels read: it lies otherwise")

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
            entries: dict[str, Any] = {name: row.states.get(name) for name in self._states.names(row)}
            if rounds_at_random(row.param, self.groups[row.group]):
                entries[ROUNDING_KEY] = state.get(ROUNDING_KEY)  # the row holds its bits
            if self._states.counts_in_state(row):
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


def _strides(slots: Sequence[Tensor | None]) -> list[tuple[int, ...] | None]:
    return [None if slot is None else slot.stride() for slot in slots]


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    return tensor.data_ptr() if tensor.numel() else 1  # kEmptyGradient: a tensor of 0 elements has no address


def real_view(tensor: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, as torch's optimizers take it."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def _is_written(columns: Tensor) -> Tensor:
    """Whether a launch has written any of these columns."""
    return (columns[PARAM_SQUARES] != UNWRITTEN).any()


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether these are the same tensors."""
    return one is other or (len(one) == len(other) and all(map(is_, one, other)))
