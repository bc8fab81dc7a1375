"""What happens to one chunk, and the persistent kernel, twin of csrc/sweep.h and csrc/cuda/kernel.h.

Every program takes chunks in turn; the last to finish advances the step counts. The rule and the variant are
compile-time arguments; everything that changes from step to step is read at run time: nothing recompiles.
"""

# mypy: ignore-errors
# ruff: noqa: N803
# Kernel code: its types are Triton's, and Triton writes compile-time arguments in capitals.

import triton
import triton.language as tl

from .blocks import MOST_BLOCK, at_random_16, decode_codes, fetch_codes, keep_codes, random_stream
from .master import exact_param, fetch_master, keep_master, stored_param
from .phase import CLEARS_GRADS, rounded, side_of, sweep_sides
from .reduce import CLIPS, JOINED, SKIPS_NONFINITE, coefficient_of, norm_of
from .report import COLUMNS, REPORTS, mark_report, no_report, tally_block, write_leaf
from .rules import MAXIMIZE, divide
from .storage import ANY_STORAGE, decode, fetch, only_if, pointer, storage_bytes, store
from .table import (
    DENSE_LAYOUT,
    GRAD,
    STEP,
    advance_all,
    advance_steps,
    all_aligned,
    all_slots,
    block_scales,
    blocks_from,
    computes_in_double,
    next_step,
    no_hypers,
    place_of,
    read_hypers,
    slot_addresses,
    slot_storages,
    steps_taken,
    storage_of,
    strided_offsets,
)


@triton.jit
def unscaled(g, scale, unscale):
    """A gradient divided by its scale, where it has one."""
    if unscale:
        g = divide(g, scale.to(g.dtype))
    return g


@triton.jit
def prepare_gradient(g, negate, clips, coefficient, SIDE: tl.constexpr):
    """What becomes of an unscaled gradient before the rule sees it."""
    if SIDE and clips:
        g = g * coefficient.to(g.dtype)
    return tl.where(negate, g * -1.0, g)  # Triton's own minus is 0 − g, which loses the sign of zero


@triton.jit
def sweep_block(
    address,  # of each slot
    at,  # indices of the block's elements in each slot
    mask,
    storage,
    scalars,
    gradient,
    side,
    blocks,
    terms,  # where a report's terms of the leaf go, or 0
    place,  # of the block's elements in their chunk, which is a leaf where leaves are reported
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PS: tl.constexpr,
    SS: tl.constexpr,
    MASTERED: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    REPORT: tl.constexpr,
    C: tl.constexpr,
    LENGTH: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One block of elements: load all slots, decode, unscale, rule, store."""
    has0 = only_if(address.state0 != 0, mask)
    has1 = only_if(address.state1 != 0, mask)
    has2 = only_if(address.state2 != 0, mask)
    p_bits = fetch(address.param, at.param, mask, storage.param, PS, C, ALIGNED)
    g_bits = fetch(address.grad, at.grad, mask, storage.grad, PS, C, ALIGNED)
    x_bits = fetch(address.state0, at.state0, has0, storage.state0, SS, C, ALIGNED)
    if STATES > 1:
        y_bits = fetch(address.state1, at.state1, has1, storage.state1, SS, C, ALIGNED)
    if STATES > 2:
        z_bits = fetch(address.state2, at.state2, has2, storage.state2, SS, C, ALIGNED)
    if BLOCKS:
        scales, begin, bits, t, at_random, key, places = blocks
        scale0, scale1, scale2 = scales  # in two lines: Triton 3.6 knows no target within another
        x_codes = fetch_codes(address.state0, at.state0, has0, storage.state0, scale0, place, bits, ALIGNED)
        if STATES > 1:
            y_codes = fetch_codes(address.state1, at.state1, has1, storage.state1, scale1, place, bits, ALIGNED)
        if STATES > 2:
            z_codes = fetch_codes(address.state2, at.state2, has2, storage.state2, scale2, place, bits, ALIGNED)
    if MASTERED:
        m_bits = fetch_master(address.master, at.master, mask, storage.master, ALIGNED)
    p = decode(p_bits, storage.param, PS, C)
    if MASTERED:
        p = exact_param(p, m_bits, address.master, storage.master, storage.param)
    g = decode(g_bits, storage.grad, PS, C)
    x = decode(x_bits, storage.state0, SS, C)
    y = decode(y_bits, storage.state1, SS, C) if STATES > 1 else x
    z = decode(z_bits, storage.state2, SS, C) if STATES > 2 else x
    if BLOCKS:
        x = decode_codes(x, x_codes, storage.state0)
        if STATES > 1:
            y = decode_codes(y, y_codes, storage.state1)
        if STATES > 2:
            z = decode_codes(z, z_codes, storage.state2)
    scale, unscale, negate, clips, coefficient = gradient
    grad = unscaled(g, scale, unscale)
    g = prepare_gradient(grad, negate, clips, coefficient, SIDE)
    before = p
    p, x, y, z, update = UPDATE(p, g, x, y, z, scalars)
    after = p
    if MASTERED:
        keep_master(address.master, at.master, mask, p, storage.master, storage.param, ALIGNED)
        p = stored_param(p, address.master, storage.master)
    if BLOCKS and at_random:
        p = at_random_16(p, random_stream(place_of(places, begin + place), key, t), storage.param)
    store(address.param, at.param, mask, p, storage.param, PS, C, ALIGNED)
    store(address.state0, at.state0, has0, x, storage.state0, SS, C, ALIGNED)
    if STATES > 1:
        store(address.state1, at.state1, has1, y, storage.state1, SS, C, ALIGNED)
    if STATES > 2:
        store(address.state2, at.state2, has2, z, storage.state2, SS, C, ALIGNED)
    if BLOCKS:
        keep_codes(x, address.state0, at.state0, has0, storage.state0, scale0, blocks, place, LENGTH, ALIGNED)
        if STATES > 1:
            keep_codes(y, address.state1, at.state1, has1, storage.state1, scale1, blocks, place, LENGTH, ALIGNED)
        if STATES > 2:
            keep_codes(z, address.state2, at.state2, has2, storage.state2, scale2, blocks, place, LENGTH, ALIGNED)
    if REPORT and terms != 0:
        stored = rounded(p, storage.param, C)
        if MASTERED:
            after = tl.where(address.master != 0, after, stored)
        else:
            after = stored
        tally_block(pointer(terms, tl.float64, False), place, mask, grad, before, after, stored, update)
    if SIDE:
        sweep_sides(p, address, at, mask, storage, side, PS, SS, C, ALIGNED)


@triton.jit
def sweep_chunk(
    address,  # of each slot: of the chunk's element 0 where dense, of the tensor's where strided
    storage,
    layouts,
    layout,
    begin,  # of the chunk in its tensor, in elements
    size,
    scalars,
    gradient,
    side,
    blocks,
    terms,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PS: tl.constexpr,
    SS: tl.constexpr,
    MASTERED: tl.constexpr,
    STRIDED: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    REPORT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Vectors from the parameter's first 16-byte boundary to its last whole vector, then both sides of that.

    Where that boundary does not suit every slot, and in strided tensors, all elements are at the sides. BLOCKS of
    codes are counted from element 0 and never split.
    """
    GRAIN: tl.constexpr = MOST_BLOCK if BLOCKS else WIDTH  # noqa: N806
    misalignment = (address.param & 15).to(tl.int32)
    boundary = tl.where(misalignment == 0, 0, (16 - misalignment) // storage_bytes(storage.param))
    by_vector = (layout == DENSE_LAYOUT) & all_aligned(advance_all(address, storage, boundary))
    if BLOCKS:
        boundary = 0
        by_vector = (layout == DENSE_LAYOUT) & all_aligned(address)
    head = tl.where(by_vector, tl.minimum(boundary, size), 0)
    count = tl.where(by_vector, tl.maximum(size - boundary, 0) // GRAIN, 0) * GRAIN
    address = advance_all(address, storage, head)
    # Blocks advance by the address, not by the index, which leaves a thread one offset a slot to keep.
    for start in range(0, count, BLOCK):
        i = tl.arange(0, BLOCK)
        block = advance_all(address, storage, start)
        mask = i < count - start
        sweep_block(
            block, all_slots(i), mask, storage, scalars, gradient, side, blocks, terms, head + start + i,
            UPDATE, STATES, PS, SS, MASTERED, SIDE, BLOCKS, REPORT, C, BLOCK, True,
        )  # fmt: skip
    for edge in range(0, 2):
        first = tl.where(edge == 0, 0, head + count)
        last = tl.where(edge == 0, head, size)
        for start in range(first, last, EDGES):
            i = tl.arange(0, EDGES)
            at = all_slots(i)
            offset = start - head
            if STRIDED:
                at = all_slots(i.to(tl.int64))
                if layout != DENSE_LAYOUT:
                    at = strided_offsets(layouts + layout, begin + start + i)
                    offset = 0
            block = advance_all(address, storage, offset)
            mask = i < last - start
            sweep_block(
                block, at, mask, storage, scalars, gradient, side, blocks, terms, start + i,
                UPDATE, STATES, PS, SS, MASTERED, SIDE, BLOCKS, REPORT, C, EDGES, False,
            )  # fmt: skip


@triton.jit
def report_chunk(
    address,
    storage,
    layouts,
    layout,
    begin,
    size,
    scalars,
    gradient,
    side,
    blocks,
    report,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PS: tl.constexpr,
    SS: tl.constexpr,
    MASTERED: tl.constexpr,
    STRIDED: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    REPORT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A chunk, leaf by leaf where each may be reported: a second loop for others would take minutes to compile."""
    terms, columns, leaves, first_leaf = report
    if REPORT:
        for start in range(0, size, JOINED):
            count = tl.minimum(size - start, JOINED)
            leaf = advance_all(address, storage, tl.where(layout == DENSE_LAYOUT, start, 0))
            within = blocks
            if BLOCKS:
                within = blocks_from(blocks, start)
            sweep_chunk(
                leaf, storage, layouts, layout, begin + start, count, scalars, gradient, side, within, terms,
                UPDATE, STATES, PS, SS, MASTERED, STRIDED, SIDE, BLOCKS, REPORT, C, BLOCK, EDGES, WIDTH,
            )  # fmt: skip
            if terms != 0:
                index = first_leaf + (begin + start) // JOINED
                into = pointer(columns, tl.float64, False)
                write_leaf(pointer(terms, tl.float64, False), count, into, leaves, index, C)
    else:
        sweep_chunk(
            address, storage, layouts, layout, begin, size, scalars, gradient, side, blocks, terms,
            UPDATE, STATES, PS, SS, MASTERED, STRIDED, SIDE, BLOCKS, REPORT, C, BLOCK, EDGES, WIDTH,
        )  # fmt: skip


@triton.jit
def clear_all(grads, numel, storage, layout, layouts, rows, chunks, chunk_count, chunk_elements, BLOCK: tl.constexpr):
    """Sets every gradient to 0: what is left of a step that is skipped, where gradients are to be cleared."""
    for c in range(tl.program_id(0), chunk_count.to(tl.int32), tl.num_programs(0)):
        row = tl.load(chunks + 2 * c)
        grad = tl.load(grads + row)
        if grad != 0:
            begin = tl.load(chunks + 2 * c + 1).to(tl.int64) * chunk_elements
            size = tl.minimum(tl.load(numel + row) - begin, chunk_elements).to(tl.int32)
            where = storage_of(tl.load(storage + row), GRAD, ANY_STORAGE)
            lies = tl.load(layout + row)
            for start in range(0, size, BLOCK):
                i = begin + start + tl.arange(0, BLOCK)
                at = i
                if lies != DENSE_LAYOUT:
                    at = strided_offsets(layouts + lies, i).grad
                zero = tl.full([BLOCK], 0.0, tl.float64)
                store(grad, at, i < begin + size, zero, where, ANY_STORAGE, tl.float64, False)


@triton.jit(
    do_not_specialize=[
        "address",
        "grads",
        "numel",
        "group",
        "storage",
        "layout",
        "layouts",
        "rows",
        "chunks",
        "chunk_count",
        "chunk_elements",
        "group_values",
        "group_flags",
        "group_tensors",
        "group_storages",
        "grad_scale",
        "found_inf",
        "arrivals",
        "phase_flags",
        "ema_decay",
        "ema_decay_storage",
        "joined",
        "norms",
        "group_max_norms",
        "leaves",
        "results",
        "first_leaf",
        "report",
        "report_terms",
    ]
)
def sweep(
    address,  # int64 [slots, rows]
    grads,  # int64 [rows], of this step; 0: none, the tensor is skipped and its step does not advance
    numel,  # int64 [rows]
    group,  # int32 [rows]
    storage,  # int64 [rows]: STORAGE_BITS a slot
    layout,  # int32 [rows]: DENSE_LAYOUT, or where the tensor's strided layout starts in `layouts`
    layouts,  # int64
    rows: tl.int64,
    chunks,  # int32 [chunk_count, 2]: tensor, index
    chunk_count: tl.int64,  # less than 2^30, 10^12 elements
    chunk_elements: tl.int64,
    group_values,  # float64 [groups, HYPERS]
    group_flags,  # int32 [groups]
    group_tensors,  # int64 [groups, HYPERS]: address of a hyperparameter that is a tensor, or 0
    group_storages,  # int32 [groups, HYPERS]: and its storage
    grad_scale: tl.int64,  # address of a float32 that gradients are divided by, or 0
    found_inf: tl.int64,  # address of a float32, or 0: nothing at all changes where it is not 0
    arrivals,  # int32 [1]: programs that have finished; the last one advances the steps and sets it back to 0
    phase_flags: tl.int32,  # csrc/phase.h: PhaseFlag
    ema_decay: tl.int64,  # address of the decay of averages, or 0
    ema_decay_storage: tl.int32,
    joined,  # float64 [norms]: what `measure` has found
    norms: tl.int64,
    group_max_norms,  # float64 [groups]: what gradients are clipped to; below 0: they are not
    leaves: tl.int64,  # of the report
    results,  # float64 [1 + norms]: how many launches were skipped, then the norms
    first_leaf,  # int64 [rows]: how many leaves the rows before this one have
    report: tl.int64,  # address of float64 [COLUMNS, leaves]: csrc/report.h; or 0
    report_terms: tl.int64,  # address of float64 [programs, COLUMNS, JOINED]
    SCALARS: tl.constexpr,
    UPDATE: tl.constexpr,
    STATES: tl.constexpr,
    PS: tl.constexpr,
    SS: tl.constexpr,
    MASTERED: tl.constexpr,
    STRIDED: tl.constexpr,
    DOUBLE: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCKS: tl.constexpr,
    REPORT: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Updates every tensor that has a gradient.

    The rule is SCALARS, UPDATE and STATES, the number of its states. The variant is PS and SS, the storage of
    parameter and gradient and of the states (ANY_STORAGE: what the table says), STRIDED and DOUBLE: strided
    tensors and float64 are admitted; MASTERED: something is kept beside 16-bit parameters; SIDE: there are outputs
    beside the update; BLOCKS: states may be codes of 8 bits; REPORT: numbers about every leaf are among the outputs.
    A program takes BLOCK elements at a time, in vectors of WIDTH, where it can, else EDGES; the two differ, or the
    compiler lays both out alike and shuffles through shared memory.
    """
    admitted = tl.load(pointer(found_inf.to(tl.int64), tl.float32, False), mask=found_inf != 0, other=0.0) == 0.0
    clips = SIDE and (phase_flags & CLIPS) != 0
    coefficient = tl.full([], 1.0, tl.float64)
    if SIDE:  # noqa: SIM102 - a branch of the compiler around one of the kernel
        if admitted & ((phase_flags & (CLIPS | SKIPS_NONFINITE)) != 0):
            for n in range(0, norms.to(tl.int32)):
                norm = norm_of(tl.load(joined + n), phase_flags)
                admitted = admitted & (((phase_flags & SKIPS_NONFINITE) == 0) | (norm - norm == 0.0))
                if tl.program_id(0) == 0:
                    tl.store(results + 1 + n, norm)
            if tl.program_id(0) == 0:
                tl.store(results, tl.load(results) + tl.where(admitted, 0.0, 1.0))
    if admitted:
        unscale = grad_scale != 0
        scale = tl.load(pointer(grad_scale.to(tl.int64), tl.float32, False), mask=unscale, other=1.0)
        rows = rows.to(tl.int64)
        # The rule that this program has built serves as long as neither group nor step changes.
        built_group = tl.full([], -1, tl.int32)
        built_steps = tl.full([], -1.0, tl.float32)
        flags = tl.full([], 0, tl.int32)
        scalars = SCALARS(no_hypers(), flags, next_step(built_steps), tl.float32)
        for c in range(tl.program_id(0), chunk_count.to(tl.int32), tl.num_programs(0)):
            chunk = chunks + 2 * c
            row = tl.load(chunk)
            if tl.load(grads + row) != 0:
                group_row = tl.load(group + row)
                steps = steps_taken(tl.load(address + STEP * rows + row))
                if (group_row != built_group) | (steps != built_steps):
                    built_group = group_row
                    built_steps = steps
                    flags = tl.load(group_flags + group_row)
                    hypers = read_hypers(group_values, group_tensors, group_storages, group_row)
                    scalars = SCALARS(hypers, flags, next_step(steps), tl.float32)
                    if SIDE:  # noqa: SIM102 - a branch of the compiler around one of the kernel
                        if clips:
                            coefficient = coefficient_of(joined, group_row, group_max_norms, phase_flags)
                gradient = (scale, unscale, (flags & MAXIMIZE) != 0, clips, coefficient)
                begin = tl.load(chunk + 1).to(tl.int64) * chunk_elements
                size = tl.minimum(tl.load(numel + row) - begin, chunk_elements).to(tl.int32)
                at = tl.load(layout + row)
                packed = tl.load(storage + row)
                s = slot_storages(packed, PS, SS)
                a = slot_addresses(address, grads, rows, row, MASTERED, SIDE)
                a = advance_all(a, s, tl.where(at == DENSE_LAYOUT, begin, 0))
                t = next_step(steps)
                blocks = block_scales(address, rows, row, packed, begin, t, BLOCKS)
                told = no_report()
                if REPORT and (phase_flags & REPORTS) != 0:
                    terms = report_terms.to(tl.int64) + tl.program_id(0).to(tl.int64) * (8 * COLUMNS * JOINED)
                    told = terms, report.to(tl.int64), leaves.to(tl.int64), tl.load(first_leaf + row)
                if DOUBLE and computes_in_double(a, s):
                    hypers = read_hypers(group_values, group_tensors, group_storages, group_row)
                    exact = SCALARS(hypers, flags, next_step(steps), tl.float64)
                    exact_side = side_of(phase_flags, ema_decay, ema_decay_storage, t, tl.float64, SIDE)
                    report_chunk(
                        a, s, layouts, at, begin, size, exact, gradient, exact_side, blocks, told,
                        UPDATE, STATES, PS, SS, False, STRIDED, SIDE, False, REPORT,
                        tl.float64, BLOCK // 2, EDGES // 2 if BLOCKS else EDGES, WIDTH,
                    )  # fmt: skip
                else:
                    side = side_of(phase_flags, ema_decay, ema_decay_storage, t, tl.float32, SIDE)
                    report_chunk(
                        a, s, layouts, at, begin, size, scalars, gradient, side, blocks, told,
                        UPDATE, STATES, PS, SS, MASTERED, STRIDED, SIDE, BLOCKS, REPORT,
                        tl.float32, BLOCK, EDGES, WIDTH,
                    )  # fmt: skip
        # Every thread has read the step counts it needs before the last program to arrive writes them.
        tl.debug_barrier()
        if tl.atomic_add(arrivals, 1) == tl.num_programs(0) - 1:
            advance_steps(address + STEP * rows, grads, rows, EDGES)
            tl.store(arrivals, 0)
            if REPORT and (phase_flags & REPORTS) != 0:
                mark_report(report, leaves, 0.0)
    else:
        if REPORT and (phase_flags & REPORTS) != 0:
            mark_report(report, leaves, 1.0)
        if SIDE and (phase_flags & CLEARS_GRADS) != 0:
            clear_all(grads, numel, storage, layout, layouts, rows, chunks, chunk_count, chunk_elements, EDGES)
