"""Clipping by the norm of all gradients, and skipping where one is not finite, have the bits of the reference."""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import lasting, reference
from fusedopt.lasting import StreamUse

from .running import INTERPRETED, ONE_RUN_EACH, Run, as_params
from .tensors import same_bits
from .test_phase import DTYPES, LAYOUTS, assert_same_bits, make, set_gradients, tensors_of

NORMS = {
    "clipped": {"max_grad_norm": 0.5},
    "not clipped": {"max_grad_norm": 1e9},
    "largest": {"max_grad_norm": 0.5, "norm_type": math.inf},
    "skip": {"skip_nonfinite": True},
    "all": {
        "max_grad_norm": 0.5,
        "skip_nonfinite": True,
        "ema_decay": 0.9,
        "copies": True,
        "zero_grads": True,
    },
}

each_run = pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
each_norm = pytest.mark.parametrize("norm", NORMS)


def launches_of(run: Run) -> int:
    return 2 if run.backend == "triton" else 1


def step_both(made: Any, truth: Any, run: Run, step: int, layout: str, scale: float | None = None) -> None:
    for optimizer, params in (made, truth):
        set_gradients(params, step, layout)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale, device=params[0].device)
            optimizer.found_inf = torch.tensor(0.0, device=params[0].device)
    before = fusedopt.launch_count()
    made[0].step()
    assert fusedopt.launch_count() == before + launches_of(run)
    truth[0].step()
    assert_same_bits(tensors_of(*made), tensors_of(*truth))
    assert bool(same_bits(made[0].grad_norm.cpu()[None], truth[0].grad_norm.cpu()[None]))


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_at_once_has_the_bits_of_the_reference(dtype: str, layout: str, run: Run, settings: Run) -> None:
    made = make("AdamW", run, DTYPES[dtype], layout, **NORMS["all"])
    truth = make("AdamW", Run("reference"), DTYPES[dtype], layout, **NORMS["all"])
    for step in range(2):
        step_both(made, truth, run, step, layout)


@each_run
@each_norm
@pytest.mark.parametrize("optimizer", ["SGD-momentum", "Adam"])
def test_each_norm_has_the_bits_of_the_reference(optimizer: str, norm: str, run: Run, settings: Run) -> None:
    made = make(optimizer, run, torch.float32, **NORMS[norm])
    truth = make(optimizer, Run("reference"), torch.float32, **NORMS[norm])
    for step, scale in enumerate((None, 3.0)):
        step_both(made, truth, run, step, "dense", scale)


@each_run
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norms_by_group_are_those_of_clip_grad_norm_called_for_each_group(
    norm_type: float, run: Run, settings: Run
) -> None:
    """Their bits are those of an optimizer for each group, so that they are the reference's too."""
    largest = {0: 0.25, 1: None, 2: 1e6, 3: 0.5}
    _, params = make("SGD", run, torch.float32)
    _, others = make("SGD", run, torch.float32)
    parts = [params[:3], params[3:4], [], params[4:]]
    groups: list[dict[str, Any]] = [{"params": part} for part in parts]
    for k in (0, 1, 2):
        groups[k]["max_grad_norm"] = largest[k]
    whole = {"norm_type": norm_type, "norm_by_group": True, "max_grad_norm": 0.5, "zero_grads": True}
    optimizer = fusedopt.AdamW(groups, lr=0.1, backend=run.backend, **whole)
    for step in range(2):
        set_gradients(params, step)
        set_gradients(others, step)
        optimizer.step()
        for k, (part, twins) in enumerate(zip(parts, (others[:3], others[3:4], [], others[4:]), strict=True)):
            alone = [param for param in twins if param.grad is not None and param.numel()]
            limit = math.inf if largest[k] is None else largest[k]
            expected = torch.nn.utils.clip_grad_norm_(alone, limit, norm_type)
            torch.testing.assert_close(optimizer.grad_norm[k].float().cpu(), expected.cpu(), rtol=1e-6, atol=0)
            if part and step == 0:
                options = {"norm_type": norm_type, "max_grad_norm": largest[k], "backend": "reference"}
                twin_optimizer = fusedopt.AdamW(twins, lr=0.1, **options)
                set_gradients(others, step)
                twin_optimizer.step()
                assert all(bool(same_bits(a.cpu(), b.cpu()).all()) for a, b in zip(part, twins, strict=True)), k
    groups[0]["max_grad_norm"] = 1e9


@each_run
def test_a_group_that_is_not_finite_keeps_all_groups_from_changing(run: Run, settings: Run) -> None:
    _, params = make("SGD", run, torch.float32)
    groups = [{"params": params[:4]}, {"params": params[4:]}]
    options: dict[str, Any] = {"max_grad_norm": 1.0, "norm_by_group": True, "skip_nonfinite": True, "report": True}
    optimizer = fusedopt.AdamW(groups, lr=0.1, backend=run.backend, **options)
    set_gradients(params, 0)
    params[4].grad[5] = math.inf
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
    assert float(optimizer.skipped_steps) == 1.0
    assert optimizer.grad_norm.isfinite().tolist() == [True, False]
    report = optimizer.report()
    assert report.skipped
    assert report.at_fault == ("4",)
    assert str(report).startswith("the last step was skipped; not finite: 4;")
    set_gradients(params, 2)
    optimizer.step()
    assert not optimizer.report().skipped


def test_a_group_s_own_norm_is_refused_where_the_norm_is_that_of_all() -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(1))], "max_grad_norm": 0.5}
    with pytest.raises(ValueError, match=r"0\.5.*norm_by_group"):
        fusedopt.SGD([group], lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"norm_by_group needs max_grad_norm"):
        fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, norm_by_group=True)
    with pytest.raises(ValueError, match=r"-1"):
        fusedopt.SGD([{**group, "max_grad_norm": -1.0}], lr=0.1, max_grad_norm=1.0, norm_by_group=True)


THREADS = tuple(Run("cpu", threads=threads) for threads in (1, 2, 3))
GRIDS = tuple(Run("emulated", grid=grid, seed=k) for k, grid in enumerate(((1, 32), (5, 96))))


@pytest.mark.parametrize("run", as_params((*THREADS, *GRIDS)))
def test_threads_and_grids_change_no_bit_of_the_norm(run: Run, settings: Run) -> None:
    norms = []
    for backend in (run, Run("reference")):
        params = [torch.nn.Parameter(torch.ones(n)) for n in (70_001, 3, 4096)]
        optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0, backend=backend.backend)
        set_gradients(params, 3)
        for param in params:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(5))
        optimizer.step()
        norms.append((optimizer.grad_norm.clone(), [param.detach().clone() for param in params]))
    assert torch.equal(norms[0][0], norms[1][0])
    assert all(torch.equal(one, other) for one, other in zip(norms[0][1], norms[1][1], strict=True))


# 2,048 leaves are one group; Triton's interpreter takes long over so many tensors: see the test after this one.
@pytest.mark.parametrize("run", as_params([run for run in ONE_RUN_EACH if not INTERPRETED or run.backend != "triton"]))
def test_more_leaves_than_one_group_have_the_bits_of_the_reference(run: Run, settings: Run) -> None:
    norms = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        generator = torch.Generator().manual_seed(7)
        params = [torch.nn.Parameter(torch.ones((), device=device)) for _ in range(2 * 2048 + 5)]
        optimizer = fusedopt.SGD(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        for param in params:
            param.grad = torch.randn((), generator=generator).to(device)
        optimizer.step()
        norms.append([optimizer.grad_norm.cpu(), torch.stack([param.detach().cpu() for param in params])])
    for mine, expected in zip(*norms, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("run", as_params((Run("triton"), Run("triton", "cuda"))))
@pytest.mark.parametrize("largest", [False, True])
def test_groups_of_leaves_join_in_triton_as_they_should(largest: bool, run: Run, settings: Run) -> None:
    """The kernel that measures, without a chunk to measure: its last program joins what the leaves are said to be."""
    from fusedopt.triton_kernels import launch
    from fusedopt.triton_kernels.reduce import LARGEST_NORM, measure

    sizes = (3, 2048, 0, 2049, 3 * 2048 + 7)
    leaves = torch.rand(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(run.device)
    part_leaf = torch.tensor([0, *itertools.accumulate(sizes)], device=run.device)
    joined = torch.full((len(sizes),), math.nan, dtype=torch.float64, device=run.device)
    places, chunks, arrivals = (
        torch.zeros(1, dtype=dtype, device=run.device) for dtype in (torch.int64, torch.int32, torch.int32)
    )
    table = (places, places, places, places, chunks, places)  # address, grads, numel, storage, layout, layouts
    flags = LARGEST_NORM.value if largest else 0
    options = launch._device_options(None, joined.device)
    measure[(2,)](
        *table, 0, chunks, 0, 2048, 0, flags, places, leaves, part_leaf, len(sizes), joined, arrivals, **options
    )
    assert arrivals.item() == 0
    for one, part in zip(joined, leaves.cpu().split(sizes), strict=True):
        assert one.item() == reference.joined_leaves(part, largest=largest).item()


@each_run
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.25, 1e6])
def test_clipping_is_that_of_clip_grad_norm(max_norm: float, norm_type: float, run: Run, settings: Run) -> None:
    optimizer, params = make("SGD", run, torch.float32, max_grad_norm=max_norm, norm_type=norm_type)
    plain, others = make("SGD", run, torch.float32)
    for own in (params, others):
        set_gradients(own, 0)
    expected = torch.nn.utils.clip_grad_norm_([param for param in others if param.numel()], max_norm, norm_type)
    before = [param.grad.clone() for param in params]
    optimizer.step()
    plain.step()
    torch.testing.assert_close(optimizer.grad_norm.float(), expected, rtol=1e-6, atol=0)
    for param, other, grad in zip(params, others, before, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)
        assert torch.equal(param.grad, grad)  # it is not written, as torch writes it


@each_run
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@each_norm
def test_a_gradient_that_is_not_finite_is_skipped_or_goes_through_as_in_torch(
    norm: str, bad: float, run: Run, settings: Run
) -> None:
    made = make("AdamW", run, torch.float32, **NORMS[norm])
    truth = make("AdamW", Run("reference"), torch.float32, **NORMS[norm])
    step_both(made, truth, run, 0, "dense")
    before = {name: tensor.clone() for name, tensor in tensors_of(*made).items()}
    for optimizer, params in (made, truth):
        set_gradients(params, 2)
        params[3].grad[1234] = bad
        optimizer.step()
    assert_same_bits(tensors_of(*made), tensors_of(*truth))
    if NORMS[norm].get("skip_nonfinite"):
        assert not math.isfinite(float(made[0].grad_norm))
        assert float(made[0].skipped_steps) == 1.0
        after = tensors_of(*made)
        kept = {name for name, tensor in before.items() if same_bits(tensor.cpu(), after[name].cpu()).all()}
        assert {name for name in before if not name.startswith("grad")} <= kept


def test_the_norm_of_large_finite_gradients_does_not_overflow() -> None:
    param = torch.nn.Parameter(torch.ones(3000))
    optimizer = fusedopt.SGD([param], lr=0.0, max_grad_norm=1.0, skip_nonfinite=True)
    param.grad = torch.full((3000,), 3e38)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(3e38 * math.sqrt(3000))
    assert float(optimizer.skipped_steps) == 0.0


def test_the_norm_is_a_tensor_that_the_next_step_with_a_gradient_overwrites() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedopt.SGD([param], lr=0.0, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        _ = optimizer.grad_norm
    optimizer.step()  # without a gradient
    assert math.isnan(float(optimizer.grad_norm))
    for scale in (1.0, 2.0):
        param.grad = scale * torch.tensor([3.0, 4.0])
        optimizer.step()
        assert float(optimizer.grad_norm) == 5.0 * scale
    param.grad = None
    optimizer.step()
    assert float(optimizer.grad_norm) == 10.0
    twin = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        _ = twin.grad_norm


@pytest.mark.parametrize("options", [{"max_grad_norm": -1.0}, {"max_grad_norm": math.nan}, {"norm_type": 1.0}])
def test_bad_norms_are_refused_when_the_optimizer_is_made(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        fusedopt.AdamW([torch.nn.Parameter(torch.ones(1))], **options)


@each_run
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
@pytest.mark.parametrize("beside", [torch.float32, torch.complex64], ids=str)
def test_the_largest_magnitude_of_complex_gradients_is_refused_and_their_norm_of_squares_taken(
    beside: torch.dtype, options: dict[str, Any], run: Run, settings: Run
) -> None:
    params = [torch.nn.Parameter(torch.ones(1, dtype=dtype, device=run.device)) for dtype in (torch.complex64, beside)]
    for param, value in zip(params, (3 + 4j, 12.0), strict=True):
        param.grad = torch.full_like(param, value)
    optimizer = fusedopt.SGD(params, lr=1.0, norm_type=math.inf, backend=run.backend, **options)
    for _ in range(2):
        with pytest.raises(
            TypeError, match=r"parameter 0 of group 0 has dtype torch.complex64, .* norm_type=inf is for"
        ):
            optimizer.step()
    assert [param.item() for param in params] == [1.0, 1.0]
    optimizer = fusedopt.SGD(params, lr=1.0, backend=run.backend, **options)
    optimizer.step()
    assert float(optimizer.grad_norm) == 13.0


@each_run
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_a_norm_over_parameters_that_share_memory_is_of_all_their_gradients(
    norm_type: float, run: Run, settings: Run
) -> None:
    found = []
    for backend in (run.backend, "reference"):
        memory = torch.ones(3000, device=run.device)
        params = [torch.nn.Parameter(memory), torch.nn.Parameter(torch.ones(5, device=run.device))]
        params.insert(1, torch.nn.Parameter(params[0].detach()))  # tied: it is updated after the first
        options: Any = {"max_grad_norm": 0.5, "norm_type": norm_type, "skip_nonfinite": True, "backend": backend}
        optimizer = fusedopt.SGD(params, lr=0.125, momentum=0.5, **options)
        for step in range(4):
            grads = [torch.full_like(param, k + step + 1.0) for k, param in enumerate(params)]
            if step == 2:
                params[0].grad = None  # the first table takes no part
                grads[1][7] = math.inf
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if param is params[0] and step == 2 else grad
            squares = [float((param.grad.double() ** 2).sum()) for param in params if param.grad is not None]
            largest = max(float(param.grad.abs().max()) for param in params if param.grad is not None)
            optimizer.step()
            assert float(optimizer.grad_norm) == (math.sqrt(sum(squares)) if norm_type == 2.0 else largest)
            assert float(optimizer.skipped_steps) == float(step >= 2)
        found.append([param.detach().clone() for param in params])
    for one, other in zip(*found, strict=True):
        assert bool(same_bits(one, other).all())


@each_run
def test_a_default_device_of_the_caller_changes_nothing(run: Run, settings: Run) -> None:
    found = []
    for device in (None, "meta"):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 3000, device=run.device).to(torch.bfloat16))
        plain = torch.nn.Parameter(torch.linspace(-1, 1, 30, device=run.device))
        options: Any = {"max_grad_norm": 0.5, "skip_nonfinite": True, "report": True, "ema_decay": 0.9}
        one = fusedopt.AdamW([plain], lr=0.1, backend=run.backend, **options)
        other = fusedopt.AdamW([weight], lr=0.1, rounding="stochastic", state_dtype=torch.int8, backend=run.backend)
        for _ in range(2):
            weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
            with torch.device(device) if device else nullcontext():
                one.step()
                other.step()
        found.append([weight.detach(), plain.detach(), one.grad_norm])
    for tensor, truth in zip(*found, strict=True):
        assert bool(same_bits(tensor, truth).all())


def test_memory_that_a_graph_may_use_outlives_the_tables() -> None:
    """A captured step goes on writing where it found room; nothing else may come to lie there."""
    options: Any = {"max_grad_norm": 1.0, "norm_by_group": True, "report": True}
    for captures in (0, 1):
        params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
        optimizer: Any = fusedopt.SGD([params[0]], lr=0.5, backend="cpu", **options)
        params[0].grad, params[1].grad = torch.ones(5), torch.ones(5)
        optimizer.step()
        ((table, _),) = optimizer._tables
        lasting = table.lasting
        lasting.launcher = SimpleNamespace(captures=captures)  # the CPU needs none
        room = [lasting.leaf_sums, lasting.joined, lasting.report, optimizer._results[0]]
        optimizer.refresh()
        optimizer.step()
        assert all(one is other for one, other in zip(room, room_of(optimizer), strict=True))
        watched = [weakref.ref(tensor) for tensor in room]
        del room, table, lasting
        optimizer.add_param_group({"params": [params[1]]})
        optimizer.step()
        assert [ref() is not None for ref in watched] == 4 * [bool(captures)]
        assert not any(one is ref() for one, ref in zip(room_of(optimizer), watched, strict=True) if captures)


def test_memory_that_launches_use_on_another_stream_is_told_to_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each change of the stream, and never during a capture."""
    told: list[tuple[str, str]] = []

    class Told:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_stream(self, stream: str) -> None:
            told.append((self.name, stream))

    use, tensors = StreamUse(), (Told("sums"), None, Told("terms"))
    for stream, is_capturing in (("one", False), ("one", False), ("other", True), ("other", False), ("one", False)):
        monkeypatch.setattr(lasting, "is_capturing", lambda device, answer=is_capturing: answer)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, answer=stream: answer)
        use.record(torch.device("cuda", 0), tensors)  # type: ignore[arg-type]
        use.record(torch.device("cpu"), tensors)  # type: ignore[arg-type]
    assert told == [(name, stream) for stream in ("one", "other", "one") for name in ("sums", "terms")]


def test_a_groups_own_norm_outlives_a_checkpoint_of_torchs() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [param]} for param in params]
    optimizer = fusedopt.SGD(
        [{**groups[0], "max_grad_norm": None}, groups[1]], lr=1.0, max_grad_norm=0.5, norm_by_group=True
    )
    optimizer.load_state_dict(torch.optim.SGD(groups, lr=1.0).state_dict())
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert params[0].tolist() == [0.0] * 3
    assert params[1].tolist() != [0.0] * 3


@pytest.mark.parametrize("key", ["max_grad_norm", "ema_decay"])
def test_a_checkpoint_with_an_option_of_the_whole_optimizer_in_a_group_is_not_loaded(key: str) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=1.0)
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= {key: 0.5, "lr": 2.0}
    with pytest.raises(ValueError, match=rf"loaded state dict: group 0 has {key}=0\.5"):
        optimizer.load_state_dict(saved)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [0.0] * 3


def room_of(optimizer: Any) -> list[torch.Tensor]:
    ((table, _),) = optimizer._tables
    return [table.lasting.leaf_sums, table.lasting.joined, table.lasting.report, optimizer._results[0]]
