"""How a slot lives in memory, twin of csrc/storage/: codecs of the 16-bit floats, loads and stores.

Slots of 16 bits are loaded and stored as integers and converted by integer code, so that a compiled kernel
and Triton's interpreter, whose own casts differ, give the same bits.
"""

# mypy: ignore-errors
# ruff: noqa: N803, SIM300
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

# csrc/storage/storage.h: Storage
FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
LOW_BITS = tl.constexpr(4)
SIGNED8 = tl.constexpr(5)
ROOT8 = tl.constexpr(6)
FLOAT8 = tl.constexpr(7)
FLOAT8_SQUARE = tl.constexpr(8)
ANY_STORAGE = tl.constexpr(-1)  # a variant that reads the storage of each slot at run time


@triton.jit
def float_bits(x):
    """The bits of a float32."""
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def bits_float(bits):
    """The float32 of some bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def float_from_bf16(bits):
    """Exact."""
    return bits_float(bits.to(tl.uint32) << 16)


@triton.jit
def bf16_from_float(x):
    """Rounds to nearest even; NaN becomes the canonical one."""
    bits = float_bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)


@triton.jit
def float_from_f16(half):
    """Exact; one float subtraction renormalises denormals."""
    half = half.to(tl.uint32)
    sign = (half & 0x8000) << 16
    shifted = (half & 0x7FFF) << 13
    exponent = shifted & 0x0F800000
    normal = shifted + (112 << 23)
    special = shifted + (224 << 23)  # Inf and NaN
    renormalised = bits_float(shifted + (113 << 23)) - 6.103515625e-05  # 2^-14, whose bits are 113 << 23
    denormal = float_bits(renormalised)
    magnitude = tl.where(exponent == 0, denormal, tl.where(exponent == 0x0F800000, special, normal))
    return bits_float(sign | magnitude)


@triton.jit
def f16_from_float(x):
    """Rounds to nearest even; below 2^-14 one float addition rounds at the right bit."""
    bits = float_bits(x)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    special = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00).to(tl.uint32)
    denormal = float_bits(bits_float(magnitude) + 0.5) - (126 << 23)  # 0.5, whose bits are 126 << 23
    normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    finite = tl.where(magnitude < (113 << 23), denormal, normal)
    return (sign | tl.where(magnitude >= (143 << 23), special, finite)).to(tl.uint16)


@triton.jit
def float_from_f8(byte):
    """Exact: 4 bits of exponent, 3 of mantissa, no infinity."""
    sign = (byte & 0x80) << 24
    shifted = (byte & 0x7F) << 20
    normal = shifted + (120 << 23)
    denormal = float_bits(bits_float(shifted + (121 << 23)) - 0.015625)  # 2^-6, whose bits are 121 << 23
    finite = tl.where(shifted < (1 << 23), denormal, normal)
    return bits_float(sign | tl.where(shifted == (0x7F << 20), 0x7FC00000, finite))


@triton.jit
def f8_from_float(x):
    """Of a magnitude up to 448, to nearest even; below 2^-6 one float addition rounds at the right bit."""
    bits = float_bits(x)
    magnitude = bits & 0x7FFFFFFF
    denormal = float_bits(bits_float(magnitude) + 16384.0) - (141 << 23)  # 2^14, whose bits are 141 << 23
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    return ((bits >> 24) & 0x80) | tl.where(magnitude < (121 << 23), denormal, normal)


@triton.jit
def f8_at_random(x, random):
    """Of x from 0 to 448, to one of the two beside it, by 16 random bits."""
    dropped = (random << 4) + 8
    normal = (float_bits(x) - (120 << 23) + dropped) >> 20
    denormal = (float_bits(x + 0.015625) - (121 << 23) + dropped) >> 20
    return tl.where(x < 0.015625, denormal, normal)


@triton.jit
def is_code(storage):
    """Whether elements are codes of 8 bits."""
    return (storage >= SIGNED8) & (storage <= FLOAT8_SQUARE)


@triton.jit
def storage_bytes(storage):
    """The size of one element."""
    return tl.where(storage == FLOAT32, 4, tl.where(storage == FLOAT64, 8, tl.where(is_code(storage), 1, 2)))


@triton.jit
def pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer to T. One from a table has lost its alignment: ALIGNED vouches for 16 bytes."""
    p = address.to(tl.pointer_type(T))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def only_if(condition, mask):
    """The mask where a scalar condition holds, else none. Interpreted, `mask & condition` is no mask."""
    return tl.where(condition, mask, False)


@triton.jit
def fetch(address, index, mask, storage, S: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """The bits of a block of a slot, once for each width it may have: the one it has is read, by predicate.

    Nothing depends on the bits yet, so that the loads of all slots are under way together. S is the storage
    where the variant fixes it, else ANY_STORAGE, and `storage` says.
    """
    single = 0.0
    half = 0
    double = 0.0
    if S == ANY_STORAGE:
        at32 = pointer(address, tl.float32, ALIGNED) + index
        at16 = pointer(address, tl.uint16, ALIGNED) + index
        single = tl.load(at32, mask=only_if(storage == FLOAT32, mask), other=0.0)
        half = tl.load(at16, mask=only_if((storage == BFLOAT16) | (storage == FLOAT16), mask), other=0)
        if C == tl.float64:
            at64 = pointer(address, tl.float64, ALIGNED) + index
            double = tl.load(at64, mask=only_if(storage == FLOAT64, mask), other=0.0)
    elif S == FLOAT32:
        single = tl.load(pointer(address, tl.float32, ALIGNED) + index, mask=mask, other=0.0)
    else:
        half = tl.load(pointer(address, tl.uint16, ALIGNED) + index, mask=mask, other=0)
    return single, half, double


@triton.jit
def decode(bits, storage, S: tl.constexpr, C: tl.constexpr):
    """What `fetch` read, in the compute type C."""
    single, half, double = bits
    if S == FLOAT32:
        x = single
    elif S == BFLOAT16:
        x = float_from_bf16(half)
    elif S == FLOAT16:
        x = float_from_f16(half)
    else:
        x = single.to(C)
        if storage == BFLOAT16:
            x = float_from_bf16(half).to(C)
        elif storage == FLOAT16:
            x = float_from_f16(half).to(C)
        if C == tl.float64 and storage == FLOAT64:
            x = double
    return x


@triton.jit
def store(address, index, mask, x, storage, S: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr):
    """Rounds a block to its slot's storage, once, and writes it."""
    if S == ANY_STORAGE:
        single = x.to(tl.float32)
        if storage == FLOAT32:
            tl.store(pointer(address, tl.float32, ALIGNED) + index, single, mask=mask)
        elif storage == BFLOAT16:
            tl.store(pointer(address, tl.uint16, ALIGNED) + index, bf16_from_float(single), mask=mask)
        elif storage == FLOAT16:
            tl.store(pointer(address, tl.uint16, ALIGNED) + index, f16_from_float(single), mask=mask)
        elif C == tl.float64:
            tl.store(pointer(address, tl.float64, ALIGNED) + index, x, mask=mask)
    elif S == FLOAT32:
        tl.store(pointer(address, tl.float32, ALIGNED) + index, x, mask=mask)
    elif S == BFLOAT16:
        tl.store(pointer(address, tl.uint16, ALIGNED) + index, bf16_from_float(x), mask=mask)
    else:
        tl.store(pointer(address, tl.uint16, ALIGNED) + index, f16_from_float(x), mask=mask)


@triton.jit
def load_scalar(address, storage):
    """One number of any storage, exactly, in float64."""
    x = tl.load(pointer(address, tl.float32, False), mask=storage == FLOAT32, other=0.0).to(tl.float64)
    is_half = (storage == BFLOAT16) | (storage == FLOAT16)
    half = tl.load(pointer(address, tl.uint16, False), mask=is_half, other=0)
    double = tl.load(pointer(address, tl.float64, False), mask=storage == FLOAT64, other=0.0)
    x = tl.where(storage == BFLOAT16, float_from_bf16(half).to(tl.float64), x)
    x = tl.where(storage == FLOAT16, float_from_f16(half).to(tl.float64), x)
    return tl.where(storage == FLOAT64, double, x)
