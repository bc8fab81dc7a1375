"""Bad input is refused before anything is written, by a message that names the tensor and both values."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt

from .kit import CLASSES, FULL_OPTIONS
from .memory_faults import FAULTS as MEMORY_FAULTS

ROOT = Path(__file__).parents[2]
BACKENDS = fusedopt.available_backends("cpu")

Setup = Callable[[], tuple[Tensor, Tensor]]


def _param(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def _with_grad_dtype(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    param = _param(3)
    param.grad_dtype = dtype
    return param, torch.ones(3, dtype=dtype)


def _inference_param() -> Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def _nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3)])


def _sparse(value: float) -> Tensor:
    return torch.tensor(value).to_sparse()


def _freed(value: float) -> Tensor:
    tensor = torch.tensor(value)
    tensor.untyped_storage().resize_(0)
    return tensor


class Unchecked(nn.Parameter):
    """A parameter to which any gradient can be given, as some libraries do; torch checks what it is assigned."""

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.__dict__.get("given")

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.__dict__["given"] = value


def _unchecked(values: Tensor) -> Tensor:
    return Unchecked(values)


# What is wrong: parameter and gradient, the type of the error, and what its message says.
GRADIENTS: dict[str, tuple[Setup, type[Exception], str]] = {
    "shape": (
        lambda: (_unchecked(torch.ones(3, 2)), torch.ones(2, 3)),
        ValueError,
        r"gradient of parameter 1 of group 0 has shape \(2, 3\), the parameter \(3, 2\)",
    ),
    "device": (
        lambda: (_unchecked(torch.ones(3)), torch.ones(3, device="meta")),
        ValueError,
        "gradient of parameter 1 of group 0 is on meta, the parameter on cpu",
    ),
    "dtype": (
        lambda: (_unchecked(torch.ones(3)), torch.ones(3, dtype=torch.int64)),
        TypeError,
        "gradient of parameter 1 of group 0 has dtype torch.int64, the parameter torch.float32",
    ),
    "complex": (
        lambda: (_unchecked(torch.ones(3)), torch.ones(3, dtype=torch.complex64)),
        TypeError,
        "gradient of parameter 1 of group 0 has dtype torch.complex64, the parameter torch.float32",
    ),
    "float8 gradient": (
        lambda: _with_grad_dtype(torch.float8_e5m2),
        TypeError,
        "gradient of parameter 1 of group 0 has dtype torch.float8_e5m2, the parameter torch.float32",
    ),
    "float8 parameter": (
        lambda: (nn.Parameter(torch.ones(3).to(torch.float8_e5m2)), torch.ones(3).to(torch.float8_e5m2)),
        TypeError,
        "parameter 1 of group 0 has dtype torch.float8_e5m2; it must be torch.float32, .* torch.float64",
    ),
    "compressed sparse": (
        lambda: (_unchecked(torch.eye(3)), torch.eye(3).to_sparse_csr()),
        RuntimeError,
        "gradient of parameter 1 of group 0 is torch.sparse_csr; it must be torch.strided",
    ),
    "sparse parameter": (
        lambda: (nn.Parameter(torch.eye(3).to_sparse()), torch.eye(3).to_sparse()),
        TypeError,
        "parameter 1 of group 0 is torch.sparse_coo; its layout must be torch.strided",
    ),
    "meta": (
        lambda: (nn.Parameter(torch.ones(3, device="meta")), torch.ones(3, device="meta")),
        RuntimeError,
        "parameter 1 of group 0 is on the meta device, where there is no memory to update",
    ),
    "wrapper": (
        lambda: (
            nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3))),
            TwoTensor(torch.ones(3), torch.ones(3)),
        ),
        TypeError,
        "parameter 1 of group 0 is a TwoTensor, which wraps other tensors",
    ),
    "inference tensor": (
        lambda: (_inference_param(), torch.ones(3)),
        RuntimeError,
        "parameter 1 of group 0 is an inference tensor; clone it",
    ),
    "list": (
        lambda: (_unchecked(torch.ones(2)), cast(Tensor, [1.0, 1.0])),
        TypeError,
        r"gradient of parameter 1 of group 0 must be a tensor, but it is \[1.0, 1.0\]",
    ),
    "nested gradient": (
        lambda: (_unchecked(torch.ones(1, 3)), _nested()),
        RuntimeError,
        "gradient of parameter 1 of group 0 is nested; it must be torch.strided",
    ),
    "nested parameter": (
        lambda: (_unchecked(_nested()), _nested()),
        TypeError,
        "parameter 1 of group 0 is nested; its layout must be torch.strided",
    ),
    "expanded parameter": (
        lambda: (nn.Parameter(torch.ones(1).expand(3)), torch.ones(3)),
        ValueError,
        r"parameter 1 of group 0 of shape \(3,\) and strides \(0,\) has elements that share memory",
    ),
}


# Functions over a step that torch.func calls with tensors that have no memory; what the message names.
TRANSFORMS: dict[str, tuple[Callable[[Callable[[Tensor], Tensor]], Any], str]] = {
    "vmap": (lambda step: torch.vmap(step)(torch.ones(2, 3)), "gradient of parameter 0 of group 0"),
    "grad": (lambda step: torch.func.grad(step)(torch.ones(3)), "parameter 0 of group 0"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_step_within_a_transform_of_functions_is_refused(transform: str, backend: str) -> None:
    apply, what = TRANSFORMS[transform]

    def step(grad: Tensor) -> Tensor:
        param = _param(3)
        param.grad = grad * 1.0
        fusedopt.AdamW([param], backend=backend).step()
        return grad.sum()

    with pytest.raises(TypeError, match=f"{what} has no memory of its own, as within torch.vmap or torch.func.grad"):
        apply(step)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("fault", GRADIENTS)
def test_tensors(cls: str, fault: str) -> None:
    make, error, message = GRADIENTS[fault]
    good = _param(4)
    bad, grad = make()
    optimizer = getattr(fusedopt, cls)([good, bad], **FULL_OPTIONS[cls])
    good.grad = torch.ones(4)
    optimizer.step()
    before, state = good.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
    version = good._version
    bad.grad = grad
    for _ in range(2):  # refused again, not forgotten
        with pytest.raises(error, match=message):
            optimizer.step()
    assert torch.equal(good.detach(), before)
    assert good._version == version
    now = optimizer.state_dict()["state"]
    assert now.keys() == state.keys()
    for name, value in state[0].items():
        assert torch.equal(now[0][name], value), name
    bad.grad = None
    optimizer.step()  # and all is well without it
    assert not torch.equal(good.detach(), before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_in_inference_mode_leaves_states_that_can_be_stepped_outside(backend: str) -> None:
    if backend not in fusedopt.available_backends("cpu"):
        pytest.skip("no compiled extension")
    param = _param(3)
    optimizer = fusedopt.Adam([param], lr=0.5, backend=backend)
    param.grad = torch.ones(3)
    with torch.inference_mode():
        optimizer.step()
    assert not optimizer.state[param]["exp_avg"].is_inference()
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert param[0].item() == pytest.approx(-0.5, abs=1e-5)


def test_a_name_is_used_where_there_is_one() -> None:
    weight = _unchecked(torch.ones(3))
    optimizer = fusedopt.SGD([("encoder.weight", weight)], lr=0.1)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"gradient of parameter 'encoder.weight' has shape \(2,\)"):
        optimizer.step()


def test_a_sparse_gradient_that_comes_later_is_named() -> None:
    table = nn.Embedding(4, 2)
    optimizer = fusedopt.Adam(table.parameters())
    table.weight.grad = torch.ones(4, 2)
    optimizer.step()
    table.weight.grad = torch.eye(4)[:, :2].to_sparse()
    with pytest.raises(RuntimeError, match=r"consider SparseAdam instead: gradient of parameter 0 of group 0 is"):
        optimizer.step()


# A state that does not fit: what is done to it, the error, its message.
STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "shape": (
        lambda state: state.update(exp_avg=torch.zeros(5)),
        ValueError,
        r"exp_avg of parameter 0 of group 0 has shape \(5,\), the parameter \(3,\)",
    ),
    "dtype": (
        lambda state: state.update(exp_avg_sq=torch.zeros(3, dtype=torch.int32)),
        TypeError,
        "exp_avg_sq of parameter 0 of group 0 has dtype torch.int32, the parameter torch.float32",
    ),
    "meta": (
        lambda state: state.update(exp_avg=torch.zeros(3, device="meta")),
        TypeError,
        "exp_avg of parameter 0 of group 0 has no memory of its own",
    ),
    "expanded": (
        lambda state: state.update(exp_avg=torch.zeros(1).expand(3)),
        ValueError,
        "exp_avg of parameter 0 of group 0 .* has elements that share memory",
    ),
    "list": (
        lambda state: state.update(exp_avg=[0.0, 0.0, 0.0]),
        TypeError,
        r"exp_avg of parameter 0 of group 0 must be a tensor, but it is \[0.0, 0.0, 0.0\]",
    ),
    "nested": (
        lambda state: state.update(exp_avg=_nested()),
        ValueError,
        r"exp_avg of parameter 0 of group 0 has shape nested, the parameter \(3,\)",
    ),
    "meta steps": (
        lambda state: state.update(step=torch.ones((), device="meta")),
        ValueError,
        "step of parameter 0 of group 0 must be a count, but it is .*, which has no memory",
    ),
    "sparse steps": (
        lambda state: state.update(step=_sparse(1.0)),
        ValueError,
        "step of parameter 0 of group 0 must be a count, but it is .*, which is torch.sparse_coo",
    ),
    "steps of text": (
        lambda state: state.update(step="1"),
        ValueError,
        "step of parameter 0 of group 0 must be a count, but it is '1', which is text",
    ),
    "too many steps": (
        lambda state: state.update(step=10**400),
        ValueError,
        "step of parameter 0 of group 0 must be a count, but it is 1000.*, which is too large",
    ),
    "steps of two": (
        lambda state: state.update(step=torch.ones(2)),
        ValueError,
        "step of parameter 0 of group 0 must have 1 element, but it has 2",
    ),
    "NaN steps": (
        lambda state: state.update(step=torch.tensor(float("nan"))),
        ValueError,
        "step of parameter 0 of group 0 must be a count, but it is nan",
    ),
    "negative steps": (
        lambda state: state.update(step=-1.0),
        ValueError,
        r"step of parameter 0 of group 0 must be a count, but it is -1\.0",
    ),
    "half a step": (
        lambda state: state.update(step=2.5),
        ValueError,
        r"step of parameter 0 of group 0 must be a count, but it is 2\.5",
    ),
    "no moments": (
        lambda state: state.pop("exp_avg_sq"),
        ValueError,
        "the state of parameter 0 of group 0 has taken 1 steps, but has no exp_avg_sq",
    ),
    "no step": (
        lambda state: state.pop("step"),
        ValueError,
        "the state of parameter 0 of group 0 has exp_avg and exp_avg_sq, but no step",
    ),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_state_that_does_not_fit_is_refused_by_load_and_by_step(fault: str) -> None:
    spoil, error, message = STATES[fault]
    param = _param(3)
    optimizer = fusedopt.Adam([param])
    param.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved["state"][0])
    before = param.detach().clone()
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    optimizer.step()  # the refused load has left it whole
    assert not torch.equal(param.detach(), before)

    before = param.detach().clone()
    spoil(optimizer.state[param])
    with pytest.raises(error, match=message.replace("1 steps", "2 steps")):
        optimizer.step()
    assert torch.equal(param.detach(), before)


# A state beside the rule's: class and options, its name, what it is set to, the error, its message.
MORE_STATES: dict[str, tuple[str, dict[str, Any], str, Any, type[Exception], str]] = {
    "velocity": ("SGD", {"momentum": 0.5}, "momentum_buffer", [0.0], TypeError, "must be a tensor, but it is .0.0."),
    "largest moment": ("Adam", {"amsgrad": True}, "max_exp_avg_sq", 1.0, TypeError, "must be a tensor, but it is 1.0"),
    "average": ("SGD", {"ema_decay": 0.5}, "ema", "x", TypeError, "must be a tensor, but it is 'x'"),
    "master": ("Adam", {"master": "fp32"}, "master", [0.0], TypeError, "must be a tensor, but it is .0.0."),
    "expanded master": (
        "Adam",
        {"master": "fp32"},
        "master",
        torch.ones(1).expand(3),
        ValueError,
        r"of shape \(3,\) and strides \(0,\) has elements that share memory",
    ),
    "master on meta": (
        "Adam",
        {"master": "fp32"},
        "master",
        torch.ones(3, device="meta"),
        TypeError,
        "has no memory of its own: it is a Tensor on meta",
    ),
    "average in 8 bits": (
        "SGD",
        {"ema_decay": 0.5},
        "ema",
        torch.zeros(3, dtype=torch.int8),
        TypeError,
        "has dtype torch.int8, the parameter torch.bfloat16",
    ),
    "master of inference mode": (
        "Adam",
        {"master": "fp32"},
        "master",
        _inference_param(),
        RuntimeError,
        "is an inference tensor; clone it",
    ),
    "key of text": (
        "SGD",
        {"rounding": "stochastic"},
        "rounding_key",
        "x",
        ValueError,
        "is 'x'; it must be a count below 16777216",
    ),
    "key of truth": (
        "Adam",
        {"rounding": "stochastic"},
        "rounding_key",
        True,
        ValueError,
        "is True; it must be a count",
    ),
    "key below 0": ("Adam", {"rounding": "stochastic"}, "rounding_key", -1, ValueError, "is -1; it must be a count"),
    "key of 25 bits": (
        "Adam",
        {"rounding": "stochastic"},
        "rounding_key",
        1 << 24,
        ValueError,
        "is 16777216; it must be a count below 16777216",
    ),
    "key of half": ("SGD", {"rounding": "stochastic"}, "rounding_key", 1.5, ValueError, "is 1.5; it must be a count"),
    "keys of two": (
        "SGD",
        {"rounding": "stochastic"},
        "rounding_key",
        torch.tensor([3, 4]),
        ValueError,
        r"is tensor\(\[3, 4\]\); it must be a count",
    ),
    "no key": ("Adam", {"rounding": "stochastic"}, "rounding_key", None, ValueError, "is None; it must be a count"),
    "sparse scales": (
        "Adam",
        {"state_dtype": torch.int8},
        "exp_avg_scale",
        torch.ones(1).to_sparse(),
        TypeError,
        "is torch.sparse_coo; its layout must be torch.strided",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", MORE_STATES)
def test_what_is_kept_beside_and_does_not_fit_is_refused_by_load_and_by_step(fault: str, backend: str) -> None:
    cls, options, key, value, error, message = MORE_STATES[fault]
    param = _param(3, dtype=torch.bfloat16)
    optimizer = getattr(fusedopt, cls)([param], **options, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = param.detach().clone()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = value
    with pytest.raises(error, match=f"{key} of parameter 0 of group 0 {message}"):
        optimizer.load_state_dict(saved)
    sane = optimizer.state[param][key]
    optimizer.state[param][key] = value
    for _ in range(2):
        with pytest.raises(error, match=f"{key} of parameter 0 of group 0 {message}"):
            optimizer.step()
    assert torch.equal(param, before)
    optimizer.state[param][key] = sane
    optimizer.step()


def test_parameters_over_one_memory_of_numpy_are_refused() -> None:
    import numpy

    memory = numpy.ones(8, numpy.float32)
    params = [nn.Parameter(torch.from_numpy(memory[at : at + 4])) for at in (0, 2)]
    optimizer = fusedopt.SGD(params, lr=0.1)
    for param in params:
        param.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"which starts 8 bytes after it, share some of their elements"):
        optimizer.step()
    assert (memory == 1.0).all()


def test_a_parameter_that_has_no_shape_yet_is_passed_over() -> None:
    param = _param(3)
    optimizer = fusedopt.SGD([param, *nn.LazyLinear(2).parameters()], lr=0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    assert param.tolist() == [0.5, 0.5, 0.5]


def _at(tensor: Tensor, index: int, value: float) -> Tensor:
    """An element of a tensor, set to a value."""
    element = tensor.detach().flatten()[index]
    element.fill_(value)
    return element


Spoil = Callable[[list[nn.Parameter], list[dict[str, Any]]], Any]

# Memory that is shared within one launch: what is done to parameters and their states, what the message names.
SHARED: dict[str, tuple[Spoil, str, str]] = {
    "two moments": (
        lambda params, states: states[0].update(exp_avg=(both := torch.zeros(5))[:3], exp_avg_sq=both[2:]),
        "exp_avg of parameter 0 of group 0",
        "exp_avg_sq of parameter 0 of group 0",
    ),
    "a moment and another parameter": (
        lambda params, states: states[0].update(exp_avg=params[1].data),
        "exp_avg of parameter 0 of group 0",
        "parameter 1 of group 0",
    ),
    "a step in its own moment": (
        lambda params, states: states[0].update(step=_at(states[0]["exp_avg"], 2, 2.0)),
        "exp_avg of parameter 0 of group 0",
        "step of parameter 0 of group 0",
    ),
    "a step in another's moment": (
        lambda params, states: states[1].update(step=_at(states[0]["exp_avg_sq"], 1, 2.0)),
        "exp_avg_sq of parameter 0 of group 0",
        "step of parameter 1 of group 0",
    ),
    "a step in another parameter": (
        lambda params, states: states[0].update(step=_at(params[1], 0, 2.0)),
        "step of parameter 0 of group 0",
        "parameter 1 of group 0",
    ),
    "a step in its own parameter": (
        lambda params, states: states[1].update(step=_at(params[1], 2, 2.0)),
        "parameter 1 of group 0",
        "step of parameter 1 of group 0",
    ),
    "a gradient and another parameter": (
        lambda params, states: setattr(params[0], "grad", params[1].data),
        r"gradient of parameter 0 of group 0 \(shape \(3,\)\)",
        r"parameter 1 of group 0 \(shape \(3,\)\)",
    ),
    "a gradient and a part of another parameter, turned round": (
        lambda params, states: setattr(params[0], "grad", params[1].data[::2].expand(3, 2)[:, 0]),
        "gradient of parameter 0 of group 0",
        "parameter 1 of group 0",
    ),
    "a gradient and its own moment": (
        lambda params, states: setattr(params[1], "grad", states[1]["exp_avg"]),
        "gradient of parameter 1 of group 0",
        "exp_avg of parameter 1 of group 0",
    ),
    "a gradient and another's moment": (
        lambda params, states: setattr(params[0], "grad", states[1]["exp_avg_sq"]),
        "gradient of parameter 0 of group 0",
        "exp_avg_sq of parameter 1 of group 0",
    ),
    "a gradient and a step": (
        lambda params, states: setattr(params[0], "grad", states[1]["step"].expand(3)),
        "gradient of parameter 0 of group 0",
        "step of parameter 1 of group 0",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", SHARED)
def test_memory_that_a_launch_would_write_twice_or_read_as_it_is_written_is_refused(fault: str, backend: str) -> None:
    spoil, one, other = SHARED[fault]
    params = [_param(3), _param(3)]
    optimizer = fusedopt.Adam(params, backend=backend)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the tables are built anew
    spoil(params, [optimizer.state[param] for param in params])
    before = [param.detach().clone() for param in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{one}.* and {other}.* share memory"):
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    for key, values in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[key][name]) for name, value in values.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_gradient_that_is_another_parameter_is_refused_whenever_it_comes(backend: str) -> None:
    params = [_param(3), _param(3), _param(3)]
    optimizer = fusedopt.SGD(params, lr=0.5, backend=backend)
    params[0].grad = torch.ones(3)
    for step in range(2):
        params[1].grad = params[0].data
        for _ in range(2):
            with pytest.raises(ValueError, match=r"gradient of parameter 1 of .* and parameter 0 of .* share memory"):
                optimizer.step()
        params[1].grad = None
        optimizer.step()
        assert params[0].tolist() == [0.5 - 0.5 * step] * 3
    params[1].grad = params[2].data  # which takes no step itself
    optimizer.step()
    assert params[1].tolist() == [0.5, 0.5, 0.5]


def test_gradients_that_share_memory_with_each_other_are_taken() -> None:
    params = [_param(3) for _ in range(5)]
    optimizer = fusedopt.SGD(params, lr=0.5)
    shared = torch.ones(7)
    for k, param in enumerate(params):
        param.grad = shared[k % 3 : k % 3 + 3]
    optimizer.step()
    assert all(param.tolist() == [0.5, 0.5, 0.5] for param in params)


@pytest.mark.parametrize("views", ["torch's", "NumPy's"])
@pytest.mark.parametrize("shift", [-31, -16, -1, 1, 16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_overlaps_its_parameter_is_read_before_anything_is_written(
    backend: str, shift: int, views: str
) -> None:
    memory = numpy.arange(6000, dtype=numpy.float32) % 7

    def view(begin: int) -> Tensor:
        return torch.from_numpy(memory[begin:][:4096]) if views == "NumPy's" else whole[begin:][:4096]

    whole = torch.from_numpy(memory)
    param = nn.Parameter(view(100))
    expected = (whole[100:][:4096] - 0.5 * whole[100 + shift :][:4096]).clone()
    param.grad = view(100 + shift)
    fusedopt.SGD([param], lr=0.5, backend=backend).step()
    assert torch.equal(param.detach(), expected)


def test_a_gradient_that_is_its_parameter_is_not_cleared() -> None:
    param = _param(3)
    optimizer = fusedopt.SGD([param], lr=0.5, zero_grads=True)
    param.grad = param.data
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 0 .* and parameter 0 of group 0 .* share"):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0, 1.0]


def test_a_gradient_that_is_a_copy_of_a_parameter_is_refused() -> None:
    params, copies = [_param(3), _param(3)], [torch.zeros(3), torch.zeros(3)]
    optimizer = fusedopt.SGD(params, lr=0.5, copy_to=copies)
    params[0].grad, params[1].grad = torch.ones(3), copies[0]
    with pytest.raises(ValueError, match=r"gradient of parameter 1 .* and copy_to of parameter 0 .* share memory"):
        optimizer.step()
    assert params[0].tolist() == [1.0, 1.0, 1.0]


# How a copy comes to be what the same launch writes: what is done to parameters, their states and copies; both names.
SHARED_COPIES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "another's moment": (
        lambda params, states, copies: states[1].update(exp_avg=copies[0]),
        "exp_avg of parameter 1 of group 0",
        "copy_to of parameter 0 of group 0",
    ),
    "its own average": (
        lambda params, states, copies: states[0].update(ema=copies[0]),
        "ema of parameter 0 of group 0",
        "copy_to of parameter 0 of group 0",
    ),
    "a moment, moved": (
        lambda params, states, copies: setattr(copies[1], "data", states[0]["exp_avg_sq"]),
        "exp_avg_sq of parameter 0 of group 0",
        "copy_to of parameter 1 of group 0",
    ),
    "a step": (
        lambda params, states, copies: states[1].update(step=_at(copies[1], 0, 1.0)),
        "step of parameter 1 of group 0",
        "copy_to of parameter 1 of group 0",
    ),
    "a parameter, moved": (
        lambda params, states, copies: setattr(params[1], "data", copies[0]),
        "copy_to of parameter 0 of group 0",
        "parameter 1 of group 0",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", SHARED_COPIES)
def test_a_copy_that_comes_to_be_what_a_launch_writes_too_is_refused(fault: str, backend: str) -> None:
    spoil, one, other = SHARED_COPIES[fault]
    params, copies = [_param(3), _param(3)], [torch.zeros(3), torch.zeros(3)]
    optimizer = fusedopt.Adam(params, copy_to=copies, ema_decay=0.5, backend=backend)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    spoil(params, [optimizer.state[param] for param in params], copies)
    before = [tensor.detach().clone() for tensor in (*params, *copies)]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"(?=.*{one})(?=.*{other}).* and .* share memory"):
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip((*params, *copies), before, strict=True))


@pytest.mark.parametrize("by_parameter", [False, True])
def test_copies_are_those_that_the_optimizer_was_made_with(by_parameter: bool) -> None:
    param, kept = _param(3), torch.zeros(3)
    copies: Any = {param: kept} if by_parameter else [kept]
    optimizer = fusedopt.SGD([param], lr=0.5, copy_to=copies)
    copies[param if by_parameter else 0] = other = torch.zeros(3)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.refresh()
    optimizer.step()
    assert kept.tolist() == param.tolist() == [0.0, 0.0, 0.0]
    assert other.tolist() == [0.0, 0.0, 0.0]


# Copies that a group which is added does not fit: of a parameter, the new one, the message.
NO_COPIES: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "list": (lambda param, other: [torch.zeros(3)], "copy_to has 1 tensors, where the optimizer has 2 parameters"),
    "the new one": (
        lambda param, other: {param: other.data},
        "copy_to of parameter 0 .* and parameter 0 of group 1 sh",
    ),
}


@pytest.mark.parametrize("fault", NO_COPIES)
def test_a_group_that_the_copies_do_not_fit_is_not_added(fault: str) -> None:
    make, message = NO_COPIES[fault]
    param, other = _param(3), _param(3)
    optimizer = fusedopt.SGD([param], lr=0.5, copy_to=make(param, other))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [other]})
    param.grad = torch.ones(3)
    optimizer.step()
    assert len(optimizer.param_groups) == 1
    assert param.tolist() == [0.5, 0.5, 0.5]


def test_a_group_may_come_beside_copies_by_parameter() -> None:
    param, other, kept = _param(3), _param(3), torch.zeros(3)
    optimizer = fusedopt.SGD([param], lr=0.5, copy_to={param: kept})
    optimizer.add_param_group({"params": [other]})
    param.grad = other.grad = torch.ones(3)
    optimizer.step()
    assert kept.tolist() == other.tolist() == [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def memory_outcomes() -> dict[str, list[str]]:
    """What the steps raised by fault, as far as the process came."""
    command = [sys.executable, "-m", "tests.contract.memory_faults"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return dict(json.loads(line) for line in result.stdout.splitlines())


@pytest.mark.parametrize("fault", MEMORY_FAULTS)
def test_memory_that_changed_behind_the_optimizer_is_refused(fault: str, memory_outcomes: dict[str, list[str]]) -> None:
    *_, message = MEMORY_FAULTS[fault]
    assert fault in memory_outcomes, "the process ended"
    told = memory_outcomes[fault]
    assert len(told) == 2, told
    assert all(re.search(message, each) for each in told), told


# Hyperparameters: constructor options, the error, its message.
OPTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "lr below 0": ("Adam", {"lr": -0.5}, ValueError, "Invalid learning rate: -0.5"),
    "lr not a number": ("SGD", {"lr": float("nan")}, ValueError, "Invalid learning rate: nan"),
    "lr of text": ("Adam", {"lr": "x"}, TypeError, "learning rate must be a number .* but it is 'x'"),
    "lr none": ("SGD", {"lr": None}, TypeError, "learning rate must be a number .* but it is None"),
    "lr too large": ("SGD", {"lr": 10**400}, TypeError, "learning rate must be a number .*, which is too large"),
    "lr complex": ("SGD", {"lr": torch.tensor(1j)}, TypeError, "learning rate must be a number .* of torch.complex64"),
    "lr sparse": ("SGD", {"lr": _sparse(0.1)}, TypeError, "learning rate must be a number .* is torch.sparse_coo"),
    "lr nested": (
        "SGD",
        {"lr": torch.nested.nested_tensor([torch.ones(1)])},
        TypeError,
        "learning rate must be a number .* is nested",
    ),
    "lr freed": ("SGD", {"lr": _freed(0.1)}, ValueError, "learning rate .* needs a storage of 4 bytes, .* has 0"),
    "lr negated": (
        "SGD",
        {"lr": torch.tensor(1 - 2j).conj().imag},
        TypeError,
        "learning rate must be a number .* which is a lazy view",
    ),
    "decay freed": ("Adam", {"weight_decay": _freed(0.1)}, ValueError, "weight_decay .* needs a storage of 4 bytes"),
    "beta sparse": (
        "Adam",
        {"betas": (_sparse(0.5), torch.tensor(0.5))},
        TypeError,
        r"betas\[0\] must be a number .* is torch.sparse_coo",
    ),
    "betas of three": ("Adam", {"betas": (0.9, 0.9, 0.9)}, ValueError, "betas must be 2 decay rates, but there are 3"),
    "dampening": ("SGD", {"dampening": None}, TypeError, "dampening must be a number .* but it is None"),
    "dampening of two": ("SGD", {"dampening": torch.ones(2)}, ValueError, "Tensor dampening must be 1-element"),
    "nesterov of two": ("SGD", {"nesterov": torch.ones(2)}, TypeError, "nesterov must be true or false, but it is"),
    "norm of two": ("SGD", {"max_grad_norm": torch.ones(2)}, ValueError, "Tensor max_grad_norm must be 1-element"),
    "norm type of two": (
        "SGD",
        {"max_grad_norm": 1.0, "norm_type": torch.ones(2)},
        ValueError,
        "Tensor norm_type must be 1-element",
    ),
    "ema above 1": ("SGD", {"ema_decay": torch.tensor(2.0)}, ValueError, "Invalid ema_decay: 2.0"),
    "ema not a number": ("SGD", {"ema_decay": torch.tensor(float("nan"))}, ValueError, "Invalid ema_decay: nan"),
    "norm type none": (
        "SGD",
        {"max_grad_norm": 1.0, "norm_type": None},
        TypeError,
        "norm_type must be a number or a tensor of 1 element, but it is None",
    ),
    "ema sparse": ("SGD", {"ema_decay": _sparse(0.5)}, TypeError, "ema_decay must be a number .* is torch.sparse_coo"),
    "zero_grads 2": ("SGD", {"zero_grads": 2}, TypeError, "zero_grads must be True or False, but it is 2"),
    "skip 2": ("SGD", {"skip_nonfinite": 2}, TypeError, "skip_nonfinite must be True or False, but it is 2"),
    "warmup of text": (
        "SGD",
        {"ema_decay": 0.5, "ema_warmup": "yes"},
        TypeError,
        "ema_warmup must be True or False, but it is 'yes'",
    ),
    "groups' norms of none": (
        "SGD",
        {"max_grad_norm": 1.0, "norm_by_group": None},
        TypeError,
        "norm_by_group must be True or False, but it is None",
    ),
    "block of tensor": (
        "Adam",
        {"state_dtype": torch.int8, "state_block": torch.tensor([64, 64])},
        ValueError,
        "state_block is tensor.* it must be 32, 64",
    ),
    "copy of a stranger": (
        "SGD",
        {"copy_to": {torch.ones(2): torch.ones(2)}},
        ValueError,
        r"copy_to has a copy for a tensor of shape \(2,\), which is no parameter of the optimizer",
    ),
    "copy by number": ("SGD", {"copy_to": {0: torch.ones(3)}}, ValueError, "copy_to has a copy for 0, which is no"),
    "nested copy": ("SGD", {"copy_to": [_nested()]}, ValueError, "copy_to of parameter 0 of group 0 has shape nested"),
    "sparse copy": (
        "SGD",
        {"copy_to": [torch.ones(3).to_sparse()]},
        TypeError,
        "copy_to of parameter 0 of group 0 is torch.sparse_coo; its layout must be torch.strided",
    ),
    "lr on meta": ("SGD", {"lr": torch.ones((), device="meta")}, TypeError, "learning rate must be a number"),
    "eps of text": ("AdamW", {"eps": "1e-8"}, TypeError, "but it is '1e-8'"),
    "betas of number": ("Adam", {"betas": 0.9}, TypeError, "betas must be 2 decay rates, but they are 0.9"),
    "beta of text": ("Adam", {"betas": ("a", 0.9)}, TypeError, r"betas\[0\] must be a number .* but it is 'a'"),
    "decay of text": ("SGD", {"ema_decay": "a"}, TypeError, "ema_decay must be a number"),
    "norm of text": ("SGD", {"max_grad_norm": "a"}, TypeError, "max_grad_norm must be a number"),
    "copies of number": ("SGD", {"copy_to": 3}, TypeError, "copy_to must be .* but it is 3"),
    "lr of two": ("AdamW", {"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element, but it has 2"),
    "lr of none": ("SGD", {"lr": torch.ones(0)}, ValueError, "Tensor lr must be 1-element, but it has 0"),
    "momentum": ("SGD", {"momentum": -0.1}, ValueError, "Invalid momentum value: -0.1"),
    "weight decay": ("SGD", {"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
    "weight decay of two": (
        "Adam",
        {"weight_decay": torch.ones(2)},
        ValueError,
        "Tensor weight_decay must be 1-element, but it has 2",
    ),
    "eps": ("Adam", {"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08"),
    "beta 0": ("Adam", {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    "beta 1": ("AdamW", {"betas": (0.9, -0.1)}, ValueError, "Invalid beta parameter at index 1: -0.1"),
    "beta of two": (
        "Adam",
        {"betas": (torch.ones(2) / 2, torch.tensor(0.5))},
        ValueError,
        r"Tensor betas\[0\] must be 1-element, but it has 2",
    ),
    "one beta a tensor": ("Adam", {"betas": (0.9, torch.tensor(0.9))}, ValueError, "both floats or both Tensors"),
    "betas of integers": ("Adam", {"betas": (0, 0)}, ValueError, "both floats or both Tensors.* int and int"),
    "one beta": ("Adam", {"betas": (0.9,)}, ValueError, "betas must be 2 decay rates, but there are 1"),
    "Nesterov alone": ("SGD", {"nesterov": True}, ValueError, "Nesterov momentum requires a momentum"),
    "Nesterov dampened": (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        "Nesterov momentum requires a momentum and zero dampening",
    ),
    "differentiable": ("Adam", {"differentiable": True}, RuntimeError, "does not support `differentiable`"),
    "fused and foreach": ("SGD", {"fused": True, "foreach": True}, RuntimeError, "cannot be `True` together"),
    "backend": ("SGD", {"backend": "gpu"}, ValueError, "backend 'gpu' is unknown; there are cpu, "),
    "backend of none": ("SGD", {"backend": ""}, ValueError, "backend '' is unknown; there are cpu, "),
    "backend of list": ("SGD", {"backend": ["cpu"]}, ValueError, r"backend \['cpu'\] is unknown; there are cpu, "),
    "backend of device": ("SGD", {"backend": torch.device("cpu")}, ValueError, "backend device.* is unknown"),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_options(fault: str) -> None:
    cls, options, error, message = OPTIONS[fault]
    with pytest.raises(error, match=message):
        getattr(fusedopt, cls)([_param(3)], **options)


# What a group is given later, the error, its message.
GROUP_CHANGES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a report": ({"report": 5}, ValueError, "group 1 has report=5, which is an option of the whole optimizer"),
    "a rule for infinities": ({"skip_nonfinite": True}, ValueError, "group 1 has skip_nonfinite=True, which is an opt"),
    "text": ({"lr": "fast"}, TypeError, "'lr' of group 1 must be a number or a tensor of 1 element, but it is 'fast'"),
    "a third beta": (
        {"betas": (0.9, 0.99, 0.999)},
        ValueError,
        "'betas' of group 1 must be 2 numbers, but there are 3",
    ),
    "none": ({"weight_decay": None}, TypeError, "'weight_decay' of group 1 must be a number .* but it is None"),
    "two": ({"lr": torch.ones(2)}, ValueError, "'lr' of group 1 must have 1 element, but it has 2"),
    "one beta": ({"betas": (0.9,)}, TypeError, r"'betas'\[1\] of group 1 must be a number .* but it is \(0.9,\)"),
    "complex": ({"eps": 1j}, TypeError, "'eps' of group 1 must be a number"),
    "too large": ({"lr": 10**400}, TypeError, "'lr' of group 1 must be a number .* which is too large"),
    "bytes": ({"lr": b"1"}, TypeError, "'lr' of group 1 must be a number .* but it is b'1', which is text"),
    "sparse": ({"lr": _sparse(0.1)}, TypeError, "'lr' of group 1 must be a number .* which is torch.sparse_coo"),
    "quantized": (
        {"lr": torch.quantize_per_tensor(torch.tensor(0.5), 0.1, 0, torch.quint8)},
        TypeError,
        "'lr' of group 1 must be a number .* of torch.quint8",
    ),
    "freed": ({"lr": _freed(0.1)}, ValueError, "'lr' of group 1 .* needs a storage of 4 bytes, but its storage has 0"),
    "flag of two": (
        {"maximize": torch.ones(2)},
        TypeError,
        r"'maximize' of group 1 must be true or false, but it is tensor\(\[1., 1.\]\)",
    ),
    "flag on meta": ({"amsgrad": torch.ones((), device="meta")}, TypeError, "'amsgrad' of group 1 must be true or fal"),
    "no parameters": ({"params": None}, TypeError, "'params' of group 1 must be a list, but it is None"),
    "text among them": ({"params": ["x"]}, TypeError, "parameter 0 of group 1 must be a tensor, but it is 'x'"),
    "meta": ({"lr": torch.tensor(0.1, device="meta")}, TypeError, "'lr' of group 1 must be a number .*device='meta'"),
    "a norm of its own": (
        {"max_grad_norm": 0.5},
        ValueError,
        "group 1 has max_grad_norm=0.5, but the norm is that of all groups: .* norm_by_group=True",
    ),
}

# What a group is given as its own norm to clip by, later or at once, the error, its message.
OWN_NORMS: dict[str, tuple[Any, type[Exception], str]] = {
    "below 0": (-1.0, ValueError, "Invalid max_grad_norm of group 1: -1.0"),
    "tensor below 0": (torch.tensor(-1.0), ValueError, "Invalid max_grad_norm of group 1: -1.0"),
    "no number": (float("nan"), ValueError, "Invalid max_grad_norm of group 1: nan"),
    "text": ("x", TypeError, "max_grad_norm of group 1 must be a number .* but it is 'x', which is text"),
    "two": (torch.ones(2), ValueError, "max_grad_norm of group 1 must be 1-element, but it has 2"),
    "meta": (torch.ones((), device="meta"), TypeError, "max_grad_norm of group 1 must be a number .* has no memory"),
}


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "report": True}], ids=["alone", "among others"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", OWN_NORMS)
def test_a_norm_that_no_step_could_clip_by_is_refused_at_once_and_between_steps(
    fault: str, backend: str, options: dict[str, Any]
) -> None:
    value, error, message = OWN_NORMS[fault]
    params = [_param(2), _param(3)]
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:]}]
    options = {"lr": 0.5, "max_grad_norm": 1.0, "norm_by_group": True, "backend": backend, **options}
    with pytest.raises(error, match=message):
        fusedopt.SGD([groups[0], {**groups[1], "max_grad_norm": value}], **options)
    optimizer = fusedopt.SGD(groups, **options)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before, versions = [param.detach().clone() for param in params], [param._version for param in params]
    for change in (value, 0.5):
        optimizer.param_groups[1]["max_grad_norm"] = change
        for _ in range(2) if change is value else ():
            with pytest.raises(error, match=message):
                optimizer.step()
            assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
            assert [param._version for param in params] == versions
    optimizer.step()
    torch.testing.assert_close(before[1] - params[1], torch.full((3,), 0.25 / 3**0.5))


def test_a_norm_of_a_group_that_changes_at_every_step_builds_no_tables_anew() -> None:
    param = _param(4)
    optimizer = fusedopt.SGD([param], lr=0.5, max_grad_norm=1.0, norm_by_group=True)
    param.grad = torch.ones(4)
    optimizer.step()
    tables = optimizer._tables
    for norm in (0.5, 0.25, torch.tensor(0.125)):
        optimizer.param_groups[0]["max_grad_norm"] = norm
        optimizer.step()
        assert optimizer._tables is tables
    assert param.tolist() == pytest.approx([1.0 - 0.25 * (1.0 + 0.5 + 0.25 + 0.125)] * 4, abs=1e-5)


# Options of the whole optimizer, as one might give them to a group.
WHOLE_OPTIONS: dict[str, Any] = {
    "ema_decay": 0.5,
    "ema_warmup": True,
    "copy_to": [None],
    "zero_grads": True,
    "norm_type": 1.0,
    "norm_by_group": True,
    "skip_nonfinite": False,
    "report": 5,
}


@pytest.mark.parametrize("option", WHOLE_OPTIONS)
@pytest.mark.parametrize("cls", CLASSES)
def test_an_option_of_the_whole_optimizer_is_refused_in_a_group(cls: str, option: str) -> None:
    given = {"params": [_param(3)], option: WHOLE_OPTIONS[option]}
    optimizer = getattr(fusedopt, cls)([_param(2)], lr=0.5)
    message = f"group {{}} has {option}={re.escape(repr(WHOLE_OPTIONS[option]))}, which is an option of the whole opt"
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.add_param_group(given)
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=message.format(0)):
        getattr(fusedopt, cls)([given], lr=0.5)


@pytest.mark.parametrize("fault", GROUP_CHANGES)
def test_a_group_that_is_given_nonsense_is_named_and_nothing_is_stepped(fault: str) -> None:
    change, error, message = GROUP_CHANGES[fault]
    params = [_param(2), _param(3)]
    optimizer = fusedopt.Adam([{"params": params[:1]}, {"params": params[1:]}])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    sane = dict(optimizer.param_groups[1])
    optimizer.param_groups[1].update(change)
    for _ in range(2):
        with pytest.raises(error, match=message):
            optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))
    optimizer.param_groups[1].clear()
    optimizer.param_groups[1].update(sane)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(params, before, strict=True))


# What a script keeps in the state beside the parameters', as torch.optim lets it.
STRANGERS: dict[str, Any] = {"note": "ema, step", "count": 5, "global": {"step": 0.0, "best": [1.0]}}
STRANGERS_MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "velocity": ("SGD", {"momentum": 0.9}),
    "average": ("SGD", {"momentum": 0.9, "ema_decay": 0.5}),
    "rounded at random": ("SGD", {"momentum": 0.9, "rounding": "stochastic"}),
    "8 bits": ("AdamW", {"state_dtype": torch.int8, "ema_decay": 0.5}),
}


@pytest.mark.parametrize("mode", STRANGERS_MODES)
def test_what_is_no_state_of_a_parameter_is_left_as_it_is(mode: str) -> None:
    cls, options = STRANGERS_MODES[mode]
    param = _param(3, dtype=torch.bfloat16)
    optimizer = getattr(fusedopt, cls)([param], lr=0.5, **options)
    optimizer.state.update(copy.deepcopy(STRANGERS))
    param.grad = torch.ones_like(param)

    def assert_kept(state: Any) -> None:
        assert {key: value for key, value in state.items() if key in STRANGERS} == STRANGERS

    for _ in range(2):
        optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    with optimizer.swap_ema() if "ema_decay" in options else contextlib.nullcontext():
        pass
    twin = copy.deepcopy(optimizer)
    for state in (optimizer.state_dict()["state"], optimizer.state_dict_torch()["state"], twin.state, optimizer.state):
        assert_kept(state)
    assert_kept(fusedopt.fuse(fusedopt.unfuse(optimizer)).state)
    optimizer.step()
    assert optimizer.state[param]["step" if cls == "AdamW" else "momentum_buffer"].any()


# What an attribute of an optimizer is set to, the message.
ATTRIBUTES: dict[str, tuple[str, Any, str]] = {
    "groups of none": ("param_groups", None, "param_groups must be a list of dicts, but it is None"),
    "groups in a tuple": ("param_groups", (), r"param_groups must be a list of dicts, but it is \(\)"),
    "a group of none": ("param_groups", [None], "group 0 must be a dict, but it is None"),
    "state of none": ("state", None, "the optimizer's state must be a dict, but it is None"),
}


@pytest.mark.parametrize("fault", ATTRIBUTES)
def test_what_is_no_optimizer_anymore_is_told(fault: str) -> None:
    name, value, message = ATTRIBUTES[fault]
    param = _param(2)
    optimizer = fusedopt.Adam([param], lr=0.5)
    param.grad = torch.ones(2)
    optimizer.step()
    before = param.detach().clone()
    setattr(optimizer, name, value)
    for _ in range(2):
        with pytest.raises(TypeError, match=message):
            optimizer.step()
    assert torch.equal(param, before)


def test_a_group_that_lost_an_option_is_named() -> None:
    param = _param(2)
    optimizer = fusedopt.SGD([param], lr=0.1)
    del optimizer.param_groups[0]["momentum"]
    param.grad = torch.ones(2)
    with pytest.raises(KeyError, match="group 0 has no 'momentum'"):
        optimizer.step()


LOADS: dict[str, tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = {
    "a group too many": (
        lambda saved: saved["param_groups"].append(saved["param_groups"][0]),
        ValueError,
        "different number of parameter groups: 2, where the optimizer has 1",
    ),
    "a parameter too few": (
        lambda saved: saved["param_groups"][0]["params"].pop(),
        ValueError,
        "doesn't match the size of optimizer's group: group 0 has 1 parameters, where the optimizer's has 2",
    ),
    "another optimizer": (
        lambda saved: saved["param_groups"][0].pop("betas"),
        ValueError,
        "loaded state dict is that of another optimizer: group 0 has no 'betas'",
    ),
    "differentiable": (
        lambda saved: saved["param_groups"][0].update(differentiable=True),
        RuntimeError,
        "group 0 of the loaded state dict: `fused` does not support `differentiable`",
    ),
    "a third beta": (
        lambda saved: saved["param_groups"][0].update(betas=(0.9, 0.9, 0.9)),
        ValueError,
        "'betas' of group 0 must be 2 numbers, but there are 3",
    ),
    "a flag of two": (
        lambda saved: saved["param_groups"][0].update(maximize=torch.ones(2)),
        TypeError,
        "'maximize' of group 0 must be true or false",
    ),
    "JSON's keys": (
        lambda saved: saved.update(state={str(key): value for key, value in saved["state"].items()}),
        ValueError,
        "loaded state dict has a state of a parameter '0', which is in none of its groups",
    ),
    "other parameters": (
        lambda saved: saved["param_groups"][0].update(params=[7, 8]),
        ValueError,
        "loaded state dict has a state of a parameter 0, which is in none of its groups",
    ),
    "one parameter twice": (
        lambda saved: saved["param_groups"][0].update(params=[0, 0]),
        ValueError,
        "loaded state dict has 0 for parameter 0 of group 0 and for parameter 1 of group 0, which are not the same",
    ),
    "lr is text": (
        lambda saved: saved["param_groups"][0].update(lr="0.1"),
        TypeError,
        "'lr' of group 0 must be a number",
    ),
}


@pytest.mark.parametrize("fault", LOADS)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(fault: str) -> None:
    spoil, error, message = LOADS[fault]
    params = [_param(2), _param(3)]
    optimizer = fusedopt.AdamW(params, lr=0.25)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    groups, state = optimizer.param_groups, optimizer.state
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups is groups
    assert optimizer.state is state
    assert groups[0]["lr"] == 0.25
    optimizer.step()


def test_a_differentiable_group_is_refused_and_not_added() -> None:
    optimizer = fusedopt.SGD([_param(2)], lr=0.1)
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        optimizer.add_param_group({"params": [_param(3)], "differentiable": True})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_a_group_that_becomes_differentiable_is_refused(steps: int) -> None:
    param = _param(2)
    optimizer = fusedopt.AdamW([{"params": []}, {"params": [param]}], lr=0.1)
    param.grad = torch.ones(2)
    for _ in range(steps):
        optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["differentiable"] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not support `differentiable`"):
            optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["differentiable"] = False
    optimizer.step()
    assert not torch.equal(param, before)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(2), ValueError, "Tensor {} must be 1-element, but it has 2"),
        (3.0, TypeError, "{} must be a tensor of 1 element, but it is 3.0"),
        (torch.ones((), device="meta"), TypeError, "{} must be a number .* which has no memory"),
        (torch.tensor(1j), TypeError, "{} must be a number .* of torch.complex64"),
        (_sparse(1.0), TypeError, "{} must be a number .* which is torch.sparse_coo"),
        (_freed(1.0), ValueError, "{} of shape .* needs a storage of 4 bytes, but its storage has 0"),
    ],
    ids=["two", "number", "meta", "complex", "sparse", "freed"],
)
def test_a_scale_that_is_no_scalar_is_refused(name: str, value: object, error: type[Exception], message: str) -> None:
    param = _param(2)
    optimizer = fusedopt.SGD([param], lr=0.1)
    param.grad = torch.ones(2)
    setattr(optimizer, name, value)
    with pytest.raises(error, match=message.format(name)):
        optimizer.step()
    assert param.tolist() == [1.0, 1.0]
    assert param._version == 0


@pytest.mark.parametrize("given", [None, [], 3])
def test_a_state_dict_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=f"loaded state dict must be a Mapping, but it is a {type(given).__name__}"):
        fusedopt.SGD([_param(2)], lr=0.1).load_state_dict(given)


def test_an_average_of_another_shape_is_refused_by_load() -> None:
    param = _param(3)
    optimizer = fusedopt.SGD([param], lr=0.1, ema_decay=0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["ema"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"ema of parameter 0 of group 0 has shape \(5,\), the parameter \(3,\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("given", [None, torch.nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_not_fused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"fuse takes an optimizer .*, but it was given"):
        fusedopt.fuse(given)


def test_fake_tensors_are_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
    optimizer = fusedopt.SGD([param], lr=0.1)
    with pytest.raises((TypeError, RuntimeError), match="parameter 0 of group 0"):
        optimizer.step()
