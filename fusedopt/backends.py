"""The backends: who launches, where it can, and which one serves a device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from . import blocks, exact, reference
from .core import compiled, environment, why_not_compiled
from .phase import EMA, MEASURES, UPDATES, WHOLE_STEP
from .precision import ROUNDING_KEY, coded_states, master_key, recoded, rounds_at_random, scale_key, widened
from .rows import Row
from .sharded import all_places, local
from .table import Table, real_view

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
        try:
            core.launch_cuda(*arguments)
        except compiled.OutOfMemory as error:
            with torch.cuda.device(table.device):
                if torch.cuda.is_current_stream_capturing():  # which forbids to give memory back
                    raise torch.OutOfMemoryError(str(error)) from error
            self._launch_again(core, arguments)

    def _launch_again(self, core: Any, arguments: tuple[Any, ...]) -> None:
        """After nothing was launched for want of memory: torch's allocator keeps what nobody uses from the driver."""
        assert compiled is not None  # a launch failed
        torch.cuda.empty_cache()
        try:
            core.launch_cuda(*arguments)
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
        if table.lasting.launcher is not None and table.lasting.launcher.captures:
            core.update_captures(table.lasting.launcher, torch.cuda.current_stream(table.device).cuda_stream)


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

    @torch.no_grad()
    def launch(self, table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """See Backend."""
        _count_launch()
        if found_inf is not None and float(found_inf) != 0.0:
            _skip(table)
            return
        scale = None if grad_scale is None else float(grad_scale)
        if table.phase.reads_twice and table.stage != UPDATES:
            _measure(table, scale)
        if table.stage == MEASURES:
            return
        norms = _write_norms(table) if table.phase.reads_twice else []
        if any(map(table.phase.refuses, norms)):
            _skip(table)
            return
        for row in table.live_rows():
            group = table.groups[row.group]
            step = 1 if row.step is None else int(row.step) + 1
            states = {name: row.states[name] for name in table.rule.states_of(group)}
            grad = row.gradient
            assert grad is not None  # a live row has one
            grad = local(grad)
            tensors = {name: local(tensor) for name, tensor in {"param": row.param, **states}.items()}
            dtype = _row_dtype(table, row)
            values = {name: real_view(tensor).to(dtype) for name, tensor in tensors.items()}
            coded = coded_states(table.rule, row.param, group)
            values |= {name: local(widened(row.states, name, group)) for name in coded}
            key = master_key(row.param, group)
            if key is not None:
                values["param"] = exact.join(tensors["param"], key, local(row.states[key]))
            g, rest = real_view(grad).to(dtype), scale
            if table.phase.max_grad_norm is not None:
                norm = norms[row.group if table.phase.norm_by_group else 0]
                coefficient = reference.clip_coefficient(norm, table.phase.max_norm_of(group))
                g, rest = reference.clipped(g, coefficient, scale), None
            before = values.pop("param").clone()  # what is computed in may be the parameter itself
            updates = table.rule.update(before, g, values, step, group, rest)
            exact_param = updates["param"]
            if key is not None:
                _keep_exact(tensors["param"], key, local(row.states[key]), updates)
            if rounds_at_random(row.param, group):
                _round_at_random(table, row, step, updates)
            for name in coded:
                _keep_codes(table, row, name, step, updates)
            for name, update in updates.items():
                if name in tensors and update is not None:
                    real_view(tensors[name]).copy_(update)
            if table.phase.report:
                after = exact_param if key is not None else real_view(tensors["param"]).to(dtype)
                unscaled = reference.clipped(real_view(grad).to(dtype), None, scale)
                _write_report(table, row, unscaled, updates["update"], before, after)
            if table.phase.flags:
                _write_sides(table, row, step, dtype)
            if row.step is not None:
                row.step.add_(1)
        _mark_report(table, skipped=False)


def _row_dtype(table: Table, row: Row) -> torch.dtype:
    """What the kernels compute a row in: any of its tensors decides."""
    states = [row.states[name] for name in (*table.rule.states_of(table.groups[row.group]), *table.phase.states)]
    tensors = [row.param, row.gradient, row.copy, *states]
    return compute_dtype([local(tensor) for tensor in tensors if tensor is not None])


def _mark_report(table: Table, *, skipped: bool) -> None:
    if table.phase.report and table.last_was_skipped is not None:
        table.last_was_skipped.fill_(float(skipped))


def _skip(table: Table) -> None:
    """What a skipped step does: nothing, or it clears the gradients."""
    _mark_report(table, skipped=True)
    for row in table.live_rows() if table.phase.zero_grads else ():
        if row.param.grad is not None:
            local(row.param.grad).zero_()


def _measure(table: Table, scale: float | None) -> None:
    """Writes down what the gradients of each part of a table come to."""
    sums = []
    for row in table.rows:
        grad = None if row.param.grad is None else row.gradient
        if grad is None:
            sums.append(torch.zeros(row.leaves, dtype=torch.float64, device="cpu"))
            continue
        flat = _flat(row, real_view(local(grad)))
        flat = reference.clipped(flat.to(_row_dtype(table, row)), None, scale)
        sums.append(reference.leaf_sums(flat, largest=table.phase.is_largest).cpu())
    bounds = [*table.parts, len(sums)]
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    joined = [
        reference.joined_leaves(torch.cat(sums[first:last] or [nothing]), largest=table.phase.is_largest)
        for first, last in pairwise(bounds)
    ]
    assert table.lasting.leaf_sums is not None  # a table whose norm is wanted has room for it
    assert table.lasting.joined is not None
    table.lasting.leaf_sums[: table.core.leaves].copy_(torch.cat(sums))
    table.lasting.joined.copy_(torch.stack(joined))


def _write_norms(table: Table) -> list[float]:
    """The norms that a step goes by; written down, and the step counted where it is to be skipped."""
    assert table.lasting.joined is not None  # as above
    assert table.results is not None
    joined = table.lasting.joined[: table.norms].tolist()
    norms = [reference.norm_of(one, largest=table.phase.is_largest) for one in joined]
    table.results[1:] = torch.tensor(norms, dtype=torch.float64, device="cpu")
    table.results[0] += float(any(map(table.phase.refuses, norms)))
    return norms


def _flat(row: Row, values: Tensor) -> Tensor:
    """Values of a row's shape in the order in which its leaves are counted."""
    if not row.is_dense:
        return values.reshape(-1)
    like = torch.empty_like(real_view(local(row.param)), dtype=values.dtype)
    return like.copy_(values).as_strided((values.numel(),), (1,))


def _write_report(
    table: Table, row: Row, grad: Tensor, update: Tensor | None, before: Tensor, after: Tensor | None
) -> None:
    """The columns of csrc/report.h for one row, after its update."""
    assert update is not None  # every rule gives it
    assert table.partials is not None  # a table that reports has room for it
    param = real_view(local(row.param)).to(before.dtype)
    flat = (_flat(row, values) for values in (grad, param, update))
    found = reference.leaf_report(*flat, lost=_flat(row, (before == after) & (update != 0)))
    first = sum(other.leaves for other in table.rows[: row.index])
    table.partials[:, first : first + row.leaves] = found


def _write_sides(table: Table, row: Row, step: int, dtype: torch.dtype) -> None:
    """Average, copy and cleared gradient of one row, after its update."""
    param = real_view(local(row.param))
    if EMA in table.phase.states:
        ema = real_view(local(row.states[EMA]))
        assert table.ema_decay is not None  # where averages are kept
        decay = reference.decay_at(float(table.ema_decay), step, warms_up=table.phase.ema_warmup)
        ema.copy_(reference.average(ema.to(dtype), param.to(dtype), step=step, decay=decay))
    if row.copy is not None:
        real_view(local(row.copy)).copy_(param.to(dtype))
    if table.phase.zero_grads and row.gradient is not None:
        local(row.gradient).zero_()


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


def _keep_exact(param: Tensor, key: str, kept: Tensor, updates: dict[str, Tensor | None]) -> None:
    """Writes what is kept beside a parameter, and leaves in the updates what it is stored as."""
    assert updates["param"] is not None  # every rule updates it
    updates["param"], rest = exact.split(updates["param"], key, param.dtype)
    kept.copy_(rest)


def _round_at_random(table: Table, row: Row, step: int, updates: dict[str, Tensor | None]) -> None:
    """Leaves in the updates a parameter that its dtype holds exactly."""
    param = updates["param"]
    assert param is not None  # every rule updates it
    key = int(table.state_of(row)[ROUNDING_KEY])
    updates["param"] = blocks.at_random(param, key, step, row.param.dtype, all_places(row.param))


def _keep_codes(table: Table, row: Row, name: str, step: int, updates: dict[str, Tensor | None]) -> None:
    """Writes a state's scales, and leaves in the updates its codes."""
    value = updates[name]
    assert value is not None  # every rule updates the states that its groups need
    made = recoded(table.rule, table.groups[row.group], name, value, step)
    updates[name] = made[name]
    scales = made[scale_key(name)]
    local(row.states[scale_key(name)]).view(-1)[: scales.numel()].copy_(scales)


def compute_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 where any tensor is, else float32: what the kernels compute a tensor in."""
    doubles = (torch.float64, torch.complex128)
    return torch.float64 if any(tensor.dtype in doubles for tensor in tensors) else torch.float32


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
