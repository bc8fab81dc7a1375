"""A model that predicts a step's time from the bytes it has to move, held against what was measured.

    time = launches x launch time + bytes / (bandwidth x efficiency)

Assumptions, each of which a measurement may refute:

* Every slot is read once if it is read and written once if it is written, and nothing else moves: an fp32
  Adam step takes 28 bytes an element (parameter, two states: in and out; gradient: in), SGD with momentum 20.
* Arithmetic is free: even float32 division and square root stay below the time of the loads.
* Caches are cold, so all bytes come from and go to the device's memory. Wrong for repeated steps on less data
  than the last cache holds: those are faster than predicted.
* Bandwidth is the data sheet's; a streaming kernel gets `EFFICIENCY` of it. On a CPU the measured roof of the
  same run stands in for both.
* A launch costs `LAUNCH_S` of device time (start and drain of one grid), whatever the size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from bench.peers.peer import STATES
from bench.workloads import Workload

EFFICIENCY = 0.92
"""Share of the data sheet's bandwidth that large in-place streams reach."""

LAUNCH_S = 3e-6
"""Device time of an empty grid from start to end."""


@dataclass(frozen=True)
class Machine:
    """A GPU's memory: bytes a second by its data sheet, and bytes."""

    name: str
    bandwidth: float
    memory: float


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("T4", 0.320e12, 16e9),
        Machine("RTX 4090", 1.008e12, 24e9),
        Machine("L40S", 0.864e12, 48e9),
        Machine("A100 SXM 40GB", 1.555e12, 40e9),
        Machine("A100 SXM 80GB", 2.039e12, 80e9),
        Machine("H100 PCIe", 2.039e12, 80e9),
        Machine("H100 SXM", 3.352e12, 80e9),
        Machine("H200", 4.8e12, 141e9),
        Machine("B200", 8.0e12, 192e9),
        Machine("MI300X", 5.3e12, 192e9),
    )
}
"""Data-sheet figures of the manufacturers."""

DEVICE_NAMES = {
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L40S": "L40S",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80GB",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "AMD Instinct MI300X": "MI300X",
}
"""What the driver calls them."""

FUSED = ("fusedopt-cpu", "fusedopt-cuda", "fusedopt-triton")
"""Peers the model is about."""


def streams(optimizer: str) -> int:
    """How often a step moves an element's bytes: gradient in, parameter and each state in and out."""
    return 3 + 2 * STATES[optimizer]


def bytes_per_step(workload: Workload, optimizer: str, default_dtype: str) -> int:
    """Bytes an ideal step moves, with state in each parameter's dtype."""
    return sum(
        count * prod(shape) * group.torch_dtype(default_dtype).itemsize * streams(optimizer)
        for group in workload.groups
        for count, shape in group.runs
    )


def predict(bytes_moved: float, bandwidth: float, efficiency: float = EFFICIENCY, launches: int = 1) -> float:
    """Predicted seconds of a step on cold caches.

    Args:
        bytes_moved: Bytes in and out.
        bandwidth: Bytes a second.
        efficiency: Share of the bandwidth that can be had.
        launches: Launches of the step.

    Raises:
        ValueError: bandwidth or efficiency is not positive.
    """
    if bandwidth <= 0 or efficiency <= 0:
        raise ValueError(f"bandwidth and efficiency must be positive, got {bandwidth} and {efficiency}")
    return launches * LAUNCH_S + bytes_moved / (bandwidth * efficiency)


def fits(workload: Workload, optimizer: str, dtype: str, machine: Machine) -> bool:
    """Whether parameter, gradient and state fit the machine's memory."""
    return workload.bytes_of(dtype) * (2 + STATES[optimizer]) <= machine.memory


@dataclass(frozen=True)
class Held:
    """A prediction held against a measurement, both in seconds."""

    record: dict[str, Any]
    predicted: float
    measured: float
    basis: str


def hold_against(records: Iterable[dict[str, Any]]) -> list[Held]:
    """Predictions for every timed result of fusedopt's fused backends.

    On a GPU whose data sheet is known the model stands alone; elsewhere the bandwidth is the run's own roof.
    """
    held = []
    for record in records:
        if record["status"] != "ok" or record["peer"] not in FUSED or record["gradients"] == "first":
            continue
        machine = MACHINES.get(DEVICE_NAMES.get(record["machine"].get("gpu") or "", ""))
        roof = record.get("roof_bytes_per_s")
        if record["device"] == "cuda" and machine:
            predicted, basis = (
                predict(record["bytes_moved"], machine.bandwidth),
                f"data sheet of {machine.name}",
            )
        elif roof:
            launches = 1 if record["device"] == "cuda" else 0
            predicted, basis = predict(record["bytes_moved"], roof, 1.0, launches), "roof of the same run"
        else:
            continue
        held.append(Held(record, predicted, record["seconds"]["median"], basis))
    return held
