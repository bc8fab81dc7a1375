"""DTensors by themselves: gradients and states that lie otherwise over the devices than their parameter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import core, table

from ..test_pycore import Both
from .team import device, on_ranks
from .twin import whole

SHAPE = (5, 4)
WHOLE: list[list[Any]] = [[Replicate()], [Shard(0)], [Shard(1)]]
ANY = [*WHOLE, [Partial()]]
# Both the compiled table and its twin in Python, whose answers are compared.
both_tables = mock.patch.object(table, "make_core", Both if core.compiled else core.make_core)
each_param = pytest.mark.parametrize("placed", WHOLE, ids=str)
each_other = pytest.mark.parametrize("other", ANY, ids=str)


def mesh() -> Any:
    return init_device_mesh(device().type, (dist.get_world_size(),))


def values(seed: int) -> Tensor:
    """Multiples of 1/8: sums over ranks are exact."""
    return torch.randint(-32, 33, SHAPE, generator=torch.Generator().manual_seed(seed)).div(8).to(device())


def place(tensor: Tensor, placed: list[Any]) -> Tensor:
    """A tensor over the mesh; as a partial sum, a part of it on each rank."""
    if placed != [Partial()]:
        return distribute_tensor(tensor, mesh(), placed)
    ranks = dist.get_world_size()
    return DTensor.from_local(tensor / ranks, mesh(), placed)


def pending(tensor: Tensor) -> Tensor:
    """What a functional all-reduce returns before it has been waited for: this tensor."""
    return all_reduce(tensor / dist.get_world_size(), "sum", dist.group.WORLD)  # type: ignore[arg-type]


@each_param
@each_other
@on_ranks(2)
@both_tables
def test_a_gradient_placed_otherwise_is_redistributed_at_any_step(placed: list[Any], other: list[Any]) -> None:
    param = nn.Parameter(place(values(0), placed))
    plain = nn.Parameter(values(0))
    ours, truth = (fusedopt.AdamW([one], lr=0.1) for one in (param, plain))
    # A sum of parts and a replica have the same local shape, so that only the placements tell them apart.
    for step, now in enumerate([placed, other, placed, other, other]):
        param.grad = place(values(1 + step), now)
        plain.grad = values(1 + step)
        before = param.grad.to_local().clone()  # type: ignore[attr-defined]
        ours.step()
        truth.step()
        assert torch.equal(whole(param), plain), f"step {step}"
        assert torch.equal(param.grad.to_local(), before), "gradients are not written"  # type: ignore[attr-defined]


@each_param
@each_other
@on_ranks(2)
@both_tables
def test_a_state_placed_otherwise_is_redistributed_and_kept_so(placed: list[Any], other: list[Any]) -> None:
    param = nn.Parameter(place(values(0), placed))
    plain = nn.Parameter(values(0))
    ours, truth = (fusedopt.AdamW([one], lr=0.1) for one in (param, plain))
    for step in range(3):
        param.grad, plain.grad = place(values(1 + step), placed), values(1 + step)
        if step == 1:
            ours.state[param]["exp_avg"] = place(values(7), other)
            truth.state[plain]["exp_avg"] = values(7)
        ours.step()
        truth.step()
        assert torch.equal(whole(param), plain)
        assert ours.state[param]["exp_avg"].placements == tuple(placed)
        assert torch.equal(whole(ours.state[param]["exp_avg"]), truth.state[plain]["exp_avg"])


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "DTensor"])
@on_ranks(2)
@both_tables
def test_a_gradient_whose_collective_still_runs_is_waited_for(sharded: bool) -> None:
    params = [nn.Parameter(place(values(0), [Replicate()]) if sharded else values(0)), nn.Parameter(values(0))]
    ours, truth = (fusedopt.AdamW([one], lr=0.1) for one in params)
    for step in range(3):
        grad = values(1 + step) if step == 0 else pending(values(1 + step))
        params[0].grad = DTensor.from_local(grad, mesh(), [Replicate()]) if sharded else grad
        params[1].grad = values(1 + step)
        ours.step()
        truth.step()
        assert torch.equal(whole(params[0]), params[1]), f"step {step}"


def plain_gradient(param: Tensor) -> None:
    param.grad = torch.ones_like(whole(param))


def gradient_of_other_ranks(param: Tensor) -> None:
    other = init_device_mesh(device().type, (1, dist.get_world_size()))
    param.grad = distribute_tensor(values(1), other, [Replicate(), Shard(0)])


@pytest.mark.parametrize(
    ("fault", "message"),
    [(plain_gradient, "is a plain tensor, the parameter a DTensor"), (gradient_of_other_ranks, "is on DeviceMesh")],
)
@pytest.mark.parametrize("steps", [0, 1])
@on_ranks(2)
@both_tables
def test_a_gradient_that_fits_no_shard_is_refused_before_anything_changes(
    fault: Callable[[Tensor], None], message: str, steps: int
) -> None:
    param = nn.Parameter(place(values(0), [Shard(0)]))
    optimizer = fusedopt.AdamW([("embedding", param)], lr=0.1)
    for _ in range(steps):
        param.grad = place(values(1), [Shard(0)])
        optimizer.step()
    before = whole(param)
    fault(param)
    with pytest.raises((TypeError, ValueError), match=f"gradient of parameter 'embedding' {message}"):
        optimizer.step()
    assert torch.equal(whole(param), before)


@on_ranks(2)
@both_tables
def test_a_sharded_gradient_of_a_plain_parameter_is_refused() -> None:
    param = nn.Parameter(values(0))
    optimizer = fusedopt.SGD([param], lr=0.1)
    param.grad = values(1)
    optimizer.step()
    param.grad = place(values(1), [Shard(0)])
    with pytest.raises(TypeError, match=r"is a DTensor of .*, the parameter a plain tensor"):
        optimizer.step()


@on_ranks(2)
def test_a_parameter_that_is_a_partial_sum_is_refused() -> None:
    param = nn.Parameter(place(values(0), [Partial()]))
    param.grad = place(values(1), [Partial()])
    with pytest.raises(TypeError, match=r"lies over the devices as \(Partial\(sum\),\); it must be"):
        fusedopt.AdamW([param]).step()


@on_ranks(2)
def test_a_plain_state_of_a_sharded_parameter_is_refused() -> None:
    param = nn.Parameter(place(values(0), [Shard(0)]))
    optimizer = fusedopt.AdamW([param])
    param.grad = place(values(1), [Shard(0)])
    optimizer.step()
    optimizer.state[param]["exp_avg"] = values(2)
    with pytest.raises(TypeError, match="exp_avg of parameter 0 of group 0 is a plain tensor, the parameter a DTensor"):
        optimizer.step()


@on_ranks(2)
def test_a_compiled_step_breaks_the_graph_and_gets_the_same_bits() -> None:
    params = [nn.Parameter(place(values(0), [Shard(0)])) for _ in range(2)]
    eager, compiled = (fusedopt.AdamW([param], lr=0.1) for param in params)
    step = torch.compile(compiled.step, backend="eager")
    for seed in range(3):
        for param in params:
            param.grad = place(values(seed), [Shard(0)])
        eager.step()
        step()
        assert torch.equal(*(param.to_local() for param in params))  # type: ignore[attr-defined]


SPREAD: dict[str, tuple[tuple[int, ...], list[Any]]] = {  # by sizes of the mesh, 0: all ranks
    "replicated": ((0,), [Replicate()]),
    "rows": ((0,), [Shard(0)]),
    "rows of replicas": ((2, 0), [Replicate(), Shard(0)]),
    "replicas of rows": ((2, 0), [Shard(0), Replicate()]),
    "rows of rows": ((2, 0), [Shard(0), Shard(0)]),
    "columns": ((0,), [Shard(1)]),
    "rows of columns": ((2, 0), [Shard(0), Shard(1)]),
    "columns of columns": ((2, 0), [Shard(1), Shard(1)]),
}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("layout", SPREAD)
@on_ranks(2, 4)
@both_tables
def test_random_rounding_over_any_ranks_has_the_bits_of_one_process(layout: str, name: str) -> None:
    """Rows of 5, 3, 1: over 4 ranks some have none."""
    sizes, placed = SPREAD[layout]
    known = math.prod(size for size in sizes if size)
    grid = init_device_mesh(device().type, tuple(size or dist.get_world_size() // known for size in sizes))
    shapes = [(5, 4), (3, 70), (1, 3), (5, 3, 35), (2, 9000)]
    plain = [nn.Parameter(torch.randn(shape).to(device(), torch.bfloat16)) for shape in shapes]
    params = [nn.Parameter(distribute_tensor(one.detach(), grid, placed)) for one in plain]
    make = getattr(fusedopt, name)
    for backend in ("reference", "cpu") if device().type == "cpu" and core.compiled else (None,):
        ours, truth = (make(some, lr=0.01, rounding="stochastic", backend=backend) for some in (params, plain))
        for step in range(3):
            torch.manual_seed(step)
            for param, one in zip(params, plain, strict=True):
                one.grad = torch.randn(one.shape).to(one)
                param.grad = distribute_tensor(one.grad, grid, placed)
            ours.step()
            truth.step()
            assert all(torch.equal(whole(param), one) for param, one in zip(params, plain, strict=True)), step


CODED: list[tuple[str, dict[str, Any]]] = [
    ("AdamW", {"state_dtype": torch.int8, "state_block": 32}),
    ("Adam", {"state_dtype": torch.float8_e4m3fn, "amsgrad": True, "master": "split"}),
    ("SGD", {"state_dtype": torch.int8, "momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "options"), CODED, ids=str)
@pytest.mark.parametrize("layout", SPREAD)
@on_ranks(2, 4)
@both_tables
def test_codes_of_a_shard_are_those_of_its_local_tensor_alone(layout: str, name: str, options: dict[str, Any]) -> None:
    sizes, placed = SPREAD[layout]
    known = math.prod(size for size in sizes if size)
    grid = init_device_mesh(device().type, tuple(size or dist.get_world_size() // known for size in sizes))
    torch.manual_seed(0)
    values = [torch.randn(shape).to(device(), torch.bfloat16) for shape in ((5, 41), (3, 700), (1, 3))]
    for backend in ("reference", "cpu") if device().type == "cpu" and core.compiled else (None,):
        params: list[Any] = [nn.Parameter(distribute_tensor(one, grid, placed)) for one in values]
        plain = [nn.Parameter(param.to_local().detach().clone()) for param in params]
        make = getattr(fusedopt, name)
        ours, truth = (make(some, lr=0.01, backend=backend, **options) for some in (params, plain))
        for step in range(4):
            for param, one in zip(params, plain, strict=True):
                param.grad = distribute_tensor(torch.randn(param.shape).to(device(), param.dtype), grid, placed)
                one.grad = param.grad.to_local().clone()
            ours.step()
            truth.step()
            for param, one in zip(params, plain, strict=True):
                assert torch.equal(param.to_local(), one)
                mine, theirs = ours.state[param], truth.state[one]
                assert list(mine) == list(theirs)
                for key, tensor in theirs.items():
                    found = mine[key].to_local().reshape(-1) if hasattr(mine[key], "to_local") else mine[key]
                    found = found[: tensor.numel()] if key.endswith("_scale") else found
                    assert torch.equal(found.float().flatten(), tensor.float().flatten()), (step, key)
            if step == 1:  # through float32, and back
                ours.load_state_dict(ours.state_dict_torch() if "master" not in options else ours.state_dict())
                truth.load_state_dict(truth.state_dict_torch() if "master" not in options else truth.state_dict())


@on_ranks(4)
@both_tables
def test_random_rounding_of_what_is_cut_twice_beyond_its_rows_is_refused_before_anything_is_written() -> None:
    grid = init_device_mesh(device().type, (2, 2))
    values = torch.ones(2, 4, 6, dtype=torch.bfloat16)
    param = nn.Parameter(distribute_tensor(values, grid, [Shard(1), Shard(2)]))
    optimizer = fusedopt.SGD([("kernel", param)], lr=0.1, rounding="stochastic")
    param.grad = distribute_tensor(values, grid, [Shard(1), Shard(2)])
    with pytest.raises(ValueError, match=r"'kernel' lies over the devices as \(Shard\(dim=1\), .*one more dimension"):
        optimizer.step()
    assert torch.equal(whole(param), values)
    assert not optimizer.state


class Operators(TorchDispatchMode):
    """Collects the operators that run, but for the profiler's marks."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "profiler":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@on_ranks(2)
@both_tables
def test_a_steady_step_passes_dtensors_by_their_dispatch() -> None:
    params = [nn.Parameter(place(values(k), [Shard(0)])) for k in range(20)]
    optimizer = fusedopt.AdamW(params)
    for step in range(3):
        for param in params:
            param.grad = place(values(step), [Shard(0)])
        with Operators() as operators:
            optimizer.step()
        assert step == 0 or not operators.seen
