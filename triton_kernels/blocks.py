"""States in 8 bits with a scale for each block, twin of csrc/storage/block.h and csrc/storage/random.h."""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .rules import square_root
from .storage import (
    BFLOAT16,
    FLOAT8,
    FLOAT8_SQUARE,
    ROOT8,
    SIGNED8,
    bits_float,
    f8_at_random,
    f8_from_float,
    float_bits,
    float_from_f8,
    is_code,
    only_if,
    pointer,
)

MOST_BLOCK = tl.constexpr(256)  # elements


@triton.jit
def random_bits(counter, key, other_key):
    """32 random bits for each counter."""
    x = counter.to(tl.uint32) ^ key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ other_key
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def random_stream(place, seed, t):
    """The random bits of elements, by their places in the tensor, at step t."""
    step_key = random_bits(t, seed.to(tl.uint32), 0x9E3779B9)
    return random_bits(place, seed.to(tl.uint32) ^ (place >> 32).to(tl.uint32), step_key)


@triton.jit
def bf16_at_random(x, random):
    """Rounds to one of the two bfloat16 beside x, to each with the probability that makes the mean x."""
    rounded = bits_float((float_bits(x) + (random & 0xFFFF)) & 0xFFFF0000)
    return tl.where(x - x == 0.0, rounded, x)


@triton.jit
def f16_at_random(x, random):
    """The same of the two float16 beside x; what is above the largest is left to its store."""
    sign = float_bits(x) & 0x80000000
    magnitude = bits_float(float_bits(x) & 0x7FFFFFFF)
    least_normal = 6.103515625e-05  # 2^-14
    normal = bits_float((float_bits(magnitude) + (random & 0x1FFF)) & 0xFFFFE000)
    shifted = bits_float((float_bits(magnitude + least_normal) + (random & 0x1FFF)) & 0xFFFFE000)
    rounded = tl.where(magnitude < least_normal, shifted - least_normal, normal)
    return tl.where(magnitude <= 65504.0, bits_float(sign | float_bits(rounded)), x)


@triton.jit
def at_random_16(x, random, storage):
    """Rounds at random to the 16-bit float that a storage is."""
    return tl.where(storage == BFLOAT16, bf16_at_random(x, random), f16_at_random(x, random))


@triton.jit
def scale_pointer(address, place, bits):
    """Where the scales of elements are, by their places in the chunk."""
    return pointer(address, tl.float32, False) + (place >> bits)


@triton.jit
def fetch_codes(address, index, mask, storage, scales, place, bits, ALIGNED: tl.constexpr):
    """The codes of a state and their scales; zeros where it has none."""
    coded = only_if(is_code(storage), mask)
    codes = tl.load(pointer(address, tl.uint8, ALIGNED) + index, mask=coded, other=0)
    return codes, tl.load(scale_pointer(scales, place, bits), mask=coded, other=0.0)


@triton.jit
def decode_codes(x, bits, storage):
    """The state in float32: x, where it is not in codes."""
    codes, scale = bits
    codes = codes.to(tl.uint32)
    mean = (bits_float((codes ^ 0x80) | 0x4B000000) - 8388736.0) * scale
    root = (bits_float(codes | 0x4B000000) - 8388608.0) * scale
    coded = tl.where(storage == SIGNED8, mean, tl.where(storage == ROOT8, root * root, float_from_f8(codes) * scale))
    return tl.where(is_code(storage), coded, x)


@triton.jit
def join(largest, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """The largest of each COUNT neighbours, for every one of them."""
    joined = tl.max(tl.reshape(largest, [LENGTH // COUNT, COUNT]), axis=1)
    return tl.reshape(tl.broadcast_to(joined[:, None], [LENGTH // COUNT, COUNT]), [LENGTH])


@triton.jit
def largest_of_block(x, mask, bits, LENGTH: tl.constexpr):
    """The bits of the largest magnitude of each element's block."""
    largest = tl.where(mask, float_bits(x) & 0x7FFFFFFF, 0).to(tl.int32)
    largest = join(largest, LENGTH, 32)
    largest = tl.where(bits >= 6, join(largest, LENGTH, 64), largest)
    largest = tl.where(bits >= 7, join(largest, LENGTH, 128), largest)
    return tl.where(bits >= 8, join(largest, LENGTH, MOST_BLOCK), largest)


@triton.jit
def random_halves(place, t):
    """16 random bits for elements by their places: those that are 16 apart share a word."""
    words = random_stream((place >> 5 << 4) | (place & 15), tl.full([], 0, tl.uint32), t)
    return tl.where((place >> 4 & 1) != 0, words >> 16, words & 0xFFFF)


@triton.jit
def encode(x, y, random, storage):
    """The codes of x, of which y is the product with the inverse of its block."""
    mean = float_bits(y + 12582912.0)
    float8 = f8_from_float(y)
    float8_square = tl.maximum(f8_at_random(y, random), tl.where(x > 0.0, 1, 0).to(tl.uint32))
    root = (float_bits(y + 256.0) + (random & 0x7FFF)) >> 15
    root = tl.maximum(root, tl.where(x > 0.0, 0x8701, 0).to(tl.uint32))
    coded = tl.where(storage == FLOAT8, float8, float8_square)
    return tl.where(storage == SIGNED8, mean, tl.where(storage == ROOT8, root, coded)) & 0xFF


@triton.jit
def keep_codes(x, address, index, mask, storage, scales, blocks, place, LENGTH: tl.constexpr, ALIGNED: tl.constexpr):
    """Writes a state as codes, and the scales of its blocks, where it is kept so."""
    if is_code(storage):
        _scales, begin, bits, t, _at_random, _key, _places = blocks
        x = tl.where(storage == ROOT8, square_root(x), x)
        largest = largest_of_block(x, mask, bits, LENGTH)
        most = tl.where(storage == SIGNED8, 127.0, tl.where(storage == ROOT8, 255.0, 448.0))
        reach = tl.div_rn(bits_float(largest.to(tl.uint32)), most)
        finite = largest < 0x7F800000
        used = finite & (reach >= 1.1754943508222875e-38)
        scale = tl.where(finite, tl.where(used, reach, 0.0), float("nan"))
        most = tl.where(storage == ROOT8, 254.99993896484375, most)  # 255 - 2^-14
        most = tl.where(storage == FLOAT8_SQUARE, 447.9998779296875, most)  # 448 - 2^-13
        y = x * tl.where(used, tl.div_rn(most, tl.where(used, bits_float(largest.to(tl.uint32)), 1.0)), 0.0)
        codes = tl.where(used, encode(x, y, random_halves(begin + place, t), storage), 0)
        tl.store(pointer(address, tl.uint8, ALIGNED) + index, codes.to(tl.uint8), mask=mask)
        first = (place & ((1 << bits) - 1)) == 0
        tl.store(scale_pointer(scales, place, bits), scale, mask=mask & first)
