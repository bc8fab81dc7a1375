"""The programs that compare precision modes: what they measure is what it should be, in small."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from bench import codes, digits, drift, memory, modes, quality
from bench.curves import draw
from bench.peers import LEAN, Peer
from bench.workloads import load
from fusedopt import blocks

PROGRAMS = ("codes", "drift", "modes", "quality")


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_it_is_and_how_it_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    assert left.value.code == 0
    page = capsys.readouterr().out
    assert f"usage: python -m bench.{name}" in page
    assert f"\n    python -m bench.{name}" in page, "an example"
    assert (module.__doc__ or "").splitlines()[0] in page


BAD_INPUT = [
    ("codes", ["--seeds", "0"], "must be at least 1, got 0"),
    ("drift", ["--only", "float128"], "no mode has float128 in its name"),
    ("modes", ["--workload", "nonsense"], "unknown workload 'nonsense'"),
    ("modes", ["--only", "nobody"], "no row has nobody in its name"),
    ("quality", ["--model", "llama"], "invalid choice: 'llama'"),
]


@pytest.mark.parametrize(("name", "words", "message"), BAD_INPUT)
def test_bad_input_ends_with_a_message(
    name: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"bench.{name}").main(words)
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_codes_of_every_pair_keep_zeros_and_no_error_is_that_of_no_code() -> None:
    for code in (*codes.FIRST.values(), *codes.SECOND.values()):
        assert not code(torch.zeros(2, 32)).any()
    assert codes.train("float32", "float32", 128, steps=1, seed=0)[0] == 0
    error, loss = codes.train("float8", "int8", 32, steps=2, seed=0)
    assert 0 < error < 0.1
    assert loss < 5


def test_drift_knows_exact_modes_and_loses_what_the_report_says() -> None:
    names = ("float32", "split, float32 states", "fp32, float32 states", "bfloat16", "float32, float8 states")
    found = drift.measure({name: drift.ALL_MODES[name] for name in names}, (1, 5))
    exact, *same = (found[name]["errors"] for name in names[:3])
    assert max(exact) < 1e-4
    assert same == [exact, exact]
    assert found["float32, float8 states"]["errors"][0] == exact[0], "coded after the first step"
    assert found["float32, float8 states"]["errors"][1] > 1e-3
    assert found["bfloat16"]["unmoved"] == pytest.approx(reported_loss(5), abs=1e-6)


def reported_loss(steps: int) -> float:
    """The mean of the report's `lost_share` over the steps of plain bfloat16 that `drift.measure` takes."""
    generator = torch.Generator().manual_seed(0)
    start = (drift.SIZE * torch.randn(drift.ELEMENTS, generator=generator)).bfloat16()
    param = torch.nn.Parameter(start)
    optimizer = fusedopt.AdamW([param], lr=drift.LR, report=True)
    lost = 0.0
    for grad in drift.gradients(steps, 1.0, generator):
        param.grad = grad
        optimizer.step()
        lost += optimizer.report().whole["lost_share"]
    return lost / steps


@pytest.mark.parametrize("model", ["charlm", "digits"])
def test_a_quality_run_ends_with_losses_of_stored_parameters(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "VALIDATION", 32)
    runs = {name: [quality.train(model, quality.MODES[name], 0, steps=2)] for name in ("float32", "bfloat16")}
    for (curve,) in runs.values():
        assert curve.steps == [0, 1, 2]
        assert all(0 < loss < 10 for loss in curve.losses)
        assert all(0 <= share <= 1 for share in curve.accuracies)
    assert runs["float32"][0].lost is None
    assert runs["bfloat16"][0].lost is not None
    assert runs["bfloat16"][0].losses[0] == pytest.approx(runs["float32"][0].losses[0], abs=0.02)
    assert len(quality.table(model, runs).rows) == 2
    assert len(draw({model: runs}).axes) == 2


def test_bytes_of_a_mode_are_those_of_the_plan() -> None:
    mode = modes.ours("float8 states, split", state_dtype=blocks.FLOAT8, master="split")
    case = modes.Case(mode, load("3x1000"))
    plans = {plan.name: plan for plan in fusedopt.plan_memory(case.params, verbose=False)}
    assert case.bytes_per_element() == pytest.approx(plans["float8 states, split"].bytes_per_element)


def test_what_cannot_be_measured_is_a_row_with_its_reason() -> None:
    absent = modes.theirs(Peer("absent", lambda *_: None, package="no_such_package_anywhere"))
    rows = [*modes.measure([modes.TORCH, absent], load("2x64"), rounds=1)]
    assert [row[0] for row in rows] == ["torch fused, float32", "absent"]
    assert rows[0][3].endswith("x")
    assert rows[1][1:3] == ("not measured", "no_such_package_anywhere is not installed")
    assert LEAN["flashoptim"].missing("cpu") == "runs on cuda only"


class Coded(Tensor):
    """Shows float32, consists of codes and scales, as low-bit states of other libraries do."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Coded:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes, made.scales = codes, scales
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Nothing is to be computed."""
        raise NotImplementedError(func)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Names of what it consists of."""
        return ["codes", "scales"], None


def test_state_bytes_look_into_subclasses_and_count_what_is_shared_once() -> None:
    shared = torch.zeros(256)
    state = {
        k: {"step": 3, "map": shared, "exp_avg": Coded(torch.zeros(1000, dtype=torch.uint8), torch.zeros(10))}
        for k in range(2)
    }
    assert memory.state_bytes(SimpleNamespace(state=state)) == 1024 + 2 * (1000 + 40)


def test_the_peak_sees_a_temporary_also_where_freed_memory_could_serve() -> None:
    if memory.peak_bytes(lambda: None, "cpu") is None:
        pytest.skip("the system does not reset the mark")

    def step() -> None:
        torch.ones(1 << 21)

    step()
    assert (memory.peak_bytes(step, "cpu") or 0) > 7 << 20
