"""What a launch does beside the update, twin of csrc/phase.h: average and copy of the parameter, cleared gradient."""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .rules import lerp
from .storage import (
    ANY_STORAGE,
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    bf16_from_float,
    decode,
    f16_from_float,
    fetch,
    float_from_bf16,
    float_from_f16,
    load_scalar,
    only_if,
    store,
)

# csrc/phase.h: PhaseFlag
AVERAGES = tl.constexpr(1)
WARMS_UP = tl.constexpr(2)
COPIES = tl.constexpr(4)
CLEARS_GRADS = tl.constexpr(8)


@triton.jit
def side_of(flags, decay_address, decay_storage, t, C: tl.constexpr, SIDE: tl.constexpr):
    """What the side outputs of a tensor need to know at its step t: csrc/phase.h: Side."""
    decay = tl.full([], 0.0, tl.float64)
    if SIDE and decay_address != 0:
        decay = load_scalar(decay_address, decay_storage)
    count = t.to(tl.float64)
    most = (1.0 + count) / (10.0 + count)
    decay = tl.where(((flags & WARMS_UP) != 0) & (most < decay), most, decay)
    return decay.to(C), (1.0 - decay).to(C), t <= 1, (flags & CLEARS_GRADS) != 0


@triton.jit
def rounded(x, storage, C: tl.constexpr):
    """A block as its storage has rounded it."""
    single = x.to(tl.float32)
    if storage == FLOAT32:
        x = single.to(C)
    elif storage == BFLOAT16:
        x = float_from_bf16(bf16_from_float(single)).to(C)
    elif storage == FLOAT16:
        x = float_from_f16(f16_from_float(single)).to(C)
    return x


@triton.jit
def sweep_sides(p, address, at, mask, storage, side, PS: tl.constexpr, SS: tl.constexpr, C: tl.constexpr,
                ALIGNED: tl.constexpr):  # fmt: skip
    """A block of what comes beside the update; p is the parameter before its store rounded it."""
    decay, one_minus_decay, first, clears = side
    if PS != FLOAT32:
        p = rounded(p, storage.param, C)
    has_ema = only_if(address.ema != 0, mask)
    bits = fetch(address.ema, at.ema, has_ema, storage.ema, SS, C, ALIGNED)
    ema = decode(bits, storage.ema, SS, C)
    ema = tl.where(first, p, lerp(ema, p, one_minus_decay, decay))
    store(address.ema, at.ema, has_ema, ema, storage.ema, SS, C, ALIGNED)
    has_copy = only_if(address.copy != 0, mask)
    store(address.copy, at.copy, has_copy, p, storage.copy, ANY_STORAGE, C, ALIGNED)
    store(address.grad, at.grad, only_if(clears, mask), tl.zeros_like(p), storage.grad, PS, C, ALIGNED)
