"""Triton's launches without a GPU: what the compiler is handed by a real step is what is compiled ahead of time.

The interpreter does not look at types, so that it cannot see an argument that no kernel compiles with.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import Parameter

import fusedopt

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

from fusedopt.triton_kernels import launch as kernels  # noqa: E402
from fusedopt.triton_launch import Capture  # noqa: E402

from .test_triton_aot import MEASURE_SIGNATURE, SIGNATURE  # noqa: E402

pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1 is set: kernels are not compiled")

TARGET = GPUTarget("cuda", 90, 32)
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
# The variant that a step should take, the dtype of its parameters, options.
STEPS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "float32": ("f32", F32, {}),
    "bfloat16": ("bf16", BF16, {}),
    "float64": ("full", F64, {}),
    "float32 states": ("bf16_f32", BF16, {"state_dtype": F32}),
    "split": ("bf16_f32_master", BF16, {"state_dtype": F32, "master": "split"}),
    "kahan": ("master", BF16, {"master": "kahan"}),
    "int8": ("bf16_8", BF16, {"state_dtype": torch.int8}),
    "stochastic": ("blocks", BF16, {"rounding": "stochastic"}),
    "average": ("f32_side", F32, {"ema_decay": 0.9}),
    "cleared": ("everything", F64, {"zero_grads": True}),
    "clipped": ("f32_side", F32, {"max_grad_norm": 1.0, "skip_nonfinite": True}),
    "clipped by group": ("strided_side", BF16, {"max_grad_norm": 1.0, "norm_by_group": True}),
    "int8, average": ("blocks_side", BF16, {"state_dtype": torch.int8, "ema_decay": torch.tensor(0.9)}),
    "report": ("f32_report", F32, {"report": True}),
    "report, clipped": ("master_report", BF16, {"report": True, "max_grad_norm": 1.0}),
    "report, int8": ("everything", BF16, {"report": True, "state_dtype": torch.int8, "rounding": "stochastic"}),
}


class Handed(NamedTuple):
    """The types of all arguments, the values of those that are constants, and how to compile."""

    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


class PretendedDriver:
    """A GPU that takes launches and does nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return TARGET


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Triton's compiler has been handed since, by the kernel's name."""
    found: dict[str, Handed] = {}
    monkeypatch.setattr(kernels, "why_not", lambda device: "")
    monkeypatch.setattr(kernels, "resident_programs", lambda variant, device: 4)
    monkeypatch.setattr(kernels, "_launching_on", lambda device: nullcontext())
    monkeypatch.setattr(
        kernels, "_device_options", lambda variant, device: kernels.compiler_options(variant, "cuda", 32)
    )
    for name in ("sweep", "measure"):
        kernel: Any = getattr(kernels, name)
        fresh = JITFunction(kernel.fn, do_not_specialize=kernel.do_not_specialize)

        def compile_nothing(
            key: Any, signature: Any, device: int, constants: Any, options: Any, *rest: Any, fresh: Any = fresh
        ) -> object:
            named = {fresh.arg_names[place]: value for (place,), value in constants.items()}
            found[fresh.__name__] = Handed(signature, named, options.__dict__)
            assert fresh.cache_key  # reads the source of all that it calls
            return object()

        def run(*args: Any, fresh: Any = fresh, grid: Any, warmup: bool, **constants: Any) -> Any:
            return JITFunction.run(fresh, *args, grid=grid, warmup=True, **constants)

        monkeypatch.setattr(fresh, "_do_compile", compile_nothing)
        monkeypatch.setattr(fresh, "run", run)
        monkeypatch.setattr(kernels, name, fresh)
    monkeypatch.setattr(driver, "_active", PretendedDriver())
    return found


def take_step(cls: str, dtype: torch.dtype, count: int = 2, **options: Any) -> Any:
    params = [Parameter(torch.ones(2049, dtype=dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer: Any = getattr(fusedopt, cls)(params, lr=0.5, backend="triton", **options)
    optimizer.step()
    ((table, _),) = optimizer._tables
    return table


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cls", ["SGD", "AdamW"])
def test_a_step_launches_what_is_compiled_ahead_of_time(cls: str, step: str, count: int, handed: Any) -> None:
    variant, dtype, options = STEPS[step]
    if cls == "SGD":
        options = {**options, "momentum": 0.9}
    table = take_step(cls, dtype, count, **options)
    assert table.core.variant in (variant, variant.replace("bf16_f32", "bf16"))
    constants = kernels.compile_time_arguments(table.rule.stem, table.core.variant)
    assert handed["sweep"].signature == SIGNATURE | dict.fromkeys(constants, "constexpr")
    assert handed["sweep"].constants == constants
    wanted = kernels.compiler_options(table.core.variant, "cuda", 32)
    assert {name: handed["sweep"].options[name] for name in wanted} == wanted
    assert ("measure" in handed) == ("max_grad_norm" in options)
    if "measure" in handed:
        assert handed["measure"].signature == MEASURE_SIGNATURE
        assert not handed["measure"].constants
        assert handed["measure"].options["num_warps"] == kernels.MEASURE_THREADS // TARGET.warp_size


def test_a_report_keeps_the_terms_that_a_graph_writes_when_another_variant_wants_more(
    handed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {"master_report": 264, "f32_report": 396}
    monkeypatch.setattr(kernels, "resident_programs", lambda variant, device: programs[variant])
    for is_captured in (False, True):
        param = Parameter(torch.ones(5))
        param.grad = torch.ones(5)
        optimizer: Any = fusedopt.AdamW([param], lr=0.5, backend="triton", report=True)
        other = Parameter(torch.ones(5).bfloat16())
        other.grad = torch.ones(5).bfloat16()
        optimizer.add_param_group({"params": [other]})
        optimizer.step()
        ((table, _),) = optimizer._tables
        assert table.core.variant == "master_report"
        launcher = table.lasting.launcher
        launcher._captures += [Capture(launcher.columns, launcher._sent)] * is_captured
        terms = weakref.ref(launcher._terms)
        del optimizer.param_groups[1]
        optimizer.step()
        assert optimizer._tables[0][0].core.variant == "f32_report"
        assert (terms() is not None) == is_captured


def test_scalars_of_a_gradient_scaler_are_handed_as_any_other(handed: Any) -> None:
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer: Any = fusedopt.AdamW([param], lr=torch.tensor(0.5), backend="triton")
    optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.zeros(1)
    optimizer.step()
    assert {name: handed["sweep"].signature[name] for name in SIGNATURE} == SIGNATURE
