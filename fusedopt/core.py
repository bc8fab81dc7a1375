"""The compiled module, or why there is none; and the storages and slots that both sides agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .build_record import why_no_extension
from .rules import Rule
from .storages import STORAGES as STORAGES

compiled: ModuleType | None = None
why_not_compiled = ""
try:
    compiled = import_module("fusedopt._C")
except ImportError as error:
    why_not_compiled = why_no_extension(error)

# DLPack's (code, bits) of what a tensor may be, for torch without the exchange table.
_DLPACK = {
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
    torch.float16: (2, 16),
    torch.float64: (2, 64),
    torch.complex64: (5, 64),
    torch.complex128: (5, 128),
    torch.complex32: (5, 32),
}
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}


class Core(Protocol):
    """The table as a backend sees it: ``fusedopt._C.Table``, or its Python twin, ``fusedopt.pycore``."""

    @property
    def revision(self) -> int:
        """Changes with anything but gradients and groups."""

    @property
    def rows(self) -> int:
        """How many there are."""

    @property
    def leaves(self) -> int:
        """How many leaves all rows have."""

    @property
    def variant(self) -> str:
        """Name of the smallest variant that covers all rows."""

    def watch_state(self, row: int, state: dict[str, Any], entries: dict[str, Any]) -> None:
        """From now on ``refresh`` reports the row when ``state`` no longer holds these very objects."""

    def set_phase(
        self,
        flags: int,
        stage: int,
        ema_decay: float,
        ema_decay_tensor: int,
        norms: int,
        max_norms: list[float],
        leaf_sums: int,
        joined: int,
        results: int,
        report: int,
    ) -> None:
        """What else a launch does: the fields of ``Phase`` in csrc/phase.h, and what each group is clipped to."""

    def hold_nothing(self) -> None:
        """Keeps ``refresh`` from having torch's C++ side count a reference to every parameter: ``fusedopt.holds``."""

    def states_in_place(self) -> bool:
        """Whether the watched states, and copies, lie where they lay when their watch began.

        Of those that only Python can be asked of, some at a time.
        """

    def state_in_place(self, row: int) -> bool:
        """The same of one row."""

    def set_row(
        self,
        row: int,
        addresses: list[int],
        storages: list[int],
        mode: int,
        numel: int,
        group: int,
        layout: list[int],
        param: Tensor,
        grad: Tensor | None,
        unwrap: bool,
        copy: Tensor | None,
        keep: list[Tensor],
    ) -> None:
        """Describes one tensor and starts watching its parameter, gradient and copy."""

    def plain_rows(self, rows: list[int]) -> tuple[list[int], bool]:
        """Of these rows those that ``begin_rows`` can describe, of new parameters that need no closer look.

        Also whether their parameters and gradients are known to share no memory.
        """

    def counted_rows(self, rows: Sequence[int]) -> list[int]:
        """Of these rows those whose steps are counted: that have states, or all where the rule always counts."""

    def begin_rows(
        self,
        rows: Sequence[int],
        steps: Tensor | bytearray,
        steps_in_state: Sequence[Tensor],
        mode: int,
        empty_like: Callable[[Tensor], Tensor],
        leaves_fresh: bool,
    ) -> None:
        """Makes the states of such rows, and describes them. ``steps`` has a count for each of ``counted_rows``.

        With ``leaves_fresh`` large ones on the host are left to the ``launch_cpu`` that follows, or to ``settle``, to
        clear.
        """

    def settle(self) -> None:
        """Clears the states that ``begin_rows`` has left to a launch."""

    def described(self, row: int) -> tuple[int, int, Tensor, int, int, dict[str, Any]]:
        """A row's group, its place in that, its parameter, and what the row was described with.

        Where the parameter lay, how many elements it had, and what its state is watched to hold.
        """

    def read_groups(self, groups: list[dict[str, Any]]) -> list[int] | int | None:
        """Reads hyperparameters again: groups whose needs changed, None, or -1: parameters or watched keys changed."""

    def refresh(self) -> list[int] | None:
        """Reads gradients again: rows that are no longer what the table says, or None."""

    def gradients_moved(self) -> bool:
        """Whether a refresh has found a gradient elsewhere since the last call."""

    def gradients_apart(self) -> bool:
        """Whether the gradients, as of the last refresh, are known to share no memory."""

    def params(self) -> list[Tensor]:
        """The parameters of all rows: the same list at every call."""

    def live_params(self) -> list[Tensor]:
        """Parameters that have a gradient."""

    def bump_versions(self, of_gradients: bool) -> list[Tensor]:
        """Tells autograd that the live parameters, or else their gradients, are written.

        Returns:
            The parameters of which the caller has to say so.
        """

    def columns(self, workers: int, only_step: bool) -> dict[str, Any]:
        """The columns as bytes."""


def make_core(
    rule: Rule,
    device: torch.device,
    places: list[tuple[int, int, Tensor]],
    group_sizes: list[int],
    states: dict[Tensor, dict[str, Any]],
    first_rows: Sequence[int],
    watched: tuple[str, ...],
) -> Core:
    """A table for one device: the compiled one where it exists. Its rows are blank until they are described.

    Args:
        rule: names hyperparameters, flags and states.
        device: where the table's tensors are.
        places: group, position in that group's list, and parameter of each row.
        group_sizes: parameters of each group, over all devices.
        states: the optimizer's ``state``: ``refresh`` reports the rows to which it gives another dict.
        first_rows: the first row of each part of the table whose leaves are joined to one number.
        watched: keys of groups that ``read_groups`` reports with -1 where one holds another object than before.
    """
    if compiled is None:
        from .pycore import PyTable

        return PyTable(rule, device, places, group_sizes, states, first_rows, watched)
    where = (_DEVICE_TYPES.get(device.type, 0), device.index or 0)
    table: Core = compiled.Table(_schema(rule, watched), where, places, group_sizes, states, first_rows)
    return table


def make_plain_core(
    rule: Rule,
    groups: list[dict[str, Any]],
    states: dict[Tensor, dict[str, Any]],
    watched: tuple[str, ...],
) -> tuple[Core, list[int]] | None:
    """A table of all parameters of these groups, and its rows that have a gradient, for ``begin_rows``.

    None where a tensor or a group needs a closer look, as one that has any of the ``watched`` keys does.
    """
    if compiled is None:
        return None
    made: tuple[Core, list[int]] | None = compiled.Table.of_plain(_schema(rule, watched), groups, states)
    return made


def environment(name: str) -> str:
    """An environment variable as it is now, "" where it is not set.

    Read by C: to say that a name is not there, ``os.environ`` takes a tenth of what torch takes to construct an
    optimizer of one tensor and step it.
    """
    return os.environ.get(name, "") if compiled is None else str(compiled.environment(name))


@cache
def _schema(rule: Rule, watched: tuple[str, ...]) -> Any:
    """What the compiled tables know of a rule, made once."""
    assert compiled is not None  # there are compiled tables
    states = [(name, rule.asked_by.get(name, "")) for name in rule.states]
    return compiled.Schema(rule.stem, list(rule.hypers), list(rule.flags), list(watched), states, rule.keeps_step)


def addresses_apart(tensors: list[Tensor]) -> list[int] | None:
    """Where tensors lie that are known to be torch's own, on one device and apart in memory; None: look closer."""
    addresses: list[int] | None = None if compiled is None else compiled.addresses_apart(tensors)
    return addresses


if compiled is not None:
    exchange_table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    compiled.connect(torch.Tensor, torch.nn.Parameter, exchange_table, _DLPACK)
