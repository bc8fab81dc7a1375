"""The compiled module, or why there is none; and the storages and slots that both sides agree on."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .rules import Rule

compiled: ModuleType | None
try:
    from . import _C as compiled
except ImportError as error:
    compiled = None
    why_not_compiled = str(error)
else:
    why_not_compiled = ""

# enum Storage in csrc/storage/storage.h
STORAGES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}

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
    """The table as a backend sees it: ``fusedopt._C.Table``, or its Python twin where nothing was compiled."""

    revision: int
    variant: str

    def resize(self, rows: int, group_sizes: list[int]) -> None:
        """Forgets everything and makes room."""

    def set_row(
        self,
        row: int,
        addresses: list[int],
        storages: list[int],
        numel: int,
        group: int,
        layout: list[int],
        param: Tensor,
        grad: Tensor | None,
        unwrap: bool,
        keep: list[Tensor],
    ) -> None:
        """Describes one tensor and starts watching its parameter and gradient."""

    def read_groups(self, groups: list[dict[str, Any]]) -> list[int] | int | None:
        """Reads hyperparameters again: groups whose needs changed, None, or -1 where parameters came or went."""

    def refresh(self) -> list[int] | None:
        """Reads gradients again: rows that are no longer what the table says, or None."""

    def live_params(self) -> list[Tensor]:
        """Parameters that have a gradient."""

    def columns(self, workers: int, only_step: bool) -> dict[str, Any]:
        """The columns as bytes."""


def make_core(rule: Rule, device: torch.device) -> Core:
    """A table for one device: the compiled one where it exists."""
    if compiled is None:
        from .pycore import PyTable

        return PyTable(rule)
    index = device.index or 0
    table: Core = compiled.Table(
        rule.stem, list(rule.hypers), list(rule.flags), (_DEVICE_TYPES.get(device.type, 0), index)
    )
    return table


if compiled is not None:
    compiled.connect(torch.Tensor, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), _DLPACK)
