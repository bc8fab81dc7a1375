"""The tensor table as a kernel reads it, twin of csrc/table.h: slots, layouts, hyperparameters, steps."""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .storage import ANY_STORAGE, FLOAT64, load_scalar, pointer, storage_bytes

# csrc/table.h: Slot
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
STATE0 = tl.constexpr(2)
STATE1 = tl.constexpr(3)
STATE2 = tl.constexpr(4)
MASTER = tl.constexpr(5)
EMA = tl.constexpr(6)
COPY = tl.constexpr(7)
STEP = tl.constexpr(8)
SCALE0 = tl.constexpr(9)
SCALE1 = tl.constexpr(10)
SCALE2 = tl.constexpr(11)
PLACE = tl.constexpr(12)
RUN = tl.constexpr(13)
PITCH = tl.constexpr(14)

HYPERS = tl.constexpr(8)  # hyperparameters a rule may name
STORAGE_BITS = tl.constexpr(4)  # bits per slot in the storage column
STORAGE_MASK = tl.constexpr(15)
DENSE_LAYOUT = tl.constexpr(-1)  # every slot dense and in the same order: element i is at address + i·size


class Slots(NamedTuple):
    """One value for each slot that has an element for each of the tensor's: address, storage or offset."""

    param: Any
    grad: Any
    state0: Any
    state1: Any
    state2: Any
    master: Any
    ema: Any
    copy: Any


@triton.jit
def all_slots(x):
    """The same value for every slot."""
    return Slots(x, x, x, x, x, x, x, x)


@triton.jit
def storage_of(packed, slot, S: tl.constexpr):
    """The storage of one slot: a constant where the variant fixes it, else what the row says."""
    if S == ANY_STORAGE:
        storage = ((packed >> (STORAGE_BITS * slot)) & STORAGE_MASK).to(tl.int32)
    else:
        storage = tl.full([], S, tl.int32)
    return storage


@triton.jit
def slot_storages(packed, PS: tl.constexpr, SS: tl.constexpr):
    """The storages of a row; PS and SS are the variant's, of parameter and gradient and of the states."""
    return Slots(
        storage_of(packed, PARAM, PS),
        storage_of(packed, GRAD, PS),
        storage_of(packed, STATE0, SS),
        storage_of(packed, STATE1, SS),
        storage_of(packed, STATE2, SS),
        storage_of(packed, MASTER, ANY_STORAGE),
        storage_of(packed, EMA, SS),
        storage_of(packed, COPY, ANY_STORAGE),
    )


@triton.jit
def slot_addresses(address, grads, rows, row, MASTERED: tl.constexpr, SIDE: tl.constexpr):
    """The addresses of a row, 0 where the tensor lacks the slot. MASTERED, SIDE: the variant admits those slots."""
    column = address + row
    master = tl.full([], 0, tl.int64)
    ema = master
    copy = master
    if MASTERED:
        master = tl.load(column + MASTER * rows)
    if SIDE:
        ema = tl.load(column + EMA * rows)
        copy = tl.load(column + COPY * rows)
    return Slots(
        tl.load(column + PARAM * rows),
        tl.load(grads + row),
        tl.load(column + STATE0 * rows),
        tl.load(column + STATE1 * rows),
        tl.load(column + STATE2 * rows),
        master,
        ema,
        copy,
    )


@triton.jit
def block_scales(address, rows, row, packed, begin, t, BLOCKS: tl.constexpr):
    """What codes and random rounding need: addresses of scales, from a chunk's first block on, and how blocks lie."""
    none = tl.full([], 0, tl.int64)
    bits = tl.full([], 0, tl.int32)
    key = tl.full([], 0, tl.int64)
    at_random = tl.full([], 0, tl.int1)
    places = (none, none, none)
    scales = (none, none, none)
    if BLOCKS:
        column = address + row
        mode = packed >> 32
        bits = (mode & 15).to(tl.int32)
        key = (mode >> 8) & 0xFFFFFF
        at_random = (mode & 16) != 0
        places = tl.load(column + PLACE * rows), tl.load(column + RUN * rows), tl.load(column + PITCH * rows)
        skipped = (begin >> bits) * 4
        scales = (
            tl.load(column + SCALE0 * rows) + skipped,
            tl.load(column + SCALE1 * rows) + skipped,
            tl.load(column + SCALE2 * rows) + skipped,
        )
    return scales, begin, bits, t, at_random, key, places


@triton.jit
def blocks_from(blocks, start):
    """The same from some whole block of the chunk on."""
    scales, begin, bits, t, at_random, key, places = blocks
    scale0, scale1, scale2 = scales  # in two lines: Triton 3.6 knows no target within another
    skipped = (start >> bits) * 4
    scales = (scale0 + skipped, scale1 + skipped, scale2 + skipped)
    return scales, begin + start, bits, t, at_random, key, places


@triton.jit
def place_of(places, element):
    """The place of an element in the whole of a tensor that lies over devices: csrc/table.h, kPlace."""
    first, run, pitch = places
    whole = tl.maximum(run, 1)
    return first + tl.where(run == 0, element, element // whole * pitch + element % whole)


@triton.jit
def advance(address, storage, elements):
    """The address of an element of a slot; 0, an absent slot, stays 0."""
    return tl.where(address != 0, address + elements * storage_bytes(storage).to(tl.int64), 0)


@triton.jit
def advance_all(a, storages, elements):
    """The address of an element in every slot."""
    return Slots(
        advance(a.param, storages.param, elements),
        advance(a.grad, storages.grad, elements),
        advance(a.state0, storages.state0, elements),
        advance(a.state1, storages.state1, elements),
        advance(a.state2, storages.state2, elements),
        advance(a.master, storages.master, elements),
        advance(a.ema, storages.ema, elements),
        advance(a.copy, storages.copy, elements),
    )


@triton.jit
def all_aligned(a):
    """True where every slot lies on 16 bytes. A slot that is absent is never accessed: it counts."""
    return ((a.param | a.grad | a.state0 | a.state1 | a.state2 | a.master | a.ema | a.copy) & 15) == 0


@triton.jit
def is_double(address, storage):
    """True where the slot is there and float64."""
    return (address != 0) & (storage == FLOAT64)


@triton.jit
def computes_in_double(a, s):
    """True where the tensor is computed in float64: any of its slots is float64."""
    return (
        is_double(a.param, s.param)
        | is_double(a.grad, s.grad)
        | is_double(a.state0, s.state0)
        | is_double(a.state1, s.state1)
        | is_double(a.state2, s.state2)
        | is_double(a.ema, s.ema)
        | is_double(a.copy, s.copy)
    )


@triton.jit
def strided_offsets(layout, i):
    """Where element i of a tensor lies in each slot, in elements from the slot's address.

    The layout is ndim, then sizes[ndim], then strides[ndim] of each slot.
    """
    ndim = tl.load(layout).to(tl.int32)
    zero = i * 0
    offsets = all_slots(zero)
    for k in range(0, ndim):
        dim = ndim - 1 - k
        size = tl.load(layout + 1 + dim)
        stride = layout + 1 + ndim + dim
        coordinate = i % size
        i = i // size
        offsets = Slots(
            offsets.param + coordinate * tl.load(stride + PARAM * ndim),
            offsets.grad + coordinate * tl.load(stride + GRAD * ndim),
            offsets.state0 + coordinate * tl.load(stride + STATE0 * ndim),
            offsets.state1 + coordinate * tl.load(stride + STATE1 * ndim),
            offsets.state2 + coordinate * tl.load(stride + STATE2 * ndim),
            offsets.master + coordinate * tl.load(stride + MASTER * ndim),
            offsets.ema + coordinate * tl.load(stride + EMA * ndim),
            offsets.copy + coordinate * tl.load(stride + COPY * ndim),
        )
    return offsets


@triton.jit
def read_hyper(values, tensors, storages, at):
    """One hyperparameter of a group, in float64; one that is a tensor is read now."""
    address = tl.load(tensors + at)
    value = tl.load(values + at)
    if address != 0:
        value = load_scalar(address, tl.load(storages + at))
    return value


@triton.jit
def read_hypers(values, tensors, storages, group):
    """The hyperparameters of a group, in the order of the rule's enum Hyper."""
    at = group * HYPERS
    return (
        read_hyper(values, tensors, storages, at),
        read_hyper(values, tensors, storages, at + 1),
        read_hyper(values, tensors, storages, at + 2),
        read_hyper(values, tensors, storages, at + 3),
        read_hyper(values, tensors, storages, at + 4),
        read_hyper(values, tensors, storages, at + 5),
        read_hyper(values, tensors, storages, at + 6),
        read_hyper(values, tensors, storages, at + 7),
    )


@triton.jit
def no_hypers():
    """What a rule is built from before the first chunk."""
    zero = tl.full([], 0.0, tl.float64)
    return zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def steps_taken(address):
    """The step slot's content, 0 for a tensor without one: its rule needs no count."""
    return tl.load(pointer(address, tl.float32, False), mask=address != 0, other=0.0)


@triton.jit
def next_step(taken):
    """The count of the step being taken, from 1."""
    return taken.to(tl.int64) + 1


@triton.jit
def advance_steps(addresses, grads, rows, BLOCK: tl.constexpr):
    """What the last to finish does: every tensor that had a gradient has taken a step."""
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        exists = row < rows
        address = tl.load(addresses + row, mask=exists, other=0)
        gradient = tl.load(grads + row, mask=exists, other=0)
        stepped = (address != 0) & (gradient != 0)
        step = pointer(address, tl.float32, False)
        tl.store(step, tl.load(step, mask=stepped, other=0.0) + 1.0, mask=stepped)
