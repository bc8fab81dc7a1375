"""States in 8 bits with a float32 scale for each block: csrc/storage/block.h and csrc/storage/random.h in torch.

Example:
    >>> import torch
    >>> codes, scales = coded(torch.tensor([0.5, -1.0, 0.0]), torch.int8, block=32)
    >>> codes.tolist()
    [64, -127, 0]
    >>> [round(x, 3) for x in decoded(codes, scales, block=32).tolist()]
    [0.504, -1.0, 0.0]
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import square_root

SMALLEST = 2.0**-126  # scale: below, its inverse could overflow
FLOAT8 = torch.float8_e4m3fn
MOST_CODE = {torch.int8: 127.0, torch.uint8: 255.0, FLOAT8: 448.0}
# What the largest magnitude of a block becomes where it is rounded at random: csrc/storage/block.h.
BELOW_MOST = {torch.uint8: 2.0**-14, FLOAT8: 2.0**-13}
_MASK = 0xFFFFFFFF


def block_count(numel: int, block: int) -> int:
    """How many blocks a tensor has; the last may be shorter."""
    return -(-numel // block)


def coded(
    values: Tensor, dtype: torch.dtype, *, block: int, step: int = 0, is_square: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes of a state and the scale of each block of them.

    Args:
        values: the state, float32.
        dtype: int8: a mean; uint8: a mean of squares, coded by its root; float8_e4m3fn: either, as it is.
        block: elements of a block, counted in row-major order.
        step: the count of this step, which decides how means of squares are rounded.
        is_square: whether it is a mean of squares.
    """
    rows = _in_blocks(values.contiguous().reshape(-1), block)
    rows = square_root(rows) if dtype == torch.uint8 else rows
    is_random = dtype == torch.uint8 or (dtype == FLOAT8 and is_square)
    most = MOST_CODE[dtype]
    largest = rows.abs().amax(dim=1)
    reach = largest / torch.full_like(largest, most)  # by a number torch on a GPU would multiply with its inverse
    finite = largest.isfinite()
    used = finite & (reach >= SMALLEST)
    scales = torch.where(finite, torch.where(used, reach, 0.0), torch.nan)
    reached = most - BELOW_MOST[dtype] if is_random else most
    y = rows * torch.where(used, torch.full_like(largest, reached) / largest, 0.0).unsqueeze(1)
    if dtype == torch.int8:
        codes = (y + 1.5 * 2.0**23).view(torch.int32) & 0xFF
    elif not is_random:
        codes = y.to(FLOAT8).view(torch.uint8)
    else:
        rounded = _float8_at_random if dtype == FLOAT8 else _whole_at_random
        codes = rounded(y, _halves(rows, step)).maximum(rows > 0.0)
    codes = torch.where(used.unsqueeze(1), codes, 0).to(torch.uint8).view(dtype)
    return codes.reshape(-1)[: values.numel()].reshape(values.shape), scales


def decoded(codes: Tensor, scales: Tensor, *, block: int) -> Tensor:
    """The state that codes and scales stand for, in float32."""
    scale = scales.repeat_interleave(block)[: codes.numel()]
    y = codes.contiguous().reshape(-1).to(torch.float32) * scale
    return (y * y if codes.dtype == torch.uint8 else y).reshape(codes.shape)


def random_bits(counter: Tensor, key: int | Tensor, other_key: int) -> Tensor:
    """32 random bits for each counter: csrc/storage/random.h. Counters, keys and bits are int64."""
    x = (counter & _MASK) ^ key
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = x ^ other_key
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def stream(places: Tensor, seed: int, step: int) -> Tensor:
    """The random bits of elements, by their places in the tensor, at one step."""
    step_key = int(random_bits(torch.tensor(step, device="cpu"), seed, 0x9E3779B9))
    return random_bits(places, seed ^ (places >> 32), step_key)


def at_random(
    values: Tensor, key: int, step: int, dtype: torch.dtype = torch.bfloat16, places: Tensor | None = None
) -> Tensor:
    """Rounds each float32 to one of the two bfloat16 or float16 beside it, so that the mean is kept.

    Args:
        values: float32.
        key: of the tensor's random bits.
        step: the count of this step.
        dtype: bfloat16 or float16.
        places: int64, of each value in the whole tensor. Default: in row-major order from 0.
    """
    if places is None:
        places = torch.arange(values.numel(), device=values.device)
    words = stream(places.to(values.device).reshape(values.shape), key, step)
    return _bf16_at_random(values, words) if dtype == torch.bfloat16 else _f16_at_random(values, words)


def _bf16_at_random(values: Tensor, words: Tensor) -> Tensor:
    return torch.where(values.isfinite(), _dropped(values, words, 16), values)


def _f16_at_random(values: Tensor, words: Tensor) -> Tensor:
    """What is above the largest is left to its store, to nearest: csrc/storage/codec.h."""
    magnitude = values.abs()
    shift = torch.where(magnitude < 2.0**-14, 2.0**-14, 0.0)
    rounded = _dropped(magnitude + shift, words, 13) - shift
    return torch.where(magnitude <= 65504.0, torch.copysign(rounded, values), values)


def _dropped(values: Tensor, words: Tensor, count: int) -> Tensor:
    """Values without their last bits, after as many random ones were added."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    mask = (1 << count) - 1
    rounded = (bits + (words & mask)) & (_MASK ^ mask)
    return torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).to(torch.int32).view(torch.float32)


def _halves(rows: Tensor, step: int) -> Tensor:
    """16 random bits for each element: those that are 16 apart share a word."""
    places = torch.arange(rows.numel(), device=rows.device).reshape(rows.shape)
    words = stream((places >> 5 << 4) | (places & 15), 0, step)
    return torch.where((places >> 4 & 1) == 1, words >> 16, words & 0xFFFF)


def _whole_at_random(x: Tensor, random: Tensor) -> Tensor:
    """One of the two whole numbers beside x, from 0 to 255: csrc/storage/block.h."""
    return ((x + 256.0).view(torch.int32) + (random & 0x7FFF)) >> 15 & 0xFF


def _float8_at_random(x: Tensor, random: Tensor) -> Tensor:
    """Bits of one of the two float8 beside x, from 0 to the largest: csrc/storage/codec.h."""
    is_small = x < 2.0**-6
    bits = torch.where(is_small, x + 2.0**-6, x).view(torch.int32).to(torch.int64)
    return (bits - (torch.where(is_small, 121, 120) << 23) + (random << 4) + 8) >> 20


def _in_blocks(flat: Tensor, block: int) -> Tensor:
    padded = flat.new_zeros(block_count(flat.numel(), block) * block)
    padded[: flat.numel()] = flat
    return padded.reshape(-1, block)
