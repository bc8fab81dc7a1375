"""Triton's launcher while a CUDA graph captures, without a GPU: what a graph would keep is kept and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fusedopt

from .running import INTERPRETED, Run, as_params
from .tensors import same_bits

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET=1")
each_run = pytest.mark.parametrize("run", as_params([Run("triton")]))


def make(**options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in (5, 2049)]
    for param in params:
        param.grad = torch.ones_like(param)
    groups = [{"params": [params[0]], "lr": 0.5}, {"params": [params[1]], "lr": 0.25}]
    return fusedopt.AdamW(groups, backend="triton", **options), params


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Callable[[], None]]:
    """Like a CUDA graph, keeps the launches of a step with their arguments, and takes no step."""
    from fusedopt import triton_launch
    from fusedopt.triton_kernels import launch as kernels

    real = kernels.launch

    def captured(optimizer: Any) -> Callable[[], None]:
        kept: list[tuple[Any, Any]] = []
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "is_capturing", lambda device: True)
            patch.setattr(kernels, "launch", lambda *args, **kwargs: kept.append((args, kwargs)))
            optimizer.step()

        def replay() -> None:
            for args, kwargs in kept:
                real(*args, **kwargs)

        return replay

    return captured


@each_run
def test_numbers_keep_the_value_of_the_capture_until_they_are_synced(run: Run, capture: Any) -> None:
    (eager, expected), (graphed, params) = make(), make()
    eager.step()
    graphed.step()
    replay = capture(graphed)
    for lr, is_synced in ((0.125, False), (0.125, True), (0.5, True), (0.25, False)):
        for optimizer in (graphed, eager) if is_synced else (graphed,):
            optimizer.param_groups[0]["lr"] = lr
        if is_synced:
            graphed.sync_hyperparameters()
        replay()
        eager.step()
    eager.param_groups[0]["lr"] = 0.25
    for optimizer in (eager, graphed):
        optimizer.step()  # beside the graph, with the numbers of now
    for mine, theirs in zip(params, expected, strict=True):
        assert same_bits(mine.detach(), theirs.detach()).all()


@each_run
@pytest.mark.parametrize("change", ["lr", "gradient"])
def test_a_step_that_would_have_to_send_its_tables_is_not_captured(change: str, run: Run, capture: Any) -> None:
    optimizer, params = make()
    optimizer.step()
    if change == "lr":
        optimizer.param_groups[0]["lr"] = 0.125
    else:
        params[0].grad = torch.ones_like(params[0])
    column = {"lr": "group_values", "gradient": "grads"}[change]
    with pytest.raises(RuntimeError, match=f"{column} would have to be sent: before the capture"):
        capture(optimizer)


@each_run
def test_syncing_after_a_gradient_moved_is_refused_by_name(run: Run, capture: Any) -> None:
    optimizer, params = make()
    optimizer.step()
    capture(optimizer)
    seen = params[1].grad
    for moved in (torch.ones_like(params[1]), None):
        params[1].grad = moved
        with pytest.raises(RuntimeError, match=r"parameter 0 of group 1: 1 of 2 parameters.*capture again"):
            optimizer.sync_hyperparameters()
    params[1].grad = seen
    optimizer.sync_hyperparameters()
