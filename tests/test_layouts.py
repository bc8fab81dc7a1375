"""Layouts: whatever the strides of parameter, gradient and state, the result is that of torch's for-loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

from .running import INTERPRETED, ONE_RUN_EACH, Run, as_params
from .tensors import PLACEMENTS, Placed, place, same_bits, shape_of

RUNS = (*ONE_RUN_EACH, Run("emulated", grid=(2, 32), seed=4, inline_columns=False))

# Parameters and states can not share memory with themselves; a gradient can.
OWN = [name for name in PLACEMENTS if name not in ("scalar", "expanded")]
GRADS = [*OWN, "expanded"]
SIZES = (60, 2 * 3 * 5 * 7, 2052)
# Triton's interpreter takes long over every block of a few hundred elements. The number of sizes in turn has no divisor
# in common with those of placements, so that each placement of each slot has tensors of every size.
SIZES_IN_TURN = (*SIZES[:2] * 5, SIZES[2]) if INTERPRETED else SIZES


def integers(size: int, seed: int) -> Tensor:
    """Small integers: all that SGD does with them below is exact in float32."""
    return torch.randint(-8, 9, (size,), generator=torch.Generator().manual_seed(seed)).reshape(shape_of(size))


def make_all(device: str) -> list[dict[str, Any]]:
    """A parameter, a gradient for each step and a momentum buffer for every combination of placements."""
    rows = []
    for index, (p, g, s) in enumerate(itertools.product(OWN, GRADS, OWN)):
        size = SIZES_IN_TURN[index % len(SIZES_IN_TURN)]
        kinds = {"param": p, "grad 0": g, "grad 1": g, "state": s}
        row = {
            name: place(integers(size, 10 * index + k), placement, torch.float32, device)
            for k, (name, placement) in enumerate(kinds.items())
        }
        rows.append({"id": f"param {p}, gradient {g}, state {s}", **row})
    return rows


@pytest.mark.parametrize("run", as_params(RUNS))
def test_every_combination_of_layouts_gives_what_torchs_for_loop_gives(run: Run, settings: Run) -> None:
    rows = make_all(run.device)
    params = [Parameter(row["param"].view) for row in rows]
    twins = [Parameter(row["param"].view.cpu().contiguous().clone()) for row in rows]
    optimizer = fusedopt.SGD(params, lr=0.25, momentum=0.5, backend=run.backend)
    torchs = torch.optim.SGD(twins, lr=0.25, momentum=0.5, foreach=False)
    for row, param, twin in zip(rows, params, twins, strict=True):
        optimizer.state[param]["momentum_buffer"] = row["state"].view
        torchs.state[twin]["momentum_buffer"] = row["state"].view.cpu().contiguous().clone()
    for step in range(2):
        for row, param, twin in zip(rows, params, twins, strict=True):
            param.grad = row[f"grad {step}"].view
            twin.grad = param.grad.cpu().contiguous()
        optimizer.step()
        torchs.step()
    for row, param, twin in zip(rows, params, twins, strict=True):
        assert torch.equal(param.detach().cpu(), twin.detach()), row["id"]
        buffer = optimizer.state[param]["momentum_buffer"]
        assert torch.equal(buffer.cpu(), torchs.state[twin]["momentum_buffer"]), row["id"]
        assert buffer.stride() == row["state"].view.stride(), row["id"]
        for name, placed in row.items():
            assert not isinstance(placed, Placed) or placed.guards_are_whole(), f"{row['id']}: around {name}"


@pytest.mark.parametrize("run", as_params(RUNS))
def test_layouts_change_no_bit_of_adam(run: Run, settings: Run) -> None:
    rows = make_all(run.device)[::5]
    params = [Parameter(row["param"].view) for row in rows]
    twins = [Parameter(row["param"].view.contiguous().clone()) for row in rows]
    options: Any = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True, "backend": run.backend}
    optimizer, other = fusedopt.Adam(params, **options), fusedopt.Adam(twins, **options)
    for step in range(2):
        for row, param, twin in zip(rows, params, twins, strict=True):
            param.grad = row[f"grad {step}"].view
            twin.grad = param.grad.contiguous()
        optimizer.step()
        other.step()
    for row, param, twin in zip(rows, params, twins, strict=True):
        assert same_bits(param.detach(), twin.detach()).all(), row["id"]
        for name, tensor in optimizer.state[param].items():
            assert same_bits(tensor, other.state[twin][name]).all(), f"{row['id']}: {name}"


@pytest.mark.parametrize("run", as_params(RUNS))
def test_a_gradient_may_change_its_layout_between_steps(run: Run, settings: Run) -> None:
    shape = shape_of(SIZES[1])
    param = Parameter(torch.zeros(shape, device=run.device))
    optimizer = fusedopt.SGD([param], lr=1.0, backend=run.backend)
    expected = torch.zeros(shape)
    for step, placement in enumerate([*GRADS, *reversed(GRADS)]):
        values = integers(SIZES[1], step)
        placed = place(values, placement, torch.float32, run.device)
        param.grad = placed.view
        expected -= placed.view.cpu()
        optimizer.step()
    assert torch.equal(param.detach().cpu(), expected)


@pytest.mark.parametrize("run", as_params(RUNS))
def test_views_into_one_buffer_touch_neither_each_other_nor_the_rest(run: Run, settings: Run) -> None:
    buffer = torch.arange(6000, dtype=torch.float32, device=run.device)
    before = buffer.clone()
    image = buffer[3001:5001].view(40, 50)
    views = {
        "first": buffer[1:8],
        "next to it": buffer[8:1033],
        "even columns": image[:, ::2],
        "odd columns": image[:, 1::2],
        "one element": buffer[5990:5991],
        "scalar": buffer[5992],
        "nothing": buffer[5994:5994],
    }
    params = [Parameter(view) for view in views.values()]
    for k, param in enumerate(params):
        param.grad = torch.full_like(param, float(k + 1))
    optimizer = fusedopt.SGD(params, lr=1.0, backend=run.backend)
    optimizer.step()
    for k, view in enumerate(views.values()):
        view += k + 1
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("run", as_params(RUNS))
def test_scalars_empty_tensors_and_many_dimensions(run: Run, settings: Run) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (0, 3), (5, 0, 2), (1, 1, 1), (2, 1, 3, 1, 2, 1, 2, 3), (2,) * 10]
    params = [Parameter(torch.ones(shape, device=run.device)) for shape in shapes]
    params.append(Parameter(torch.ones((3,) * 6, device=run.device).permute(3, 1, 5, 0, 4, 2)[:, ::2]))
    optimizer = fusedopt.AdamW(params, lr=0.5, weight_decay=0.0, eps=0.0, backend=run.backend)
    for param in params:
        param.grad = torch.full_like(param, -2.0)
    optimizer.step()
    for param in params:
        # The first step of Adam is lr along the sign of the gradient, up to the rounding of bias corrections.
        assert torch.allclose(param, torch.full_like(param, 1.5), rtol=4 * 2.0**-24, atol=0)
        assert optimizer.state[param]["exp_avg"].shape == param.shape
        assert float(optimizer.state[param]["step"]) == 1


@pytest.mark.parametrize("run", as_params(RUNS))
def test_parameters_may_share_a_gradient(run: Run, settings: Run) -> None:
    params = [Parameter(torch.zeros(4, 6, device=run.device)) for _ in range(3)]
    shared = torch.arange(24.0, device=run.device).view(4, 6)
    for param in params:
        param.grad = shared
    fusedopt.SGD(params, lr=1.0, backend=run.backend).step()
    for param in params:
        assert torch.equal(param.detach(), -shared)


def test_elements_that_share_memory_are_refused_before_anything_is_written() -> None:
    base = torch.ones(8)
    for bad in (torch.ones(1, 3).expand(4, 3), base.as_strided((5, 4), (1, 1))):
        good = Parameter(torch.ones(2))
        params = [good, Parameter(bad)]
        for param in params:
            param.grad = torch.ones(param.shape)
        with pytest.raises(ValueError, match="parameter 1 of group 0"):
            fusedopt.SGD(params, lr=1.0).step()
        assert torch.equal(good.detach(), torch.ones(2))
        assert (bad == 1).all()


@pytest.mark.parametrize("run", as_params(RUNS))
def test_parameters_that_are_the_same_memory_are_updated_one_after_the_other(run: Run, settings: Run) -> None:
    results = []
    for cls, options in ((torch.optim.SGD, {"foreach": False}), (fusedopt.SGD, {"backend": run.backend})):
        base = torch.arange(8.0, device=run.device)
        params = [Parameter(base[:5]), Parameter(base[5:]), Parameter(base[:5])]
        for param in params:
            param.grad = torch.ones_like(param)
        cls(params, lr=1.0, weight_decay=1.0, **options).step()
        results.append(base)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(lambda base: base[:5], lambda base: base[4:], id="neighbours with one element in common"),
        pytest.param(lambda base: base, lambda base: base[2:3], id="one within the other"),
        pytest.param(lambda base: base.view(2, 4), lambda base: base.view(2, 4).t(), id="transposed"),
        pytest.param(lambda base: base[::2], lambda base: base[::3], id="columns that meet now and then"),
        pytest.param(lambda base: base, lambda base: base.view(torch.int16)[4:6].view(torch.float16), id="dtypes"),
    ],
)
def test_parameters_that_overlap_in_part_are_refused_before_anything_is_written(one: Any, other: Any) -> None:
    base = torch.arange(8.0)
    params = [Parameter(one(base)), Parameter(other(base))]
    for param in params:
        param.grad = torch.ones_like(param)
    message = r"parameter 0 of group 0 \(.*\) and parameter 1 of group 0 \(.*\), .* share some of their elements"
    with pytest.raises(ValueError, match=message):
        fusedopt.SGD(params, lr=1.0).step()
    assert torch.equal(base, torch.arange(8.0))


def test_interleaved_views_of_one_tensor_are_apart() -> None:
    base = torch.arange(12.0)
    params = [Parameter(base[::3]), Parameter(base.view(6, 2)[1:3, 0:1]), Parameter(base[7::4])]
    for param in params:
        param.grad = torch.ones_like(param)
    fusedopt.SGD(params, lr=1.0).step()
    assert base.tolist() == [-1, 1, 1, 2, 3, 5, 5, 6, 8, 8, 10, 10]
