"""What a report says of each leaf, twin of csrc/report.h: terms in a program's own memory, then joined."""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .reduce import CHAINS, JOINED, join_halves, reported_chains
from .storage import pointer

REPORTS = tl.constexpr(128)  # csrc/phase.h: PhaseFlag
COLUMNS = tl.constexpr(5)  # csrc/report.h: ReportColumn


@triton.jit
def no_report():
    """Stands where nothing is reported."""
    zero = tl.full([], 0, tl.int64)
    return zero, zero, zero, zero


@triton.jit
def tally_block(terms, place, mask, grad, before, after, stored, update):
    """What a block has of its leaf: gradient, parameter and update, of which the squares count, and both events."""
    lost = (before == after) & (update != 0.0)
    at = terms + place
    tl.store(at, grad.to(tl.float64), mask=mask)
    tl.store(at + JOINED, stored.to(tl.float64), mask=mask)
    tl.store(at + 2 * JOINED, update.to(tl.float64), mask=mask)
    tl.store(at + 3 * JOINED, tl.where(grad - grad == 0.0, 0.0, 1.0).to(tl.float64), mask=mask)
    tl.store(at + 4 * JOINED, tl.where(lost, 1.0, 0.0).to(tl.float64), mask=mask)


@triton.jit
def mark_report(report, leaves, skipped):
    """Says behind the columns whether the last launch was skipped."""
    tl.store(pointer(report.to(tl.int64), tl.float64, False) + COLUMNS * leaves.to(tl.int64), skipped)


@triton.jit
def write_leaf(terms, size, columns, leaves, index, C: tl.constexpr):
    """Joins the terms of a leaf of some size, and writes them down as that leaf of the table."""
    tl.debug_barrier()
    k = tl.arange(0, JOINED)
    for column in range(0, COLUMNS):  # an event is the square of 1
        x = tl.load(terms + column * JOINED + k, mask=k < size, other=0.0)
        tl.store(columns + column * leaves + index, join_halves(reported_chains(x, C), False, CHAINS, 6))
    tl.debug_barrier()
