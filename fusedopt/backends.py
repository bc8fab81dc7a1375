"""The backends: who launches, where it can, and which one serves a device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from . import reference_launch
from .core import compiled, environment, why_not_compiled
from .lasting import is_capturing
from .phase import WHOLE_STEP
from .table import Table

# Best first.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_launches = 0  # of the backends written in Python
_warned: set[str] = set()  # what this process has said already


class Backend(Protocol):
    """One way to run a step."""

    name: str

    def why_not(self, device: torch.device) -> str:
        """Why this backend can not serve a device; empty: it can."""

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of every tensor of a table that has a gradient."""

    def moved_since_captures(self, table: Table) -> list[int]:
        """Rows whose tensors lie where no step that a CUDA graph captured reads or writes them; none was: no rows."""

    def update_captures(self, table: Table) -> None:
        """Gives the table's hyperparameters to the captured steps, on the current stream."""


class _NeverCaptured:
    """What backends have in common whose steps no graph can capture."""

    def moved_since_captures(self, table: Table) -> list[int]:
        """See Backend."""
        return []

    def update_captures(self, table: Table) -> None:
        """See Backend."""


class Cpu(_NeverCaptured):
    """The C++ engine: one team of threads over all tensors."""

    name = "cpu"

    def __init__(self) -> None:
        """Chooses the instruction set once: what FUSEDOPT_CPU_ISA names, else the best for each launch (empty)."""
        sets: list[str] = compiled.instruction_sets() if compiled else []
        wanted = os.environ.get("FUSEDOPT_CPU_ISA")
        self.isa = wanted or ""
        self.fault = ""  # told when an optimizer is to step: the package loads, so that its page can say it too
        if compiled and wanted and wanted not in sets:
            self.fault = f"FUSEDOPT_CPU_ISA is '{wanted}'; this build and processor have {', '.join(sets)}"

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        if compiled is None:
            return f"no compiled extension: {why_not_compiled}"
        return self.fault if device.type == "cpu" else f"it serves the CPU, not {device}"

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        core: Any = table.core
        core.launch_cpu(torch.get_num_threads(), self.isa, _pointer(grad_scale), _pointer(found_inf))


class Cuda:
    """The CUDA kernels, through the driver."""

    name = "cuda"

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        if compiled is None:
            return f"no compiled extension: {why_not_compiled}"
        if device.type != "cuda":
            return f"it serves CUDA devices, not {device}"
        if torch.version.hip:
            return "this torch is built for ROCm"
        return str(compiled.cuda_unavailable(-1 if device.index is None else device.index))

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        assert compiled is not None  # why_not said so
        if table.lasting.launcher is None:
            table.lasting.launcher = compiled.CudaLaunch(table.device.index)
        core: Any = table.core
        stream = torch.cuda.current_stream(table.device).cuda_stream
        arguments = (table.lasting.launcher, stream, _pointer(grad_scale), _pointer(found_inf))
        self._call(table.device, core.launch_cuda, arguments)

    @staticmethod
    def _call(device: torch.device, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Calls again where the first does nothing for want of memory: torch's allocator keeps what nobody uses."""
        assert compiled is not None  # what is called
        try:
            call(*arguments)
            return
        except compiled.OutOfMemory as error:
            if is_capturing(device):  # which forbids to give memory back
                raise torch.OutOfMemoryError(str(error)) from error
        torch.cuda.empty_cache()
        try:
            call(*arguments)
        except compiled.OutOfMemory as error:
            raise torch.OutOfMemoryError(str(error)) from error

    def moved_since_captures(self, table: Table) -> list[int]:
        """See Backend."""
        core: Any = table.core
        if table.lasting.launcher is None or not table.lasting.launcher.captures:
            return []
        moved: list[int] = core.moved_since_captures(table.lasting.launcher)
        return moved

    def update_captures(self, table: Table) -> None:
        """See Backend."""
        core: Any = table.core
        if table.lasting.launcher is None or not table.lasting.launcher.captures:
            return
        stream = torch.cuda.current_stream(table.device).cuda_stream
        self._call(table.device, core.update_captures, (table.lasting.launcher, stream))


class Triton:
    """The Triton kernels: NVIDIA and AMD GPUs, and any device under Triton's interpreter."""

    name = "triton"

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        try:
            from .triton_kernels.launch import why_not
        except ImportError as error:
            return f"triton is not installed ({error}); pip install triton"
        return str(why_not(device))

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        from .triton_launch import launch

        _count_launch()
        if table.phase.reads_twice and table.stage == WHOLE_STEP:
            _count_launch()  # no barrier of all programs: the norm has a launch of its own
        launch(table, grad_scale, found_inf)

    def moved_since_captures(self, table: Table) -> list[int]:
        """See Backend."""
        return [] if table.lasting.launcher is None else table.lasting.launcher.moved_since_captures(table.core)

    def update_captures(self, table: Table) -> None:
        """See Backend."""
        if table.lasting.launcher is not None:
            table.lasting.launcher.update_captures(table.core)


class Reference(_NeverCaptured):
    """Plain torch, tensor by tensor: fusedopt.reference."""

    name = "reference"

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        return ""

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        _count_launch()
        reference_launch.launch(table, grad_scale, found_inf)


class Emulated(_NeverCaptured):
    """The CUDA kernels compiled for the host, on CPU tensors: for tests, never chosen by itself."""

    name = "emulated"
    blocks = 3
    threads = 64
    seed = 0
    inline_columns = True

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        if compiled is not None and not compiled.emulates():
            return "an installed fusedopt has no emulated kernels: they are for tests, in a checkout"
        return Cpu.why_not(cpu, device)

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        core: Any = table.core
        core.launch_emulated(
            self.blocks, self.threads, self.seed, self.inline_columns, _pointer(grad_scale), _pointer(found_inf)
        )


cpu = Cpu()
_ALL: dict[str, Backend] = {backend.name: backend for backend in (cpu, Cuda(), Triton(), Reference(), Emulated())}


def find_backend(name: str | None) -> Backend | None:
    """The backend of a name, or of FUSEDOPT_BACKEND, or None: choose for each device.

    Raises:
        ValueError: there is none of that name.
    """
    asked = (environment("FUSEDOPT_BACKEND") or None) if name is None else name
    if asked is None:
        return None
    if not isinstance(asked, str) or asked not in _ALL:
        source = " (named by FUSEDOPT_BACKEND)" if name is None else ""
        raise ValueError(f"backend {asked!r} is unknown{source}; there are {', '.join(_ALL)}")
    return _ALL[asked]


def choose_backend(name: str | None, device: torch.device) -> Backend:
    """The backend that serves a device: the one asked for, or the best that can.

    Raises:
        RuntimeError: the one asked for can not serve the device.
    """
    asked = find_backend(name)
    if asked is not None:
        reason = asked.why_not(device)
        if reason:
            raise RuntimeError(f"backend '{asked.name}' can not serve {device}: {reason}")
        return asked
    best, reasons = best_backend(device)
    if reasons:
        _warn_once(f"fusedopt uses '{best.name}' on {device.type}: {'; '.join(reasons)}")
    return best


def best_backend(device: torch.device) -> tuple[Backend, list[str]]:
    """The first of a device's backends that can serve it, and why those before it can not.

    Raises:
        ValueError: FUSEDOPT_CPU_ISA names an instruction set that is not here.
    """
    kind = device.type
    if cpu.fault and kind == "cpu":
        raise ValueError(cpu.fault)
    reasons = [] if kind in PREFERENCE else ["there are no kernels for it"]
    for name in PREFERENCE.get(kind, ("reference",)):
        reason = _ALL[name].why_not(device)
        if not reason:
            return _ALL[name], reasons
        reasons.append(f"'{name}' can not serve it: {reason}")
    raise RuntimeError(f"no backend serves {device}: {'; '.join(reasons)}")


class Waiting:
    """Stands for a backend that nothing has needed yet: frozen parameters may lie where no backend serves."""

    name = "waiting"

    def __init__(self, requested: str | None, device: torch.device) -> None:
        """Takes what ``choose_backend`` takes."""
        self._requested = requested
        self._device = device
        self._chosen: Backend | None = None

    def why_not(self, device: torch.device) -> str:
        """See Backend."""
        return ""

    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        self._choose().launch(table, grad_scale, found_inf)

    def moved_since_captures(self, table: Table) -> list[int]:
        """See Backend."""
        return self._choose().moved_since_captures(table) if table.lasting.launcher is not None else []

    def update_captures(self, table: Table) -> None:
        """See Backend."""
        if table.lasting.launcher is not None:
            self._choose().update_captures(table)

    def _choose(self) -> Backend:
        if self._chosen is None:
            self._chosen = choose_backend(self._requested, self._device)
        return self._chosen


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """Names of the backends that can serve a device, best first.

    Example:
        >>> "reference" in available_backends("cpu")
        True
    """
    return [name for name, reason in why_not(torch.device(device)).items() if not reason]


def why_not(device: torch.device) -> dict[str, str]:
    """For every backend, best first, why it can not serve a device; empty: it can."""
    return {name: backend.why_not(device) for name, backend in _ALL.items()}


def launch_count() -> int:
    """How many launches this process has made, on all devices and backends."""
    return _launches + (int(compiled.launch_count()) if compiled else 0)


def _warn_once(message: str) -> None:
    """One warning for a reason, however many optimizers and tables meet it."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


def _count_launch() -> None:
    global _launches
    _launches += 1


def _pointer(scalar: Tensor | None) -> int:
    return 0 if scalar is None else scalar.data_ptr()
