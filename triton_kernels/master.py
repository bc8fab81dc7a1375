"""What is kept beside a 16-bit parameter, twin of csrc/storage/master.h: the exact parameter from it, and back."""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .storage import (
    BFLOAT16,
    FLOAT32,
    LOW_BITS,
    bf16_from_float,
    bits_float,
    f16_from_float,
    float_bits,
    float_from_bf16,
    float_from_f16,
    only_if,
    pointer,
)


@triton.jit
def rounded_to_16(x, storage):
    """A float32 as a 16-bit float has it, in float32."""
    return tl.where(storage == BFLOAT16, float_from_bf16(bf16_from_float(x)), float_from_f16(f16_from_float(x)))


@triton.jit
def fetch_master(address, index, mask, storage, ALIGNED: tl.constexpr):
    """The bits of a block of the master slot, of either width."""
    there = only_if(address != 0, mask)
    single = tl.load(pointer(address, tl.float32, ALIGNED) + index, mask=only_if(storage == FLOAT32, there), other=0.0)
    half = tl.load(pointer(address, tl.uint16, ALIGNED) + index, mask=only_if(storage != FLOAT32, there), other=0)
    return single, half


@triton.jit
def exact_param(p, bits, address, storage, param_storage):
    """The parameter that the rule sees, from p as stored and from what is kept."""
    single, half = bits
    low = (half.to(tl.uint32) ^ 0x8000) - 0x8000
    joined = bits_float(float_bits(p) + low)
    joined = tl.where(joined != joined, p, joined)
    copied = tl.where(rounded_to_16(single, param_storage) == p, single, p)
    compensated = p + tl.where(storage == BFLOAT16, float_from_bf16(half), float_from_f16(half))
    exact = tl.where(storage == LOW_BITS, joined, tl.where(storage == FLOAT32, copied, compensated))
    return tl.where(address != 0, exact, p)


@triton.jit
def stored_param(p, address, storage):
    """What the parameter's storage rounds to the stored one: of low bits, half up."""
    high = bits_float((float_bits(p) + 0x8000) & 0xFFFF0000)
    by_halves = (address != 0) & (storage == LOW_BITS)
    return tl.where(by_halves & (p == p), high, p)


@triton.jit
def keep_master(address, index, mask, p, storage, param_storage, ALIGNED: tl.constexpr):
    """Writes what is kept of an exact parameter."""
    there = only_if(address != 0, mask)
    low = tl.where(p != p, 0, float_bits(p) & 0xFFFF).to(tl.uint16)
    lost = p - rounded_to_16(p, param_storage)
    lost = tl.where(lost - lost == 0.0, lost, 0.0)
    compensation = tl.where(storage == BFLOAT16, bf16_from_float(lost), f16_from_float(lost))
    half = tl.where(storage == LOW_BITS, low, compensation)
    tl.store(pointer(address, tl.float32, ALIGNED) + index, p, mask=only_if(storage == FLOAT32, there))
    tl.store(pointer(address, tl.uint16, ALIGNED) + index, half, mask=only_if(storage != FLOAT32, there))
