"""Selects the kernel of a rule and a variant, and launches it once on a table's columns."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from .reduce import measure
from .rules import RULES
from .storage import ANY_STORAGE, BFLOAT16, FLOAT32, FLOAT64
from .sweep import sweep

THREADS = 128  # of a program
MEASURE_THREADS = 512  # of one that joins leaves: with fewer, the 2,048 numbers of a leaf do not fit their registers
REGISTERS = 65536  # of a multiprocessor, on every NVIDIA GPU
INTERPRETED = not isinstance(sweep, triton.JITFunction)  # TRITON_INTERPRET=1 when the kernels were defined
INTERPRETED_PROGRAMS = 3
# Triton up to 3.5 flushes denormals to zero in float32 division and square root on NVIDIA GPUs.
OLDEST_TRITON = (3, 6)


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: csrc/variants.h.

    Attributes:
        param_storage: storage of parameter and gradient; ANY_STORAGE: decided at run time.
        state_storage: storage of the states; the same.
        strided: admits slots that differ in layout, or are not dense.
        double: admits tensors with a float64 slot, computed in float64.
        width: elements a thread takes at a time: 16 bytes of the widest slot but float64, as Triton stores no
            more at once and lays all slots of a block out alike.
        programs: of THREADS threads that should fit on a multiprocessor at once; it bounds the registers.
        side: admits outputs beside the update: csrc/phase.h.
        mastered: admits what is kept beside a 16-bit parameter; never for a tensor computed in float64.
        blocks: admits states in 8 bits: csrc/storage/block.h; never for a tensor computed in float64.
        report: admits numbers about every leaf: csrc/report.h.
    """

    param_storage: int
    state_storage: int
    strided: bool
    double: bool
    width: int
    programs: int
    side: bool = False
    mastered: bool = False
    blocks: bool = False
    report: bool = False


_F32, _BF16, _ANY = FLOAT32.value, BFLOAT16.value, ANY_STORAGE.value

VARIANTS = {
    "f32": Variant(_F32, _F32, strided=False, double=False, width=4, programs=5),
    "bf16": Variant(_BF16, _BF16, strided=False, double=False, width=8, programs=5),
    "bf16_f32": Variant(_BF16, _F32, strided=False, double=False, width=4, programs=5),
    "any": Variant(_ANY, _ANY, strided=False, double=False, width=4, programs=4),
    "strided": Variant(_ANY, _ANY, strided=True, double=False, width=4, programs=4),
    "full": Variant(_ANY, _ANY, strided=True, double=True, width=4, programs=4),
    "f32_side": Variant(_F32, _F32, strided=False, double=False, width=4, programs=3, side=True),
    "strided_side": Variant(_ANY, _ANY, strided=True, double=False, width=4, programs=3, side=True),
    "bf16_f32_master": Variant(_BF16, _F32, strided=False, double=False, width=4, programs=4, mastered=True),
    "master": Variant(_ANY, _ANY, strided=True, double=False, width=4, programs=4, mastered=True),
    "bf16_8": Variant(_BF16, _ANY, strided=False, double=False, width=4, programs=3, mastered=True, blocks=True),
    "blocks": Variant(_ANY, _ANY, strided=True, double=False, width=4, programs=3, mastered=True, blocks=True),
    "blocks_side": Variant(
        _ANY, _ANY, strided=True, double=False, width=4, programs=2, side=True, mastered=True, blocks=True
    ),
    "f32_report": Variant(_F32, _F32, strided=False, double=False, width=4, programs=3, side=True, report=True),
    "master_report": Variant(
        _ANY, _ANY, strided=True, double=False, width=4, programs=2, side=True, mastered=True, report=True
    ),
    "everything": Variant(
        _ANY, _ANY, strided=True, double=True, width=4, programs=2, side=True, mastered=True, blocks=True, report=True
    ),
}


@dataclass
class Columns:
    """The tensor table, the chunk plan and the groups, as tensors on one device: the columns of csrc/table.h.

    Attributes:
        device: where all of them lie.
        rows: tensors in the table.
        address: int64 [15, rows], in the order of csrc/table.h; 0 where the tensor lacks the slot.
        grads: int64 [rows], this step's gradients: 0 none, 1 one of no elements.
        numel: int64 [rows].
        group: int32 [rows].
        storage: int64 [rows], 4 bits a slot.
        layout: int32 [rows], -1 for dense, else an offset into `layouts`.
        layouts: int64, for each strided tensor ndim, sizes[ndim], strides[ndim] of the eight element slots.
        first_leaf: int64 [rows + 1], how many leaves of 2,048 elements the rows before each have.
        part_leaf: int64 [parts + 1], the first leaf of each part whose leaves are joined to a norm; at last all leaves.
        chunks: int32 [chunks, 2], tensor and index within the tensor.
        chunk_elements: elements of a chunk, a multiple of 2,048.
        group_values: float64 [groups, 8].
        group_flags: int32 [groups].
        group_max_norms: float64 [groups], what gradients are clipped to; below 0: they are not.
        group_tensors: int64 [groups, 8], addresses of hyperparameters that are tensors, else 0.
        group_storages: int32 [groups, 8], and their storages.
        arrivals: int32 [1], 0 between launches.
    """

    device: torch.device
    rows: int
    address: torch.Tensor
    grads: torch.Tensor
    numel: torch.Tensor
    group: torch.Tensor
    storage: torch.Tensor
    layout: torch.Tensor
    layouts: torch.Tensor
    first_leaf: torch.Tensor
    part_leaf: torch.Tensor
    chunks: torch.Tensor
    chunk_elements: int
    group_values: torch.Tensor
    group_flags: torch.Tensor
    group_max_norms: torch.Tensor
    group_tensors: torch.Tensor
    group_storages: torch.Tensor
    arrivals: torch.Tensor


@cache
def why_not(device: torch.device) -> str:
    """Why these kernels can not serve a device; empty: they can."""
    if INTERPRETED and device.type != "cpu":
        return "TRITON_INTERPRET=1 was set, and the interpreter serves the CPU alone"
    if INTERPRETED:
        return ""
    if device.type == "cpu":
        return "on the CPU its kernels need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {triton.__version__} flushes denormals to zero; {oldest} and later keep them"
    return ""


@cache
def compile_time_arguments(rule: str, variant: str) -> dict[str, Any]:
    """The constants of the kernel of a rule and a variant.

    Raises:
        ValueError: there is no such rule or variant.
    """
    if rule not in RULES:
        raise ValueError(f"rule is '{rule}'; the Triton kernels have {', '.join(RULES)}")
    if variant not in VARIANTS:
        raise ValueError(f"variant is '{variant}'; the Triton kernels have {', '.join(VARIANTS)}")
    it, v = RULES[rule], VARIANTS[variant]
    return {
        "SCALARS": it.scalars,
        "UPDATE": it.update,
        "STATES": it.states,
        "PS": v.param_storage,
        "SS": v.state_storage,
        "MASTERED": v.mastered,
        "STRIDED": v.strided,
        "DOUBLE": v.double,
        "SIDE": v.side,
        "BLOCKS": v.blocks,
        "REPORT": v.report,
        "BLOCK": THREADS * v.width,
        # A block of codes fits into it.
        "EDGES": THREADS if v.double and not v.blocks else THREADS * v.width // 2,
        "WIDTH": v.width,
    }


@cache
def compiler_options(variant: str | None, backend: str, warp_size: int) -> dict[str, Any]:
    """How to compile a kernel: without contraction into fma, within the registers of the variant.

    Args:
        variant: its name; None: the kernel is `measure`.
        backend: "cuda" or "hip".
        warp_size: threads of a warp.
    """
    threads = MEASURE_THREADS if variant is None else THREADS
    options = {"num_warps": threads // warp_size, "num_stages": 1, "enable_fp_fusion": False}
    if backend == "cuda" and variant is not None:
        options["maxnreg"] = REGISTERS // (THREADS * VARIANTS[variant].programs) // 8 * 8
    return options


@cache
def resident_programs(variant: str, device: torch.device) -> int:
    """How many programs of a variant a device runs at once, so how many workers to plan chunks for.

    Args:
        variant: its name.
        device: a GPU; under the interpreter, the CPU.
    """
    if INTERPRETED:
        return INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * VARIANTS[variant].programs


@cache
def _device_options(variant: str | None, device: torch.device) -> dict[str, Any]:
    if INTERPRETED:
        return {}
    warp_size = int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))
    return compiler_options(variant, "hip" if torch.version.hip else "cuda", warp_size)


def launch(
    rule: str,
    variant: str,
    columns: Columns,
    *,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    phase_flags: int = 0,
    ema_decay: torch.Tensor | None = None,
    leaf_sums: torch.Tensor | None = None,
    joined: torch.Tensor | None = None,
    results: torch.Tensor | None = None,
    report: torch.Tensor | None = None,
    report_terms: torch.Tensor | None = None,
    programs: int | None = None,
    sweeps: bool = True,
) -> None:
    """Takes a step of every tensor that has a gradient, by one launch on the device's current stream.

    Args:
        rule: a key of RULES.
        variant: a key of VARIANTS that covers the table.
        columns: the table. What its addresses point to must outlive the launch.
        grad_scale: float32, one element, on the device: gradients are divided by it. Default: they are not.
        found_inf: float32, one element, on the device: where it is not 0, nothing changes. Default: 0.
        phase_flags: bits of ``enum PhaseFlag`` in csrc/phase.h; the variant admits side outputs. Default: none.
        ema_decay: float32 or float64, one element, on the device: decay of the averages. Default: 0.
        leaf_sums: float64, one for each leaf: where the norm is to be found, which takes a launch more.
        joined: float64, what these come to for each part of the table, which are the norms; where the flags ask for
            the norm, as the next.
        results: float64, skipped launches, then the norms.
        report: float64 [5, leaves], and one behind: csrc/report.h; where the flags ask for it, as the next.
        report_terms: float64 [programs, 5, 2048], room for the terms of one leaf.
        programs: Triton programs to run. Default: what the device runs at once; 3 if interpreted.
        sweeps: whether the step is taken. Default: yes; else the norm is found, no more.

    Raises:
        ValueError: the rule or the variant is unknown.
        RuntimeError: see `why_not`.
    """
    constants = compile_time_arguments(rule, variant)
    reason = why_not(columns.device)
    if reason:
        raise RuntimeError(f"Triton kernels can not serve {columns.device}: {reason}")
    chunk_count = columns.chunks.shape[0]
    if programs is None:
        programs = min(resident_programs(variant, columns.device), max(1, chunk_count))
    with _launching_on(columns.device):
        if leaf_sums is not None:
            measure[(programs,)](
                columns.address,
                columns.grads,
                columns.numel,
                columns.storage,
                columns.layout,
                columns.layouts,
                columns.rows,
                columns.chunks,
                chunk_count,
                columns.chunk_elements,
                0 if grad_scale is None else grad_scale.data_ptr(),
                phase_flags,
                columns.first_leaf,
                leaf_sums,
                columns.part_leaf,
                columns.part_leaf.shape[0] - 1,
                joined,
                columns.arrivals,
                **_device_options(None, columns.device),
            )
        if not sweeps:
            return
        sweep[(programs,)](
            columns.address,
            columns.grads,
            columns.numel,
            columns.group,
            columns.storage,
            columns.layout,
            columns.layouts,
            columns.rows,
            columns.chunks,
            chunk_count,
            columns.chunk_elements,
            columns.group_values,
            columns.group_flags,
            columns.group_tensors,
            columns.group_storages,
            0 if grad_scale is None else grad_scale.data_ptr(),
            0 if found_inf is None else found_inf.data_ptr(),
            columns.arrivals,
            phase_flags,
            0 if ema_decay is None else ema_decay.data_ptr(),
            FLOAT64.value if ema_decay is not None and ema_decay.dtype == torch.float64 else FLOAT32.value,
            columns.group_max_norms if joined is None else joined,  # some float64: that of no norm is never read
            0 if joined is None else joined.shape[0],
            columns.group_max_norms,
            0 if report is None else report.shape[-1],
            columns.group_max_norms if results is None else results,
            columns.first_leaf,
            0 if report is None else report.data_ptr(),
            0 if report_terms is None else report_terms.data_ptr(),
            **constants,
            **_device_options(variant, columns.device),
        )


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one; under the interpreter, keeps NumPy from warning of overflow and NaN."""
    if not INTERPRETED:
        return torch.cuda.device(device)
    try:
        import numpy
    except ImportError:
        return nullcontext()
    return numpy.errstate(all="ignore")
