"""Gives the Triton kernels their own copy of the table's columns, as tensors on its device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .core import Core
from .lasting import StreamUse, is_capturing, refuse_capture
from .phase import LEAF, MEASURES, UPDATES
from .pycore import GRAD, SLOTS
from .reference import REPORT_COLUMNS
from .table import Table

_DTYPES = {
    "address": torch.int64,
    "grads": torch.int64,
    "numel": torch.int64,
    "group": torch.int32,
    "storage": torch.int64,
    "layout": torch.int32,
    "layouts": torch.int64,
    "first_leaf": torch.int64,
    "part_leaf": torch.int64,
    "chunks": torch.int32,
    "group_values": torch.float64,
    "group_flags": torch.int32,
    "group_max_norms": torch.float64,
    "group_tensors": torch.int64,
    "group_storages": torch.int32,
}
_SHAPES = {
    "address": (SLOTS, -1),
    "chunks": (-1, 2),
    "group_values": (-1, 8),
    "group_tensors": (-1, 8),
    "group_storages": (-1, 8),
}


GROUP_COLUMNS = tuple(name for name in _DTYPES if name.startswith("group_"))
ROW_COLUMNS = ("address", "grads")


class Capture:
    """A step that a CUDA graph captured: the columns that its replays read, and where they say that tensors are."""

    def __init__(self, columns: Any, sent: dict[str, bytes]) -> None:
        """Keeps the columns alive for as long as the launcher lives."""
        self.columns = columns
        self.places = _places(sent)


class Launcher:
    """The columns of one table on its device; what changed is sent again, the rest stays."""

    def __init__(self, device: torch.device) -> None:
        """Starts with nothing."""
        self.device = device
        self.revision = -1
        self.columns: Any = None
        self._sent: dict[str, bytes] = {}
        self._sent_decay: tuple[float, Tensor] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._terms: Tensor | None = None
        self._captures: list[Capture] = []
        self._streams = StreamUse()

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Sends what changed and launches."""
        from .triton_kernels.launch import Columns, launch

        core = table.core
        all_columns = self._all_columns(core, only_step=self.revision == core.revision)
        changed = [name for name, data in all_columns.items() if name in _DTYPES and self._sent.get(name) != data]
        is_captured = is_capturing(self.device)
        if is_captured:
            self._check_capturable(changed)
        for name in changed:
            self._tensors[name] = self._send(name, all_columns[name])
            self._sent[name] = all_columns[name]
        if self.revision != core.revision or self.columns is None:
            self.revision = core.revision
            self._chunk_elements = int(all_columns["chunk_elements"])
            self._tensors.setdefault("arrivals", torch.zeros(1, dtype=torch.int32, device=self.device))
        if changed or self.columns is None:
            self.columns = Columns(
                device=self.device, rows=len(table.rows), chunk_elements=self._chunk_elements, **self._tensors
            )
        if is_captured and all(capture.columns is not self.columns for capture in self._captures):
            self._captures.append(Capture(self.columns, self._sent))
        decay, measured = self._decay(table.ema_decay), self._measured(table)
        self._streams.record(self.device, (*self._tensors.values(), self._terms, decay))
        launch(
            table.rule.stem,
            core.variant,
            self.columns,
            grad_scale=grad_scale,
            found_inf=found_inf,
            phase_flags=table.phase.flags,
            ema_decay=decay,
            sweeps=table.stage != MEASURES,
            **measured,
        )

    @property
    def captures(self) -> int:
        """How many steps CUDA graphs have captured."""
        return len(self._captures)

    def moved_since_captures(self, core: Core) -> list[int]:
        """Rows whose tensors lie where no captured step finds them."""
        if not self._captures:
            return []
        now = _places(self._all_columns(core, only_step=False))
        known = [capture.places == now for capture in self._captures if capture.places.shape == now.shape]
        if not known:
            return list(range(now.shape[1]))
        return [row for row in range(now.shape[1]) if not any(bool(same[:, row].all()) for same in known)]

    def update_captures(self, core: Core) -> None:
        """Writes the groups' hyperparameters of now where captured steps read them."""
        columns = self._all_columns(core, only_step=True)
        for name in GROUP_COLUMNS if self._captures else ():
            values = self._send(name, columns[name])
            for capture in self._captures:
                getattr(capture.columns, name).copy_(values, non_blocking=True)
            # Other launches read a tensor of their own: what captures read is no longer what was sent to them.
            self._tensors[name], self._sent[name] = values, columns[name]
            self.columns = replace(self.columns, **{name: values})
        self._streams.record(self.device, self._tensors.values())

    def _all_columns(self, core: Core, *, only_step: bool) -> dict[str, Any]:
        from .triton_kernels.launch import resident_programs

        return core.columns(resident_programs(core.variant, self.device), only_step)

    @staticmethod
    def _check_capturable(changed: list[str]) -> None:
        """Refuses to capture a copy from memory of the host, which would be read again at every replay."""
        if changed:
            raise RuntimeError(
                f"backend 'triton' can capture only a step whose tables are on the device, and {', '.join(changed)} "
                "would have to be sent: before the capture take a step with the same gradients, in the same memory "
                "(zero_grad(set_to_none=False)), states and hyperparameters; backend='cuda' wants one of the same "
                "parameters and states"
            )

    def _measured(self, table: Table) -> dict[str, Any]:
        """What the norm and the report need; nothing where there is neither."""
        phase = table.phase
        if not phase.reads_twice and not phase.report:
            return {}
        found: dict[str, Any] = {}
        if phase.reads_twice:
            assert table.lasting.joined is not None  # a table whose norm is wanted has room for it
            read = table.lasting.joined if table.stage == MEASURES else table.lasting.joined[: table.norms]
            sums = None if table.stage == UPDATES else table.lasting.leaf_sums
            found |= {"leaf_sums": sums, "joined": read, "results": table.results}
        if phase.report:
            found |= {"report": table.partials, "report_terms": self._room_for_terms(table)}
        return found

    def _room_for_terms(self, table: Table) -> Tensor:
        from .triton_kernels.launch import resident_programs

        programs = resident_programs(table.core.variant, self.device)
        if self._terms is None or self._terms.shape[0] < programs:
            refuse_capture(self.device)
            table.lasting.keep(self._terms)
            self._terms = torch.empty(programs, REPORT_COLUMNS, LEAF, dtype=torch.float64, device=self.device)
        return self._terms

    def _decay(self, decay: float | Tensor | None) -> Tensor | None:
        """The decay of averages, on the device."""
        if decay is None or isinstance(decay, Tensor):
            return decay
        if self._sent_decay is None or self._sent_decay[0] != decay:
            refuse_capture(self.device)
            self._sent_decay = decay, torch.tensor(decay, dtype=torch.float64, device=self.device)
        return self._sent_decay[1]

    def _send(self, name: str, data: bytes) -> Tensor:
        dtype = _DTYPES[name]
        column = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
        column = column.reshape(_SHAPES.get(name, (-1,))) if column.numel() else column
        if self.device.type == "cpu":
            return column
        return column.pin_memory().to(self.device, non_blocking=True)


def _places(columns: dict[str, bytes]) -> Tensor:
    """Where every row's tensors are: a column of addresses for each row."""
    address, grads = (torch.frombuffer(bytearray(columns[name]), dtype=torch.int64) for name in ROW_COLUMNS)
    return torch.cat((address.view(SLOTS, -1)[[slot for slot in range(SLOTS) if slot != GRAD]], grads.view(1, -1)))


def launch(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """One step of every tensor of a table that has a gradient, by the Triton kernels."""
    if table.lasting.launcher is None:
        table.lasting.launcher = Launcher(table.device)
    table.lasting.launcher.launch(table, grad_scale, found_inf)
