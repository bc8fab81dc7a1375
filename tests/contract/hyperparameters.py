"""Behaviours: hyperparameters - numbers and tensors, changed between steps, by hand and by schedulers - and groups."""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from .behaviour import behaviour
from .kit import CLASSES, FULL_OPTIONS, Kit, agree, agree_with_truth, demand, identical, train, truth_kit

AREA = "Hyperparameters and groups"
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _beside_truth(
    kit: Kit,
    cls: str,
    options: dict[str, Any],
    between: Callable[[Optimizer, int], None],
    steps: int = 5,
    truth_options: dict[str, Any] | None = None,
) -> None:
    """Trains beside the for-loop, doing the same to both between steps."""
    results = []
    for maker, those in ((kit.make, options), (truth_kit(kit.device).make, truth_options or options)):
        params = [kit.param([1.0, -2.0, 3.0]), kit.param([[0.5]])]
        optimizer = maker(cls, params, **those)
        for step in range(steps):
            between(optimizer, step)
            train(optimizer, params, 1, lambda s, i: kit.random(*params[i].shape, seed=2 * s + i), first=step)
        results.append(params)
    for param, expected in zip(*results, strict=True):
        agree(param, expected, f"a parameter of {cls}", steps)


def _nothing(optimizer: Optimizer, step: int) -> None:
    return


def _set(**values: Any) -> Callable[[Optimizer, int], None]:
    """Gives every group the values of a step, from lists by step."""

    def between(optimizer: Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            for key, all_values in values.items():
                group[key] = all_values[step % len(all_values)]

    return between


@behaviour(AREA, "plain SGD, momentum, dampening, Nesterov, weight decay, maximize, and each of them together")
def _(kit: Kit) -> None:
    for options in (
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "maximize": True, "momentum": 0.9, "nesterov": True},
    ):
        start = [kit.random(5, 3), kit.random(70)]
        agree_with_truth(
            kit,
            "SGD",
            start,
            4,
            lambda s, i: kit.random(*start[i].shape, seed=2 * s + i),
            lr=0.1,
            **options,
        )


@behaviour(AREA, "Adam and AdamW, with AMSGrad, weight decay of either kind, maximize")
def _(kit: Kit) -> None:
    for cls in ("Adam", "AdamW"):
        for options in (
            {},
            {"amsgrad": True},
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "maximize": True, "amsgrad": True},
            {"betas": (0.0, 0.5), "eps": 0.1},
            {"decoupled_weight_decay": True, "weight_decay": 0.1} if cls == "Adam" else {"weight_decay": 0.0},
        ):
            start = [kit.random(5, 3), kit.random(70)]
            agree_with_truth(
                kit,
                cls,
                start,
                4,
                lambda s, i: kit.random(*start[i].shape, seed=2 * s + i),
                lr=0.05,
                **options,
            )


@behaviour(AREA, "each group its own options, over three groups")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            params = [kit.param(kit.random(4, seed=k)) for k in range(6)]
            special = {"momentum": 0.5, "nesterov": True} if cls == "SGD" else {"betas": (0.5, 0.9), "eps": 1e-3}
            groups = [
                {"params": params[:2]},
                {"params": params[2:3], "lr": 0.02, "weight_decay": 0.3},
                {"params": params[3:], "maximize": True, **special},
            ]
            optimizer = maker(cls, groups, lr=0.1)
            train(optimizer, params, 4, lambda s, i: kit.random(4, seed=6 * s + i))
            results.append(params)
        for param, expected in zip(*results, strict=True):
            agree(param, expected, f"a parameter of {cls}", 4)


@behaviour(AREA, "a group that is added between steps")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            params = [kit.param([1.0, 2.0])]
            optimizer = maker(cls, params, **FULL_OPTIONS[cls])
            train(optimizer, params, 2, lambda s, i: kit.random(2, seed=s))
            params.append(kit.param([[3.0]]))
            optimizer.add_param_group({"params": params[1], "lr": 0.03})
            train(optimizer, params, 2, lambda s, i: kit.random(*((2,), (1, 1))[i], seed=s), first=2)
            results.append(params)
        for param, expected in zip(*results, strict=True):
            agree(param, expected, f"a parameter of {cls}", 4)


@behaviour(AREA, "an empty group")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, 2.0])
        optimizer = kit.make(cls, [{"params": []}, {"params": [param]}, {"params": []}], lr=0.1)
        train(optimizer, [param], 2, lambda s, i: kit.random(2, seed=s))
        demand(param.tolist() != [1.0, 2.0], "nothing was updated")


@behaviour(AREA, "lr, weight decay, betas or momentum written into the group between steps")
def _(kit: Kit) -> None:
    changes: dict[str, Any] = {"lr": [0.1, 0.01, 0.0, 1], "weight_decay": [0.0, 0.1, 0]}
    _beside_truth(kit, "SGD", {"momentum": 0.9}, _set(momentum=[0.9, 0.5], **changes))
    for cls in ("Adam", "AdamW"):
        _beside_truth(kit, cls, {}, _set(betas=[(0.9, 0.99), (0.5, 0.7)], eps=[1e-8, 0.1], **changes))


@behaviour(AREA, "flags turned on and off between steps")
def _(kit: Kit) -> None:
    _beside_truth(kit, "SGD", {"momentum": 0.9, "lr": 0.1}, _set(nesterov=[False, True], maximize=[True, True, False]))
    _beside_truth(kit, "SGD", {"lr": 0.1}, _set(momentum=[0.0, 0.0, 0.9, 0.9, 0.0]))
    _beside_truth(kit, "AdamW", {"lr": 0.1}, _set(maximize=[True, True, False]))
    _beside_truth(kit, "Adam", {"lr": 0.1, "amsgrad": True}, _set(amsgrad=[True, False]))


@behaviour(AREA, "AMSGrad turned on in the middle of training")
def _(kit: Kit) -> None:
    param = kit.param([1.0, 2.0])
    optimizer = kit.make("Adam", [param], lr=0.1)
    train(optimizer, [param], 2, lambda s, i: kit.random(2, seed=s))
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, [param], 1, lambda s, i: kit.random(2, seed=9))
    state = optimizer.state[param]
    identical(state["max_exp_avg_sq"], state["exp_avg_sq"], "the first maximum")


@behaviour(AREA, "lr as a tensor of any floating dtype and any shape of one element, read at every step")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for dtype in FLOATS:
            for shape in ((), (1,), (1, 1)):
                values = [0.125, 0.0625, 0.5]  # which every dtype holds

                def between(optimizer: Optimizer, step: int, values: list[float] = values) -> None:
                    lr = optimizer.param_groups[0]["lr"]
                    if isinstance(lr, Tensor):
                        lr.fill_(values[step % 3])
                    else:
                        optimizer.param_groups[0]["lr"] = values[step % 3]

                lr = torch.full(shape, 0.25, dtype=dtype)
                _beside_truth(kit, cls, {"lr": lr}, between, steps=3, truth_options={"lr": 0.25})


@behaviour(AREA, "betas as tensors")
def _(kit: Kit) -> None:
    for cls in ("Adam", "AdamW"):
        for dtype in (torch.float32, torch.float64):
            for shape in ((), (1,), (1, 1, 1)):
                betas = tuple(torch.full(shape, value, dtype=dtype) for value in (0.75, 0.875))
                options = {"betas": betas, "lr": 0.1}
                _beside_truth(kit, cls, options, _nothing, truth_options={"betas": (0.75, 0.875), "lr": 0.1})


class _Listed(UserList[float]):
    """A list of a configuration, as some libraries hand it over: a sequence, but neither tuple nor list."""


@behaviour(AREA, "betas as a sequence that is neither tuple nor list, for all or in a group, and loaded again")
def _(kit: Kit) -> None:
    for betas in (_Listed([0.75, 0.875]), np.array([0.75, 0.875])):
        for cls in ("Adam", "AdamW"):
            param = kit.param([1.0, 2.0])
            for optimizer in (
                kit.make(cls, [param], betas=betas),
                kit.make(cls, [{"params": [param], "betas": betas}]),
            ):
                train(optimizer, [param], 1, lambda s, i: torch.ones(2, device=kit.device))
                optimizer.load_state_dict(optimizer.state_dict())
                train(optimizer, [param], 1, lambda s, i: torch.ones(2, device=kit.device))
                state = optimizer.state[param]
                identical(state["exp_avg"], torch.full_like(state["exp_avg"], 0.4375), "the mean of two gradients of 1")


@behaviour(AREA, "weight decay and momentum as tensors, read at every step")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        options: dict[str, Any] = {"weight_decay": 0.25, "lr": 0.1}
        if cls == "SGD":
            options["momentum"] = 0.5
        tensors = {key: torch.tensor(value) if key != "lr" else value for key, value in options.items()}

        def between(optimizer: Optimizer, step: int) -> None:
            for key in ("weight_decay", "momentum"):
                value = optimizer.param_groups[0].get(key)
                if isinstance(value, Tensor):
                    value.fill_(0.125 * (step + 1))
                elif value is not None:
                    optimizer.param_groups[0][key] = 0.125 * (step + 1)

        _beside_truth(kit, cls, tensors, between, truth_options=options)


@behaviour(AREA, "momentum as a tensor that is 0 at first")
def _(kit: Kit) -> None:
    def between(optimizer: Optimizer, step: int) -> None:
        value = 0.0 if step < 2 else 0.5
        momentum = optimizer.param_groups[0]["momentum"]
        if isinstance(momentum, Tensor):
            momentum.fill_(value)
        else:
            optimizer.param_groups[0]["momentum"] = value

    options = {"momentum": torch.tensor(0.0), "dampening": 0.5, "lr": 0.1}
    _beside_truth(kit, "SGD", options, between, truth_options={**options, "momentum": 0.0})


@behaviour(AREA, "numpy's scalars, and arrays of one element that change in place")
def _(kit: Kit) -> None:
    import numpy

    lr = numpy.array(0.25)

    def between(optimizer: Optimizer, step: int) -> None:
        if optimizer.param_groups[0]["lr"] is lr:
            lr.fill(0.25 / (step + 1))
        else:
            optimizer.param_groups[0]["lr"] = 0.25 / (step + 1)

    for cls in CLASSES:
        _beside_truth(kit, cls, {"lr": lr}, between, truth_options={"lr": 0.25})
        _beside_truth(
            kit,
            cls,
            {"lr": numpy.float64(0.25), "weight_decay": numpy.float64(0.5)},
            _nothing,
            truth_options={"lr": 0.25, "weight_decay": 0.5},
        )


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 2, gamma=0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], gamma=0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, factor=0.5, total_iters=2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, gamma=0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=5),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=5),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, T_0=2),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 1.0 / (epoch + 1)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.75),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, factor=0.5), lr_scheduler.ExponentialLR(opt, gamma=0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, factor=0.5), lr_scheduler.ExponentialLR(opt, gamma=0.5)]
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=3),
}


@behaviour(AREA, "every scheduler of torch.optim.lr_scheduler, those that rewrite betas and momentum included")
def _(kit: Kit) -> None:
    for name, make_scheduler in SCHEDULERS.items():
        for cls, options in (("SGD", {"momentum": 0.9}), ("AdamW", {})):
            for lr in (0.1, torch.tensor(0.1)):
                if isinstance(lr, Tensor) and kit.name == "foreach" and cls != "SGD":
                    continue  # torch refuses it when the optimizer is made
                results = []
                for maker in (kit.make, truth_kit(kit.device).make):
                    param = kit.param([1.0, -2.0, 3.0])
                    optimizer = maker(cls, [param], lr=lr.clone() if isinstance(lr, Tensor) else lr, **options)
                    scheduler = make_scheduler(optimizer)
                    for step in range(6):
                        param.grad = kit.random(3, seed=step)
                        optimizer.step()
                        scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
                    results.append(param)
                agree(results[0], results[1], f"the parameter of {cls} under {name}", 6)


@behaviour(AREA, "SWA: an AveragedModel and its scheduler around the optimizer")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        torch.manual_seed(2)
        model = nn.Linear(3, 1).to(kit.device)
        optimizer = maker("SGD", model.parameters(), lr=0.1, momentum=0.9)
        averaged = swa_utils.AveragedModel(model)
        schedule = swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
        for step in range(5):
            optimizer.zero_grad()
            model(kit.random(4, 3, seed=step)).pow(2).mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            schedule.step()
        results.append(list(averaged.parameters()))
    for param, expected in zip(*results, strict=True):
        agree(param, expected, "an averaged parameter", 5)


@behaviour(AREA, "capturable, foreach and fused given one by one, SGD's too where torch has them")
def _(kit: Kit) -> None:
    if kit.is_torch:
        raise RuntimeError("they are what makes these three what they are")
    for cls in CLASSES:
        for flag in ("capturable", "foreach", "fused"):
            agree_with_truth_of_flag(kit, cls, flag)


def agree_with_truth_of_flag(kit: Kit, cls: str, flag: str) -> None:
    """Trains with a flag that asks for another implementation, or for capture."""
    param, plain = kit.param([1.0, -2.0]), kit.param([1.0, -2.0])
    optimizer = kit.make(cls, [param], **{**FULL_OPTIONS[cls], flag: True})
    truth = truth_kit(kit.device).make(cls, [plain], **FULL_OPTIONS[cls])
    for one, those in ((optimizer, [param]), (truth, [plain])):
        train(one, those, 3, lambda s, i: kit.random(2, seed=s))
    agree(param, plain, "the parameter", 3)
