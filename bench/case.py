"""A case: one workload under one optimizer, dtype, device, thread count and way of making gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench import workloads
from bench.peers import HYPER, Hyper
from bench.roofline import bytes_per_step
from bench.workloads import Workload

LEARNING_RATES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.05}
"""Large for 16-bit parameters, so that the few steps of the check move them by tens of their ulps.
Times do not depend on it."""


@dataclass(frozen=True)
class Case:
    """What is timed, apart from who does it.

    Attributes:
        workload: Name of a workload.
        optimizer: A key of `HYPER`.
        dtype: Dtype of parameters, gradients and state where the workload leaves it open.
        device: `cpu` or `cuda`.
        threads: torch's CPU threads.
        gradients: One of `timing.GRADIENTS`.
    """

    workload: str
    optimizer: str
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    gradients: str = "kept"

    @property
    def shapes(self) -> Workload:
        """The workload itself."""
        return workloads.load(self.workload)

    @property
    def hyper(self) -> Hyper:
        """The hyperparameters."""
        return HYPER[self.optimizer]

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each group."""
        groups = self.shapes.groups
        return [LEARNING_RATES[group.torch_dtype(self.dtype)] * group.lr_scale for group in groups]

    @property
    def bytes_moved(self) -> int:
        """Bytes an ideal step moves: each slot once each way it is used."""
        return bytes_per_step(self.shapes, self.optimizer, self.dtype)

    def label(self) -> str:
        """A title for tables and bars."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device == "cpu" else ""
        gradients = "first step" if self.gradients == "first" else f"{self.gradients} gradients"
        return f"{self.workload}, {self.optimizer}, {self.dtype}, {gradients}, {self.device}{threads}"
