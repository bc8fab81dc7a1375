"""What a step does and does not do: lazy state, groups, closures, hooks, checkpoints, gradients, AMP, launches."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import random
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt

from .running import ONE_RUN_EACH, Run, as_params
from .tensors import same_bits

CPU_RUNS = [run for run in ONE_RUN_EACH if run.device == "cpu"]

# How each optimizer is called here; the same call makes torch's.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01}),
    "amsgrad": ("Adam", {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01, "weight_decay": 0.1}),
}
STATEFUL = [name for name in OPTIMIZERS if name != "sgd"]


def make(name: str, params: Any, run: Run, **options: Any) -> Any:
    cls, defaults = OPTIMIZERS[name]
    return getattr(fusedopt, cls)(params, **{**defaults, **options}, backend=run.backend)


def make_torchs(name: str, params: Any, **options: Any) -> Any:
    cls, defaults = OPTIMIZERS[name]
    return getattr(torch.optim, cls)(params, **{**defaults, **options})


SHAPES = ((3, 5), (17,), (), (0,), (2, 3, 4))


def make_params(run: Run, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator).to(run.device, dtype)) for shape in SHAPES]


def set_grads(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)


def snapshot(optimizer: Any) -> list[Tensor]:
    """Copies of all parameters and states, in order."""
    tensors = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            tensors += [state[name].clone() for name in sorted(state) if isinstance(state[name], Tensor)]
    return tensors


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert same_bits(a.cpu(), b.cpu()).all(), (a, b)


# --- state


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_state_appears_with_the_first_gradient_and_is_that_of_torch_fused(name: str, run: Run, settings: Run) -> None:
    params, twins = make_params(run), make_params(run)
    optimizer, torchs = make(name, params, run), make_torchs(name, twins, fused=True)
    assert not optimizer.state
    set_grads(params, 1)
    set_grads(twins, 1)
    params[1].grad = twins[1].grad = None
    optimizer.step()
    torchs.step()
    assert params[1] not in optimizer.state
    assert len(optimizer.state) == (0 if name == "sgd" else len(params) - 1)
    for param, twin in zip(params, twins, strict=True):
        state, expected = optimizer.state.get(param, {}), torchs.state.get(twin, {})
        assert list(state) == [key for key in expected if expected[key] is not None]
        for key, tensor in state.items():
            assert (tensor.shape, tensor.dtype, tensor.stride()) == (
                expected[key].shape,
                expected[key].dtype,
                expected[key].stride(),
            ), key
            assert tensor.device == param.device
    assert [set(group) for group in optimizer.param_groups] == [set(group) for group in torchs.param_groups]


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_a_parameter_without_gradient_takes_no_step_and_is_not_held_back_by_others(run: Run, settings: Run) -> None:
    """Each parameter's trajectory is the one it has alone: its own steps alone correct its bias."""
    params = make_params(run)
    together = make("adamw", params, run)
    twins = make_params(run)
    alone = [make("adamw", [twin], run) for twin in twins]
    chance = random.Random(3)
    taken = [0] * len(params)
    for k in range(8):
        set_grads(params, k)
        for index, (param, twin, optimizer) in enumerate(zip(params, twins, alone, strict=True)):
            if chance.random() < 0.4:
                param.grad = None
                continue
            taken[index] += 1
            twin.grad = param.grad.clone()
            optimizer.step()
        together.step()
    assert min(taken) < max(taken)
    for param, twin, optimizer, steps in zip(params, twins, alone, taken, strict=True):
        assert float(together.state[param]["step"]) == steps
        assert_same([param, *together.state[param].values()], [twin, *optimizer.state[twin].values()])


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_a_copy_a_pickle_and_a_checkpoint_goes_on_bit_for_bit(name: str, run: Run, settings: Run) -> None:
    params = make_params(run)
    optimizer = make(name, params, run)
    for k in range(3):
        set_grads(params, k)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved_params = [Parameter(param.detach().clone()) for param in params]
    loaded = make(name, saved_params, run, lr=77.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for k in range(3, 6):
        for each in (optimizer, loaded, copied, pickled):
            set_grads([param for group in each.param_groups for param in group["params"]], k)
            each.step()
    for other in (loaded, copied, pickled):
        assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loop"])
def test_checkpoints_of_torch_and_of_fusedopt_load_into_each_other(name: str, fused: bool) -> None:
    run = Run("cpu")
    params, twins = make_params(run, dtype=torch.float64), make_params(run, dtype=torch.float64)
    ours, torchs = make(name, params, run), make_torchs(name, twins, fused=fused, foreach=False)
    for k in range(6):
        set_grads(params, k)
        set_grads(twins, k)
        ours.step()
        torchs.step()
        ours_before, torchs_before = ours.state_dict(), torchs.state_dict()
        if k % 2:
            ours.load_state_dict(copy.deepcopy(torchs_before))
            torchs.load_state_dict(copy.deepcopy(ours_before))
    for one, other in zip(snapshot(ours), snapshot(torchs), strict=True):
        # 6 steps of at most 20 roundings; 1 - 0.999^t magnifies that of the power a thousandfold.
        assert torch.allclose(one.double(), other.double(), rtol=120 * 2.0**-53 * 1e3, atol=1e-15)


def test_a_loaded_state_keeps_its_dtype() -> None:
    param = Parameter(torch.randn(40).bfloat16())
    param.grad = torch.randn(40).bfloat16()
    optimizer = fusedopt.AdamW([param])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float() * 1.001
    saved["state"][0]["exp_avg_sq"] = saved["state"][0]["exp_avg_sq"].double() * 1.001
    loaded = fusedopt.AdamW([param])
    loaded.load_state_dict(saved)
    assert loaded.state[param]["exp_avg"].dtype == torch.float32
    assert loaded.state[param]["exp_avg_sq"].dtype == torch.float64
    assert torch.equal(loaded.state[param]["exp_avg"], saved["state"][0]["exp_avg"])
    loaded.step()
    assert loaded.state[param]["exp_avg"].dtype == torch.float32


def test_a_changed_flag_adds_the_state_it_needs() -> None:
    params = make_params(Run("cpu"))
    optimizer = make("adam", params, Run("cpu"))
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    set_grads(params, 1)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert list(state) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
        assert torch.equal(state["max_exp_avg_sq"], state["exp_avg_sq"])
        assert float(state["step"]) == 2


def test_momentum_that_is_switched_on_begins_with_the_gradient() -> None:
    param = Parameter(torch.zeros(5))
    optimizer = fusedopt.SGD([param], lr=1.0)
    param.grad = torch.ones(5)
    optimizer.step()
    optimizer.param_groups[0].update(momentum=0.5, dampening=0.25)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.ones(5))
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((5,), 0.5 + 0.75))
    assert torch.equal(param.detach(), torch.full((5,), -1 - 1 - 1.25))


def test_a_row_that_needs_no_state_any_more_is_stepped() -> None:
    param = Parameter(torch.ones(5))
    optimizer = fusedopt.SGD([param], lr=0.5, momentum=0.5)
    param.grad = torch.ones(5)
    optimizer.step()
    optimizer.state.clear()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    param.grad = torch.ones(5)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(param.detach(), torch.full((5,), 1.0 - 4 * 0.5))


def test_a_first_step_that_failed_for_want_of_memory_is_a_first_step_when_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = [Parameter(torch.ones(1)) for _ in range(3)]
    optimizer = fusedopt.SGD(params, lr=0.5, momentum=0.5, dampening=0.5)
    for param in params:
        param.grad = torch.ones(1)
    calls: list[int] = []

    def empty_like(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return made(*args, **kwargs)

    made = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", empty_like)
    with contextlib.suppress(MemoryError):
        optimizer.step()
        assert not calls, "no state was made by it"
    optimizer.step()
    assert [float(param) for param in params] == [0.5] * 3


def test_a_velocity_given_after_a_first_step_that_was_skipped_is_taken() -> None:
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = fusedopt.SGD([param], lr=0.5, momentum=0.5)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    optimizer.state[param]["momentum_buffer"] = torch.full((3,), 2.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((3,), 2.0))
    assert torch.equal(param.detach(), torch.zeros(3))


@pytest.mark.parametrize("steps", [1, 2])  # its handle is looked for at the second
def test_a_state_given_other_memory_is_found_without_being_told(steps: int) -> None:
    param = Parameter(torch.zeros(5))
    param.grad = torch.zeros(5)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=1.0)
    for _ in range(steps):
        optimizer.step()
    optimizer.state[param]["momentum_buffer"].data = torch.ones(5)
    optimizer.step()
    assert torch.equal(param.detach(), -torch.ones(5))


def test_refresh_finds_state_tensors_that_were_replaced() -> None:
    param = Parameter(torch.zeros(5))
    param.grad = torch.ones(5)
    optimizer = fusedopt.SGD([param], lr=1.0, momentum=1.0)
    optimizer.step()
    optimizer.state[param]["momentum_buffer"] = torch.full((5,), 9.0)
    optimizer.refresh()
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((5,), 10.0))


def test_a_parameter_whose_data_moved_is_followed() -> None:
    param = Parameter(torch.zeros(5))
    param.grad = torch.ones(5)
    optimizer = fusedopt.SGD([param], lr=1.0)
    optimizer.step()
    old = param.data
    param.data = torch.full((5,), 7.0)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((5,), 6.0))
    assert torch.equal(old, torch.full((5,), -1.0))


# --- groups and hyperparameters


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_every_group_has_its_own_hyperparameters_read_anew_each_step(run: Run, settings: Run) -> None:
    count = 40
    params = [Parameter(torch.zeros(k % 7, device=run.device)) for k in range(count)]
    rate = torch.tensor(0.5)  # on the CPU: read by the host
    own = torch.tensor(0.25, device=run.device)  # on the parameter's device: read by the launch
    groups = [{"params": [param], "lr": float(k)} for k, param in enumerate(params)]
    groups[3]["lr"], groups[4]["lr"] = rate, own
    optimizer = fusedopt.SGD(groups, backend=run.backend)
    total = [0.0] * count
    for step in range(4):
        optimizer.param_groups[5]["lr"] = 2.0**step
        rate.fill_(2.0**-step)
        own.fill_(3.0 * step)
        for k, param in enumerate(params):
            param.grad = torch.ones_like(param)
            total[k] -= float(optimizer.param_groups[k]["lr"])
        optimizer.step()
    for param, expected in zip(params, total, strict=True):
        assert torch.equal(param.detach().cpu(), torch.full(param.shape, expected))
    assert optimizer.param_groups[3]["lr"] is rate
    assert optimizer.param_groups[4]["lr"] is own


@pytest.mark.parametrize("run", as_params(CPU_RUNS))
def test_a_group_can_be_added_between_steps(run: Run, settings: Run) -> None:
    params, late = make_params(run), make_params(run, seed=1)
    optimizer = make("adamw", params, run)
    twins, late_twins = make_params(run), make_params(run, seed=1)
    first, second = make("adamw", twins, run), make("adamw", late_twins, run, lr=0.5)
    for k in range(4):
        if k == 2:
            optimizer.add_param_group({"params": late, "lr": 0.5})
        set_grads(params, k)
        set_grads(twins, k)
        first.step()
        if k >= 2:
            set_grads(late, 10 + k)
            set_grads(late_twins, 10 + k)
            second.step()
        optimizer.step()
    assert_same([*params, *late], [*twins, *late_twins])


def test_schedulers_drive_it() -> None:
    params, twins = make_params(Run("cpu"), dtype=torch.float64), make_params(Run("cpu"), dtype=torch.float64)
    ours, torchs = make("nesterov", params, Run("cpu")), make_torchs("nesterov", twins)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.5, total_steps=10) for each in (ours, torchs)]
    for k in range(9):
        set_grads(params, k)
        set_grads(twins, k)
        for each in (ours, torchs, *schedulers):
            each.step()
    assert ours.param_groups[0]["momentum"] == torchs.param_groups[0]["momentum"] != 0.9
    for param, twin in zip(params, twins, strict=True):
        assert torch.allclose(param, twin, rtol=1e-13, atol=1e-15)


# --- closures and hooks


@pytest.mark.parametrize("run", as_params(CPU_RUNS))
def test_a_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back(run: Run, settings: Run) -> None:
    param = Parameter(torch.full((3,), 2.0))
    optimizer = fusedopt.SGD([param], lr=0.25, backend=run.backend)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        calls.append(torch.is_grad_enabled())
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss.item() == 12.0
    assert calls == [True]
    assert torch.equal(param.detach(), torch.ones(3))
    assert optimizer.step(closure=closure).item() == 3.0
    assert optimizer.step() is None


def test_hooks_run_once_in_torchs_order() -> None:
    param = Parameter(torch.zeros(2))
    param.grad = torch.ones(2)
    fusedopt.Adam([Parameter(torch.zeros(1))])  # the parent class, patched by torch when first made
    optimizer = fusedopt.AdamW([param])
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"]
    assert float(optimizer.state[param]["step"]) == 1


# --- mixed precision


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_found_inf_leaves_everything_as_it_was(name: str, run: Run, settings: Run) -> None:
    params, twins = make_params(run), make_params(run)
    optimizer, other = make(name, params, run), make(name, twins, run)
    chance = random.Random(1)
    # The very first step is skipped too: the first velocity is still to come.
    for k, skipped in enumerate([True, False, True, True, False, chance.random() < 0.5, False]):
        set_grads(params, k)
        before = [param.detach().clone() for param in params]
        optimizer.found_inf = torch.tensor(float(skipped), device=run.device)
        optimizer.grad_scale = None
        launches = fusedopt.launch_count()
        optimizer.step()
        assert fusedopt.launch_count() == launches + 1
        del optimizer.found_inf, optimizer.grad_scale
        if skipped:
            assert_same(params, before)
            continue
        set_grads(twins, k)
        other.step()
        assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("run", as_params(CPU_RUNS))
def test_torchs_gradient_scaler_works_and_gradients_stay_scaled(run: Run, settings: Run) -> None:
    params, twins = make_params(run), make_params(run)
    optimizer, other = make("adamw", params, run), make("adamw", twins, run)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for k in range(6):
        set_grads(params, k)
        set_grads(twins, k)
        spoilt = k in (0, 3)
        scale = scaler.get_scale() if k else 1024.0
        for param in params:
            param.grad *= scale
        if spoilt:
            params[0].grad.view(-1)[4] = float("inf")
        scaled = [param.grad.clone() for param in params]
        scaler.scale(torch.ones(()))  # where a training step has its loss
        scaler.step(optimizer)
        scaler.update()
        assert_same([param.grad for param in params], scaled)
        assert not hasattr(optimizer, "found_inf")
        if not spoilt:
            other.step()
        assert_same(params, twins)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


@pytest.mark.parametrize("way", ["made", "copied", "fused from torch's"])
def test_with_fused_false_the_gradient_scaler_unscales_before_the_step_as_trainers_that_clip_want_it(way: str) -> None:
    """Lightning refuses to clip for an optimizer that unscales by itself."""
    params, twins = [Parameter(torch.ones(5))], [Parameter(torch.ones(5))]
    library = torch.optim if way == "fused from torch's" else fusedopt
    optimizer = library.AdamW(params, fused=False)
    if way == "copied":
        params, optimizer = copy.deepcopy((params, optimizer))
    fusedopt.fuse(optimizer)
    assert not optimizer._step_supports_amp_scaling
    other = fusedopt.AdamW(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(3):
        twins[0].grad = torch.arange(5.0) + k
        params[0].grad = 1024.0 * twins[0].grad
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(params[0].grad, twins[0].grad)
        other.step()
        assert torch.equal(params[0], twins[0])


# --- one launch, and nothing else


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_one_launch_for_any_number_of_tensors_groups_and_dtypes(run: Run, settings: Run) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [Parameter(torch.ones(k % 5, dtype=dtypes[k % 4], device=run.device)) for k in range(120)]
    groups = [{"params": params[k : k + 3], "lr": 0.1 * k, "amsgrad": k % 2 == 0} for k in range(0, 120, 3)]
    optimizer = fusedopt.AdamW(groups, backend=run.backend)
    for k in range(3):
        for index, param in enumerate(params):
            param.grad = None if index % 4 == k else torch.ones_like(param)
        before = fusedopt.launch_count()
        optimizer.step()
        assert fusedopt.launch_count() == before + 1


@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_nothing_is_written_but_parameters_and_state(run: Run, settings: Run) -> None:
    params = make_params(run)
    optimizer = make("amsgrad", params, run)
    bystander = Parameter(torch.randn(50, device=run.device))
    optimizer.add_param_group({"params": [bystander]})
    set_grads(params, 1)
    grads = [param.grad for param in params]
    copies = [grad.clone() for grad in grads]
    versions = [grad._version for grad in grads]
    before = [bystander.detach().clone()]
    random_state = torch.get_rng_state()
    mode = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    device = torch.cuda.current_device() if run.device == "cuda" else None
    for _ in range(3):
        optimizer.step()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert_same(grads, copies)
    assert [grad._version for grad in grads] == versions
    assert_same([bystander], before)
    assert bystander.grad is None
    assert torch.equal(torch.get_rng_state(), random_state)
    assert mode == (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    assert run.device != "cuda" or torch.cuda.current_device() == device


@pytest.mark.parametrize("run", as_params(CPU_RUNS))
def test_versions_of_updated_parameters_advance_and_others_do_not(run: Run, settings: Run) -> None:
    params = make_params(run)
    optimizer = make("momentum", params, run)
    set_grads(params, 1)
    params[2].grad = None
    versions = [param._version for param in params]
    optimizer.step()
    advanced = [param._version > version for param, version in zip(params, versions, strict=True)]
    assert advanced == [True, True, False, True, True]
    x = torch.ones(17, requires_grad=True)
    loss = (x * params[1]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("run", as_params([Run("cpu"), Run("emulated"), Run("cuda", "cuda")]))
def test_a_step_advances_the_version_of_what_it_writes_by_one(run: Run, settings: Run) -> None:
    params = make_params(run)
    optimizer = fusedopt.SGD(params, lr=0.1, zero_grads=True, backend=run.backend)
    for step in range(3):  # from the second on they are told without Python
        if step != 2:
            set_grads(params, step)
        written = [*params, *(param.grad for param in params)]
        versions = [tensor._version for tensor in written]
        optimizer.step()
        assert [tensor._version for tensor in written] == [version + 1 for version in versions]


@pytest.mark.gpu
@pytest.mark.parametrize("run", as_params([Run("cuda", "cuda"), Run("triton", "cuda")]))
def test_the_profiler_sees_one_kernel_a_step(run: Run, settings: Run) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params = [Parameter(torch.ones(k % 3000, dtype=dtypes[k % 3], device="cuda")) for k in range(600)]
    groups = [{"params": params[k : k + 6], "lr": 0.1} for k in range(0, 600, 6)]
    optimizer = fusedopt.AdamW(groups, backend=run.backend)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Optimizer.step"))]
    assert len(kernels) == 1, on_device
    assert sum(name.startswith("Memset") for name in on_device) == 0


# --- errors


def test_an_error_names_the_tensor_changes_nothing_and_can_be_mended() -> None:
    params = make_params(Run("cpu"))
    optimizer = make("adam", params, Run("cpu"))
    set_grads(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    good = optimizer.state[params[1]]["exp_avg"]
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(18)
    optimizer.refresh()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 1 of group 0 .*\(18,\).*\(17,\)"):
        optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = good
    assert_same(snapshot(optimizer), before)
    twins = make_params(Run("cpu"))
    other = make("adam", twins, Run("cpu"))
    set_grads(twins, 0)
    other.step()
    optimizer.step()
    other.step()
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_flag_changed_before_a_failed_step_is_not_forgotten() -> None:
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(4))]
    optimizer = fusedopt.Adam(params, lr=0.1)
    for param in params:
        param.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = True
    params[1].grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (4,), check_invariants=True)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0"):
        optimizer.step()
    assert_same(snapshot(optimizer)[:2], before[:2])
    params[1].grad = torch.ones(4)
    optimizer.step()
    for param in params:
        assert torch.equal(optimizer.state[param]["max_exp_avg_sq"], optimizer.state[param]["exp_avg_sq"])
        assert float(optimizer.state[param]["step"]) == 2


# --- processes, threads, lifetimes


def test_an_optimizer_is_freed_by_reference_count() -> None:
    params = make_params(Run("cpu"))
    optimizer = make("adamw", params, Run("cpu"))
    set_grads(params, 0)
    optimizer.step()
    optimizer.step()
    gone, param_gone = weakref.ref(optimizer), weakref.ref(params[0])
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        params.clear()
        assert param_gone() is None
    finally:
        gc.enable()


def train(seed: int, steps: int, sizes: tuple[int, ...] = (70_000, 40_000, 3)) -> list[Tensor]:
    """Some steps of AdamW on tensors large enough for several threads."""
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(size, generator=generator)) for size in sizes]
    optimizer = fusedopt.AdamW(params, lr=0.1, backend="cpu")
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return snapshot(optimizer)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def test_python_threads_step_optimizers_at_once(two_threads: None) -> None:
    expected = [train(seed, 6) for seed in range(4)]
    results: dict[int, list[Tensor]] = {}
    workers = [threading.Thread(target=lambda k=k: results.update({k: train(k, 6)})) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for seed, tensors in enumerate(expected):
        assert_same(results[seed], tensors)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_steps_with_threads_of_its_own(two_threads: None) -> None:
    expected = train(5, 3)  # the team of this process has started
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # torch's own threads do not survive a fork; the engine's are to
            params = [Parameter(torch.zeros(200_000))]
            params[0].grad = torch.ones(200_000)
            optimizer = fusedopt.SGD(params, lr=1.0, backend="cpu")
            ((table, _),) = optimizer._current_tables()
            table.core.launch_cpu(3, fusedopt.backends.cpu.isa)
            table.core.launch_cpu(3, fusedopt.backends.cpu.isa)
            os.write(writer, b"1" if bool((params[0] == -2).all()) else b"0")
        finally:
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"1"
    os.waitpid(child, 0)
    os.close(reader)
    assert_same(train(5, 3), expected)


def test_the_floating_point_mode_of_the_caller_neither_matters_nor_changes(two_threads: None) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no mode that flushes denormals")
    try:
        param = Parameter(torch.full((100_000,), 1e-40))
        torch.set_flush_denormal(False)
        param.grad = torch.full((100_000,), 3e-41)
        optimizer = fusedopt.SGD([param], lr=1.0, backend="cpu")
        expected = (param - param.grad).detach()
        torch.set_flush_denormal(True)
        optimizer.step()
        flushes = float(torch.tensor(1e-39) * 0.5) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert (expected != 0).all()
    assert_same([param], [expected])


def test_an_optimizer_for_each_parameter_steps_in_the_backward_pass() -> None:
    params, twins = make_params(Run("cpu")), make_params(Run("cpu"))
    each = {param: make("adamw", [param], Run("cpu")) for param in params}

    def step(param: Parameter) -> None:
        each[param].step()
        each[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    together = make("adamw", twins, Run("cpu"))
    for _ in range(3):
        sum(((param - 1) ** 2).sum() for param in params).backward()
        sum(((twin - 1) ** 2).sum() for twin in twins).backward()
        together.step()
        together.zero_grad()
    assert_same(params, twins)
    assert all(param.grad is None for param in params)


def test_complex_parameters_are_updated_as_their_real_and_imaginary_parts() -> None:
    values = torch.randn(9, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    param, parts = Parameter(values.clone()), Parameter(torch.view_as_real(values).clone())
    one, other = fusedopt.AdamW([param], lr=0.1), fusedopt.AdamW([parts], lr=0.1)
    for k in range(3):
        grad = torch.randn(9, dtype=torch.complex64, generator=torch.Generator().manual_seed(k))
        param.grad, parts.grad = grad, torch.view_as_real(grad).clone()
        one.step()
        other.step()
    assert_same([torch.view_as_real(param.detach())], [parts])
    assert one.state[param]["exp_avg"].dtype == torch.complex64
    assert_same([torch.view_as_real(one.state[param]["exp_avg"])], [other.state[parts]["exp_avg"]])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_table_is_kept_where_nothing_changes(momentum: float) -> None:
    """The look at where states lie finds those of the first step; also where there are none."""
    optimizer = fusedopt.SGD(make_params(Run("cpu")), lr=0.1, momentum=momentum)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    tables = optimizer._tables
    for _ in range(3):
        optimizer.step()
    assert optimizer._tables is tables


def test_counts_that_the_state_has_not_go_with_a_copy() -> None:
    """Else the copy's next step would be its first: undampened."""
    optimizer = fusedopt.SGD(make_params(Run("cpu")), lr=0.1, momentum=0.9, dampening=0.5)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        for param in each.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        each.step()
    for param, other in zip(*(each.param_groups[0]["params"] for each in (optimizer, twin)), strict=True):
        assert torch.equal(param, other)
