"""Torch's own database of optimizer inputs, shipped with torch, driven through fusedopt beside torch's for-loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt

from ..running import ONE_RUN_EACH, Run, as_params
from .kit import CLASSES

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest, which is not installed")

from torch.testing._internal import common_optimizers
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    optim_db,
)

INFOS: dict[str, OptimizerInfo] = {info.name: info for info in optim_db if info.name in CLASSES}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ITERATIONS = 7  # as in torch's test of derived implementations


def _inputs(cls: str, dtype: torch.dtype) -> list[tuple[str, dict[str, Any]]]:
    """All options that torch tests, those that it keeps for accelerators included, each with its name."""
    inputs = []
    for device in ("cpu", "cuda"):
        for one in INFOS[cls].optim_inputs_func(device, dtype):
            if (one.desc, device) not in [(name, "cuda") for name, _ in inputs]:
                inputs.append((one.desc, one.kwargs))
    return list({name: (name, options) for name, options in inputs}.values())


CASES = [
    pytest.param(run.values[0], cls, dtype, name, marks=run.marks, id=f"{run.id}-{cls}-{str(dtype)[6:]}-{name}")
    for run in as_params(ONE_RUN_EACH)
    for cls in CLASSES
    for dtype in DTYPES
    for name, _ in _inputs(cls, dtype)
]


def _model(dtype: torch.dtype, device: str) -> nn.Module:
    """The model of torch's test, and its empty parameter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 5), nn.Sigmoid(), nn.Linear(5, 1), nn.Sigmoid())
    model.register_parameter("empty", nn.Parameter(torch.empty(0)))
    return model.to(dtype=dtype, device=device)


def _truth(cls: str, params: Any, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Torch's for-loop, which asserts on the CPU where a group is capturable.

    Hyperparameters that are tensors are given to it as numbers: it would compute with them in their own dtype,
    where the kernels take their value.
    """
    options = {key: value for key, value in options.items() if key not in ("capturable", "foreach", "fused")}
    options = {key: _as_number(value) for key, value in options.items()}
    made: torch.optim.Optimizer = getattr(torch.optim, cls)(params, foreach=False, **options)
    return made


def _as_number(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_number(item) for item in value)
    return float(value) if isinstance(value, Tensor) else value


def _train(model: nn.Module, optimizer: Any, dtype: torch.dtype, device: str) -> None:
    x = torch.ones(10, dtype=dtype, device=device)
    for iteration in range(ITERATIONS):
        optimizer.zero_grad()
        model(x).sum().backward()
        if iteration == 3:  # as in torch's test: a gradient that is missing once
            next(model.parameters()).grad = None
        optimizer.step()


def _compare(mine: nn.Module, truth: nn.Module, optimizer: Any, reference: Any, dtype: torch.dtype) -> None:
    # Half precision: steps of lr 0.01 that round the other way, each by one unit in the last place.
    bounds = {"rtol": ITERATIONS * torch.finfo(dtype).eps, "atol": ITERATIONS * torch.finfo(dtype).eps}
    if dtype in (torch.float32, torch.float64):
        bounds = {"rtol": 8 * ITERATIONS * torch.finfo(dtype).eps, "atol": 8 * ITERATIONS * torch.finfo(dtype).eps}
    for param, expected in zip(mine.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(param, expected, **bounds)
        ours, theirs = optimizer.state[param], reference.state[expected]
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name].to(value.dtype), value, **bounds, check_device=False)


@pytest.mark.parametrize(("run", "cls", "dtype", "name"), CASES)
def test_all_inputs_beside_the_for_loop(settings: Run, cls: str, dtype: torch.dtype, name: str) -> None:
    options = copy.deepcopy(dict(_inputs(cls, dtype))[name])
    mine, truth = (_model(dtype, settings.device) for _ in range(2))
    optimizer = getattr(fusedopt, cls)(mine.parameters(), backend=settings.backend, **options)
    reference = _truth(cls, truth.parameters(), options)
    for model, each in ((mine, optimizer), (truth, reference)):
        _train(model, each, dtype, settings.device)
    _compare(mine, truth, optimizer, reference, dtype)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_implementation_flag_of_torch_gives_the_same_bits(cls: str) -> None:
    info = INFOS[cls]
    all_inputs = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
        "cpu", torch.float32, info, skip=("differentiable",)
    )
    results: dict[str, list[list[Tensor]]] = {}
    for one in all_inputs:
        options = copy.deepcopy(one.kwargs)
        options.pop("differentiable", None)
        if isinstance(options.get("lr"), Tensor) and options.get("foreach") and cls != "SGD":
            continue  # torch refuses it when it is made, and so do we: test_error_inputs
        model = _model(torch.float32, "cpu")
        optimizer = getattr(fusedopt, cls)(model.parameters(), **options)
        _train(model, optimizer, torch.float32, "cpu")
        results.setdefault(one.desc.split(" & ")[0], []).append([param.detach() for param in model.parameters()])
    assert sum(len(runs) for runs in results.values()) > len(results)
    for runs in results.values():
        for other in runs[1:]:
            assert all(torch.equal(*pair) for pair in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_inputs_given_by_group(cls: str) -> None:
    for name, options in _inputs(cls, torch.float32):
        if options.get("foreach"):
            continue
        models = [_model(torch.float32, "cpu") for _ in range(2)]
        optimizers = []
        for model, package in zip(models, (fusedopt, None), strict=True):
            params = list(model.parameters())
            own = {key: value for key, value in copy.deepcopy(options).items() if key != "capturable"}
            groups = [{"params": params[:2], **own}, {"params": params[2:], "lr": 0.05}]
            if package is None:
                numbers = [{key: _as_number(value) for key, value in group.items()} for group in groups]
                optimizers.append(_truth(cls, numbers, {"lr": 0.01}))
            else:
                optimizers.append(getattr(package, cls)(groups, lr=0.01))
        for model, optimizer in zip(models, optimizers, strict=True):
            _train(model, optimizer, torch.float32, "cpu")
        try:
            _compare(models[0], models[1], optimizers[0], optimizers[1], torch.float32)
        except AssertionError as error:
            raise AssertionError(f"{cls} {name}: {error}") from error


@pytest.mark.parametrize("cls", CLASSES)
def test_error_inputs(cls: str) -> None:
    errors = INFOS[cls].optim_error_inputs_func("cpu", torch.float32)
    assert len(errors) >= 7
    for error in errors:
        given = error.optimizer_error_input
        params = given.params if given.params is not None else [nn.Parameter(torch.zeros(1))]
        construct = lambda: getattr(fusedopt, cls)(params, **given.kwargs)  # noqa: E731
        if error.error_type is UserWarning:
            with pytest.warns(UserWarning, match=error.error_regex):
                construct()
        elif error.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                construct()
        else:
            optimizer = construct()
            with pytest.raises(error.error_type, match=error.error_regex):
                optimizer.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_all_scheduler_inputs_lower_the_loss(cls: str) -> None:
    for schedulers in INFOS[cls].scheduler_inputs:
        for lr in (1e-2, torch.tensor(1e-2)):
            weight = nn.Parameter(torch.randn(10, 5, generator=torch.Generator().manual_seed(0)))
            bias = nn.Parameter(torch.zeros(10))
            optimizer = getattr(fusedopt, cls)([{"params": [weight]}, {"params": [bias]}], lr=lr)
            made = [make(optimizer) for make in schedulers]
            x = torch.randn(5, generator=torch.Generator().manual_seed(1))

            def closure(
                optimizer: Any = optimizer, weight: Tensor = weight, bias: Tensor = bias, x: Tensor = x
            ) -> Tensor:
                optimizer.zero_grad()
                loss = (weight.mv(x) + bias).pow(2).sum()
                loss.backward()
                return loss

            first = closure().item()
            for _ in range(20):
                for scheduler in made:
                    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                        scheduler.step(closure().item())
                    else:
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore", UserWarning)  # the order of the first two steps
                            scheduler.step()
                optimizer.step(closure)
            assert closure().item() < first


def test_the_sparse_rosenbrock_of_torch() -> None:
    """Alternating partial derivatives of the Rosenbrock function as sparse gradients, as in torch's test."""
    options, schedulers = INFOS["SGD"].metadata_for_sparse
    params = [nn.Parameter(torch.tensor([1.5, 1.5])) for _ in range(2)]
    optimizers = [fusedopt.SGD([params[0]], **options), torch.optim.SGD([params[1]], foreach=False, **options)]
    all_schedulers = [[make(optimizer) for make in schedulers] for optimizer in optimizers]
    for step in range(40):
        for param, optimizer, made in zip(params, optimizers, all_schedulers, strict=True):
            x, y = param.detach()
            slope = torch.stack((-400 * x * (y - x**2) - 2 * (1 - x), 200 * (y - x**2)))
            at = step % 2
            param.grad = torch.sparse_coo_tensor([[at, at]], [slope[at] / 4, slope[at] - slope[at] / 4], (2,))
            optimizer.step()
            for scheduler in made:
                scheduler.step()
    torch.testing.assert_close(params[0], params[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_of_every_input_loads_and_goes_on(cls: str) -> None:
    for name, options in _inputs(cls, torch.float32):
        model = _model(torch.float32, "cpu")
        optimizer = getattr(fusedopt, cls)(model.parameters(), **copy.deepcopy(options))
        _train(model, optimizer, torch.float32, "cpu")
        other = copy.deepcopy(model)
        again = getattr(fusedopt, cls)(other.parameters())
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each, its in ((model, optimizer), (other, again)):
            _train(each, its, torch.float32, "cpu")
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True)), name
