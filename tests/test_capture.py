"""What a step refuses while a CUDA graph captures, without a GPU: to make what the graph alone would fill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import Parameter

import fusedopt
from fusedopt import lasting, traced

from .tensors import same_bits


@dataclass(frozen=True)
class Change:
    """What makes a step another than those before it.

    Attributes:
        options: of the optimizer.
        make: the change itself, of an optimizer that has taken a step.
        scaled: the step after it is a gradient scaler's.
    """

    options: dict[str, Any]
    make: Callable[[Any], None]
    scaled: bool = False


def _give_gradients(optimizer: Any) -> None:
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.full_like(param, 0.5)


def _ask_for(key: str, value: object) -> Callable[[Any], None]:
    return lambda optimizer: optimizer.param_groups[0].update({key: value})


CHANGES = {
    "a first gradient-AdamW": Change({}, _give_gradients),
    "a first gradient-SGD": Change({"momentum": 0.9}, _give_gradients),
    "a new state-AdamW": Change({}, _ask_for("amsgrad", True)),
    "a new state-SGD": Change({}, _ask_for("momentum", 0.9)),
    "a norm-AdamW": Change({}, lambda optimizer: None, scaled=True),
}


def _begin(cls: str, **options: Any) -> Any:
    """An optimizer of which one parameter has a gradient."""
    params = [Parameter(torch.linspace(-1, 1, size)) for size in (3, 40_000)]
    params[0].grad = torch.full_like(params[0], 0.25)
    return getattr(fusedopt, cls)(params, lr=0.5, **options)


def _refused(step: Callable[[], Any], optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes a step that is refused, and has made nothing."""
    before = {param: dict(state) for param, state in optimizer.state.items()}
    with monkeypatch.context() as patch:
        patch.setattr(lasting, "is_capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="run one step like it before the capture"):
            step()
    assert {param: dict(state) for param, state in optimizer.state.items()} == before


def _assert_same(one: Any, other: Any) -> None:
    for mine, theirs in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert same_bits(mine.detach(), theirs.detach()).all()
        assert one.state[mine].keys() == other.state[theirs].keys()


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "looked at closely"])
def test_a_first_step_within_a_capture_is_refused_before_states_are_made(
    cls: str, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if cls == "SGD" else {}
    if not plain:
        options["ema_decay"] = 0.5
    optimizer, eager = _begin(cls, **options), _begin(cls, **options)
    _refused(optimizer.step, optimizer, monkeypatch)
    for each in (optimizer, eager):
        each.step()
    _assert_same(optimizer, eager)


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_that_needs_new_memory_is_refused_within_a_capture_and_whole_after_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = CHANGES[name]
    optimizers = [_begin(name.rpartition("-")[2], **change.options) for _ in range(2)]
    steps: list[Callable[[], Any]] = []
    for optimizer in optimizers:
        optimizer.step()
        change.make(optimizer)
        scaler = fusedopt.amp.GradScaler("cpu", init_scale=2.0)
        scaler.scale(torch.ones(()))  # makes its scale
        steps.append((lambda s=scaler, o=optimizer: s.step(o)) if change.scaled else optimizer.step)
    _refused(steps[0], optimizers[0], monkeypatch)
    for step in steps:
        step()
    _assert_same(*optimizers)


def test_a_step_like_the_one_before_it_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _begin("AdamW", max_grad_norm=1.0, report=True)
    optimizer.step()
    monkeypatch.setattr(lasting, "is_capturing", lambda device: True)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)  # in other memory
    optimizer.step()


def test_a_compiled_step_is_left_out_of_the_graphs_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or refused, where torch has no way to leave it out: replays would keep this step's hyperparameters."""
    optimizer = _begin("AdamW")
    optimizer.step()
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in torch.ops.fusedopt.step.default.tags
    param = optimizer.param_groups[0]["params"][0]
    before = param.detach().clone()
    monkeypatch.setattr(traced, "is_capturing", lambda device: True)
    monkeypatch.setattr(traced, "_NOT_RECORDED", {})
    with pytest.raises(RuntimeError, match="reduce-overhead"):
        torch.ops.fusedopt.step([param.detach()], [param.grad], [0], optimizer._number)
    assert same_bits(param.detach(), before).all()
