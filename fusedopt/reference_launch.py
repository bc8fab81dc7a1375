"""A launch in plain torch, tensor by tensor, with the formulas of fusedopt.reference."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from . import blocks, exact, reference
from .phase import EMA, MEASURES, UPDATES
from .precision import ROUNDING_KEY, coded_states, master_key, recoded, rounds_at_random, scale_key, widened
from .rows import Row
from .sharded import all_places, local
from .table import Table, real_view


@torch.no_grad()
def launch(table: Table, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """One step of every tensor of a table that has a gradient."""
    if found_inf is not None and float(found_inf) != 0.0:
        _skip(table)
        return
    scale = None if grad_scale is None else float(grad_scale)
    if table.phase.reads_twice and table.stage != UPDATES:
        _measure(table, scale)
    if table.stage == MEASURES:
        return
    norms = _write_norms(table) if table.phase.reads_twice else []
    if any(map(table.phase.refuses, norms)):
        _skip(table)
        return
    for row in table.live_rows():
        _step_row(table, row, norms, scale)
    _mark_report(table, skipped=False)


def _step_row(table: Table, row: Row, norms: list[float], scale: float | None) -> None:
    group = table.groups[row.group]
    step = 1 if row.step is None else int(row.step) + 1
    dtype = _row_dtype(table, row)
    assert row.gradient is not None  # a live row has one
    grad = real_view(local(row.gradient)).to(dtype)
    values = _read(table, row, dtype)
    before = values.pop("param").clone()  # what is computed in may be the parameter itself
    if table.phase.max_grad_norm is None:
        updates = table.rule.update(before, grad, values, step, group, scale)
    else:
        norm = norms[row.group if table.phase.norm_by_group else 0]
        coefficient = reference.clip_coefficient(norm, table.phase.max_norm_of(group))
        clipped = reference.clipped(grad, coefficient, scale)
        updates = table.rule.update(before, clipped, values, step, group, None)
    update, exact_param = updates["update"], updates["param"]
    _write(table, row, step, updates)
    if table.phase.report:
        after = exact_param if master_key(row.param, group) else real_view(local(row.param)).to(dtype)
        _write_report(table, row, reference.clipped(grad, None, scale), update, before, after)
    if table.phase.flags:
        _write_sides(table, row, step, dtype)
    if row.step is not None:
        row.step.add_(1)


def _stored(table: Table, row: Row) -> dict[str, Tensor]:
    """A row's parameter and states, by the names of the rule."""
    states = {name: row.states[name] for name in table.rule.states_of(table.groups[row.group])}
    return {name: local(tensor) for name, tensor in {"param": row.param, **states}.items()}


def _read(table: Table, row: Row, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a row's parameter and states stand for."""
    group = table.groups[row.group]
    stored = _stored(table, row)
    values = {name: real_view(tensor).to(dtype) for name, tensor in stored.items()}
    coded = coded_states(table.rule, row.param, group)
    values |= {name: local(widened(row.states, name, group)) for name in coded}
    key = master_key(row.param, group)
    if key is not None:
        values["param"] = exact.join(stored["param"], key, local(row.states[key]))
    return values


def _write(table: Table, row: Row, step: int, updates: dict[str, Tensor | None]) -> None:
    """Stores what became of a row's parameter and states; leaves in the updates what was stored."""
    group = table.groups[row.group]
    stored = _stored(table, row)
    key = master_key(row.param, group)
    if key is not None:
        _keep_exact(stored["param"], key, local(row.states[key]), updates)
    if rounds_at_random(row.param, group):
        _round_at_random(table, row, step, updates)
    for name in coded_states(table.rule, row.param, group):
        _keep_codes(table, row, name, step, updates)
    for name, update in updates.items():
        if name in stored and update is not None:
            real_view(stored[name]).copy_(update)


def _row_dtype(table: Table, row: Row) -> torch.dtype:
    """What the kernels compute a row in: float64 where any of its tensors is, else float32."""
    states = [row.states[name] for name in (*table.rule.states_of(table.groups[row.group]), *table.phase.states)]
    tensors = [row.param, row.gradient, row.copy, *states]
    dtypes = {local(tensor).dtype for tensor in tensors if tensor is not None}
    return torch.float32 if dtypes.isdisjoint((torch.float64, torch.complex128)) else torch.float64


def _mark_report(table: Table, *, skipped: bool) -> None:
    if table.phase.report and table.last_was_skipped is not None:
        table.last_was_skipped.fill_(float(skipped))


def _skip(table: Table) -> None:
    """What a skipped step does: nothing, or it clears the gradients."""
    _mark_report(table, skipped=True)
    for row in table.live_rows() if table.phase.zero_grads else ():
        if row.param.grad is not None:
            local(row.param.grad).zero_()


def _measure(table: Table, scale: float | None) -> None:
    """Writes down what the gradients of each part of a table come to."""
    sums = []
    for row in table.rows:
        grad = None if row.param.grad is None else row.gradient
        if grad is None:
            sums.append(torch.zeros(row.leaves, dtype=torch.float64, device="cpu"))
            continue
        flat = _flat(row, real_view(local(grad)))
        flat = reference.clipped(flat.to(_row_dtype(table, row)), None, scale)
        sums.append(reference.leaf_sums(flat, largest=table.phase.is_largest).cpu())
    bounds = [*table.parts, len(sums)]
    nothing = torch.zeros(0, dtype=torch.float64, device="cpu")
    joined = [
        reference.joined_leaves(torch.cat(sums[first:last] or [nothing]), largest=table.phase.is_largest)
        for first, last in pairwise(bounds)
    ]
    assert table.lasting.leaf_sums is not None  # a table whose norm is wanted has room for it
    assert table.lasting.joined is not None
    table.lasting.leaf_sums[: table.core.leaves].copy_(torch.cat(sums))
    table.lasting.joined.copy_(torch.stack(joined))


def _write_norms(table: Table) -> list[float]:
    """The norms that a step goes by; written down, and the step counted where it is to be skipped."""
    assert table.lasting.joined is not None  # as above
    assert table.results is not None
    joined = table.lasting.joined[: table.norms].tolist()
    norms = [reference.norm_of(one, largest=table.phase.is_largest) for one in joined]
    table.results[1:] = torch.tensor(norms, dtype=torch.float64, device="cpu")
    table.results[0] += float(any(map(table.phase.refuses, norms)))
    return norms


def _flat(row: Row, values: Tensor) -> Tensor:
    """Values of a row's shape in the order in which its leaves are counted."""
    if not row.is_dense:
        return values.reshape(-1)
    like = torch.empty_like(real_view(local(row.param)), dtype=values.dtype)
    return like.copy_(values).as_strided((values.numel(),), (1,))


def _write_report(
    table: Table, row: Row, grad: Tensor, update: Tensor | None, before: Tensor, after: Tensor | None
) -> None:
    """The columns of csrc/report.h for one row, after its update."""
    assert update is not None  # every rule gives it
    assert table.partials is not None  # a table that reports has room for it
    param = real_view(local(row.param)).to(before.dtype)
    flat = (_flat(row, values) for values in (grad, param, update))
    found = reference.leaf_report(*flat, lost=_flat(row, (before == after) & (update != 0)))
    here = next(leaves for other, leaves in table.rows_with_leaves() if other is row)
    table.partials[:, here] = found


def _write_sides(table: Table, row: Row, step: int, dtype: torch.dtype) -> None:
    """Average, copy and cleared gradient of one row, after its update."""
    param = real_view(local(row.param))
    if EMA in table.phase.states:
        ema = real_view(local(row.states[EMA]))
        assert table.ema_decay is not None  # where averages are kept
        decay = reference.decay_at(float(table.ema_decay), step, warms_up=table.phase.ema_warmup)
        ema.copy_(reference.average(ema.to(dtype), param.to(dtype), step=step, decay=decay))
    if row.copy is not None:
        real_view(local(row.copy)).copy_(param.to(dtype))
    if table.phase.zero_grads and row.gradient is not None:
        local(row.gradient).zero_()


def _keep_exact(param: Tensor, key: str, kept: Tensor, updates: dict[str, Tensor | None]) -> None:
    """Writes what is kept beside a parameter, and leaves in the updates what it is stored as."""
    assert updates["param"] is not None  # every rule updates it
    updates["param"], rest = exact.split(updates["param"], key, param.dtype)
    kept.copy_(rest)


def _round_at_random(table: Table, row: Row, step: int, updates: dict[str, Tensor | None]) -> None:
    """Leaves in the updates a parameter that its dtype holds exactly."""
    param = updates["param"]
    assert param is not None  # every rule updates it
    key = int(table.state_of(row)[ROUNDING_KEY])
    updates["param"] = blocks.at_random(param, key, step, row.param.dtype, all_places(row.param))


def _keep_codes(table: Table, row: Row, name: str, step: int, updates: dict[str, Tensor | None]) -> None:
    """Writes a state's scales, and leaves in the updates its codes."""
    value = updates[name]
    assert value is not None  # every rule updates the states that its groups need
    made = recoded(table.rule, table.groups[row.group], name, value, step)
    updates[name] = made[name]
    scales = made[scale_key(name)]
    local(row.states[scale_key(name)]).view(-1)[: scales.numel()].copy_(scales)
