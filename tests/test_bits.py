"""The bit contract: every case, on every backend, however it is run, has the bits of the reference."""

from __future__ import annotations

import functools
import itertools
import random
import struct
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.optimizers.adam import RULE as ADAM_RULE

from . import tensors, truth
from .cases import COMBINATIONS, LAYOUTS, RULES, Case, RuleCase, batches, can_have_gradient_of_another_dtype, matrix
from .running import GPU_RUNS, ISAS, ONE_RUN_EACH, RUNS, Run, as_params

STEPS = 3
SHOWN = 6  # mismatches in a message


def make_optimizer(rule: RuleCase, made: list[tensors.CaseTensors], run: Run) -> Any:
    """One optimizer for all of these cases, their states loaded, in the order and groups that the run wants."""
    made = list(made)
    if run.order:
        random.Random(run.order).shuffle(made)
    groups: dict[Any, dict[str, Any]] = {}
    states: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    for index, one in enumerate(made):
        param = torch.nn.Parameter(one.param.view)
        one.parameter = param
        key = one.case.option.name if run.merged else index
        group = groups.setdefault(key, {"params": [], **rule.group(one.case.option, run.device)})
        group["params"].append(param)
        if one.states:
            states[param] = {name: placed.view for name, placed in one.states.items()}
            if rule.rule.keeps_step:
                step = torch.tensor(float(one.step), dtype=torch.float32, device=run.device)
                states[param] = {"step": step, **states[param]}
    optimizer = getattr(fusedopt, rule.name)(list(groups.values()), backend=run.backend)
    optimizer.state.update(states)
    return optimizer


def set_grad(param: torch.nn.Parameter, grad: torch.Tensor) -> None:
    """Gives a parameter a gradient of any dtype."""
    if grad.dtype != param.dtype and param.grad is None:
        param.grad_dtype = None
    param.grad = grad


def mismatches(optimizer: Any, one: tensors.CaseTensors, snapshot: truth.Snapshot) -> list[str]:
    """In words, where a case's tensors differ from what they should be."""
    found = []
    state = optimizer.state[one.parameter]
    for name, expected in snapshot.values.items():
        actual = (one.parameter.detach() if name == "param" else state[name]).cpu()
        if actual.dtype != expected.dtype:
            found.append(f"{one.case.id}: {name} has dtype {actual.dtype}, not {expected.dtype}")
            continue
        wrong = ~tensors.same_bits(actual, expected)
        if wrong.any():
            k = int(wrong.flatten().nonzero()[0])
            got, want = actual.flatten()[k].item(), expected.flatten()[k].item()
            found.append(
                f"{one.case.id}: {name}[{k}] is {got!r} ({struct.pack('>d', got).hex()}), not {want!r} "
                f"({struct.pack('>d', want).hex()}); {int(wrong.sum())} of {wrong.numel()} elements differ"
            )
    if "step" in state and float(state["step"]) != snapshot.step:
        found.append(f"{one.case.id}: step is {float(state['step'])}, not {snapshot.step}")
    return found


@functools.cache
def batch_trajectory(name: str, grad_scale: float | None) -> list[list[truth.Snapshot]]:
    return truth.trajectory(batches()[name], STEPS, grad_scale)


def compare(
    cases: list[Case],
    expected: list[list[truth.Snapshot]],
    run: Run,
    grad_scale: float | None = None,
    variant: str | None = None,
) -> int:
    """Steps the cases in one optimizer and compares after each step; returns the number of tensors compared."""
    made = [tensors.make(case, len(expected), run.device) for case in cases]
    optimizer = make_optimizer(cases[0].rule, made, run)
    if grad_scale is not None:
        optimizer.grad_scale = torch.tensor(grad_scale, device=run.device)
        optimizer.found_inf = torch.tensor(0.0, device=run.device)
    grads_before = [[grad.buffer.clone() for grad in one.grads] for one in made]
    wrong: list[str] = []
    compared = 0
    for k, snapshots in enumerate(expected):
        for one in made:
            set_grad(one.parameter, one.grads[k].view)
        before = fusedopt.launch_count()
        optimizer.step()
        assert fusedopt.launch_count() == before + 1
        for one, snapshot in zip(made, snapshots, strict=True):
            wrong += mismatches(optimizer, one, snapshot)
            compared += len(snapshot.values)
        if wrong:
            break
    ((table, _),) = optimizer._tables
    assert variant in (None, table.core.variant)
    assert not wrong, f"step {k + 1}: {len(wrong)} tensors differ\n" + "\n".join(wrong[:SHOWN])
    for one, before_step in zip(made, grads_before, strict=True):
        assert all(torch.equal(grad.buffer, old) for grad, old in zip(one.grads, before_step, strict=True)), one.case.id
        assert all(placed.guards_are_whole() for placed in one.placed()), f"{one.case.id}: bytes around it changed"
    return compared


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_case_has_the_bits_of_the_reference(batch: str, run: Run, settings: Run, record_property: Any) -> None:
    compared = compare(batches()[batch], batch_trajectory(batch, None), run, variant=batch.split("-")[1])
    record_property("count:bit contract, tensors compared", compared)


@pytest.mark.parametrize("batch", batches())
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_every_case_has_the_bits_of_the_reference_when_gradients_are_unscaled(
    batch: str, run: Run, settings: Run, record_property: Any
) -> None:
    compared = compare(batches()[batch], batch_trajectory(batch, 3.0), run, grad_scale=3.0)
    record_property("count:bit contract, tensors compared", compared)


LARGE_SIZES = (65_536, 32_769, 1, 32_767, 20_481, 100_003, 5)
CHUNK_RUNS = (
    *(Run("cpu", isa=isa, threads=threads) for isa in ISAS for threads in (1, 2, 3, 61)),
    *(Run("emulated", grid=grid, seed=k) for k, grid in enumerate(((1, 16), (2, 30), (9, 64)))),
    *GPU_RUNS,
)


@functools.cache
def large_cases(rule: RuleCase) -> list[Case]:
    """Tensors of many chunks, with all options of a rule."""
    layouts = {layout.name: layout for layout in LAYOUTS}
    rows = zip(
        LARGE_SIZES * 2,
        itertools.cycle(rule.options[-6:]),
        itertools.cycle([COMBINATIONS[0], COMBINATIONS[2], COMBINATIONS[4]]),
        itertools.cycle([layouts["contiguous"], layouts["misaligned"], layouts["transposed_grad"]]),
        strict=False,
    )
    return [Case(rule, option, dtypes, layout, n, "extreme", "fresh") for n, option, dtypes, layout in rows]


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
@pytest.mark.parametrize("run", as_params(CHUNK_RUNS))
def test_chunks_and_threads_change_no_bit(rule: RuleCase, run: Run, settings: Run, record_property: Any) -> None:
    compared = compare(large_cases(rule), large_trajectory(rule), run)
    record_property("count:bit contract, tensors compared", compared)


@functools.cache
def large_trajectory(rule: RuleCase) -> list[list[truth.Snapshot]]:
    return truth.trajectory(large_cases(rule), 2)


def test_the_matrix_holds_every_pair_and_every_dtype(record_property: Any) -> None:
    cases = matrix()
    axes = ("option", "dtypes", "layout", "size", "values", "start")
    for rule in RULES:
        rows = [case for case in cases["pairwise"] if case.rule is rule]
        for one, other in itertools.combinations(axes, 2):
            seen = {(str(getattr(case, one)), str(getattr(case, other))) for case in rows}
            values = [{str(getattr(case, axis)) for case in rows} for axis in (one, other)]
            missing = set(itertools.product(*values)) - seen
            assert all("scalar" in str(pair) for pair in missing), missing
    adam = {case.dtypes for case in cases["all dtypes"] if case.rule.rule is ADAM_RULE}
    assert len(adam) == 4**4
    left_out = sum(len(rows) for rows in cases.values()) - sum(len(rows) for rows in batches().values())
    assert left_out == 0 or not can_have_gradient_of_another_dtype()
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in cases.items())
    record_property("figure", f"bit contract: {counts} cases in {len(batches())} launches; {left_out} left out")


def test_values_hold_denormals_signed_zeros_infinities_and_nan() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        values = tensors.values_of("special", 2000, dtype, seed=1)
        tiny = torch.finfo(dtype).tiny
        assert ((values != 0) & (values.abs() < tiny)).any()
        zeros = values[values == 0]
        assert zeros.signbit().any()
        assert (~zeros.signbit()).any()
        assert values.isinf().any()
        assert values.isnan().any()
        finite = tensors.values_of("extreme", 2000, dtype, seed=1)
        assert finite.isfinite().all()


# Variants whose cases are in tests/test_precision.py, test_blocks.py, test_phase.py and test_report.py.
ELSEWHERE = {"bf16_f32_master", "master", "bf16_8", "blocks"}
ELSEWHERE |= {"f32_side", "strided_side", "blocks_side", "f32_report", "master_report", "everything"}


def test_every_variant_is_in_the_matrix() -> None:
    compiled = pytest.importorskip("fusedopt._C")
    for rule in ("SGD", "Adam"):
        assert {name.split("-")[1] for name in batches() if name.startswith(rule)} == {*compiled.variants()} - ELSEWHERE
