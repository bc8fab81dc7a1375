"""The 16-bit storages: every value read, every rounding boundary written, against torch's own conversions.

Momentum SGD is the instrument. With lr 1, momentum 1, a gradient and a parameter of -0, a buffer x stays x and leaves
-x in the float32 parameter: x was read exactly. With a buffer of -0 and momentum 1 the new buffer is the gradient,
rounded once to the buffer's storage.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt

from .running import ISAS, Run, as_params
from .tensors import same_bits

STORAGES = {"bf16": torch.bfloat16, "f16": torch.float16}

RUNS = (
    Run("reference"),
    *(Run("cpu", isa=isa) for isa in ISAS),
    Run("emulated", grid=(1, 256)),
    Run("triton"),
    Run("cuda", "cuda"),
    Run("triton", "cuda"),
)


def step(param: Tensor, grad: Tensor, buffer: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """One step of SGD with lr 1 and momentum 1 from a buffer that is there; the parameter and the buffer after it."""
    parameter = torch.nn.Parameter(param.to(run.device))
    parameter.grad = grad.to(run.device)
    optimizer = fusedopt.SGD([parameter], lr=1.0, momentum=1.0, backend=run.backend)
    optimizer.state[parameter]["momentum_buffer"] = buffer.to(run.device)
    optimizer.step()
    return parameter.detach().cpu(), optimizer.state[parameter]["momentum_buffer"].cpu()


def minus_zeros(count: int, dtype: torch.dtype) -> Tensor:
    return torch.full((count,), -0.0, dtype=dtype)


def assert_same_bits(actual: Tensor, expected: Tensor, inputs: Tensor) -> None:
    wrong = ~same_bits(actual, expected)
    if wrong.any():
        k = int(wrong.nonzero()[0])
        pytest.fail(
            f"{int(wrong.sum())} of {wrong.numel()} values are wrong: {inputs[k].item()!r} became "
            f"{actual[k].item()!r}, not {expected[k].item()!r}"
        )


@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=["in_f32", "in_f64"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_16_bit_value_is_read_and_written_as_itself(
    run: Run, storage: str, compute: torch.dtype, settings: Run
) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(STORAGES[storage])
    zeros = minus_zeros(every.numel(), compute)
    param, buffer = step(zeros, zeros.clone(), every.clone(), run)
    assert_same_bits(param, -every.to(compute), every)
    assert_same_bits(buffer, every, every)


# Bits of a float32 that a storage drops; denormals of float16 drop more, and their boundaries lie in the kept ones.
DROPPED = {"bf16": 16, "f16": 13}


def boundaries(storage: str) -> Tensor:
    """Every float32 whose dropped bits are 0, the least, just below, at and just above the half, or the most."""
    bits = DROPPED[storage]
    half = 1 << (bits - 1)
    kept = torch.arange(1 << (32 - bits), dtype=torch.int64)[:, None] << bits
    dropped = torch.tensor([0, 1, half - 1, half, half + 1, 2 * half - 1])
    patterns = (kept | dropped).flatten()
    return torch.where(patterns >= 1 << 31, patterns - (1 << 32), patterns).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_rounding_boundary_is_written_as_torch_writes_it(run: Run, storage: str, settings: Run) -> None:
    values = boundaries(storage)
    if run.backend == "triton" and run.device == "cpu":
        values = values[::29]  # the interpreter is slow
    dtype = STORAGES[storage]
    _, buffer = step(minus_zeros(values.numel(), torch.float32), values, minus_zeros(values.numel(), dtype), run)
    assert_same_bits(buffer, values.to(dtype), values)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("run", as_params(RUNS))
def test_float64_is_written_through_float32(run: Run, storage: str, settings: Run) -> None:
    generator = torch.Generator().manual_seed(3)
    dtype = STORAGES[storage]
    numbers = torch.randn(20_000, generator=generator, dtype=torch.float64)
    scales = 2.0 ** torch.randint(-30, 20, numbers.shape, generator=generator)
    ties = (numbers * scales).to(dtype).double() * (1 + 2.0 ** -(24 - DROPPED[storage]))
    values = torch.cat([numbers * scales, ties, ties * (1 + 2.0**-40), ties * (1 - 2.0**-40)])
    _, buffer = step(minus_zeros(values.numel(), torch.float64), values, minus_zeros(values.numel(), dtype), run)
    assert_same_bits(buffer, values.to(torch.float32).to(dtype), values)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "run", as_params([*(Run("cpu", isa=isa) for isa in ISAS), Run("emulated", grid=(1, 256)), Run("cuda", "cuda")])
)
def test_every_float32_is_written_as_torch_writes_it(
    run: Run, storage: str, settings: Run, record_property: Any
) -> None:
    dtype = STORAGES[storage]
    size = 1 << 24
    parameter = torch.nn.Parameter(minus_zeros(size, torch.float32).to(run.device))
    buffer = minus_zeros(size, dtype).to(run.device)
    parameter.grad = torch.empty(size, device=run.device)
    optimizer = fusedopt.SGD([parameter], lr=0.0, momentum=1.0, backend=run.backend)
    optimizer.state[parameter]["momentum_buffer"] = buffer
    patterns = torch.arange(size, dtype=torch.int32, device=run.device)
    for high in range(-128, 128):
        parameter.grad.copy_((patterns + high * size).view(torch.float32))
        buffer.fill_(-0.0)
        optimizer.step()
        assert_same_bits(buffer.cpu(), parameter.grad.cpu().to(dtype), parameter.grad.cpu())
    record_property("count:float32 values written to 16 bits", 256 * size)
