"""Checkpoints as files: a process killed in the middle of writing one, a file cut short, weights_only."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fusedopt

from .kit import CLASSES, FULL_OPTIONS, fused_kit, train

ROOT = Path(__file__).parents[2]
KIT = fused_kit("cpu")
STEPS = 8

# Trains, and after every step writes a checkpoint beside the last one, which it then replaces. While it writes that of
# step 5 it stops halfway and says so.
WRITER = """
import io, os, sys, time
from collections.abc import Callable
from pathlib import Path
import torch
from tests.contract.test_checkpoint_files import begin, steps
cls, folder = sys.argv[1], Path(sys.argv[2])
params, optimizer = begin(cls)
for step in range(8):
    steps(params, optimizer, step, 1)
    file = io.BytesIO()
    torch.save({"step": step + 1, "params": params, "optimizer": optimizer.state_dict()}, file)
    data = file.getvalue()
    with open(folder / "new", "wb") as new:
        new.write(data[: len(data) // 2])
        new.flush()
        if step == 4:
            (folder / "halfway").touch()
            time.sleep(600)
        new.write(data[len(data) // 2 :])
        new.flush()
        os.fsync(new.fileno())
    os.replace(folder / "new", folder / "checkpoint")
"""


def begin(cls: str) -> tuple[list[nn.Parameter], Any]:
    """Parameters and an optimizer that are the same in every process."""
    params = [nn.Parameter(KIT.random(6, 4, seed=1)), nn.Parameter(KIT.random(5, seed=2))]
    return params, getattr(fusedopt, cls)(params, **FULL_OPTIONS[cls])


def steps(params: list[nn.Parameter], optimizer: Any, first: int, count: int) -> None:
    """Steps whose gradients depend on nothing but their number."""
    train(optimizer, params, count, lambda s, i: KIT.random(*params[i].shape, seed=10 * s + i), first=first)


@pytest.mark.parametrize("cls", ["SGD", "AdamW"])
def test_a_process_killed_while_it_writes_leaves_the_last_checkpoint_whole(cls: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", WRITER, cls, str(tmp_path)], cwd=ROOT, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "halfway").exists():
            assert process.poll() is None, "the writer ended by itself"
            assert time.monotonic() < deadline, "the writer did not get to its fifth checkpoint in 120 s"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises((RuntimeError, EOFError)):
        torch.load(tmp_path / "new", weights_only=True)  # what was being written is of no use

    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["step"] == 4
    params, optimizer = begin(cls)
    for param, value in zip(params, saved["params"], strict=True):
        param.data.copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    steps(params, optimizer, 4, STEPS - 4)

    expected, uninterrupted = begin(cls)
    steps(expected, uninterrupted, 0, STEPS)
    for param, value in zip(params, expected, strict=True):
        assert torch.equal(param, value)
        for name, tensor in uninterrupted.state[value].items():
            assert torch.equal(optimizer.state[param][name], tensor), name


@pytest.mark.parametrize("cls", CLASSES)
def test_a_checkpoint_holds_tensors_and_numbers_alone(cls: str) -> None:
    params, optimizer = begin(cls)
    steps(params, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded["state"]) is dict
    for state in loaded["state"].values():
        assert type(state) is dict
        for name, value in state.items():
            assert type(value) is torch.Tensor, name
            assert not value.requires_grad, name


def test_steps_of_all_parameters_take_the_room_of_one_small_buffer() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(50)]
    optimizer = fusedopt.Adam(params)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    storages = {optimizer.state[param]["step"].untyped_storage().data_ptr() for param in params}
    assert len(storages) == 1
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    one = io.BytesIO()
    torch.save(optimizer.state_dict()["state"][0]["step"], one)
    assert one.getbuffer().nbytes < 4096  # the buffer goes along, and is small
    file.seek(0)
    again = fusedopt.Adam(params)
    again.load_state_dict(torch.load(file, weights_only=True))
    for param in params:
        param.grad = torch.ones(3)
    again.step()
    assert [float(again.state[param]["step"]) for param in params] == [2.0] * 50


def test_loading_tensors_that_are_right_already_copies_none() -> None:
    params, optimizer = begin("AdamW")
    steps(params, optimizer, 0, 1)
    saved = optimizer.state_dict()
    again = fusedopt.AdamW(params)
    again.load_state_dict(saved)
    assert again.state[params[0]]["exp_avg"] is saved["state"][0]["exp_avg"]


def without(state_dict: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state_dict.items() if name != key}


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no state": (lambda saved: without(saved, "state"), "loaded state dict has no 'state'"),
    "no groups": (lambda saved: without(saved, "param_groups"), "loaded state dict has no 'param_groups'"),
    "state of another type": (
        lambda saved: {**saved, "state": [1]},
        "'state' of the loaded state dict must be a Mapping, but it is a list",
    ),
    "groups of another type": (
        lambda saved: {**saved, "param_groups": {}},
        "'param_groups' of the loaded state dict must be a Sequence, but it is a dict",
    ),
    "a group of another type": (
        lambda saved: {**saved, "param_groups": [None]},
        "group 0 of the loaded state dict must be a dict, but it is a NoneType",
    ),
    "a group without parameters": (
        lambda saved: {**saved, "param_groups": [without(saved["param_groups"][0], "params")]},
        "group 0 of the loaded state dict has no 'params'",
    ),
    "parameters of another type": (
        lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], "params": 3}]},
        "'params' of group 0 of the loaded state dict must be a Sequence, but it is a int",
    ),
    "a parameter that is no key": (
        lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], "params": [{}]}]},
        "a parameter of group 0 of the loaded state dict must be a Hashable, but it is a dict",
    ),
    "state of a parameter of another type": (
        lambda saved: {**saved, "state": {0: torch.ones(3)}},
        "must be a Mapping, but it is a Tensor",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_no_optimizer_can_have_saved_is_refused_by_what_is_wrong_and_changes_nothing(name: str) -> None:
    spoil, words = SPOILT[name]
    param = nn.Parameter(torch.ones(3))
    optimizer = fusedopt.Adam([param])
    param.grad = torch.ones(3)
    optimizer.step()
    before, groups = dict(optimizer.state[param]), optimizer.param_groups
    with pytest.raises(ValueError, match=re.escape(words)):
        optimizer.load_state_dict(spoil(optimizer.state_dict()))
    assert optimizer.param_groups is groups
    assert all(optimizer.state[param][key] is value for key, value in before.items())
