"""torch.distributed.checkpoint: saved on 4 ranks, resumed on any number, into fusedopt and into torch.optim.

Training goes on from given gradients, the same whatever the number of ranks; so what is resumed must end with the
bits of the run that was never interrupted.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.optim import Optimizer

import fusedopt

from .team import Team, on_ranks
from .twin import Net, make_model, whole

MAKERS: dict[str, Callable[..., Optimizer]] = {
    "fusedopt.AdamW": lambda params: fusedopt.AdamW(params, lr=0.01, amsgrad=True),
    "torch.optim.AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True),
    "fusedopt.SGD": lambda params: fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "stochastic AdamW": lambda params: fusedopt.AdamW(params, lr=0.01, rounding="stochastic"),
    "stochastic SGD": lambda params: fusedopt.SGD(params, lr=0.01, momentum=0.9, rounding="stochastic"),
    "torch.optim.SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
}
# Which optimizer's checkpoint each one resumes, to end as which one ends.
PAIRS = [
    ("fusedopt.AdamW", "fusedopt.AdamW"),
    ("fusedopt.AdamW", "torch.optim.AdamW"),
    ("torch.optim.AdamW", "fusedopt.AdamW"),
    ("stochastic AdamW", "stochastic AdamW"),
    ("stochastic SGD", "stochastic SGD"),
    ("fusedopt.SGD", "fusedopt.SGD"),
    ("fusedopt.SGD", "torch.optim.SGD"),
    ("torch.optim.SGD", "fusedopt.SGD"),
]
BEFORE, AFTER = 3, 2  # steps before and after the save
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FORMS = {"nested": StateDictOptions(), "flat": FLAT}


def dtype_of(name: str) -> torch.dtype:
    return torch.bfloat16 if name.startswith("stochastic") else torch.float32


def sharded(seed: int, dtype: torch.dtype = torch.float32) -> Net:
    model = make_model(seed).to(dtype)
    fully_shard(model.first)
    fully_shard(model)
    return model


def train(model: nn.Module, optimizer: Optimizer, first: int, steps: int) -> None:
    """Steps with gradients that depend on nothing but the number of the step."""
    for step in range(first, first + steps):
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
            param.grad = like(grad, param)
        optimizer.step()


def like(grad: Tensor, param: Any) -> Tensor:
    if not hasattr(param, "placements"):
        return grad
    return distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)


def state_of(model: nn.Module, optimizer: Optimizer, options: StateDictOptions | None = None) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": state}


def resume(model: nn.Module, optimizer: Optimizer, folder: Path, options: StateDictOptions | None = None) -> None:
    state = state_of(model, optimizer, options)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def everything(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Parameters and states."""
    params = list(model.parameters())
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [whole(torch.as_tensor(tensor)).cpu() for tensor in [*params, *states]]


# ---- the run that is saved ------------------------------------------------------------------------------


def save(folder: Path) -> None:
    """Every optimizer's training on these ranks, saved in every form on the way."""
    for name, make in MAKERS.items():
        model = sharded(1, dtype_of(name))
        optimizer = make(model.parameters())
        train(model, optimizer, 0, BEFORE)
        for form, options in FORMS.items():
            dcp.save(state_of(model, optimizer, options), checkpoint_id=folder / name / form)
        train(model, optimizer, BEFORE, AFTER)
        end = everything(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(end, folder / name / "end.pt")


@pytest.fixture(scope="module")
def saved(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 4 ranks saved."""
    folder = tmp_path_factory.mktemp("saved")
    team.run(save, 4, "cpu", {"folder": folder})
    return folder


def check_end(model: nn.Module, optimizer: Optimizer, end: list[Tensor], same_bits: bool) -> None:
    """As the run that was never interrupted; the other library rounds its last steps otherwise."""
    # An update is some 16 roundings of half an ulp, in theirs as in ours, of numbers not far above 1 here.
    ulps = 0 if same_bits else 16 * AFTER * torch.finfo(torch.float32).eps
    for found, expected in zip(everything(model, optimizer), end, strict=True):
        torch.testing.assert_close(found, expected, rtol=ulps, atol=ulps)


# ---- resumed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("saver", "loader"), PAIRS, ids=lambda name: name)
@pytest.mark.parametrize("form", FORMS)
@on_ranks(1, 2)
def test_a_checkpoint_of_4_ranks_resumes_on_fewer(saved: Path, saver: str, loader: str, form: str) -> None:
    model = sharded(2, dtype_of(saver))
    optimizer = MAKERS[loader](model.parameters())
    resume(model, optimizer, saved / saver / form, FORMS[form])
    train(model, optimizer, BEFORE, AFTER)
    check_end(model, optimizer, torch.load(saved / saver / "end.pt"), saver == loader)


@pytest.mark.parametrize(("saver", "loader"), PAIRS, ids=lambda name: name)
def test_a_checkpoint_of_4_ranks_resumes_without_a_process_group(saved: Path, saver: str, loader: str) -> None:
    model = make_model(seed=2).to(dtype_of(saver))
    optimizer = MAKERS[loader](model.parameters())
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=saved / saver / "nested", no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(model, optimizer, BEFORE, AFTER)
    check_end(model, optimizer, torch.load(saved / saver / "end.pt"), saver == loader)


@on_ranks(2)
def test_a_full_state_dict_gathers_and_is_broadcast_from_one_rank(tmp_path: Path) -> None:
    make = MAKERS["fusedopt.AdamW"]
    model = sharded(seed=1)
    optimizer = make(model.parameters())
    train(model, optimizer, 0, BEFORE)
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    other = sharded(seed=1)
    again = make(other.parameters())
    set_optimizer_state_dict(
        other,
        again,
        full if dist.get_rank() == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    states = [everything(*pair)[6:] for pair in ((model, optimizer), (other, again))]
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


@on_ranks(2)
def test_an_async_save_keeps_the_state_of_when_it_was_called(tmp_path: Path) -> None:
    model = sharded(seed=1)
    optimizer = MAKERS["fusedopt.AdamW"](model.parameters())
    train(model, optimizer, 0, BEFORE)
    then = everything(model, optimizer)
    response = dcp.async_save(state_of(model, optimizer), checkpoint_id=tmp_path / "async")
    train(model, optimizer, BEFORE, 20)
    response.result()  # type: ignore[union-attr]
    other = sharded(seed=2)
    again = MAKERS["fusedopt.AdamW"](other.parameters())
    resume(other, again, tmp_path / "async")
    assert all(torch.equal(*pair) for pair in zip(everything(other, again), then, strict=True))


# ---- interrupted ----------------------------------------------------------------------------------------


class Dying(dcp.FileSystemWriter):
    """Writes to storage; rank 1 is killed when it is half way through its file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            (Path(self.path) / "__1_0.distcp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write_data(plan, planner)


def save_twice_and_die(folder: Path) -> None:
    """A folder for each save: the second is never finished."""
    model = sharded(seed=1)
    optimizer = MAKERS["fusedopt.AdamW"](model.parameters())
    train(model, optimizer, 0, BEFORE)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "1")
    train(model, optimizer, BEFORE, AFTER)
    dcp.save(state_of(model, optimizer), storage_writer=Dying(folder / "2"))


def resume_the_last_that_is_whole(folder: Path, end: Path) -> None:
    """Metadata are written last, so a folder that has them is whole."""
    whole_ones = sorted(path.parent for path in folder.glob("*/.metadata"))
    assert [path.name for path in whole_ones] == ["1"]
    model = sharded(seed=2)
    optimizer = MAKERS["fusedopt.AdamW"](model.parameters())
    resume(model, optimizer, whole_ones[-1])
    train(model, optimizer, BEFORE, AFTER)
    check_end(model, optimizer, torch.load(end), same_bits=True)


def test_a_rank_killed_during_a_save_leaves_the_last_checkpoint_usable(team: Team, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1:\nits process ended"):
        team.run(save_twice_and_die, 2, "cpu", {"folder": tmp_path})
    assert (tmp_path / "2" / "__1_0.distcp").read_bytes() == b"half"
    end = saved / "fusedopt.AdamW" / "end.pt"
    team.run(resume_the_last_that_is_whole, 2, "cpu", {"folder": tmp_path, "end": end})


# ---- states in 8 bits -----------------------------------------------------------------------------------

CODES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
each_code = pytest.mark.parametrize("code", CODES)


def coded(seed: int, code: str) -> tuple[Net, fusedopt.AdamW]:
    model = sharded(seed, torch.bfloat16)
    return model, fusedopt.AdamW(model.parameters(), lr=0.01, state_dtype=CODES[code], state_block=32)


def here(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """What of parameters and states is on this rank, codes as numbers."""
    params = list(model.parameters())
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [getattr(one, "_local_tensor", one).detach().float().clone() for one in [*params, *states]]


@each_code
@pytest.mark.parametrize("form", FORMS)
@on_ranks(2, 4)
def test_codes_are_saved_and_loaded_over_as_many_ranks(tmp_path: Path, code: str, form: str) -> None:
    model, optimizer = coded(1, code)
    train(model, optimizer, 0, BEFORE)
    dcp.save(state_of(model, optimizer, FORMS[form]), checkpoint_id=tmp_path / "codes")
    train(model, optimizer, BEFORE, AFTER)
    other, again = coded(2, code)
    resume(other, again, tmp_path / "codes", FORMS[form])
    train(other, again, BEFORE, AFTER)
    assert all(torch.equal(*pair) for pair in zip(here(other, again), here(model, optimizer), strict=True))


def save_codes(folder: Path, code: str) -> None:
    model, optimizer = coded(1, code)
    train(model, optimizer, 0, BEFORE)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "codes")
    wide = optimizer.state_dict_torch()["state"]
    dcp.save({str(k): state for k, state in wide.items()}, checkpoint_id=folder / "float32")
    values = [whole(state["exp_avg"]) for state in wide.values()]
    if dist.get_rank() == 0:
        torch.save(values, folder / "values.pt")


def resume_codes(folder: Path, code: str) -> None:
    model, optimizer = coded(2, code)
    with pytest.raises(CheckpointException, match="Size mismatch between saved"):
        resume(model, optimizer, folder / "codes")
    model, optimizer = coded(2, code)
    train(model, optimizer, 0, 1)
    template = optimizer.state_dict_torch()
    state = {str(k): value for k, value in template["state"].items()}
    dcp.load(state, checkpoint_id=folder / "float32")
    optimizer.load_state_dict({**template, "state": {int(k): value for k, value in state.items()}})
    for param, expected in zip(model.parameters(), torch.load(folder / "values.pt"), strict=True):
        assert torch.equal(whole(optimizer.state[param]["exp_avg"]), expected)
    train(model, optimizer, BEFORE, 1)
    assert all(int(optimizer.state[param]["step"]) == BEFORE + 1 for param in model.parameters())
    assert all(optimizer.state[param]["exp_avg"].dtype == CODES[code] for param in model.parameters())


@each_code
def test_codes_go_to_fewer_ranks_through_float32_and_are_refused_otherwise(
    team: Team, tmp_path: Path, code: str
) -> None:
    team.run(save_codes, 4, "cpu", {"folder": tmp_path, "code": code})
    team.run(resume_codes, 2, "cpu", {"folder": tmp_path, "code": code})
