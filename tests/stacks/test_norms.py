"""The norm of gradients that lie over ranks is that of the whole, on every rank: clipped and skipped as in one process.

Gradients are multiples of 1/8, so that their squares add up exactly in any order, and everything has the bits of the
same steps with plain tensors.
"""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import clip_grad_norm_

import fusedopt
from fusedopt import core, table

from ..test_pycore import Both
from .team import device, on_ranks
from .twin import Net, backward, make_model, whole

# Over 2 ranks uneven shards and empty ones, over 4 more of them; more than one leaf.
SHAPES = [(5, 4), (1, 3), (2, 2100), (7,)]
PLACEMENTS: dict[str, list[list[Any]]] = {
    "sharded": [[Shard(0)]],
    "by columns": [[Shard(0)], [Shard(1)], [Shard(1)], [Shard(0)]],
    "replicated": [[Replicate()]],
    "some replicated": [[Replicate()], [Shard(0)]],
    "plain and sharded": [[], [Shard(0)]],
}
PLACEMENTS_2D: dict[str, list[list[Any]]] = {
    "replicas of shards": [[Replicate(), Shard(0)]],
    "both ways": [[Shard(0), Shard(1)], [Shard(0), Replicate()], [Replicate(), Shard(1)], [Shard(0), Shard(0)]],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.5},
    "largest": {"max_grad_norm": 0.5, "norm_type": math.inf},
    "by group": {"max_grad_norm": 0.5, "norm_by_group": True},
    "skipping": {"skip_nonfinite": True},
    "all": {"max_grad_norm": 2.0, "skip_nonfinite": True, "ema_decay": 0.9, "zero_grads": True, "report": True},
}
both_tables = mock.patch.object(table, "make_core", Both if core.compiled else core.make_core)
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference", "emulated"])
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def eighths(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(-32, 33, shape, generator=torch.Generator().manual_seed(seed)).div(8).to(device())


def place(tensor: Tensor, mesh: Any, placed: list[Any]) -> Tensor:
    return distribute_tensor(tensor, mesh, placed) if placed else tensor


def compare(mesh: Any, placements: list[list[Any]], options: dict[str, Any], backend: str) -> None:
    """Steps with and without DTensors: the same parameters, norms and counts."""
    if device().type == "cuda":
        backend = "reference" if backend == "reference" else "cuda"
    lies = [placements[k % len(placements)] for k in range(len(SHAPES))]
    plain = [nn.Parameter(eighths(shape, k)) for k, shape in enumerate(SHAPES)]
    over = [nn.Parameter(place(p.detach().clone(), mesh, how)) for p, how in zip(plain, lies, strict=True)]
    ours, truth = (
        fusedopt.AdamW([{"params": it[:2]}, {"params": it[2:]}], lr=0.1, backend=backend, **options)
        for it in (over, plain)
    )
    is_one = all(placement.is_replicate() for how in lies for placement in how)
    for step in range(3):
        grads = [eighths(shape, 10 * step + k) for k, shape in enumerate(SHAPES)]
        if step == 1 and options.get("skip_nonfinite"):
            grads[0][4, 3] = math.inf  # on one rank only, where it is cut
        for param, twin, grad, how in zip(over, plain, grads, lies, strict=True):
            param.grad, twin.grad = place(grad.clone(), mesh, how), grad.clone()
        before = fusedopt.launch_count()
        ours.step()
        assert fusedopt.launch_count() - before == (1 if is_one else 2)
        truth.step()
        assert torch.equal(ours.grad_norm, truth.grad_norm)
        assert torch.equal(ours.skipped_steps, truth.skipped_steps)
        for param, twin in zip(over, plain, strict=True):
            assert torch.equal(whole(param), twin), f"step {step}"
            for key, value in truth.state.get(twin, {}).items():
                assert torch.equal(whole(ours.state[param][key]), value), f"{key} at step {step}"
    assert float(ours.skipped_steps) == float(bool(options.get("skip_nonfinite")))


@each_backend
@each_option
@pytest.mark.parametrize("placements", PLACEMENTS.values(), ids=PLACEMENTS)
@on_ranks(2)
@both_tables
def test_a_norm_over_ranks_is_that_of_the_whole(
    placements: list[list[Any]], options: dict[str, Any], backend: str
) -> None:
    compare(init_device_mesh(device().type, (2,)), placements, options, backend)


@each_option
@pytest.mark.parametrize("placements", PLACEMENTS_2D.values(), ids=PLACEMENTS_2D)
@on_ranks(4)
def test_a_norm_over_a_mesh_of_two_dimensions_is_that_of_the_whole(
    placements: list[list[Any]], options: dict[str, Any]
) -> None:
    compare(init_device_mesh(device().type, (2, 2)), placements, options, "cpu")


@on_ranks(4)
def test_four_ranks_with_empty_shards_agree() -> None:
    compare(init_device_mesh(device().type, (4,)), PLACEMENTS["sharded"], OPTIONS["all"], "cpu")


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@on_ranks(2)  # with 4, where shards are empty, torch's own clipping by the largest fails
def test_clipping_in_the_step_is_torchs_clipping_before_it(norm_type: float) -> None:
    """Torch rounds the norm and the clipped gradients to float32: 2 roundings, of a gradient as of the norm."""
    models = [make_model(), make_model()]
    for model in models:
        fully_shard(model)
    ours = fusedopt.SGD(models[0].parameters(), lr=0.1, max_grad_norm=0.01, norm_type=norm_type)
    recipe = fusedopt.SGD(models[1].parameters(), lr=0.1)
    for model in models:
        backward(model, 0)
    norm = clip_grad_norm_(models[1].parameters(), 0.01, norm_type=norm_type).full_tensor()  # type: ignore[attr-defined]
    ours.step()
    recipe.step()
    eps = torch.finfo(torch.float32).eps
    terms = sum(param.numel() for param in Net().parameters())  # roundings of a sum in any order
    torch.testing.assert_close(float(ours.grad_norm), float(norm), rtol=terms * eps, atol=0.0)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        scale = 0.1 * 0.01 * terms * eps
        torch.testing.assert_close(whole(one), whole(other), rtol=2 * eps, atol=scale)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, float(ours.grad_norm).hex())
    assert len(set(everyone)) == 1, "all ranks clip alike"
