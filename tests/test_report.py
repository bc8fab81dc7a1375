"""What a report says of a step has the bits of the reference on every backend, and is what it says it is."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.reference import LEAF

from .running import ISAS, ONE_RUN_EACH, Run, as_params
from .tensors import same_bits
from .test_norm import GRIDS, THREADS
from .test_phase import DTYPES, LAYOUTS, OPTIMIZERS, assert_same_bits, make, set_gradients, tensors_of

each_run = pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))

BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "all": {"max_grad_norm": 0.5, "skip_nonfinite": True, "ema_decay": 0.9, "copies": True, "zero_grads": True},
}
# Of every mode: dtype of the parameters, and options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "int8": (torch.float32, {"state_dtype": torch.int8}),
    "int8 and split": (torch.bfloat16, {"state_dtype": torch.int8, "state_block": 32, "master": "split"}),
    "float8": (torch.bfloat16, {"state_dtype": torch.float8_e4m3fn, "state_block": 256}),
    "rounding": (torch.bfloat16, {"rounding": "stochastic"}),
    "rounding and int8": (torch.float16, {"rounding": "stochastic", "state_dtype": torch.int8}),
}
NONFINITE = 3  # csrc/report.h
MASTERS = {"fp32": torch.bfloat16, "split": torch.bfloat16, "kahan": torch.float16}


def assert_same_report(one: Any, other: Any) -> None:
    assert (one.skipped, one.at_fault) == (other.skipped, other.at_fault)
    assert_same_numbers(one, other)


def assert_same_numbers(one: Any, other: Any) -> None:
    assert [row["name"] for row in one.rows] == [row["name"] for row in other.rows]
    numbers, others = (torch.tensor(list(it.scalars().values())[1:], dtype=torch.float64) for it in (one, other))
    assert bool(same_bits(numbers, others).all()), f"\n{one}\n{other}"


def compare(run: Run, optimizer: str, dtype: torch.dtype, layout: str = "dense", **options: Any) -> None:
    """Steps as the reference does, the report and everything written included."""
    made = make(optimizer, run, dtype, layout, report=True, **options)
    truth = make(optimizer, Run("reference"), dtype, layout, report=True, **options)
    for step in range(2):
        for it, params in (made, truth):
            set_gradients(params, step, layout)
            it.step()
        assert_same_bits(tensors_of(*made), tensors_of(*truth))
        assert_same_report(made[0].report(), truth[0].report())


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_report_has_the_bits_of_the_reference(dtype: str, layout: str, run: Run, settings: Run) -> None:
    compare(run, "AdamW", DTYPES[dtype], layout)


@each_run
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_report_beside_everything_else_has_the_bits_of_the_reference(optimizer: str, run: Run, settings: Run) -> None:
    compare(run, optimizer, torch.float32, **BESIDE["all"])


@each_run
@pytest.mark.parametrize("mode", MASTERS)
def test_a_report_beside_kept_bits_of_16_bit_parameters_has_the_bits_of_the_reference(
    mode: str, run: Run, settings: Run
) -> None:
    compare(run, "AdamW", MASTERS[mode], master=mode, **BESIDE["all"])


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_a_report_of_codes_and_random_rounding_has_the_bits_of_the_reference(
    mode: str, layout: str, run: Run, settings: Run
) -> None:
    dtype, options = MODES[mode]
    compare(run, "AdamW", dtype, layout, **options, **(BESIDE["all"] if layout == "dense" else {}))


@each_run
def test_a_report_of_codes_with_several_leaves_in_a_chunk_has_the_bits_of_the_reference(
    run: Run, settings: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run.backend == "triton":  # which would share so few elements among many programs
        monkeypatch.setattr("fusedopt.triton_kernels.launch.resident_programs", lambda *_: 1)
    compare(run, "AdamW", torch.float32, state_dtype=torch.int8)


@pytest.mark.parametrize("run", as_params((*THREADS, *GRIDS)))
def test_threads_and_grids_change_no_bit_of_a_report(run: Run, settings: Run) -> None:
    found = []
    for backend in (run.backend, "reference"):
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (70_001, 3, 4096)]
        optimizer = fusedopt.SGD(params, lr=0.1, momentum=0.9, report=True, backend=backend)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        found.append(optimizer.report())
    assert_same_report(*found)


@each_run
def test_norms_are_those_of_torch(run: Run, settings: Run) -> None:
    optimizer, params = make("SGD", run, torch.float32, report=True, max_grad_norm=0.1)
    set_gradients(params, 0)
    scale = torch.tensor(4.0, device=run.device)
    optimizer.grad_scale, optimizer.found_inf = scale, torch.zeros((), device=run.device)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    report = optimizer.report()
    assert report.whole["grad_norm"] == pytest.approx(float(optimizer.grad_norm), rel=BOUND)
    for row, param, old in zip(report.rows, params, before, strict=True):
        assert row["elements"] == param.numel()
        assert row["grad_norm"] == pytest.approx(float((param.grad / scale).norm()), rel=1e-6)
        assert row["param_norm"] == pytest.approx(float(param.detach().norm()), rel=1e-6)
        rounding = torch.finfo(torch.float32).eps * row["param_norm"]  # of the subtraction
        assert row["update_norm"] == pytest.approx(float((param.detach() - old).norm()), abs=rounding)
    norms = [row["update_norm"] for row in report.rows]
    assert report.whole["update_norm"] == pytest.approx(math.hypot(*norms))


# A chain of 32 terms, the first of which is added to 0, rounds 31 times, the tree of 64 chains 6 times, that of the
# leaves at most 22 times; squares of float32 are exact in float64, and all terms have the same sign. The root halves
# the relative error and rounds once.
EXACT_BOUND = ((31 + 6 + 22) / 2 + 1) * 2.0**-53
# A chain that float32 holds rounds each term at most 32 times in float32: its square, and 31 times as it is added. What
# that rounds to denormals is 2**-45 of a sum of at least 2**-100.
BOUND = 32 / 2 * 2.0**-24 * (1 + 2.0**-18) + EXACT_BOUND
HELD = (1e-16, 1e19)  # gradients of a scale between these have chains that float32 holds


@each_run
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 1e-30, 1e-16, 1e-15, 1.0, 1e17, 1e18, 1e19, 1e30, 1e38])
def test_norms_are_as_accurate_as_their_bound_wherever_float32_goes(scale: float, run: Run, settings: Run) -> None:
    generator = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(run.device)) for n in (5000, 77)]
    optimizer = fusedopt.SGD(params, lr=0.5, report=True, backend=run.backend)
    for param in params:
        numbers = torch.rand(param.shape, generator=generator, dtype=torch.float64) * 3 * scale
        param.grad = numbers.to(torch.float32).to(run.device)
    optimizer.step()
    for row, param in zip(optimizer.report().rows, params, strict=True):
        for key, values in (("grad_norm", param.grad), ("param_norm", param), ("update_norm", param.grad * 0.5)):
            exact = math.sqrt(math.fsum(x * x for x in values.detach().double().tolist()))
            bound = BOUND if key == "param_norm" or HELD[0] <= scale <= HELD[1] else EXACT_BOUND
            assert abs(row[key] - exact) <= bound * exact, key
            assert 0 < row[key] < math.inf


SCALES = (0.0, 1e-44, 1e-38, 1e-23, 1e-19, 1e-16, 1e-15, 1e-8, 1.0, 1e9, 1e17, 1e18, 1e19, 1e38, math.inf, math.nan)


def of_scale(scale: float, next_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Elements of a scale, in every other chain of another; where one is not finite, the first third of them."""
    numel = 2 * LEAF + 607
    values = torch.randn(numel, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    scales = torch.tensor([scale, next_scale], dtype=torch.float64).repeat(-(-numel // 2))[:numel]
    scales[numel // 3 :] = scales[numel // 3 :].nan_to_num(0.25, 0.5)
    return (values * scales).to(dtype)


# Ways to step whose sums of a report are of another kind: class, dtype of the parameters, options. Where eps is 0, the
# update of an element that a vector lacks is NaN.
STEPS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "f32": ("SGD", torch.float32, {}),
    "f32 cleared": ("SGD", torch.float32, {"zero_grads": True}),
    "f64": ("SGD", torch.float64, {}),
    "bf16": ("SGD", torch.bfloat16, {}),
    "f16": ("SGD", torch.float16, {}),
    "adamw without eps": ("AdamW", torch.float32, {"eps": 0.0, "zero_grads": True}),
    "bf16 adamw": ("AdamW", torch.bfloat16, {}),
    "split": ("AdamW", torch.bfloat16, {"master": "split"}),
    "int8": ("AdamW", torch.float32, {"state_dtype": torch.int8, "state_block": 64}),
    "float8": ("AdamW", torch.bfloat16, {"state_dtype": torch.float8_e4m3fn}),
}


@pytest.mark.parametrize("run", as_params((*ONE_RUN_EACH, *(Run("cpu", isa=isa) for isa in ISAS[1:]))))
@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("way", STEPS)
def test_chains_that_float_holds_and_others_have_the_bits_of_the_reference(
    way: str, layout: str, run: Run, settings: Run
) -> None:
    optimizer_class, dtype, options = STEPS[way]
    most = min(torch.finfo(dtype).max, 3e38)
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = []
        for pair in pairwise(SCALES):
            grad = of_scale(*pair, dtype).to(device)
            params.append(torch.nn.Parameter(grad.clamp(-most, most).flip(0)))
            params[-1].grad = torch.stack((grad, grad), dim=1)[:, 0] if layout == "strided" else grad
        optimizer: Any = getattr(fusedopt, optimizer_class)(params, lr=0.5, report=True, backend=backend, **options)
        optimizer.step()
        ((table, _),) = optimizer._tables
        found.append(table.partials.cpu())
    mismatches = ~same_bits(*found)
    assert not mismatches.any(), mismatches.nonzero()
    assert found[0][NONFINITE].count_nonzero() >= 2


@each_run
def test_infinite_and_nan_gradients_are_counted(run: Run, settings: Run) -> None:
    optimizer, params = make("AdamW", run, torch.float32, report=True)
    set_gradients(params, 0)
    params[4].grad[[0, 1023, 1024, 2048, 5002]] = torch.tensor(
        [math.nan, math.inf, -math.inf, math.nan, math.inf], device=run.device
    )
    optimizer.step()
    report = optimizer.report()
    assert [row["nonfinite"] for row in report.rows] == [0, 0, 0, 0, 5, 0]
    assert report.whole["nonfinite"] == 5


# A step that is too small for bfloat16, beside one that is not and one of size 0.
@each_run
@pytest.mark.parametrize(("mode", "share"), [(None, 0.5), ("fp32", 0.0), ("split", 0.0)])
def test_updates_lost_to_rounding_are_counted(mode: str | None, share: float, run: Run, settings: Run) -> None:
    weight = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16, device=run.device))
    optimizer = fusedopt.SGD([weight], lr=1.0, master=mode, report=True, backend=run.backend)
    weight.grad = torch.zeros_like(weight)
    weight.grad[:2000], weight.grad[2000:3000] = 2.0**-12, 0.25
    optimizer.step()
    assert optimizer.report().whole["lost_share"] == share


@each_run
def test_a_skipped_step_leaves_the_report_of_the_last(run: Run, settings: Run) -> None:
    optimizer, params = make("AdamW", run, torch.float32, report=True, skip_nonfinite=True)
    set_gradients(params, 0)
    optimizer.step()
    before = optimizer.report()
    set_gradients(params, 2)
    params[3].grad[7] = math.nan
    optimizer.step()
    report = optimizer.report()
    assert_same_numbers(before, report)
    assert (before.skipped, report.skipped) == (False, True)
    assert report.at_fault == ("3",)
    assert report.scalars()["skipped"] == 1.0


def test_a_report_reads_as_rows_scalars_and_text() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.named_parameters(), report=True)
    with pytest.raises(RuntimeError, match="none that is reported has been taken"):
        optimizer.report()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    report = optimizer.report()
    assert [row["name"] for row in report.rows] == ["weight", "bias"]
    assert all(row.keys() == {"name", *report.whole} for row in report.rows)
    scalars = report.scalars("optim/")
    assert scalars["optim/grad_norm"] == report.whole["grad_norm"]
    assert scalars["optim/update_ratio/bias"] == report.rows[1]["update_ratio"]
    assert str(report).splitlines()[-1].startswith("all")
    assert report.__rich__().row_count == 3


def test_parameters_without_gradient_are_not_in_the_report() -> None:
    optimizer, params = make("AdamW", Run("cpu"), torch.float32, report=True)
    for step, expected in ((0, "012345"), (1, "01345"), (2, "012345")):
        set_gradients(params, step)
        optimizer.step()
        assert "".join(row["name"] for row in optimizer.report().rows) == expected


def test_a_report_is_refused_where_none_is_kept() -> None:
    with pytest.raises(RuntimeError, match="report=True"):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1).report()


@each_run
def test_of_every_third_step_a_report_says_what_that_of_every_step_says_of_it(run: Run, settings: Run) -> None:
    every, params = make("AdamW", run, torch.float32, report=True, skip_nonfinite=True)
    third, others = make("AdamW", run, torch.float32, report=3, skip_nonfinite=True)
    told = []
    for step in range(5):
        for it, tensors in ((every, params), (third, others)):
            set_gradients(tensors, step)
            if step == 4:
                tensors[2].grad[1] = math.inf
            it.step()
        told.append(every.report())
        assert_same_report(third.report(), told[step // 3 * 3])
    assert_same_bits(tensors_of(every, params), tensors_of(third, others))


def test_a_report_is_not_of_leaves_that_are_no_longer_there() -> None:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 5000)]
    optimizer = fusedopt.SGD(params, lr=0.1, report=2)
    params[0].grad = torch.ones(3)
    optimizer.step()
    params[1].grad = torch.ones(5000)
    optimizer.step()
    with pytest.raises(RuntimeError, match="its parameters changed"):
        optimizer.report()
    optimizer.step()
    assert [row["elements"] for row in optimizer.report().rows] == [3, 5000]


def test_a_first_gradient_in_a_step_that_is_not_reported_makes_no_other_numbers_of_a_report() -> None:
    params = [torch.nn.Parameter(torch.ones(n)) for n in (5000, 10)]
    optimizer = fusedopt.SGD(params, lr=0.1, report=10)
    for steps, live in ((2, 1), (1, 0)):
        params[live].grad = torch.ones_like(params[live])
        for _ in range(steps):
            optimizer.step()
    with pytest.raises(RuntimeError, match="its parameters changed"):
        optimizer.report()


@pytest.mark.parametrize("report", [-1, 2.0, "always"])
def test_what_is_no_number_of_steps_is_refused(report: Any) -> None:
    with pytest.raises(ValueError, match="report must be True, False or a number of steps, but it is"):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, report=report)


@each_run
@pytest.mark.parametrize("skips", [1, 3])
def test_a_report_is_that_of_the_last_step_taken_whoever_had_gradients_since(
    skips: int, run: Run, settings: Run
) -> None:
    params = {name: torch.nn.Parameter(torch.ones(3, device=run.device)) for name in "abc"}
    optimizer = fusedopt.SGD(list(params.items()), lr=0.5, report=True, skip_nonfinite=True, backend=run.backend)

    def step(**grads: float) -> Any:
        for name, param in params.items():
            param.grad = torch.full_like(param, grads[name]) if name in grads else None
        optimizer.step()
        return optimizer.report()

    assert math.isnan(step(b=math.nan).whole["grad_norm"])
    assert [row["name"] for row in optimizer.report().rows] == ["b"]
    step(a=1.0, b=1.0, c=1.0)
    taken = step(a=2.0, b=2.0)
    for _ in range(skips):
        assert_same_numbers(step(a=math.nan, c=1.0), taken)
        found = step(b=math.nan)
    assert (found.skipped, found.at_fault) == (True, ("b",))
    assert [row["name"] for row in found.rows] == ["a", "b"]
    assert_same_numbers(found, taken)
    found = step(c=2.0)
    assert [(row["name"], row["grad_norm"]) for row in found.rows] == [("c", math.sqrt(12.0))]


@each_run
def test_nobody_is_at_fault_where_somebody_else_found_the_infinity(run: Run, settings: Run) -> None:
    params = [torch.nn.Parameter(torch.ones(3, device=run.device)) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=0.5, report=True, skip_nonfinite=True, backend=run.backend)
    for param, value in zip(params, (math.inf, 1.0), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer.step()
    assert optimizer.report().at_fault == ("0",)
    optimizer.found_inf = torch.ones((), device=run.device)
    params[0].grad = torch.ones(3, device=run.device)
    optimizer.step()
    assert (optimizer.report().skipped, optimizer.report().at_fault) == (True, ())


@each_run
def test_tables_that_took_no_part_in_a_step_are_not_told_of(run: Run, settings: Run) -> None:
    one = torch.nn.Parameter(torch.ones(3, device=run.device))
    other = torch.nn.Parameter(one.data)  # tied: a table, and a launch, of its own
    optimizer = fusedopt.SGD([("one", one), ("other", other)], lr=0.5, report=True, backend=run.backend)
    for grads, names in (((1.0, 2.0), ["one", "other"]), ((1.0, None), ["one"]), ((1.0, 2.0), ["one", "other"])):
        for param, value in zip((one, other), grads, strict=True):
            param.grad = None if value is None else torch.full_like(param, value)
        optimizer.step()
        assert [row["name"] for row in optimizer.report().rows] == names


def test_a_report_of_a_parameter_that_has_left_the_groups_is_refused_in_words() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fusedopt.SGD(params, lr=0.1, report=True)
    for param in params[:2]:
        param.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["params"].pop()  # it had no gradient
    assert [row["name"] for row in optimizer.report().rows] == ["0", "1"]
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(RuntimeError, match="in no group any more"):
        optimizer.report()
    optimizer.step()
    assert [row["name"] for row in optimizer.report().rows] == ["0"]
