"""fusedopt.amp.GradScaler against torch's recipe: scales, steps and checkpoints are the same, and a pass is saved."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import base

from .running import ONE_RUN_EACH, Run, as_params
from .tensors import same_bits
from .test_phase import assert_same_bits, make, set_gradients, tensors_of

each_run = pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))

# What is not finite in each step; the scale is halved after each and doubled after two without.
PATHS = {
    "never": [None] * 5,
    "at first": [math.inf, None, None, None],
    "twice": [None, math.nan, -math.inf, None, None, None, None],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "with everything": {"max_grad_norm": 0.5, "ema_decay": 0.9, "copies": True, "zero_grads": True, "report": True},
}


def make_scaler(kind: Any, device: str) -> Any:
    scaler = kind(device, init_scale=8.0, growth_interval=2)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def set_scaled(params: list[torch.nn.Parameter], step: int, scale: float, bad: float | None) -> None:
    set_gradients(params, step)
    for param in params:
        if param.grad is not None:
            param.grad.mul_(scale)
    if bad is not None:
        params[3].grad[77] = bad


def train(
    kind: Any, made: tuple[Any, Any], path: list[float | None], device: str, unscale: bool = False
) -> list[float]:
    optimizer, params = made
    scaler = make_scaler(kind, device)
    scales = []
    for step, bad in enumerate(path):
        set_scaled(params, step, scaler.get_scale(), bad)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@each_run
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled before"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_steps_and_scales_are_those_of_torch(path: str, options: str, unscale: bool, run: Run, settings: Run) -> None:
    scales, found = [], []
    for kind in (fusedopt.amp.GradScaler, torch.amp.GradScaler):
        made = make("AdamW", run, torch.float32, **OPTIONS[options])
        scales.append(train(kind, made, PATHS[path], run.device, unscale))
        found.append({name: tensor for name, tensor in tensors_of(*made).items() if not name.startswith("grad")})
    assert scales[0] == scales[1]
    assert_same_bits(*found)


@each_run
def test_gradients_are_not_written_and_the_step_is_one_launch(run: Run, settings: Run) -> None:
    optimizer, params = make("SGD", run, torch.float32)
    scaler = make_scaler(fusedopt.amp.GradScaler, run.device)
    set_scaled(params, 0, 8.0, None)
    grads = [param.grad.clone() for param in params]
    before = fusedopt.launch_count()
    scaler.step(optimizer)
    assert fusedopt.launch_count() == before + (2 if run.backend == "triton" else 1)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))


@each_run
def test_a_step_without_the_scaler_looks_for_nothing_and_has_the_bits_it_had(run: Run, settings: Run) -> None:
    scaled, plain = (make("AdamW", run, torch.float32) for _ in range(2))
    scaler = make_scaler(fusedopt.amp.GradScaler, run.device)
    for step in range(3):
        set_scaled(scaled[1], step, 8.0 if step == 1 else 1.0, None)
        set_gradients(plain[1], step)
        if step == 1:
            scaler.step(scaled[0])
        else:
            before = fusedopt.launch_count()
            scaled[0].step()
            assert fusedopt.launch_count() == before + 1
        plain[0].step()
    found, others = ({n: t for n, t in tensors_of(*it).items() if not n.startswith("grad")} for it in (scaled, plain))
    assert_same_bits(found, others)


@each_run
def test_an_infinity_is_found_after_a_step_that_looked_for_none(run: Run, settings: Run) -> None:
    made = optimizer, params = make("AdamW", run, torch.float32)
    scaler = make_scaler(fusedopt.amp.GradScaler, run.device)
    set_gradients(params, 0)
    optimizer.step()
    set_scaled(params, 1, 8.0, math.inf)
    before = {name: tensor.clone() for name, tensor in tensors_of(*made).items()}
    scaler.step(optimizer)
    assert_same_bits(tensors_of(*made), before)


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
@pytest.mark.parametrize("unscaled", [None, 0, 1])
def test_one_of_several_optimizers_that_meets_an_infinity_lowers_the_scale_of_all(
    order: tuple[int, ...], unscaled: int | None
) -> None:
    scaler = make_scaler(fusedopt.amp.GradScaler, "cpu")
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    kinds = (fusedopt.SGD, fusedopt.Adam, torch.optim.SGD)
    optimizers = [kind([param], lr=1.0) for kind, param in zip(kinds, params, strict=True)]
    for k, param in enumerate(params):
        param.grad = torch.full((3,), math.inf if k == 1 else 8.0)
    for k in order:
        if k == unscaled:
            scaler.unscale_(optimizers[k])
        scaler.step(optimizers[k])
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert [param.tolist() for param in params] == [[0.0] * 3, [1.0] * 3, [0.0] * 3]


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fusedopt.amp.GradScaler])
def test_a_hook_that_changes_gradients_comes_after_the_look_for_infinities_as_with_torch(kind: type[Any]) -> None:
    scaler = make_scaler(kind, "cpu")
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: optimizer.zero_grad())
    scales = []
    for value in (8.0, math.inf, 8.0):
        param.grad = torch.full((3,), value)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [8.0, 4.0, 4.0]
    assert param.tolist() == [1.0] * 3


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, fusedopt.amp.GradScaler])
def test_a_hook_that_raises_leaves_a_scaler_that_can_be_updated_as_with_torch(kind: type[Any]) -> None:
    scaler = make_scaler(kind, "cpu")
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=1.0)
    param.grad = torch.full((3,), math.inf)

    def fail(*_: Any) -> None:
        raise KeyError

    optimizer.register_step_post_hook(fail)
    with pytest.raises(KeyError):
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0


def test_checkpoints_go_from_one_scaler_to_the_other() -> None:
    ours, theirs = (make_scaler(kind, "cpu") for kind in (fusedopt.amp.GradScaler, torch.amp.GradScaler))
    theirs.update(2.0)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == theirs.state_dict()
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert ours.state_dict() == theirs.state_dict()


def test_misuse_is_refused_as_by_torch() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=1.0)
    scaler = make_scaler(fusedopt.amp.GradScaler, "cpu")
    param.grad = torch.ones(3)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    with pytest.raises(RuntimeError, match=r"[Cc]losure"):
        scaler.step(optimizer, closure=lambda: 0.0)


def test_a_scaler_that_is_off_steps_and_no_more() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([param], lr=1.0)
    param.grad = torch.ones(3)
    fusedopt.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert bool(same_bits(param.detach(), torch.zeros(3)).all())


@pytest.mark.parametrize(("device", "may_be_late"), [("cpu", False), ("cuda", True)])
def test_a_scalar_for_a_launch_on_the_cpu_has_come_before_it_is_read(
    device: str, may_be_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda scalar, **how: asked.append(how["non_blocking"]))
    base._on(torch.device(device), "found_inf", torch.ones(()))
    assert asked == [may_be_late]
