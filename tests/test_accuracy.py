"""As accurate as can be: the error against float64 beside that of torch's fused optimizers, and torch's for-loop."""

from __future__ import annotations

import functools
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt

from . import balls
from .cases import RULES, Option, RuleCase

ELEMENTS = 256
STEPS = 20
DRAWS = 16  # of hyperparameters: the rounding of a few constants is not to decide

LIMITS = {"param": 1.02, "exp_avg_sq": 1.02, "max_exp_avg_sq": 1.02, "exp_avg": 1.25, "momentum_buffer": 1.02}

Gradients = Callable[[torch.Generator], Tensor]

GRADIENTS: dict[str, Gradients] = {
    "noise": lambda generator: torch.randn(ELEMENTS, generator=generator),
    "drift": lambda generator: 1 + 0.3 * torch.randn(ELEMENTS, generator=generator),
    "scales": lambda generator: torch.randn(ELEMENTS, generator=generator) * 10.0 ** torch.linspace(-6, 2, ELEMENTS),
    "sparse": lambda generator: (
        torch.randn(ELEMENTS, generator=generator) * (torch.rand(ELEMENTS, generator=generator) < 0.2)
    ),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share, and threads that wait for each other take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def gradient(seed: int, step: int) -> Tensor:
    """The gradient of a tensor's step; the seed chooses the kind."""
    kinds = list(GRADIENTS.values())
    return kinds[seed % len(kinds)](torch.Generator().manual_seed(1000 * seed + step))


def plain_options(rule: RuleCase) -> list[Option]:
    """Options as numbers; without eps, an element that never had a gradient is 0/0 everywhere."""
    return [option for option in rule.options if not option.tensors and option.name != "eps_zero"]


def vary(group: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """The same options with other constants."""

    def near_one(x: float) -> float:
        return 1 - (1 - x) * math.exp(chance.uniform(-0.5, 0.5)) if 0 < x < 1 else x

    varied = dict(group)
    varied["lr"] *= 10 ** chance.uniform(-2, 0.5)
    for name in ("weight_decay", "eps"):
        if name in varied:
            varied[name] *= math.exp(chance.uniform(-1, 1))
    if "betas" in varied:
        varied["betas"] = tuple(min(near_one(beta), 0.9999) if beta > 0.5 else beta for beta in varied["betas"])
    if "momentum" in varied:
        varied["momentum"] = near_one(varied["momentum"])
    return varied


def take_steps(cls: Any, groups: list[dict[str, Any]], dtype: torch.dtype, **options: Any) -> list[dict[str, Tensor]]:
    """Runs an optimizer with a tensor for each kind of gradient in each group; the slots it leaves behind."""
    kinds = len(GRADIENTS)
    params = []
    for seed in range(kinds * len(groups)):
        start = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(seed))
        params.append(torch.nn.Parameter(start.to(dtype)))
    optimizer = cls([{**group, "params": params[k * kinds :][:kinds]} for k, group in enumerate(groups)], **options)
    for step in range(STEPS):
        for seed, param in enumerate(params):
            param.grad = gradient(seed, step).to(dtype)
        optimizer.step()
    return [{"param": p.detach(), **_states(optimizer.state[p])} for p in params]


def _states(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "step" and value is not None}


def errors(truth: list[dict[str, Tensor]], results: list[dict[str, Tensor]]) -> Iterator[tuple[str, float]]:
    """The mean error of each slot of each tensor, relative to its mean size."""
    for exact, result in zip(truth, results, strict=True):
        assert exact.keys() == result.keys()
        for name, value in exact.items():
            size = value.abs().mean().item()
            if size:
                yield name, (result[name].double() - value).abs().mean().item() / size


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_mean_error_against_float64_is_that_of_torch_fused(rule: RuleCase, record_property: Any) -> None:
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    torch_class, our_class = getattr(torch.optim, rule.name), getattr(fusedopt, rule.name)
    chance = random.Random(7)
    for option in plain_options(rule):
        groups = [vary(rule.group(option), chance) for _ in range(DRAWS)]
        exact = take_steps(torch_class, groups, torch.float64, fused=True)
        for name, error in errors(exact, take_steps(our_class, groups, torch.float32)):
            ours[name].append(error)
        for name, error in errors(exact, take_steps(torch_class, groups, torch.float32, fused=True)):
            theirs[name].append(error)
    for name, values in ours.items():
        mine, torchs = sum(values) / len(values), sum(theirs[name]) / len(theirs[name])
        record_property(
            "figure",
            f"mean error, {rule.name} {name}: {mine:.3e} fusedopt, {torchs:.3e} torch fused, "
            f"ratio {mine / torchs:.3f} (limit {LIMITS[name]}), {len(values)} tensors x {STEPS} steps",
        )
        assert mine <= LIMITS[name] * torchs, name


def test_the_reference_in_float64_is_torch_in_float64() -> None:
    for rule in RULES:
        for option in plain_options(rule):
            groups = [rule.group(option)]
            exact = take_steps(getattr(torch.optim, rule.name), groups, torch.float64, foreach=False)
            ours = take_steps(getattr(fusedopt, rule.name), groups, torch.float64, backend="reference")
            # 20 steps of at most 20 roundings each, on slots that do not cancel; 1 − βᵗ magnifies that of βᵗ.
            bound = 20 * 20 * 2.0**-53 / (1 - max(groups[0].get("betas", (0.0,))))
            assert all(error <= bound for _, error in errors(exact, ours)), (rule.name, option.name)


DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rule", "option"),
    [pytest.param(rule, option, id=f"{rule.name}-{option.name}") for rule in RULES for option in plain_options(rule)],
)
def test_a_step_from_the_same_state_is_within_rounding_of_the_for_loop(
    rule: RuleCase, option: Option, dtype: str
) -> None:
    """Both lie within the radius of tests/balls.py around the exact step, so no further apart than twice that."""
    group = rule.group(option)
    start = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    ours = getattr(fusedopt, rule.name)([{"params": [mine], **group}])
    loop = getattr(torch.optim, rule.name)([{"params": [theirs], **group}], foreach=False)
    generator = torch.Generator().manual_seed(2)
    precision = balls.Precision.of(DTYPES[dtype])
    exact = torch.zeros(ELEMENTS, dtype=torch.float64)
    for step, kind in enumerate(("noise", "drift", "sparse", "scales", "noise"), start=1):
        mine.grad = GRADIENTS[kind](generator).to(DTYPES[dtype])
        theirs.grad = mine.grad.clone()
        before = {"param": theirs.detach(), **_states(loop.state[theirs])}
        before.update({name: torch.zeros_like(start) for name in rule.states(option) if name not in before})
        inputs = {k: balls.Ball(v.double().clone(), exact, precision) for k, v in before.items()}
        grad = balls.Ball(theirs.grad.double(), exact, precision)
        expected = balls.UPDATES[rule.name](inputs.pop("param"), grad, inputs, group, step)
        loop.step()
        ours.step()
        for name, ball in expected.items():
            result, other = (mine, theirs) if name == "param" else (ours.state[mine][name], loop.state[theirs][name])
            difference = (result.detach().double() - other.detach().double()).abs()
            beyond = difference > 2 * ball.radius
            assert not beyond.any(), (
                f"{name} in step {step}: {difference[beyond][0]:.3e} apart, bound {2 * ball.radius[beyond][0]:.3e}"
            )
            size = ball.center.abs()
            vacuous = 2 * ball.radius > 0.5 * torch.maximum(size, size.mean())
            assert vacuous.float().mean() < 0.05, f"the bound of {name} says nothing"
            with torch.no_grad():
                result.copy_(other)  # the next step starts from the same numbers again
