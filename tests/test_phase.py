"""What a step does beside the update - average, copy, cleared gradient - has the same bits on every backend."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

from .running import ONE_RUN_EACH, Run, as_params
from .tensors import same_bits

STEPS = 4
SIZES = (0, 1, 5, 2049, 5_003)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
OPTIMIZERS = {
    "SGD": {"lr": 0.1},
    "SGD-momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.01},
}
LAYOUTS = ("dense", "transposed_grad", "misaligned")

each_run = pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, lying otherwise."""
    if layout == "transposed_grad" and values.dim() == 2:
        return values.t().contiguous().t()
    if layout == "misaligned":
        buffer = torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)
        return buffer[1:].view(values.shape).copy_(values)
    return values.clone()


def make(optimizer: str, run: Run, dtype: torch.dtype, layout: str = "dense", **phase: Any) -> tuple[Any, Any]:
    """An optimizer over tensors of many sizes, and its parameters."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(n,) for n in SIZES] + [(33, 65)]
    values = [torch.randn(shape, generator=generator).to(run.device, dtype) for shape in shapes]
    place = layout if layout == "misaligned" else "dense"
    params = [torch.nn.Parameter(laid_out(value, place)) for value in values]
    kind = getattr(fusedopt, optimizer.split("-")[0])
    if phase.pop("copies", False):
        dtypes = (torch.bfloat16, torch.float16, torch.float32)
        phase["copy_to"] = [torch.empty_like(p, dtype=dtypes[k % 3]).detach() for k, p in enumerate(params)]
    return kind(params, backend=run.backend, **OPTIMIZERS[optimizer], **phase), params


def set_gradients(params: list[torch.nn.Parameter], step: int, layout: str = "dense") -> None:
    """Gradients of a step; one parameter has none at the second."""
    generator = torch.Generator().manual_seed(100 + step)
    for k, param in enumerate(params):
        values = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        param.grad = None if (k, step) == (2, 1) else laid_out(values, layout)


def tensors_of(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Everything that a step writes."""
    found = {f"param {k}": param.detach() for k, param in enumerate(params)}
    for k, param in enumerate(params):
        found |= {f"{name} {k}": torch.as_tensor(value) for name, value in optimizer.state[param].items()}
        if param.grad is not None:
            found[f"grad {k}"] = param.grad
    found |= {f"copy {k}": tensor for k, tensor in enumerate(optimizer._phase.copy_to or ())}
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert bool(same_bits(tensor.cpu(), other[name].cpu()).all()), name


PHASES: dict[str, dict[str, Any]] = {
    "average": {"ema_decay": 0.9},
    "warm average": {"ema_decay": 0.999, "ema_warmup": True},
    "low decay": {"ema_decay": 0.25},
    "copy": {"copies": True},
    "clear": {"zero_grads": True},
    "all": {"ema_decay": 0.9, "ema_warmup": True, "copies": True, "zero_grads": True},
}


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@each_optimizer
def test_all_side_outputs_have_the_bits_of_the_reference(
    optimizer: str, dtype: str, layout: str, run: Run, settings: Run
) -> None:
    compare("all", optimizer, DTYPES[dtype], layout, run)


@each_run
@pytest.mark.parametrize("phase", PHASES)
def test_each_side_output_alone_has_the_bits_of_the_reference(phase: str, run: Run, settings: Run) -> None:
    compare(phase, "AdamW", torch.float32, "dense", run)


def compare(phase: str, optimizer: str, dtype: torch.dtype, layout: str, run: Run) -> None:
    made = make(optimizer, run, dtype, layout, **PHASES[phase])
    truth = make(optimizer, Run("reference"), dtype, layout, **PHASES[phase])
    for step in range(STEPS):
        for _, params in (made, truth):
            set_gradients(params, step, layout)
        before = fusedopt.launch_count()
        made[0].step()
        assert fusedopt.launch_count() == before + 1
        truth[0].step()
        assert_same_bits(tensors_of(*made), tensors_of(*truth))


@each_run
@each_optimizer
def test_side_outputs_change_no_bit_of_the_update(optimizer: str, run: Run, settings: Run) -> None:
    made = make(optimizer, run, torch.float32, **PHASES["all"])
    plain = make(optimizer, run, torch.float32)
    for step in range(STEPS):
        for it, params in (made, plain):
            set_gradients(params, step)
            it.step()
    kept = tensors_of(*made)
    for name, tensor in tensors_of(*plain).items():
        assert name.startswith("grad") or same_bits(tensor.cpu(), kept[name].cpu()).all()


@each_run
def test_a_skipped_step_changes_nothing_but_clears_the_gradients(run: Run, settings: Run) -> None:
    optimizer, params = make("AdamW", run, torch.float32, **PHASES["all"])
    set_gradients(params, 0)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in tensors_of(optimizer, params).items()}
    set_gradients(params, 1)
    set_gradients(params[2:3], 5)
    optimizer.found_inf = torch.ones((), device=run.device)
    optimizer.step()
    assert_same_bits(tensors_of(optimizer, params), before)  # in which the gradients are 0


@each_run
def test_the_average_is_that_of_averaged_model(run: Run, settings: Run) -> None:
    optimizer, params = make("AdamW", run, torch.float32, ema_decay=0.9)
    model = torch.nn.ParameterList(params)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(6):
        set_gradients(params, 10 + step)
        optimizer.step()
        average.update_parameters(model)
    for param, expected in zip(params, average.module, strict=True):
        torch.testing.assert_close(optimizer.state[param]["ema"], expected.detach(), rtol=3e-7, atol=1e-7)


@each_run
def test_the_copy_is_that_of_copy(run: Run, settings: Run) -> None:
    optimizer, params = make("SGD", run, torch.float32, copies=True)
    set_gradients(params, 0)
    optimizer.step()
    for param, copied in zip(params, optimizer._phase.copy_to, strict=True):
        assert torch.equal(copied, param.detach().to(copied.dtype))


@each_run
def test_cleared_gradients_keep_their_memory(run: Run, settings: Run) -> None:
    optimizer, params = make("SGD-momentum", run, torch.float32, zero_grads=True)
    set_gradients(params, 0)
    addresses = [param.grad.data_ptr() for param in params]
    optimizer.step()
    assert [param.grad.data_ptr() for param in params] == addresses
    assert not any(param.grad.any() for param in params)


@each_run
def test_cleared_gradients_forget_what_they_came_from(run: Run, settings: Run) -> None:
    """As torch's ``zero_grad(set_to_none=False)``: second derivatives are those of this step's gradient alone."""
    found = []
    for cls, clears in ((fusedopt.SGD, {"zero_grads": True, "backend": run.backend}), (torch.optim.SGD, {})):
        param = torch.nn.Parameter(torch.ones(3, device=run.device))
        optimizer = cls([param], lr=0.5, **clears)
        for _ in range(3):
            param.pow(3).sum().backward(create_graph=True)
            found.append(torch.autograd.grad(param.grad.sum(), param, retain_graph=True)[0])
            optimizer.step()
            if not clears:
                optimizer.zero_grad(set_to_none=False)
            assert param.grad.grad_fn is None
            assert not param.grad.requires_grad
    assert all(torch.equal(*pair) for pair in zip(found[:3], found[3:], strict=True))


@each_run
def test_a_decay_that_is_a_tensor_is_read_at_every_step(run: Run, settings: Run) -> None:
    decay = torch.tensor(0.5, device=run.device)
    optimizer, params = make("SGD", run, torch.float32, ema_decay=decay)
    truth, others = make("SGD", run, torch.float32, ema_decay=0.5)
    for step, value in enumerate((0.5, 0.5)):
        decay.fill_(value)
        for it, own in ((optimizer, params), (truth, others)):
            set_gradients(own, 10 + step)
            it.step()
    assert_same_bits(tensors_of(optimizer, params), tensors_of(truth, others))
    decay.fill_(0.0)
    set_gradients(params, 12)
    optimizer.step()
    assert all(torch.equal(optimizer.state[param]["ema"], param.detach()) for param in params)


@pytest.mark.parametrize("warm", [False, True])
@each_optimizer
def test_a_checkpoint_carries_the_averages(optimizer: str, warm: bool) -> None:
    run = Run("cpu")
    phase = {"ema_decay": 0.99, "ema_warmup": warm}
    straight = make(optimizer, run, torch.bfloat16, **phase)
    for step in range(2):
        set_gradients(straight[1], step)
        straight[0].step()
    file = io.BytesIO()
    torch.save(straight[0].state_dict(), file)
    file.seek(0)
    resumed = make(optimizer, run, torch.bfloat16, **phase)
    for param, own in zip(resumed[1], straight[1], strict=True):
        param.data.copy_(own.data)
    resumed[0].load_state_dict(torch.load(file))
    assert resumed[0].state[resumed[1][3]]["ema"].dtype == torch.float32
    # SGD without momentum keeps no count of its own that a checkpoint could carry: its warm-up starts again.
    if warm and optimizer.startswith("SGD"):
        return
    for it, params in (straight, resumed):
        set_gradients(params, 7)
        it.step()
    assert_same_bits(tensors_of(*straight), tensors_of(*resumed))


def test_averages_may_be_kept_from_a_later_step_on() -> None:
    optimizer, params = make("AdamW", Run("cpu"), torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    later, others = make("AdamW", Run("cpu"), torch.float32, ema_decay=0.5)
    for param, own in zip(others, params, strict=True):
        param.data.copy_(own.data)
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = others[3].detach().clone()
    set_gradients(others, 1)
    later.step()
    torch.testing.assert_close(later.state[others[3]]["ema"], (before + others[3].detach()) / 2)


def test_swapping_puts_averages_in_place_and_parameters_back_even_after_an_error() -> None:
    optimizer, params = make("AdamW", Run("cpu"), torch.float32, ema_decay=0.9)
    for step in (0, 2):
        set_gradients(params, step)
        optimizer.step()
    before = [param.detach().clone() for param in params]
    swapped = []

    def evaluate() -> None:
        with optimizer.swap_ema():
            swapped.extend(torch.equal(param.detach(), optimizer.state[param]["ema"]) for param in params)
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()
    assert all(swapped)
    assert all(torch.equal(param.detach(), old) for param, old in zip(params, before, strict=True))
    plain, _ = make("AdamW", Run("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="ema_decay"), plain.swap_ema():
        pass


# When a parameter gets which values that can not change places with its average, and what is said of it.
UNSWAPPABLE: dict[str, tuple[str, torch.Tensor, str]] = {
    "another shape before": ("before", torch.ones(3), r"shape.*\(2,\).*\(3,\)"),
    "another shape within": ("within", torch.ones(3), r"shape.*\(2,\).*\(3,\)"),
    "one element for all": ("within", torch.ones(1).expand(2), "can not be given its value: .*single memory"),
}


@pytest.mark.parametrize("fault", UNSWAPPABLE)
def test_a_parameter_that_can_not_be_swapped_is_named_and_all_others_keep_their_values(fault: str) -> None:
    when, values, message = UNSWAPPABLE[fault]
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = fusedopt.SGD(params, lr=0.5, ema_decay=0.5)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(2)
        optimizer.step()
    if when == "before":
        params[1].data = values

    def evaluate() -> None:
        with optimizer.swap_ema():
            assert when == "within"
            params[1].data = values

    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0.*{message}"):
        evaluate()
    assert [param.tolist() for param in params] == [[0.0] * 2, values.tolist(), [0.0] * 2]


def save_and_load(optimizer: fusedopt.SGD) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EVENTS: dict[str, Callable[[fusedopt.SGD], Any]] = {
    "nothing": lambda optimizer: None,
    "looked at again": lambda optimizer: optimizer.refresh(),
    "another group": lambda optimizer: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]}),
    "saved and loaded": save_and_load,
}


@pytest.mark.parametrize("mode", [{}, {"rounding": "stochastic"}], ids=["plain", "at random"])
@pytest.mark.parametrize("event", EVENTS)
def test_after_a_skipped_first_step_velocity_and_average_begin_with_the_next(event: str, mode: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    options = {"momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True, "ema_decay": 0.5, **mode}
    optimizer = fusedopt.SGD([param], lr=1.0, **options)
    param.grad = torch.full_like(param, math.inf)
    optimizer.step()
    EVENTS[event](optimizer)
    param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state[param]
    assert param.tolist() == [0.0, 0.0]
    assert state["momentum_buffer"].tolist() == [1.0, 1.0]
    assert state["ema"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("option", [{"ema_decay": 0.5}, {"rounding": "stochastic"}], ids=str)
def test_momentum_that_begins_later_is_not_dampened_as_with_torch_or_refused_where_steps_were_counted(
    option: dict[str, Any],
) -> None:
    for dampening in (0.0, 0.5):
        params = [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
        ours = fusedopt.SGD(params[:1], lr=0.5, dampening=dampening, **option)
        theirs = torch.optim.SGD(params[1:], lr=0.5, dampening=dampening)
        for step in range(3):
            for optimizer, param in ((ours, params[0]), (theirs, params[1])):
                param.grad = torch.ones_like(param)
                optimizer.param_groups[0]["momentum"] = 0.5 if step == 2 else 0.0
            theirs.step()
            if step == 2 and dampening:
                with pytest.raises(ValueError, match=r"parameter 0 of group 0 has taken 2 steps.*dampening to 0.*0.5"):
                    ours.step()
            else:
                ours.step()
                assert torch.equal(*params)


def test_a_copied_optimizer_keeps_its_phase() -> None:
    optimizer, params = make("AdamW", Run("cpu"), torch.float32, **PHASES["all"])
    twin = copy.deepcopy(optimizer)
    others = [param for group in twin.param_groups for param in group["params"]]
    for step in range(2):
        for it, own in ((optimizer, params), (twin, others)):
            set_gradients(own, step)
            it.step()
    assert_same_bits(tensors_of(optimizer, params), tensors_of(twin, others))


WEIGHT = torch.nn.Parameter(torch.ones(4))
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"ema_decoy": 0.5}, TypeError, "ema_decoy"),
    "decay": ({"ema_decay": 1.5}, ValueError, "1.5"),
    "decay tensor": ({"ema_decay": torch.ones(2)}, ValueError, "2 elements"),
    "warm-up alone": ({"ema_warmup": True}, ValueError, "ema_decay"),
    "copy shape": ({"copy_to": [torch.ones(3)]}, ValueError, r"\(3,\).*\(4,\)"),
    "copy dtype": ({"copy_to": [torch.ones(4, dtype=torch.int32)]}, TypeError, "int32"),
    "copy count": ({"copy_to": []}, ValueError, "0 tensors.*1 parameter"),
    "copy of itself": ({"copy_to": [WEIGHT]}, ValueError, "share memory"),
    "copy expanded": ({"copy_to": [torch.ones(1).expand(4)]}, ValueError, "share memory"),
}


@each_optimizer
@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_when_the_optimizer_is_made(case: str, optimizer: str) -> None:
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        getattr(fusedopt, optimizer.split("-")[0])([WEIGHT], **OPTIMIZERS[optimizer], **options)


def test_gradients_that_can_not_be_cleared_are_refused_before_anything_changes() -> None:
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = fusedopt.SGD([first, second], lr=1.0, zero_grads=True)
    first.grad, second.grad = torch.ones(4), torch.ones(1).expand(4)
    with pytest.raises(ValueError, match=r"zero_grads.*parameter 1.*share memory"):
        optimizer.step()
    second.grad = first.grad
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert first.tolist() == [1.0] * 4


def _given_twice() -> list[torch.nn.Parameter]:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    return [param, param]


def _tied() -> list[torch.nn.Parameter]:
    one = torch.nn.Parameter(torch.ones(4))
    other = torch.nn.Parameter(one.data)
    one.grad = other.grad = torch.ones(4)
    return [one, other]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("params", [_given_twice, _tied])
def test_a_gradient_that_two_updates_would_read_is_not_cleared_by_the_first(params: Any) -> None:
    made = params()
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 and .*parameter 1 of group 0 share memory"):
        fusedopt.SGD(made, lr=0.5, zero_grads=True).step()
    assert made[0].tolist() == [1.0] * 4


@each_run
@pytest.mark.parametrize("overlap", ["the same", "partly", "partly, beside a change"])
def test_a_gradient_that_comes_to_lie_in_another_is_not_cleared_either(overlap: str, run: Run, settings: Run) -> None:
    params = [torch.nn.Parameter(torch.ones(4, device=run.device)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": params}, {"params": []}]
    optimizer = fusedopt.SGD(groups, lr=0.5, zero_grads=True, backend=run.backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    if overlap == "partly, beside a change":
        optimizer.param_groups[1]["weight_decay"] = 0.5  # of what no row needs
    memory = torch.ones(7, device=run.device)
    params[0].grad = memory[:4]
    params[1].grad = params[0].grad if overlap == "the same" else memory[3:]
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    params[1].grad = memory[3:].clone()
    optimizer.step()
    assert [param.tolist() for param in params] == [[0.0] * 4] * 2


def test_a_step_within_swapped_averages_is_refused() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedopt.SGD([param], lr=0.5, ema_decay=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="within swap_ema"):
        optimizer.step()
    optimizer.step()
    assert param.tolist() == [0.0, 0.0]


def test_the_average_of_a_parameter_that_got_another_shape_is_refused_before_anything_is_written() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([("w", param)], lr=0.1, ema_decay=0.9)
    param.grad = torch.ones(4)
    optimizer.step()
    average = optimizer.state[param]["ema"].clone()
    param.data, param.grad = torch.ones(5), torch.ones(5)
    with pytest.raises(ValueError, match=r"ema of parameter 'w' has shape \(4,\), the parameter \(5,\)"):
        optimizer.step()
    assert torch.equal(param, torch.ones(5))
    assert torch.equal(optimizer.state[param]["ema"], average)


def test_a_parameter_that_takes_anothers_place_needs_its_average_or_that_this_is_given_up() -> None:
    old, new = (torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 3.0))
    optimizer = fusedopt.SGD([("w", old)], lr=0.5, ema_decay=0.5)
    old.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"parameter 'w' has no average.*of its shape \(4,\).*was replaced"):
        optimizer.step()
    assert torch.equal(new, torch.full((4,), 3.0))
    average = optimizer.state[old]["ema"].clone()
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.step()
    assert torch.equal(optimizer.state[new]["ema"], (average + new) / 2)


def test_a_first_gradient_may_come_after_another_parameter_of_its_shape_has_left() -> None:
    params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = fusedopt.SGD([{"params": [param]} for param in params], lr=0.5, ema_decay=0.5)
    params[0].grad = torch.ones(4)
    optimizer.step()
    del optimizer.param_groups[0]  # frozen; its state stays
    params[1].grad = torch.ones(4)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[params[1]]["ema"].tolist() == [0.25] * 4


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_swaps_that_overlap_end_with_the_last_of_them(first_ends_first: bool) -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedopt.SGD([param], lr=1.0, ema_decay=0.5)
    param.grad = torch.ones(2)
    for _ in range(2):
        optimizer.step()
    attributes = set(vars(optimizer))
    swaps = [optimizer.swap_ema() for _ in range(2)]
    for swap in swaps:
        swap.__enter__()
    for swap in swaps if first_ends_first else reversed(swaps):
        assert param.tolist() == [-0.5, -0.5]
        swap.__exit__(None, None, None)
    assert param.tolist() == [-1.0, -1.0]
    assert set(vars(optimizer)) == attributes
    optimizer.step()
    assert param.tolist() == [-2.0, -2.0]


def test_no_copy_is_made_of_an_optimizer_whose_parameters_are_averages_for_a_while() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = fusedopt.SGD([param], lr=1.0, ema_decay=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="copy made within swap_ema"):
        copy.deepcopy(optimizer)
    copy.deepcopy(optimizer).step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_average_that_torch_has_cast_is_kept_in_float32_again(dtype: torch.dtype) -> None:
    param = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    param.grad = torch.ones_like(param)
    ours, theirs = fusedopt.SGD([param], lr=0.5, ema_decay=0.999), torch.optim.SGD([param], lr=0.5)
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state[param]["ema"].dtype == dtype
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.state[param]["ema"].dtype == torch.float32


@pytest.mark.parametrize(
    ("option", "good", "bad"), [("max_grad_norm", 1.0, -1.0), ("max_grad_norm", 1.0, math.nan), ("ema_decay", 0.5, 2.0)]
)
def test_an_option_that_leaves_its_range_is_refused_by_the_next_step(option: str, good: float, bad: float) -> None:
    param, value = torch.nn.Parameter(torch.ones(2)), torch.tensor(good)
    optimizer = fusedopt.SGD([param], lr=0.5, **{option: value})
    param.grad = torch.ones(2)
    optimizer.step()
    before, version = param.tolist(), param._version
    value.fill_(bad)
    with pytest.raises(ValueError, match=f"{option}.*{bad}"):
        optimizer.step()
    assert (param.tolist(), param._version) == (before, version)


def test_an_average_that_is_swapped_in_twice_lets_no_step_be_lost() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = fusedopt.SGD([param], lr=0.5, ema_decay=0.5)
    param.grad = torch.ones(4)
    optimizer.step()
    with optimizer.swap_ema():
        with optimizer.swap_ema():
            pass
        with pytest.raises(RuntimeError, match="swap_ema"):
            optimizer.step()
    optimizer.step()
