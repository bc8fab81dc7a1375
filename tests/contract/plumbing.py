"""Behaviours: autograd's checks, closures, hooks, profiling, memory, and what others build around an optimizer."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .behaviour import behaviour
from .kit import CLASSES, FULL_OPTIONS, Kit, agree, agree_with_truth, demand, train, truth_kit

AUTOGRAD = "Autograd"
STEP = "The step around the update"
OTHERS = "What others build on it"


@behaviour(AUTOGRAD, "a tensor saved for backward and then stepped over is found out")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        weight = kit.param([[1.0, 2.0], [3.0, 4.0]])
        optimizer = kit.make(cls, [weight], lr=0.1)
        hidden = kit.random(2, 2).requires_grad_() @ weight
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        try:
            hidden.sum().backward()
        except RuntimeError as error:
            demand("modified by an inplace operation" in str(error), str(error))
        else:
            demand(False, "the gradient was computed from the weights of after the step")


@behaviour(AUTOGRAD, "only parameters that were updated count a new version")
def _(kit: Kit) -> None:
    updated, left = kit.param([1.0]), kit.param([1.0])
    optimizer = kit.make("Adam", [updated, left])
    updated.grad = torch.ones_like(updated)
    before = (updated._version, left._version)
    optimizer.step()
    demand(updated._version > before[0], "the version of the updated parameter stayed")
    demand(left._version == before[1], "the version of a parameter without gradient moved")


@behaviour(AUTOGRAD, "a step under no_grad, inference_mode and enable_grad is the same")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        params = []
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            param = kit.param([1.0, 2.0])
            optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
            for step in range(2):
                param.grad = kit.random(2, seed=step)
                with mode():
                    optimizer.step()
            demand(param.requires_grad and param.grad_fn is None, f"the parameter became part of a graph: {param}")
            params.append(param.tolist())
        demand(params[0] == params[1] == params[2], f"{cls} depends on the mode: {params}")


@behaviour(AUTOGRAD, "a parameter that is no leaf is refused", refused="can't optimize a non-leaf Tensor")
def _(kit: Kit) -> None:
    kit.make("SGD", [kit.param([1.0]) * 2], lr=0.1)
    demand(False, "it was taken")


@behaviour(STEP, "a closure is run with gradients enabled, and its loss returned, also by keyword")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, 2.0])
        optimizer = kit.make(cls, [param], lr=0.1)

        def closure(param: Tensor = param, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = param.pow(2).sum()
            loss.backward()
            return loss

        demand(float(optimizer.step(closure)) == 5.0, "the loss was not returned")
        with torch.no_grad():
            demand(float(optimizer.step(closure=closure)) < 5.0, "the first step did not lower the loss")
        demand(optimizer.step() is None, "a step without closure returned something")


@behaviour(STEP, "a closure that returns a float, or raises")
def _(kit: Kit) -> None:
    param = kit.param([1.0])
    optimizer = kit.make("SGD", [param], lr=0.1)
    param.grad = torch.ones_like(param)

    def failing() -> float:
        raise KeyError("mine")

    demand(optimizer.step(lambda: 2.5) == 2.5, "the float was not returned")
    before = param.item()
    try:
        optimizer.step(failing)
    except KeyError:
        demand(param.item() == before, "the parameter was updated all the same")
    else:
        demand(False, "the error was swallowed")


@behaviour(STEP, "the eight kinds of hooks run, each once, in torch's order")
def _(kit: Kit) -> None:
    orders = []
    for maker in (kit.make, truth_kit(kit.device).make):
        log: list[str] = []
        param = kit.param([1.0])
        maker("AdamW", [kit.param([1.0])])  # a subclass after its parent: torch wraps step once, not twice
        maker("Adam", [kit.param([1.0])])
        optimizer = maker("AdamW", [param], lr=0.1)

        def note(name: str, log: list[str] = log) -> Any:
            return lambda *args: log.append(name)

        handles = [
            register_optimizer_step_pre_hook(note("global pre")),
            register_optimizer_step_post_hook(note("global post")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
            optimizer.register_state_dict_pre_hook(note("state_dict pre")),
            optimizer.register_state_dict_post_hook(note("state_dict post")),
            optimizer.register_load_state_dict_pre_hook(note("load pre")),
            optimizer.register_load_state_dict_post_hook(note("load post")),
        ]
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        finally:
            for handle in handles:
                handle.remove()
        optimizer.step()
        orders.append(log)
    demand(orders[0] == orders[1], f"{orders[0]}, where torch has {orders[1]}")


@behaviour(STEP, "hooks may replace the arguments of a step, and the state_dict that is saved or loaded")
def _(kit: Kit) -> None:
    param = kit.param([1.0])
    optimizer = kit.make("SGD", [param], lr=0.1)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    demand(optimizer.step() == 7.0, "the closure of the hook was not called")
    optimizer.register_state_dict_post_hook(lambda opt, saved: {**saved, "more": 1})
    saved = optimizer.state_dict()
    demand(saved.get("more") == 1, "the hook's state_dict was not returned")

    def faster(opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        groups = [{**group, "lr": 9.0} for group in saved["param_groups"]]
        return {**saved, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(faster)
    optimizer.load_state_dict(saved)
    demand(optimizer.param_groups[0]["lr"] == 9.0, "the hook's state_dict was not loaded")
    demand(saved["param_groups"][0]["lr"] == 0.1, "the caller's state_dict was changed")


@behaviour(STEP, "the profiler shows the step as Optimizer.step#Class.step")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0])
        optimizer = kit.make(cls, [param], lr=0.1)
        param.grad = torch.ones_like(param)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        names = [event.key for event in profile.key_averages()]
        demand(f"Optimizer.step#{cls}.step" in names, f"it shows {names}")
        demand(f"Optimizer.zero_grad#{cls}.zero_grad" in names, f"it shows {names}")


@behaviour(STEP, "differentiable=True", refused="does not support `differentiable`")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0])
        optimizer = kit.make(cls, [param], differentiable=True, lr=0.1)
        scale = kit.param([2.0])
        moved = param.clone()
        optimizer.param_groups[0]["params"] = [moved]
        moved.grad = scale * 3.0
        optimizer.step()
        demand(moved.grad_fn is not None and moved.requires_grad, "the step left no derivative")
        moved.sum().backward()
        demand(scale.grad is not None, "the derivative of the step is missing")


@behaviour(STEP, "zero_grad, to None and to zero")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0])
        optimizer = kit.make(cls, [param])
        param.grad = torch.ones_like(param)
        optimizer.zero_grad(set_to_none=False)
        demand(param.grad is not None and param.grad.tolist() == [0.0], "the gradient is not zero")
        optimizer.zero_grad()
        demand(param.grad is None, "the gradient is not None")


@behaviour(STEP, "parameters and optimizer are freed by reference count")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, 2.0])
        optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
        train(optimizer, [param], 2, lambda s, i: kit.random(2, seed=s))
        optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, [param], 2, lambda s, i: kit.random(2, seed=s))
        optimizer.zero_grad()
        gone = [weakref.ref(optimizer), weakref.ref(param), weakref.ref(next(iter(optimizer.state[param].values())))]
        gc.disable()
        try:
            del optimizer, param
            demand([ref() for ref in gone] == [None] * 3, f"{cls} left {[type(ref()) for ref in gone]}")
        finally:
            gc.enable()


@behaviour(STEP, "an optimizer that its own parameter refers to is found by the garbage collector")
def _(kit: Kit) -> None:
    param = kit.param([1.0, 2.0])
    optimizer = kit.make("AdamW", [param], lr=0.1)
    train(optimizer, [param], 2, lambda s, i: kit.random(2, seed=s))
    param.optimizer = optimizer  # type: ignore[attr-defined]
    gone = weakref.ref(optimizer)
    del optimizer, param
    gc.collect()
    demand(gone() is None, "it was not collected")


@behaviour(STEP, "a step changes nothing else: random numbers, threads, defaults, places and layouts of tensors")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = nn.Parameter(kit.random(4, 6).t())
        optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
        grad = kit.random(6, 4)
        before = (param.data_ptr(), param.stride(), torch.get_num_threads(), torch.get_default_dtype())
        seed = torch.get_rng_state()
        for _ in range(2):
            param.grad = grad
            optimizer.step()
        after = (param.data_ptr(), param.stride(), torch.get_num_threads(), torch.get_default_dtype())
        demand(before == after, f"{before} became {after}")
        demand(torch.equal(seed, torch.get_rng_state()), "random numbers were drawn")
        demand(param.grad is grad, "the gradient was replaced")


@behaviour(STEP, "two optimizers with several groups each, stepped in turn, do not disturb each other")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        params = [kit.param(kit.random(5, seed=k)) for k in range(6)]
        first = maker("AdamW", [{"params": params[:2]}, {"params": params[2:3], "lr": 0.3}], lr=0.1)
        second = maker("AdamW", [{"params": params[3:5]}, {"params": params[5:], "lr": 0.2}], lr=0.05)
        for step in range(3):
            for optimizer, those in ((first, params[:3]), (second, params[3:])):
                train(optimizer, those, 1, lambda s, i: kit.random(5, seed=3 * s + i), first=step)
        results.append(params)
    for param, expected in zip(*results, strict=True):
        agree(param, expected, "a parameter", 3)


@behaviour(STEP, "under another default dtype, and another default device")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        start = [kit.random(5), kit.random(3, dtype=torch.float64)]
        torch.set_default_dtype(torch.float64)
        try:
            agree_with_truth(
                kit,
                cls,
                start,
                3,
                lambda s, i: kit.random(*start[i].shape, seed=s, dtype=start[i].dtype),
                **FULL_OPTIONS[cls],
            )
        finally:
            torch.set_default_dtype(torch.float32)
        param, grad = kit.param([1.0, 2.0]), kit.random(2)
        optimizer = kit.make(cls, [param], lr=0.1)
        with torch.device("meta"):
            for _ in range(2):
                param.grad = grad
                optimizer.step()
        demand(param.tolist() != [1.0, 2.0], "nothing was updated")


@behaviour(OTHERS, "optimizer in backward: one instance a parameter, stepped by a hook")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        torch.manual_seed(3)
        model, plain = (nn.Linear(3, 2).to(kit.device) for _ in range(2))
        plain.load_state_dict(model.state_dict())
        for param in model.parameters():
            optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])

            def hook(param: Tensor, optimizer: Any = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            param.register_post_accumulate_grad_hook(hook)
        truth = truth_kit(kit.device).make(cls, plain.parameters(), **FULL_OPTIONS[cls])
        for step in range(3):
            model(kit.random(4, 3, seed=step)).pow(2).sum().backward()
            truth.zero_grad()
            plain(kit.random(4, 3, seed=step)).pow(2).sum().backward()
            truth.step()
        for param, expected in zip(model.parameters(), plain.parameters(), strict=True):
            # One step's rounding enters the next gradient, which this model amplifies by less than 40.
            apart = (param - expected).abs().max().item()
            demand(apart < 40 * 3 * 9 * torch.finfo(torch.float32).eps, f"a parameter of {cls} is {apart:.2g} off")


@behaviour(STEP, "the constructor takes torch's arguments by the same names, in the same order, with the same defaults")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        theirs = inspect.signature(getattr(torch.optim, cls)).parameters
        ours = inspect.signature(getattr(kit.package, cls)).parameters
        demand([name for name in ours if name in theirs] == [*theirs], f"{cls} takes {', '.join(ours)}")
        for name, expected in theirs.items():
            demand(ours[name].default == expected.default, f"{name} of {cls} is {ours[name].default!r}")
            demand(ours[name].kind == expected.kind, f"{name} of {cls} is {ours[name].kind.description}")


@behaviour(STEP, "parameters that are taken out of the groups and the state are freed")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for replaces in (True, False):
            optimizer = kit.make(cls, [kit.param([1.0])], **FULL_OPTIONS[cls])
            gone = []
            for _step in range(4):
                param = kit.param([1.0])
                if replaces:
                    optimizer.param_groups[0]["params"][0] = param
                else:
                    optimizer.add_param_group({"params": [param]})
                    optimizer.param_groups.pop(0)
                optimizer.state.clear()
                param.grad = kit.random(1)
                optimizer.step()
                gone.append(weakref.ref(param))
                del param
            gc.collect()
            demand(sum(one() is not None for one in gone) == 1, f"{cls} keeps {[one() is not None for one in gone]}")


@behaviour(OTHERS, "constructed as ZeroRedundancyOptimizer does: keyword options, groups that may be empty")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        defaults = FULL_OPTIONS[cls]
        param = kit.param([1.0, 2.0])
        groups = [{"params": [param], **defaults}, {"params": [], **defaults}]
        optimizer = kit.make(cls, groups, **defaults)
        for group in optimizer.param_groups:  # which it copies between its own groups and these
            for key in defaults:
                group[key] = defaults[key]
        param.grad = kit.random(2)
        optimizer.step(closure=None)
        demand(param.tolist() != [1.0, 2.0], "nothing was updated")


@behaviour(OTHERS, "ZeroRedundancyOptimizer in a process group of one", devices=("cpu",))
def _(kit: Kit) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with single_process_group():
        results = []
        for one in (kit, truth_kit(kit.device)):
            params = [one.param([1.0, 2.0]), one.param([[3.0]])]
            optimizer = ZeroRedundancyOptimizer(
                params,
                one.package.AdamW,
                **dict(one.options),
                lr=0.1,
            )
            train(optimizer, params, 3, lambda s, i: kit.random(*((2,), (1, 1))[i], seed=2 * s + i))
            optimizer.consolidate_state_dict()
            optimizer.load_state_dict(optimizer.state_dict())
            train(optimizer, params, 1, lambda s, i: kit.random(*((2,), (1, 1))[i], seed=9 + i))
            results.append(params)
        for param, expected in zip(*results, strict=True):
            agree(param, expected, "a parameter", 4)


@behaviour(OTHERS, "DTensor parameters, as FSDP2 makes them", devices=("cpu",))
def _(kit: Kit) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    with single_process_group():
        mesh = init_device_mesh(kit.device, (1,))
        for cls in CLASSES:
            local = kit.random(4, 3)
            param = nn.Parameter(distribute_tensor(local.clone(), mesh, [Shard(0)]))
            plain = nn.Parameter(local.clone())
            optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
            truth = truth_kit(kit.device).make(cls, [plain], **FULL_OPTIONS[cls])
            for step in range(3):
                plain.grad = kit.random(4, 3, seed=step)
                param.grad = distribute_tensor(plain.grad.clone(), mesh, [Shard(0)])
                optimizer.step()
                truth.step()
            agree(param.to_local(), plain, f"the parameter of {cls}", 3)  # type: ignore[attr-defined]
            for name, value in optimizer.state[param].items():
                demand(name == "step" or isinstance(value, DTensor), f"{name} is a {type(value).__name__}")


@behaviour(OTHERS, "torch.distributed.checkpoint: get, save, load and set the state of an optimizer", devices=("cpu",))
def _(kit: Kit) -> None:
    import tempfile

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    results = []
    for one in (kit, truth_kit(kit.device)):
        torch.manual_seed(4)
        model, fresh = nn.Linear(3, 2), nn.Linear(3, 2)
        optimizer = one.make("AdamW", model.parameters(), lr=0.1)
        train(optimizer, list(model.parameters()), 2, lambda s, i: kit.random(*((2, 3), (2,))[i], seed=2 * s + i))
        fresh.load_state_dict(model.state_dict())
        again = one.make("AdamW", fresh.parameters(), lr=0.5)
        with tempfile.TemporaryDirectory() as folder:
            dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder, no_dist=True)
            state = {"optimizer": get_optimizer_state_dict(fresh, again)}
            dcp.load(state, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(fresh, again, state["optimizer"])
        train(again, list(fresh.parameters()), 2, lambda s, i: kit.random(*((2, 3), (2,))[i], seed=20 + 2 * s + i))
        results.append(list(fresh.parameters()))
    for param, expected in zip(*results, strict=True):
        agree(param, expected, "a parameter", 4)


class single_process_group:  # noqa: N801
    """A process group of this process alone, for as long as the block."""

    def __enter__(self) -> None:
        import torch.distributed as dist

        self._mine = not dist.is_initialized()
        if self._mine:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def __exit__(self, *exception: object) -> None:
        import torch.distributed as dist

        if self._mine:
            dist.destroy_process_group()
