"""Precision modes: the dtypes of states, their checkpoints, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusedopt

from .running import INTERPRETED, ONE_RUN_EACH, Run, as_params

SIZES = (1, 7, 64, 2049, 5000)  # a scalar, partial vectors, several leaves
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def make_params(dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for n in SIZES]


def take_steps(optimizer: Any, params: list[torch.nn.Parameter], steps: int, seed: int = 1) -> None:
    """Steps with gradients that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        optimizer.step()


def bits_of(optimizer: Any, params: list[torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of all parameters and states, on the CPU."""
    found = {f"param {k}": param.detach().cpu().clone() for k, param in enumerate(params)}
    for k, param in enumerate(params):
        found |= {f"{name} {k}": tensor.cpu().clone() for name, tensor in optimizer.state[param].items()}
    return found


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


STATE_MODES = [
    ("AdamW", F32, {"state_dtype": BF16}),
    ("AdamW", BF16, {"state_dtype": F32}),
    ("AdamW", BF16, {"state_dtype": {"exp_avg": F16, "exp_avg_sq": F32}}),
    ("Adam", F32, {"state_dtype": {"exp_avg": BF16}, "amsgrad": True}),
    ("SGD", F32, {"state_dtype": F16, "momentum": 0.9}),
]


@pytest.mark.parametrize(("name", "dtype", "options"), STATE_MODES, ids=str)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_states_have_the_dtype_asked_for_and_the_bits_of_the_reference(
    name: str, dtype: torch.dtype, options: dict[str, Any], run: Run, settings: Run
) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = make_params(dtype, device=device)
        optimizer = getattr(fusedopt, name)(params, lr=0.01, backend=backend, **options)
        take_steps(optimizer, params, 3)
        found.append(bits_of(optimizer, params))
    assert_same(*found)
    asked = options["state_dtype"]
    for key, tensor in found[0].items():
        state = key.split()[0]
        if state not in ("param", "step"):
            assert tensor.dtype == (asked.get(state, dtype) if isinstance(asked, dict) else asked)


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
def test_groups_of_different_modes_are_one_launch() -> None:
    params = make_params(BF16)
    groups = [{"params": params[:2], "state_dtype": F32}, {"params": params[2:4], "state_dtype": {"exp_avg": F16}}]
    optimizer = fusedopt.AdamW([*groups, {"params": params[4:]}])
    before = fusedopt.launch_count()
    take_steps(optimizer, params, 1)
    assert fusedopt.launch_count() == before + 1
    assert [optimizer.state[param]["exp_avg"].dtype for param in params] == [F32, F32, F16, F16, BF16]


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
def test_a_checkpoint_of_torch_goes_into_a_mode_and_back() -> None:
    params = make_params(F32)
    theirs = torch.optim.AdamW(params)
    take_steps(theirs, params, 2)
    optimizer = fusedopt.AdamW(params, state_dtype=BF16)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert optimizer.param_groups[0]["state_dtype"] == BF16
    take_steps(optimizer, params, 1)
    assert optimizer.state[params[0]]["exp_avg"].dtype == BF16
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict_torch()))
    assert theirs.state[params[0]]["exp_avg"].dtype == F32
    assert "state_dtype" not in theirs.param_groups[0]
    take_steps(theirs, params, 1)


REFUSED = [
    ({"state_dtype": torch.int32}, "state_dtype of exp_avg is torch.int32"),
    ({"state_dtype": {"velocity": F32}}, "state_dtype names 'velocity'"),
    ({"state_dtype": F16}, "state_dtype of exp_avg_sq is torch.float16"),
]


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_a_mode_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(make_params(BF16), **options)
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW([{"params": make_params(BF16), **options}])
