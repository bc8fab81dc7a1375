"""Behaviours: mixed precision, with the gradient scaler and under autocast."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .behaviour import behaviour
from .kit import CLASSES, FULL_OPTIONS, Kit, agree, demand, identical, states_of, train, truth_kit

AREA = "Mixed precision"


def _scaler(kit: Kit, scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(kit.device, init_scale=scale, growth_interval=1000)


def _scaled_training(kit: Kit, cls: str, gradients: Callable[[int], Tensor], between: Any = None) -> list[Tensor]:
    """Four steps of gradients through a scaler; and the same, unscaled, by the for-loop without one."""
    results: list[Tensor] = []
    for maker, scaler in ((kit.make, _scaler(kit)), (truth_kit(kit.device).make, None)):
        param = kit.param([1.0, -2.0, 3.0])
        optimizer = maker(cls, [param], **FULL_OPTIONS[cls])
        for step in range(4):
            grad = gradients(step)
            if scaler is None:
                if bool(grad.isfinite().all()):
                    param.grad = grad
                    if between:
                        between(param)
                    optimizer.step()
                continue
            optimizer.zero_grad()
            scaler.scale((param * grad.nan_to_num(posinf=0.0)).sum()).backward()
            if not bool(grad.isfinite().all()):
                param.grad = grad.clone()
            if between:
                scaler.unscale_(optimizer)
                between(param)
            scaler.step(optimizer)
            scaler.update()
        results.append(param)
    return results


@behaviour(AREA, "the gradient scaler's steps are the unscaled ones")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        scaled, plain = _scaled_training(kit, cls, lambda step: kit.random(3, seed=step))
        agree(scaled, plain, f"the parameter of {cls}", 4)


@behaviour(AREA, "a step whose gradients overflowed is skipped, the first included")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for bad in (0, 2):

            def gradients(step: int, bad: int = bad) -> Tensor:
                return (
                    kit.random(3, seed=step)
                    if step != bad
                    else torch.tensor([1.0, float("inf"), 0.0], device=kit.device)
                )

            scaled, plain = _scaled_training(kit, cls, gradients)
            agree(scaled, plain, f"the parameter of {cls}", 4)


@behaviour(AREA, "a skipped step leaves parameters, state and step counts bit for bit")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, -2.0, 3.0])
        optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
        train(optimizer, [param], 2, lambda s, i: kit.random(3, seed=s))
        before, state = param.detach().clone(), copy.deepcopy(states_of(optimizer, param))
        scaler = _scaler(kit)
        param.grad = scaler.scale(torch.tensor([1.0, float("nan"), 2.0], device=kit.device))
        scaler.step(optimizer)
        scaler.update()
        identical(param.detach(), before, "the parameter")
        for name, value in states_of(optimizer, param).items():
            identical(value, state[name], name)


@behaviour(AREA, "unscale_, clipping, then the step")
def _(kit: Kit) -> None:
    def clip(param: Tensor) -> None:
        torch.nn.utils.clip_grad_norm_([param], 0.5)

    for cls in CLASSES:
        scaled, plain = _scaled_training(kit, cls, lambda step: 3 * kit.random(3, seed=step), clip)
        agree(scaled, plain, f"the parameter of {cls}", 4)


@behaviour(AREA, "a scale that a script set on the optimizer is multiplied in")
def _(kit: Kit) -> None:
    if not getattr(kit.make("Adam", [kit.param([1.0])]), "_step_supports_amp_scaling", False):
        raise RuntimeError("this implementation has no scale of its own")
    results = []
    for maker, factor in ((kit.make, 4.0), (truth_kit(kit.device).make, 1.0)):
        param = kit.param([1.0, -2.0, 3.0])
        optimizer = maker("SGD", [param], lr=0.1)
        if factor != 1.0:
            optimizer.grad_scale = torch.tensor(factor, device=kit.device)  # type: ignore[attr-defined]
        param.grad = factor * kit.random(3)
        optimizer.step()
        results.append(param)
    agree(results[0], results[1], "the parameter", 1)


@behaviour(AREA, "a scaler that is disabled is as none")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param, plain = kit.param([1.0]), kit.param([1.0])
        optimizer, same = (kit.make(cls, [one], **FULL_OPTIONS[cls]) for one in (param, plain))
        scaler = torch.amp.GradScaler(kit.device, enabled=False)
        for one in (param, plain):
            one.grad = torch.ones_like(one)
        scaler.step(optimizer)
        same.step()
        identical(param.detach(), plain.detach(), "the parameter")


@behaviour(
    AREA, "a closure given to an enabled scaler is refused by the scaler", refused="Closure use is not currently"
)
def _(kit: Kit) -> None:
    param = kit.param([1.0])
    optimizer = kit.make("Adam", [param])
    scaler = _scaler(kit)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer, closure=lambda: None)
    demand(False, "it was taken")


@behaviour(AREA, "training under autocast, with a scaler that overflows at first")
def _(kit: Kit) -> None:
    dtype = torch.float16 if kit.device == "cuda" else torch.bfloat16
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(kit.device)
            optimizer = maker(cls, model.parameters(), lr=0.01)
            scaler = torch.amp.GradScaler(kit.device, init_scale=3e38, growth_interval=2)
            losses = []
            for step in range(6):
                optimizer.zero_grad()
                with torch.autocast(kit.device, dtype=dtype):
                    loss = (model(kit.random(16, 4, seed=step)) - 1.0).pow(2).mean()
                scaler.scale(loss * 100).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.detach().float())
            results.append((torch.stack(losses), scaler.get_scale()))
        demand(results[0][1] == results[1][1], "the scaler went another way")
        apart = (results[0][0] - results[1][0]).abs().max().item()
        demand(apart < 0.02, f"the losses are {apart:.2g} apart")


@behaviour(AREA, "pickled between scaled steps, it goes on")
def _(kit: Kit) -> None:
    param = kit.param([1.0, 2.0])
    optimizer = kit.make("Adam", [param], lr=0.1)
    scaler = _scaler(kit)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(param.pow(2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer, param = pickle.loads(pickle.dumps((optimizer, param)))
    plain = kit.param([1.0, 2.0])
    truth = truth_kit(kit.device).make("Adam", [plain], lr=0.1)
    for _ in range(2):
        truth.zero_grad()
        plain.pow(2).sum().backward()
        truth.step()
    agree(param, plain, "the parameter", 2)
