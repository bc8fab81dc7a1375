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


# ---- float8 ---------------------------------------------------------------------------------------------------------
# Blocks of 32 that hold one 448 each: their scale is 1, so that the codes are the float8 of the values themselves.

F8 = torch.float8_e4m3fn
BLOCK = 32


def in_blocks(values: Tensor) -> Tensor:
    """Values with a 448 before every 31 of them."""
    rows = torch.zeros(-(-values.numel() // (BLOCK - 1)) * (BLOCK - 1), dtype=torch.float32)
    rows[: values.numel()] = values
    rows = rows.reshape(-1, BLOCK - 1)
    return torch.cat([torch.full((rows.shape[0], 1), 448.0), rows], dim=1).flatten()


def step8(param: Tensor, grad: Tensor, codes: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """One step of SGD with lr 1 and momentum 1 from codes whose scales are 1; parameter, codes and scales after it."""
    parameter = torch.nn.Parameter(param.to(run.device))
    parameter.grad = grad.to(run.device)
    options: dict[str, Any] = {"state_dtype": F8, "state_block": BLOCK, "backend": run.backend}
    optimizer = fusedopt.SGD([parameter], lr=1.0, momentum=1.0, **options)
    state = optimizer.state[parameter]
    state["momentum_buffer"] = codes.clone().to(run.device)
    state["momentum_buffer_scale"] = torch.ones(-(-codes.numel() // BLOCK), device=run.device)
    optimizer.step()
    found = parameter.detach(), state["momentum_buffer"], state["momentum_buffer_scale"]
    return found[0].cpu(), found[1].cpu(), found[2].cpu()


@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_float8_is_read_as_torch_reads_it_and_written_as_itself(run: Run, settings: Run) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(F8).float()
    codes = in_blocks(every).to(F8)
    zeros = minus_zeros(codes.numel(), torch.float32)
    param, after, scales = step8(zeros, zeros.clone(), codes, run)
    assert_same_bits(param, -codes.float(), codes.float())
    whole = scales.isfinite().repeat_interleave(BLOCK)  # the blocks without a NaN
    assert whole.sum() == codes.numel() - 2 * BLOCK
    assert torch.equal(after.view(torch.uint8)[whole], codes.view(torch.uint8)[whole])
    assert (scales[scales.isfinite()] == 1.0).all()


def float8_boundaries() -> Tensor:
    """Around every float8, every middle between two of them, and what is below the least: a few float32 each."""
    every = torch.arange(127, dtype=torch.uint8).view(F8).double()
    centres = torch.cat([every, (every[1:] + every[:-1]) / 2, every[1] * 2.0 ** -torch.arange(1, 30).double()])
    bits = centres.float().view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    values = bits.clamp(min=0).view(torch.float32).flatten().clamp(max=448.0)
    return torch.cat([values, -values])


@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_float8_rounding_boundary_is_written_as_torch_writes_it(run: Run, settings: Run) -> None:
    values = in_blocks(float8_boundaries())
    zeros = minus_zeros(values.numel(), torch.float32)
    _, codes, scales = step8(zeros, values, torch.zeros(values.numel()).to(F8), run)
    assert (scales == 1.0).all()
    assert_same_bits(codes.float(), (values + 0.0).to(F8).float(), values)


@pytest.mark.slow
def test_every_float32_up_to_the_largest_is_the_float8_that_torch_makes_of_it(record_property: Any) -> None:
    size, run, count = 31 << 19, Run("cpu"), 0
    for high in range(0, 0x43E00001, size):
        patterns = torch.arange(high, min(high + size, 0x43E00001), dtype=torch.int64).to(torch.int32)
        values = in_blocks(patterns.view(torch.float32))
        zeros = minus_zeros(values.numel(), torch.float32)
        _, codes, _ = step8(zeros, values, torch.zeros(values.numel()).to(F8), run)
        assert torch.equal(codes.view(torch.uint8), values.to(F8).view(torch.uint8))
        count += patterns.numel()
    record_property("count:float32 values written to float8", count)


@pytest.mark.parametrize("run", as_params(RUNS))
def test_a_mean_of_squares_becomes_one_of_the_two_float8_beside_it_and_never_0(run: Run, settings: Run) -> None:
    every = torch.arange(127, dtype=torch.uint8).view(F8).double()
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9], dtype=torch.float64)
    between = (every[:-1, None] + shares * (every[1:] - every[:-1])[:, None]).flatten()
    tiny = every[1] * 2.0 ** -torch.arange(1, 30).double()
    grads = in_blocks(torch.cat([between, tiny]).float()).sqrt()
    parameter = torch.nn.Parameter(torch.zeros_like(grads).to(run.device))
    parameter.grad = grads.to(run.device)
    optimizer = fusedopt.Adam(  # whose exp_avg_sq is the square of the gradient
        [parameter], betas=(0.9, 0.0), state_dtype={"exp_avg_sq": F8}, state_block=BLOCK, backend=run.backend
    )
    optimizer.step()
    state = optimizer.state[parameter]
    scales = state["exp_avg_sq_scale"].cpu().double().repeat_interleave(BLOCK)
    found = state["exp_avg_sq"].cpu().double()
    y = (grads * grads).double() / scales
    # A scale and its inverse are rounded: what lies that near to a float8 may be taken for it.
    low = every[torch.searchsorted(every, y * (1 + 2**-22), right=True) - 1]
    high = every[torch.searchsorted(every, y * (1 - 2**-22)).clamp(max=126)]
    assert ((found == low) | (found == high)).all()
    assert (found[grads > 0] > 0).all()
