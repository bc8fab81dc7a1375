"""Random mixtures of tensors, dtypes, layouts, groups, options and events for fifty steps, against torch's for-loop.

The for-loop runs in float64 on plain copies. After every step it is given the values that fusedopt stored, so that each
step is judged by itself: by the rounding of one step, whatever came before. Step counts, and whether a momentum buffer
exists, are its own.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import fusedopt
from fusedopt.backends import available_backends

from .kit import CLASSES, STATES

STEPS = 50
OPERATIONS = 16  # roundings of the longest chain of operations in one step, generously

REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*REAL, torch.complex64)
SHAPES = ((), (1,), (5,), (3, 4), (2, 3, 2, 2), (0, 2), (70,), (129,), (17, 9))
LAYOUTS = ("contiguous", "transposed", "slice", "offset")

dtypes = st.sampled_from(DTYPES)
shapes = st.sampled_from(SHAPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**16)
numbers: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from((0.1, 0.01, 0.0, 1)),
    "weight_decay": st.sampled_from((0.0, 0.1)),
    "momentum": st.sampled_from((0.0, 0.9, 0.5)),
    "dampening": st.sampled_from((0.0, 0.5)),
    "betas": st.sampled_from(((0.9, 0.99), (0.5, 0.9), (0.0, 0.5))),
    "eps": st.sampled_from((1e-3, 1e-2)),
    "maximize": st.booleans(),
}
OPTIONS = {
    "SGD": ("lr", "weight_decay", "momentum", "dampening", "maximize"),
    "Adam": ("lr", "weight_decay", "betas", "eps", "maximize"),
    "AdamW": ("lr", "weight_decay", "betas", "eps", "maximize"),
}
# Hyperparameters that are also tried as tensors.
AS_TENSORS = {"lr", "weight_decay", "momentum"}


def _random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand((*shape, 2), generator=generator) * 2 - 1
    return torch.view_as_complex(values) if dtype.is_complex else values[..., 0].to(dtype)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, otherwise in memory."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "slice" and values.dim() > 0:
        base = torch.zeros(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)
        base[..., 1 : 1 + values.shape[-1]] = values
        return base[..., 1 : 1 + values.shape[-1]]
    if layout == "offset":
        base = torch.zeros(values.numel() + 1, dtype=values.dtype)
        base[1:] = values.flatten()
        return base[1:].view(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def _parts(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass
class Pair:
    """A parameter of fusedopt and its float64 copy under the for-loop."""

    mine: nn.Parameter
    plain: nn.Parameter
    layout: str
    grad_layout: str
    has_grad: bool = True


class Mixtures(RuleBasedStateMachine):
    """One optimizer of fusedopt and torch's for-loop beside it."""

    cls: ClassVar[str]
    backend: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.count = 0

    @initialize(data=st.data(), amsgrad=st.booleans())
    def make(self, data: st.DataObject, amsgrad: bool) -> None:
        self.amsgrad = amsgrad and self.cls == "Adam"
        groups = [self._new_group(data) for _ in range(data.draw(st.integers(1, 3)))]
        self.fixed = {"amsgrad": True} if self.amsgrad else {}
        self.mine = getattr(fusedopt, self.cls)([mine for mine, _ in groups], backend=self.backend, **self.fixed)
        self.truth = getattr(torch.optim, self.cls)([plain for _, plain in groups], foreach=False, **self.fixed)

    def _new_pair(self, data: st.DataObject) -> Pair:
        dtype, shape, layout = data.draw(dtypes), data.draw(shapes), data.draw(layouts)
        values = _random(shape, data.draw(seeds), dtype)
        mine = nn.Parameter(_laid_out(values, layout))
        return Pair(mine, nn.Parameter(_wide(values)), layout, data.draw(layouts))

    def _new_group(self, data: st.DataObject) -> tuple[dict[str, Any], dict[str, Any]]:
        pairs = [self._new_pair(data) for _ in range(data.draw(st.integers(0, 3)))]
        options = {name: data.draw(numbers[name]) for name in OPTIONS[self.cls]}
        self.pairs += pairs
        return {"params": [pair.mine for pair in pairs], **options}, {
            "params": [pair.plain for pair in pairs],
            **options,
        }

    @rule(data=st.data())
    def add_a_group(self, data: st.DataObject) -> None:
        if len(self.pairs) < 12:
            mine, plain = self._new_group(data)
            self.mine.add_param_group(mine)
            self.truth.add_param_group(plain)

    @rule(data=st.data(), as_tensor=st.booleans())
    def change_an_option(self, data: st.DataObject, as_tensor: bool) -> None:
        index = data.draw(st.integers(0, len(self.mine.param_groups) - 1))
        name = data.draw(st.sampled_from(OPTIONS[self.cls]))
        value = data.draw(numbers[name])
        self.truth.param_groups[index][name] = value
        if as_tensor and name in AS_TENSORS:
            # float64, as these numbers are not exact in less
            value = torch.full(data.draw(st.sampled_from(((), (1,)))), value, dtype=torch.float64)
        self.mine.param_groups[index][name] = value

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def give_or_take_a_gradient(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        pair.has_grad = not pair.has_grad

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), layout=layouts)
    def lay_a_gradient_out_otherwise(self, data: st.DataObject, layout: str) -> None:
        data.draw(st.sampled_from(self.pairs)).grad_layout = layout

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), dtype=st.sampled_from(REAL))
    def cast_a_parameter(self, data: st.DataObject, dtype: torch.dtype) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        if not pair.mine.is_complex():
            pair.mine.grad = None
            pair.mine.data = pair.mine.data.to(dtype)
            pair.plain.data.copy_(pair.mine.data)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), layout=layouts)
    def move_a_parameter(self, data: st.DataObject, layout: str) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        pair.mine.grad = None
        pair.mine.data = _laid_out(pair.mine.data, layout)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data(), layout=layouts, seed=seeds)
    def replace_a_state(self, data: st.DataObject, layout: str, seed: int) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        state = self.mine.state.get(pair.mine, {})
        for name in STATES[self.cls]:
            if isinstance(state.get(name), Tensor):
                values = _random(tuple(pair.mine.shape), seed, pair.mine.dtype)
                if name != "exp_avg" and name != "momentum_buffer":  # those are squares
                    values = torch.view_as_complex(_parts(values).abs()) if values.is_complex() else values.abs()
                if name == "max_exp_avg_sq":
                    values = state["exp_avg_sq"].detach().to(values.dtype)
                state[name] = _laid_out(values, layout)
                self.truth.state[pair.plain][name] = _wide(values)

    @precondition(lambda self: self.pairs)
    @rule(data=st.data())
    def forget_a_state(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        self.mine.state.pop(pair.mine, None)
        self.truth.state.pop(pair.plain, None)

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.mine.state_dict(), file)
        file.seek(0)
        groups = [{"params": list(group["params"])} for group in self.mine.param_groups]
        self.mine = getattr(fusedopt, self.cls)(groups, backend=self.backend, **self.fixed)
        self.mine.load_state_dict(torch.load(file, weights_only=True))

    @rule(by_pickle=st.booleans())
    def copy_all(self, by_pickle: bool) -> None:
        both = (self.mine, [pair.mine for pair in self.pairs])
        self.mine, params = pickle.loads(pickle.dumps(both)) if by_pickle else copy.deepcopy(both)
        for pair, param in zip(self.pairs, params, strict=True):
            pair.mine = param

    @rule()
    def look_again(self) -> None:
        self.mine.refresh()

    @rule(seed=seeds)
    def a_skipped_step(self, seed: int) -> None:
        self._give_gradients(seed)
        before = [pair.mine.detach().clone() for pair in self.pairs]
        self.mine.found_inf = torch.ones(())
        self.mine.step()
        del self.mine.found_inf
        for pair, values in zip(self.pairs, before, strict=True):
            assert torch.equal(pair.mine, values)
            if self.cls != "SGD" and pair.mine.grad is not None and not self.truth.state[pair.plain]:
                self._start_state(pair)

    def _start_state(self, pair: Pair) -> None:
        """What the skipped first step of a fused optimizer leaves: moments of 0 after 0 steps."""
        names = STATES["AdamW"] + (("max_exp_avg_sq",) if self.amsgrad else ())
        state = {name: torch.zeros_like(pair.plain).detach() for name in names}
        self.truth.state[pair.plain].update(step=torch.tensor(0.0), **state)

    @precondition(lambda self: hasattr(self, "mine"))
    @invariant()
    def a_step(self) -> None:
        """After every event: a step of both, with new gradients, every third through a scale."""
        self.count += 1
        scale = 4.0 if self.count % 3 == 0 else None
        self._give_gradients(1000 * self.count)
        if scale is not None:
            self.mine.grad_scale = torch.tensor(scale)
            for pair in self.pairs:
                if pair.plain.grad is not None:
                    pair.plain.grad /= scale
        moments = {id(pair): self._moment(pair) for pair in self.pairs}
        before = {id(pair): _parts(pair.plain.detach().clone()).abs() for pair in self.pairs}
        self.mine.step()
        if scale is not None:
            del self.mine.grad_scale
        self.truth.step()
        for group, plain_group in zip(self.mine.param_groups, self.truth.param_groups, strict=True):
            for pair in self.pairs:
                if any(pair.mine is param for param in group["params"]):
                    self._judge(pair, plain_group, before[id(pair)], moments[id(pair)])

    def _give_gradients(self, seed: int) -> None:
        for index, pair in enumerate(self.pairs):
            pair.mine.grad = pair.plain.grad = None
            if pair.has_grad:
                grad = _random(tuple(pair.mine.shape), seed + index, pair.mine.dtype)
                pair.mine.grad = _laid_out(grad, pair.grad_layout)
                pair.plain.grad = _wide(grad)

    def _moment(self, pair: Pair) -> Tensor:
        state = self.truth.state.get(pair.plain, {})
        moment = state.get("exp_avg", state.get("momentum_buffer"))
        return torch.zeros(()) if moment is None else _parts(moment).abs().clone()

    def _judge(self, pair: Pair, group: dict[str, Any], before: Tensor, moment: Tensor) -> None:
        mine, truth = self.mine.state.get(pair.mine, {}), self.truth.state.get(pair.plain, {})
        if "step" in truth:
            assert float(mine["step"]) == float(truth["step"])
        slots = {name: (mine[name], truth[name]) for name in STATES[self.cls] if isinstance(truth.get(name), Tensor)}
        if pair.plain.grad is not None:
            grad = _parts(pair.plain.grad).abs() + group["weight_decay"] * before
            terms = before + (before - _parts(pair.plain.detach()).abs()).abs()
            terms = terms + self._step_size(pair, group) * (moment + grad)
            self._compare("parameter", pair.mine, pair.plain, terms)
            for name, (ours, theirs) in slots.items():
                squares = name not in ("exp_avg", "momentum_buffer")
                self._compare(name, ours, theirs, grad * grad + _parts(theirs).abs() if squares else moment + grad)
        for name, (ours, theirs) in slots.items():
            theirs.copy_(ours)
            assert ours.shape == theirs.shape, name
        pair.plain.data.copy_(pair.mine.data)

    def _step_size(self, pair: Pair, group: dict[str, Any]) -> Any:
        """By what the velocity or the first moment is multiplied."""
        if self.cls == "SGD":
            return float(group["lr"]) * (1.0 + group["momentum"])
        state = self.truth.state[pair.plain]
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        second = state["max_exp_avg_sq"] if self.amsgrad else state["exp_avg_sq"]
        root = _parts(second).sqrt() / math.sqrt(1 - beta2**step)
        return group["lr"] / (1 - beta1**step) / (root + group["eps"])

    @staticmethod
    def _compare(name: str, ours: Tensor, theirs: Tensor, terms: Tensor) -> None:
        """Terms: the sum of the magnitudes that were added up on the way, element by element."""
        actual, expected = _parts(ours.detach()), _parts(theirs.detach())
        stored = torch.finfo(actual.dtype)
        rounding = stored.eps * expected.abs() + stored.smallest_normal * stored.eps
        bound = rounding + OPERATIONS * torch.finfo(torch.float32).eps * terms
        apart = (actual.double() - expected).abs()
        assert bool((apart <= bound).all()), (
            f"{name} of {ours.dtype}: {float((apart - bound).max()):.3g} beyond {bound}"
        )


def _machine(cls: str, backend: str) -> type[Mixtures]:
    return type(f"Mixtures of {cls}", (Mixtures,), {"cls": cls, "backend": backend})


def _run(cls: str, backend: str, examples: int, derandomize: bool) -> None:
    run_state_machine_as_test(
        _machine(cls, backend),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=derandomize,
            database=None,
            phases=(Phase.generate,) if derandomize else (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_fifty_random_events(cls: str) -> None:
    _run(cls, available_backends("cpu")[0], examples=12, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("backend", ["cpu", "reference", "emulated"])
def test_very_many_random_events(cls: str, backend: str) -> None:
    if backend not in available_backends("cpu"):
        pytest.skip(f"backend {backend} is not here; there are {', '.join(available_backends('cpu'))}")
    _run(cls, backend, examples=200, derandomize=False)
