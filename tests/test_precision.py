"""Precision modes: the dtypes of states, their checkpoints, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import exact

from . import tensors
from .running import INTERPRETED, ONE_RUN_EACH, Run, as_params

# A scalar, partial vectors, several leaves; fewer of them where Triton is interpreted.
SIZES = (1, 7, 64, 260, 2049) if INTERPRETED else (1, 7, 64, 2049, 5000)
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
        found |= {f"{name} {k}": torch.as_tensor(kept).cpu().clone() for name, kept in optimizer.state[param].items()}
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


CHANGES = [
    {"state_dtype": F32},
    {"state_dtype": torch.int8, "state_block": 64},
    {"master": "split"},
    {"rounding": "stochastic"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_a_mode_that_is_written_into_a_group_between_steps_holds_from_the_next_on(
    change: dict[str, Any], run: Run, settings: Run
) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = make_params(BF16, device=device)
        optimizer = fusedopt.AdamW([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
        take_steps(optimizer, params, 2)
        optimizer.param_groups[1] |= change
        take_steps(optimizer, params, 2, seed=2)
        found.append(bits_of(optimizer, params))
        optimizer.param_groups[1]["master"] = "fp16"
        with pytest.raises(ValueError, match="master is 'fp16'"):
            optimizer.step()
        assert_same(found[-1], bits_of(optimizer, params))
    assert_same(*found)


# A mode of bfloat16, what the parameter is cast to after a step, the message.
CASTS: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"master": "fp32"}, F32, "has 'master', which a parameter of torch.float32 cannot have"),
    ({"master": "split"}, torch.float64, "has 'low_bits', which a parameter of torch.float64 cannot have"),
    ({"master": "kahan"}, F32, "has 'compensation', which a parameter of torch.float32 cannot have"),
    (
        {"state_dtype": torch.int8},
        torch.float64,
        "exp_avg of .* is codes of torch.int8, which a parameter of torch.float64 cannot have",
    ),
]


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize(("options", "dtype", "message"), CASTS, ids=str)
def test_what_a_parameter_cannot_have_after_a_cast_is_told(
    options: dict[str, Any], dtype: torch.dtype, message: str
) -> None:
    params = make_params(BF16)
    optimizer = fusedopt.AdamW(params, **options)
    take_steps(optimizer, params, 1)
    for param in params:
        param.grad = None
        param.data = param.data.to(dtype)
    before = bits_of(optimizer, params)
    with pytest.raises(ValueError, match=message):
        take_steps(optimizer, params, 1)
    assert_same(bits_of(optimizer, params), before)


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
def test_codes_that_no_flag_asks_for_any_more_stay_as_they_are() -> None:
    params = make_params(BF16)
    optimizer = fusedopt.AdamW(params, state_dtype=torch.int8, amsgrad=True)
    for is_asked in (True, False, True):
        before = optimizer.state[params[3]].get("max_exp_avg_sq")
        largest = None if before is None else before.clone()
        optimizer.param_groups[0]["amsgrad"] = is_asked
        take_steps(optimizer, params, 1)
        assert is_asked or torch.equal(optimizer.state[params[3]]["max_exp_avg_sq"], largest)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


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
    ({"master": "fp16"}, "master is 'fp16'"),
]


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_a_mode_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW(make_params(BF16), **options)
    with pytest.raises(ValueError, match=message):
        fusedopt.AdamW([{"params": make_params(BF16), **options}])


MASTER_MODES = [
    ("AdamW", BF16, {"master": "fp32", "state_dtype": F32}),
    ("AdamW", BF16, {"master": "split", "state_dtype": F32}),
    ("AdamW", BF16, {"master": "kahan", "state_dtype": F32}),
    ("AdamW", BF16, {"master": "split"}),
    ("Adam", BF16, {"master": "kahan", "amsgrad": True, "state_dtype": {"exp_avg": F16}}),
    ("Adam", F16, {"master": "fp32", "state_dtype": F32}),
    ("Adam", F16, {"master": "kahan", "state_dtype": F32}),
    ("SGD", BF16, {"master": "split"}),
    ("SGD", BF16, {"master": "fp32", "momentum": 0.9}),
]


def disturb(params: list[torch.nn.Parameter]) -> None:
    """Changes parameters behind the optimizer's back, one of them to what its low bits cannot belong to."""
    params[2].data.mul_(1.5)
    params[3].data[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])


@pytest.mark.parametrize(("name", "dtype", "options"), MASTER_MODES, ids=str)
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_what_is_kept_of_parameters_has_the_bits_of_the_reference(
    name: str, dtype: torch.dtype, options: dict[str, Any], run: Run, settings: Run
) -> None:
    found = []
    for backend, device in ((run.backend, run.device), ("reference", "cpu")):
        params = make_params(dtype, device=device)
        params.append(torch.nn.Parameter(make_params(dtype, 5, device)[2].detach().view(8, 8).t()))
        params.append(torch.nn.Parameter(make_params(F32, 6, device)[3].detach()))  # has none, in the same launch
        optimizer = getattr(fusedopt, name)(params, lr=0.01, weight_decay=0.1, backend=backend, **options)
        take_steps(optimizer, params, 3)
        disturb(params)
        before = fusedopt.launch_count()
        take_steps(optimizer, params, 2, seed=2)
        assert fusedopt.launch_count() == before + 2
        found.append(bits_of(optimizer, params))
    for key, tensor in found[1].items():
        assert found[0][key].dtype == tensor.dtype, key
        same = tensors.same_bits(found[0][key], tensor) if tensor.is_floating_point() else found[0][key] == tensor
        assert same.all(), key


@pytest.mark.parametrize("mode", ["fp32", "split"])
@pytest.mark.parametrize("run", as_params(ONE_RUN_EACH))
def test_a_run_with_a_master_is_the_float32_run_bit_for_bit(mode: str, run: Run, settings: Run) -> None:
    kept = "master" if mode == "fp32" else "low_bits"
    low, wide = make_params(BF16, device=run.device), make_params(BF16, device=run.device)
    wide = [torch.nn.Parameter(param.detach().float()) for param in wide]
    ours = fusedopt.AdamW(low, master=mode, state_dtype=F32, backend=run.backend)
    theirs = fusedopt.AdamW(wide, backend=run.backend)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3 if INTERPRETED else 20):
        for one, other in zip(low, wide, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(run.device, BF16)
            other.grad = one.grad.float()
        ours.step()
        theirs.step()
    for one, other in zip(low, wide, strict=True):
        joined = exact.join(one.detach(), kept, ours.state[one][kept])
        assert torch.equal(joined.view(torch.int32), other.detach().view(torch.int32))
        assert torch.equal(ours.state[one]["exp_avg_sq"], theirs.state[other]["exp_avg_sq"])


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
def test_parameter_and_low_bits_are_every_float32_and_back() -> None:
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (high + low).view(F32)
        values = values[~values.isnan()]
        param, bits = exact.split(values, "low_bits", BF16)
        assert torch.equal(exact.join(param, "low_bits", bits).view(torch.int32), values.view(torch.int32))


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize("mode", ["fp32", "split", "kahan"])
def test_small_updates_are_not_lost(mode: str) -> None:
    param = torch.nn.Parameter(torch.ones(100, dtype=BF16))
    optimizer = fusedopt.SGD([param], lr=1e-4, master=mode)
    for _ in range(1000):
        param.grad = torch.ones_like(param)
        optimizer.step()
    # In bfloat16 alone 1 - 1e-4 is 1. Here the whole way of 0.1 is made but for half an ulp below 1, 2^-9, and, with a
    # compensation, for its own rounding, at most 2^-9 of half an ulp, a thousand times.
    assert abs(float(param[0].detach()) - 0.9) <= 2**-9 + 1000 * 2**-18


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
@pytest.mark.parametrize("mode", ["fp32", "split", "kahan"])
def test_a_checkpoint_goes_on_bit_for_bit_and_another_mode_refuses_it(mode: str, tmp_path: Any) -> None:
    params = make_params(BF16)
    optimizer = fusedopt.AdamW(params, master=mode, state_dtype=F32)
    take_steps(optimizer, params, 3)
    torch.save([optimizer.state_dict(), [param.detach() for param in params]], tmp_path / "saved")
    state, values = torch.load(tmp_path / "saved", weights_only=True)
    copies = [torch.nn.Parameter(value) for value in values]
    resumed = fusedopt.AdamW(copies, master=mode, state_dtype=F32)
    resumed.load_state_dict(state)
    for one, some in ((optimizer, params), (resumed, copies)):
        take_steps(one, some, 2, seed=9)
    assert_same(bits_of(resumed, copies), bits_of(optimizer, params))
    other = fusedopt.AdamW(make_params(BF16), master=None if mode != "split" else "fp32")
    with pytest.raises(ValueError, match="but master is"):
        other.load_state_dict(state)
    assert not other.state
    other.load_state_dict(copy.deepcopy(optimizer.state_dict_torch()))


@pytest.mark.skipif(INTERPRETED, reason="no kernel of its own")
def test_a_parameter_that_cannot_have_the_mode_is_refused_and_nothing_written() -> None:
    params = make_params(F16)
    before = [param.detach().clone() for param in params]
    optimizer = fusedopt.AdamW(params, master="split", state_dtype=F32)
    with pytest.raises(ValueError, match="master='split' is for bfloat16"):
        take_steps(optimizer, params, 1)
    assert not optimizer.state
    assert all(torch.equal(param.detach(), old) for param, old in zip(params, before, strict=True))
