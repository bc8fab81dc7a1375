"""The norm of all gradients, twin of csrc/rules/reduce.h and csrc/norm.h: a launch of its own before the update's.

A spin barrier between two passes needs all programs to run at once, which an ordinary launch does not promise. So the
first launch joins every leaf, its last program to finish the leaves of every norm.
"""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .rules import divide, maximum, square_root
from .storage import ANY_STORAGE, decode, fetch, pointer
from .table import DENSE_LAYOUT, computes_in_double, slot_addresses, slot_storages, strided_offsets

# csrc/rules/reduce.h
JOINED = tl.constexpr(2048)
ROW = tl.constexpr(16)
CHAIN = tl.constexpr(32)
CHAINS = tl.constexpr(64)
LEAST_HELD = tl.constexpr(2.0**-100)  # of float32
MOST_HELD = tl.constexpr(3.4028234663852886e38)

# csrc/phase.h: PhaseFlag
CLIPS = tl.constexpr(16)
LARGEST_NORM = tl.constexpr(32)
SKIPS_NONFINITE = tl.constexpr(64)
NORMS_BY_GROUP = tl.constexpr(256)


@triton.jit
def join(one, other, largest):
    """The sum, or the larger of two: NaN if either is NaN."""
    return tl.where(largest, maximum(one, other), one + other)


@triton.jit
def join_halves(x, largest, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Joins COUNT = 2^LEVELS values: value k with value k + half, for every k below half, until one is left."""
    for level in tl.static_range(LEVELS):
        # Not split and joined: Triton 3.6 then lets every thread hold the whole leaf, 38 KB of local memory each.
        halves = tl.reshape(x, [2, COUNT // 2 >> level])
        x = tl.where(largest, tl.reduce(halves, 0, maximum), tl.sum(halves, 0))
    return tl.sum(x)


@triton.jit
def join_rows(joined, rows, largest, COUNT: tl.constexpr):
    """Joins COUNT rows of chains, the last dimension, one after the other to what the chains came to before."""
    if COUNT == 1:
        return join(joined, tl.reshape(rows, [CHAINS]), largest)
    else:  # noqa: RET505 - the compiler looks at one branch only, where the other is an else
        low, high = tl.split(tl.trans(tl.reshape(rows, [CHAINS, 2, COUNT // 2]), (0, 2, 1)))
        joined = join_rows(joined, low, largest, COUNT // 2)
        return join_rows(joined, high, largest, COUNT // 2)


@triton.jit
def chains_of(terms, largest):
    """What the chains of a leaf join to, of its 2,048 terms."""
    rows = tl.trans(tl.reshape(terms, [JOINED // (ROW * CHAIN), CHAIN, ROW]), (0, 2, 1))
    return join_rows(tl.zeros([CHAINS], terms.dtype), tl.reshape(rows, [CHAINS, CHAIN]), largest, CHAIN)


@triton.jit
def join_leaf(terms, largest):
    """What the 2,048 terms of a leaf join to."""
    return join_halves(chains_of(terms, largest), largest, CHAINS, 6)


@triton.jit
def reported_chains(x, C: tl.constexpr):
    """What the squares of elements in float64 come to: added in C, or in float64 where that does not hold the sum."""
    if C == tl.float64:  # noqa: SIM300 - no constant here
        return chains_of(x * x, False)
    else:  # noqa: RET505 - as above
        narrow = x.to(C)
        sums = chains_of(narrow * narrow, False)
        hold = (sums >= LEAST_HELD) & (sums <= MOST_HELD)
        found = sums.to(tl.float64)
        if tl.sum(tl.where(hold, 0, 1)) > 0:
            found = tl.where(hold, found, chains_of(x * x, False))
        return found


@triton.jit
def join_leaves(leaf_sums, begin, end, largest):
    """What the leaves from one to another come to: groups of 2,048 leaves, then the groups."""
    k = tl.arange(0, JOINED)
    groups = tl.zeros([JOINED], tl.float64)
    leaves = (end - begin).to(tl.int32)
    for first in range(0, leaves, JOINED):
        # Past the first cache, which other multiprocessors do not write.
        sums = tl.load(leaf_sums + begin + first + k, mask=first + k < leaves, other=0.0, cache_modifier=".cg")
        groups = tl.where(k == first // JOINED, join_halves(sums, largest, JOINED, 11), groups)
    return join_halves(groups, largest, JOINED, 11)


@triton.jit
def leaf_terms(address, at, mask, storage, scale, unscale, largest, C: tl.constexpr):
    """What the elements of a leaf contribute, in float64."""
    g = decode(fetch(address, at, mask, storage, ANY_STORAGE, C, False), storage, ANY_STORAGE, C)
    if unscale:
        g = divide(g, scale.to(g.dtype))
    g = g.to(tl.float64)
    return tl.where(mask, tl.where(largest, tl.abs(g), g * g), 0.0)


@triton.jit(
    do_not_specialize=[
        "address", "grads", "numel", "storage", "layout", "layouts", "rows", "chunks", "chunk_count",
        "chunk_elements", "grad_scale", "phase_flags", "first_leaf", "leaf_sums",
        "part_leaf", "parts", "joined", "arrivals",
    ]
)  # fmt: skip
def measure(
    address,
    grads,
    numel,
    storage,
    layout,
    layouts,
    rows: tl.int64,
    chunks,
    chunk_count: tl.int64,
    chunk_elements: tl.int64,
    grad_scale: tl.int64,
    phase_flags: tl.int32,
    first_leaf,  # int64 [rows]: how many leaves the rows before this one have
    leaf_sums,  # float64 [leaves]
    part_leaf,  # int64 [parts + 1]: the first leaf of each part
    parts: tl.int64,
    joined,  # float64 [parts]: what the leaves of each part come to, found by the last program to finish
    arrivals,
):
    """Joins the gradients of every leaf, then the leaves of every part. The arguments are those of `sweep`."""
    largest = (phase_flags & LARGEST_NORM) != 0
    unscale = grad_scale != 0
    scale = tl.load(pointer(grad_scale.to(tl.int64), tl.float32, False), mask=unscale, other=1.0)
    rows = rows.to(tl.int64)
    for c in range(tl.program_id(0), chunk_count.to(tl.int32), tl.num_programs(0)):
        row = tl.load(chunks + 2 * c)
        begin = tl.load(chunks + 2 * c + 1).to(tl.int64) * chunk_elements
        end = tl.minimum(tl.load(numel + row), begin + chunk_elements)
        s = slot_storages(tl.load(storage + row), ANY_STORAGE, ANY_STORAGE)
        a = slot_addresses(address, grads, rows, row, True, True)
        lies = tl.load(layout + row)
        in_double = computes_in_double(a, s)
        for start in range(0, (end - begin).to(tl.int32), JOINED):
            i = begin + start + tl.arange(0, JOINED)
            at = i
            if lies != DENSE_LAYOUT:
                at = strided_offsets(layouts + lies, i).grad
            found = tl.full([], 0.0, tl.float64)
            if a.grad != 0:
                if in_double:
                    terms = leaf_terms(a.grad, at, i < end, s.grad, scale, unscale, largest, tl.float64)
                else:
                    terms = leaf_terms(a.grad, at, i < end, s.grad, scale, unscale, largest, tl.float32)
                found = join_leaf(terms, largest)
            tl.store(leaf_sums + tl.load(first_leaf + row) + (begin + start) // JOINED, found)
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1) == tl.num_programs(0) - 1:
        tl.debug_barrier()
        for part in range(0, parts.to(tl.int32)):
            tl.store(
                joined + part, join_leaves(leaf_sums, tl.load(part_leaf + part), tl.load(part_leaf + part + 1), largest)
            )
        tl.store(arrivals, 0)


@triton.jit
def norm_of(joined, phase_flags):
    """The norm whose leaves have come to this."""
    return tl.where((phase_flags & LARGEST_NORM) != 0, joined, square_root(joined))


@triton.jit
def coefficient_of(joined, group, max_norms, phase_flags):
    """What the gradients of a group are multiplied by so that their norm is at most what is wanted."""
    norm = norm_of(tl.load(joined + tl.where((phase_flags & NORMS_BY_GROUP) != 0, group, 0)), phase_flags)
    max_norm = tl.load(max_norms + group)
    coefficient = max_norm / (norm + 1e-6)
    return tl.where((max_norm < 0.0) | (coefficient >= 1.0), 1.0, coefficient)
