"""fuse and unfuse: the same object, the same state, the same bits, and clear refusals."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fusedopt


class Case(NamedTuple):
    """A class by its name in both packages, and how it is made."""

    name: str
    options: dict[str, Any]


CASES = [
    Case("SGD", {"lr": 0.1}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "fused": True}),
    Case("SGD", {"lr": 0.1, "momentum": 0.9, "maximize": True, "foreach": True}),
    Case("Adam", {"lr": 0.01}),
    Case("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "foreach": True}),
    Case("Adam", {"lr": 0.01, "fused": True, "maximize": True}),
    Case("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
    Case("AdamW", {"lr": 0.01, "amsgrad": True, "fused": True}),
    Case("AdamW", {"lr": torch.tensor(0.01), "fused": True}),
]
BY_CASE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{'-'.join(case.options)}")


class Training:
    """A small model in two groups, and gradients that depend on the step alone."""

    def __init__(self, case: Case, package: Any = torch.optim, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        shapes = [(17,), (3, 5), (), (0,), (4, 2)]
        self.params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        groups = [{"params": self.params[:3]}, {"params": self.params[3:], "lr": case.options["lr"] * 2}]
        self.optimizer: Optimizer = getattr(package, case.name)(groups, **case.options)
        self.done = 0
        # Whether a parameter may have no gradient at first: torch 2.13's fused SGD does not survive that.
        self.may_be_late = (case.name, case.options.get("fused")) != ("SGD", True)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            generator = torch.Generator().manual_seed(self.done)
            for index, param in enumerate(self.params):
                grad = torch.randn(param.shape, dtype=torch.float64, generator=generator)
                late = index == 1 and self.done < 4 and self.may_be_late
                param.grad = None if late else grad.to(param.dtype)
            self.optimizer.step()
            self.done += 1

    def tensors(self) -> list[Tensor]:
        """Parameters and state, in a fixed order."""
        states = [self.optimizer.state.get(param, {}) for param in self.params]
        return [*self.params, *(state[name] for state in states for name in sorted(state))]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    assert [tensor.shape for tensor in one] == [tensor.shape for tensor in other]
    assert [tensor.dtype for tensor in one] == [tensor.dtype for tensor in other]
    for a, b in zip(one, other, strict=True):
        assert a.detach().cpu().numpy().tobytes() == b.detach().cpu().numpy().tobytes()


@BY_CASE
@pytest.mark.parametrize("before", [0, 1, 3])
def test_fuse_goes_on_as_a_fused_optimizer_that_loaded_the_state_dict(case: Case, before: int) -> None:
    fused, loaded = Training(case), Training(case, fusedopt)
    fused.step(before)
    loaded.optimizer.load_state_dict(copy.deepcopy(fused.optimizer.state_dict()))
    loaded.done = before
    with torch.no_grad():
        for mine, theirs in zip(loaded.params, fused.params, strict=True):
            mine.copy_(theirs)
    fusedopt.fuse(fused.optimizer)
    fused.step(3)
    loaded.step(3)
    assert_same_bits(fused.tensors(), loaded.tensors())


@BY_CASE
def test_fuse_and_unfuse_in_the_middle_change_nothing_but_rounding(case: Case) -> None:
    plain, mixed = Training(case, dtype=torch.float64), Training(case, dtype=torch.float64)
    plain.step(9)
    mixed.step(3)
    fusedopt.fuse(mixed.optimizer)
    mixed.step(3)
    fusedopt.unfuse(mixed.optimizer)
    mixed.step(3)
    # Numbers are of order 1; an operation rounds by 2^-53; 9 steps of some 20 operations follow each other.
    for a, b in zip(plain.tensors(), mixed.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=180 * 2.0**-53, atol=180 * 2.0**-53, check_dtype=False)


@BY_CASE
@pytest.mark.parametrize("before", [0, 3])
def test_fuse_then_unfuse_leaves_every_bit_and_attribute(case: Case, before: int) -> None:
    training, untouched = Training(case), Training(case)
    training.step(before)
    untouched.step(before)
    attributes = {name: id(value) for name, value in vars(training.optimizer).items() if name != "state"}
    tensors = [id(tensor) for tensor in training.tensors()]
    result = fusedopt.unfuse(fusedopt.fuse(training.optimizer))
    assert result is training.optimizer
    assert type(result) is type(untouched.optimizer)
    assert [id(tensor) for tensor in training.tensors()] == tensors
    after = {name: id(value) for name, value in vars(result).items() if name != "state"}
    assert after.keys() == attributes.keys()
    assert after["param_groups"] == attributes["param_groups"]
    training.step(2)
    untouched.step(2)
    assert_same_bits(training.tensors(), untouched.tensors())


@BY_CASE
def test_a_fused_optimizer_is_not_disturbed_by_unfuse_and_fuse(case: Case) -> None:
    straight, around = Training(case, fusedopt), Training(case, fusedopt)
    straight.step(6)
    around.step(3)
    fusedopt.unfuse(around.optimizer)
    fusedopt.fuse(around.optimizer)
    around.step(3)
    assert_same_bits(straight.tensors(), around.tensors())


@BY_CASE
def test_unfuse_leaves_what_torch_would_have_made(case: Case) -> None:
    ours, theirs = Training(case, fusedopt), Training(case)
    ours.step(5)
    theirs.step(5)
    fusedopt.unfuse(ours.optimizer)
    assert vars(ours.optimizer).keys() == vars(theirs.optimizer).keys()
    assert ours.optimizer.defaults.keys() == theirs.optimizer.defaults.keys()
    for mine, other in zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True):
        assert mine.keys() == other.keys()
    for mine, other in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
    amp = "_step_supports_amp_scaling"
    assert getattr(ours.optimizer, amp, False) == getattr(theirs.optimizer, amp, False)
    ours.step(1)


def test_fuse_and_unfuse_leave_nothing_behind() -> None:
    optimizer: Any = fusedopt.AdamW([nn.Parameter(torch.ones(3))])
    references = set()
    for _ in range(3):
        fusedopt.fuse(fusedopt.unfuse(optimizer))
        references.add(weakref.getweakrefcount(optimizer))
    assert references == {1}


def test_unfuse_forgets_a_velocity_whose_first_step_was_skipped() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=0.1, momentum=0.9, dampening=0.5)
    param.grad = torch.ones(3)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    del optimizer.found_inf
    fusedopt.unfuse(optimizer).step()
    assert param.tolist() == pytest.approx([0.9] * 3)  # the first velocity is the whole gradient


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_step_counts_go_where_each_side_keeps_them(options: dict[str, Any]) -> None:
    param = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer: Optimizer = torch.optim.Adam([param], lr=0.1, **options)
    param.grad = torch.ones(3, device="cuda")
    optimizer.step()
    home = optimizer.state[param]["step"].device
    fusedopt.fuse(optimizer).step()
    assert optimizer.state[param]["step"].device == param.device
    fusedopt.unfuse(optimizer)
    assert optimizer.state[param]["step"].device == home
    optimizer.step()
    assert float(optimizer.state[param]["step"]) == 3.0
    # A capturable step finds 1 - 0.999^t in float32: half of the relative error of that, in two steps of 0.1.
    assert param.tolist() == pytest.approx([0.7] * 3, abs=2 * 0.1 * 2**-24 / (1 - 0.999) / 2)


class OldAdamW(torch.optim.AdamW):
    """As torch 2.6 had it: its groups know no decoupled_weight_decay."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)
        self._forget()

    def _forget(self) -> None:
        for group in (self.defaults, *self.param_groups):
            group.pop("decoupled_weight_decay", None)


def test_an_older_torch_gets_back_its_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fusedopt.fuse"], "TWINS", {OldAdamW: fusedopt.AdamW})
    optimizer = OldAdamW([nn.Parameter(torch.ones(3))], weight_decay=0.5, lr=0.5)
    defaults, keys = set(optimizer.defaults), set(optimizer.param_groups[0])
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(3)
    fusedopt.fuse(optimizer).step()
    assert optimizer.param_groups[0]["params"][0].tolist() == [0.75] * 3  # the decay is decoupled
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    optimizer.step()
    assert type(fusedopt.unfuse(optimizer)) is OldAdamW
    assert (set(optimizer.defaults), set(optimizer.param_groups[0])) == (defaults, keys)


def test_what_hangs_on_the_optimizer_stays() -> None:
    calls: list[str] = []
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.1, betas=(0.8, 0.9))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.note = "mine"  # type: ignore[attr-defined]
    defaults, groups, state = dict(optimizer.defaults), optimizer.param_groups, optimizer.state
    fused = fusedopt.fuse(optimizer)
    assert isinstance(fused, fusedopt.AdamW)
    assert fused.param_groups is groups
    assert fused.state is state
    assert fused.defaults == defaults
    assert fused.param_groups[0]["param_names"] == ["weight", "bias"]
    assert fused.note == "mine"  # type: ignore[attr-defined]
    model(torch.ones(1, 2)).sum().backward()
    fused.step()
    fused.state_dict()
    assert calls == ["before", "after", "saved"]


def _run_with_scheduler(make: Callable[[Optimizer], Any], fuse_at: int | None, attach_at: int) -> Any:
    param = nn.Parameter(torch.ones(4))
    optimizer: Optimizer = torch.optim.AdamW([param], lr=0.1)
    rates, scheduler = [], None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            if step == attach_at:
                scheduler = make(optimizer)
            if step == fuse_at:
                optimizer = fusedopt.fuse(optimizer)
            param.grad = torch.full((4,), 0.1 * step)
            optimizer.step()
            if scheduler:
                scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    return rates, optimizer


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LinearLR": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=8),
    "two": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.ConstantLR(optimizer, total_iters=2),
            torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        ],
        milestones=[2],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("fuse_at", [0, 2])
@pytest.mark.parametrize("attach_at", [0, 1])
def test_schedulers_attached_before_or_after_go_on(scheduler: str, fuse_at: int, attach_at: int) -> None:
    expected, _ = _run_with_scheduler(SCHEDULERS[scheduler], None, attach_at)
    rates, optimizer = _run_with_scheduler(SCHEDULERS[scheduler], fuse_at, attach_at)
    assert rates == expected
    assert isinstance(optimizer, fusedopt.AdamW)


def test_a_scheduler_sees_the_steps_of_the_optimizer_that_the_object_is_now() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], lr=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fusedopt.fuse(optimizer)
    launches = fusedopt.launch_count()
    param.grad = torch.ones(4)
    optimizer.step()
    assert fusedopt.launch_count() == launches + 1
    fusedopt.unfuse(optimizer)
    optimizer.step()
    assert fusedopt.launch_count() == launches + 1
    assert param.tolist() == [0.0] * 4


def test_a_scheduled_optimizer_is_freed_when_it_is_let_go() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(4))], lr=0.5)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    fusedopt.fuse(optimizer)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_fuse_between_unscale_and_step_of_a_gradient_scaler() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([param], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    scaler.unscale_(optimizer)
    fusedopt.fuse(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert param.tolist() == [0.75] * 4


def test_fuse_takes_a_backend() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adam([param], lr=0.1)
    fusedopt.fuse(optimizer, backend="reference")
    assert fusedopt.fuse(optimizer, backend="reference") is optimizer
    with pytest.raises(ValueError, match="fused already, with backend 'reference'; 'cpu' was asked for"):
        fusedopt.fuse(optimizer, backend="cpu")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_fused_optimizer_can_be_copied(copied: Callable[[Any], Any]) -> None:
    training = Training(CASES[-3])
    torch.optim.lr_scheduler.StepLR(training.optimizer, 1)
    training.step(2)
    fusedopt.fuse(training.optimizer)
    training.params, training.optimizer = copied((training.params, training.optimizer))
    assert type(training.optimizer) is fusedopt.AdamW
    training.step(1)


class Halved(torch.optim.Adam):
    """A user's own."""


class Lookahead(fusedopt.SGD):
    """A user's own."""


def _replaced(optimizer: Optimizer) -> Optimizer:
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign]
    return optimizer


REFUSED: list[tuple[str, Callable[[Any], Optimizer], str, type[Exception]]] = [
    ("subclass", lambda p: Halved(p), r"Halved is a subclass, whose step may do otherwise", TypeError),
    ("other class", lambda p: torch.optim.RMSprop(p), r"RMSprop has no fused twin", TypeError),
    (
        "differentiable",
        lambda p: torch.optim.Adam(p, differentiable=True),
        "group 0 can not be fused: .*differentiable",
        RuntimeError,
    ),
    ("replaced step", lambda p: _replaced(torch.optim.SGD(p)), "step was replaced by", RuntimeError),
]


@pytest.mark.parametrize(("make", "message", "error"), [row[1:] for row in REFUSED], ids=[r[0] for r in REFUSED])
def test_fuse_refuses_and_leaves_all_as_it_was(
    make: Callable[[Any], Optimizer], message: str, error: type[Exception]
) -> None:
    optimizer = make([nn.Parameter(torch.ones(3))])
    before = (type(optimizer), dict(vars(optimizer)))
    with pytest.raises(error, match=message):
        fusedopt.fuse(optimizer)
    assert (type(optimizer), vars(optimizer)) == before


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [("vulkan", ValueError, "'vulkan' is unknown"), ("cuda", RuntimeError, "'cuda' can not serve cpu")],
)
def test_fuse_refuses_a_backend_that_can_not_serve(backend: str, error: type[Exception], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(error, match=message):
        fusedopt.fuse(optimizer, backend=backend)
    assert type(optimizer) is torch.optim.SGD


def test_unfuse_refuses_what_has_no_twin() -> None:
    with pytest.raises(TypeError, match=r"Lookahead has no twin in torch.optim"):
        fusedopt.unfuse(Lookahead([nn.Parameter(torch.ones(3))], lr=0.1))
    plain = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    assert fusedopt.unfuse(plain) is plain
