"""How much memory there is, what a case needs, and how much more a step takes at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.peers import STATES

TEMPORARIES = 3
"""Copies of the parameters that torch's foreach holds at its peak, the most of any peer."""

STATE_BYTES = 4
"""Bytes an element of state takes at most: some peers keep float32 state whatever the parameter's dtype."""


def available_bytes(device: str) -> int:
    """Free memory of a device; on Linux the kernel's own estimate for the CPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def contender_bytes(case: Case) -> int:
    """Parameters and state of one contender, at most."""
    workload = case.shapes
    element = max(STATE_BYTES, max(group.torch_dtype(case.dtype).itemsize for group in workload.groups))
    return workload.bytes_of(case.dtype) + STATES[case.optimizer] * element * workload.elements


def shared_bytes(case: Case, roof_bytes: int) -> int:
    """Gradients (twice where they are made anew), temporaries of a step, and the roofs' buffers."""
    copies = TEMPORARIES + (2 if case.gradients == "fresh" else 1)
    return copies * case.shapes.bytes_of(case.dtype) + roof_bytes


def residency(case: Case, contenders: int, roof_bytes: int, available: int) -> bool | None:
    """Whether all contenders may stay in memory (True), one at a time (False), or not even that (None)."""
    shared, each = shared_bytes(case, roof_bytes), contender_bytes(case)
    if shared + contenders * each <= 0.8 * available:
        return True
    return False if shared + each <= 0.9 * available else None


def require(needed: int, device: str) -> None:
    """Refuses what does not fit, before anything is allocated.

    Raises:
        ValueError: a device has not so many bytes free.
    """
    available = available_bytes(device)
    if needed > 0.9 * available:
        raise ValueError(f"needs {needed / 2**30:.1f} GiB of memory on {device}, {available / 2**30:.1f} are free")


def state_bytes(optimizer: Any) -> int | None:
    """Bytes of all state tensors, each once, or None where the optimizer keeps no `state` mapping."""
    state = getattr(optimizer, "state", None)
    if state is None or not hasattr(state, "values"):
        return None
    tensors = [
        t for entry in state.values() if isinstance(entry, dict) for t in entry.values() if isinstance(t, Tensor)
    ]
    parts = {part for tensor in tensors for part in _parts(tensor)}
    return sum(nbytes for _, nbytes in parts)


def _parts(tensor: Tensor) -> list[tuple[int, int]]:
    """Address and bytes of what a tensor consists of: a subclass may keep other dtypes than the one it shows."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    return [(tensor.data_ptr(), tensor.nbytes)]


def peak_bytes(step: Callable[[], None], device: str) -> int | None:
    """Memory one step takes at its peak on top of what was allocated before; None where it cannot be read."""
    return _cuda_peak(step) if device == "cuda" else _cpu_peak(step)


def _cuda_peak(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(step: Callable[[], None]) -> int | None:
    """By the kernel's high-water mark of resident memory, reset first; see proc(5), `clear_refs`."""
    try:
        _give_back_freed()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def _give_back_freed() -> None:
    """Freed memory that malloc still holds would hide what a step takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
