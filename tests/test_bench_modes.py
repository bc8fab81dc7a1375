"""The programs beside `python -m bench`: what they measure is what it should be, in small."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from bench import (
    codes,
    digits,
    drift,
    memory,
    modes,
    phase,
    present,
    quality,
    readme,
    records,
    reported,
    roofs,
    script,
)
from bench.case import LEARNING_RATES
from bench.cli import main
from bench.curves import draw
from bench.peers import LEAN, Peer
from bench.side import Parameters, gradients
from bench.workloads import load
from fusedopt import blocks

PROGRAMS = (*script.PROGRAMS, "ncu")


@pytest.fixture(autouse=True)
def _small_and_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(roofs.ELEMENTS, "cpu", 2**12)
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
    assert re.search(rf"^    (ncu … )?python -m bench\.{name} ?", page, re.MULTILINE), "an example"
    assert (module.__doc__ or "").splitlines()[0] in page


BAD_INPUT = [
    ("codes", ["--seeds", "0"], "must be at least 1, got 0"),
    ("codes", ["--steps", "many"], "must be a whole number, got 'many'"),
    ("drift", ["--only", "float128"], "no mode has float128 in its name"),
    ("drift", ["--spread", "nan"], "must be a finite number of at least 0, got 'nan'"),
    ("drift", ["--spread", "-1"], "must be a finite number of at least 0, got '-1'"),
    ("drift", ["--marks", "1", "0"], "must be at least 1, got 0"),
    ("modes", ["--workload", "nonsense"], "unknown workload 'nonsense'"),
    ("modes", ["--only", "nobody"], "no row has nobody in its name"),
    ("modes", ["--workload", "1x999999999999", "--time"], "GiB of memory on cpu"),
    ("ncu", ["nope", "adamw", "float32", "kept", "torch-fused"], "unknown workload 'nope'"),
    ("phase", ["--workload", "nope"], "unknown workload 'nope'"),
    ("phase", ["--workload", "mixed-dtypes"], "mixed-dtypes has parameters that are not in float32"),
    ("phase", ["--workload", "1x999999999999"], "GiB of memory on cpu"),
    ("phase", ["--rounds", "1"], "must be at least 2, got 1"),
    ("phase", ["--threads", "0"], "must be at least 1, got 0"),
    ("quality", ["--model", "llama"], "invalid choice: 'llama'"),
    ("readme", ["absent.jsonl"], "no results at absent.jsonl"),
    ("phase", ["--out", "/dev/null/x/y"], "no folder can be made at /dev/null/x"),
    ("quality", ["--out", "/dev/null/x"], "no folder can be made at /dev/null/x"),
    ("reported", ["--workload", "nope"], "unknown workload 'nope'"),
    ("reported", ["--workload", "1x999999999999"], "GiB of memory on cpu"),
    ("reported", ["--rounds", "-3"], "must be at least 2, got -3"),
    ("reported", ["--threads", "0"], "must be at least 1, got 0"),
    ("scale", ["--rounds", "0"], "must be at least 1, got 0"),
    *(
        (name, words, "torch finds no CUDA device")
        for name, words in {
            "ncu": ["2x2", "adamw", "float32", "kept", "torch-fused"],
            "phase": ["--device", "cuda"],
            "reported": ["--device", "cuda"],
        }.items()
        if not torch.cuda.is_available()
    ),
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


def test_marks_of_drift_are_those_asked_for_each_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drift, "ELEMENTS", 64)
    drift.main("--marks 2 1 1 --only bfloat16 --spread 0".split())
    page = capsys.readouterr().out
    heading = next(line for line in page.splitlines() if "mode" in line)
    assert heading.count("error, 1") == heading.count("error, 2") == 1
    assert page.count("%") == 5 * sum("bfloat16" in name for name in drift.ALL_MODES)


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
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", rows[0][3])
    assert rows[1][1:3] == ("not measured", "no_such_package_anywhere is not installed")
    assert LEAN["flashoptim"].missing("cpu") == "runs on cuda only"


def test_a_mode_that_does_not_fit_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1000)
    (row,) = modes.measure([modes.TORCH], load("2x64"), rounds=0)
    assert row[1:3] == ("not measured", "needs 0.0 GiB of memory on cpu, 0.0 are free")


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


# ---- the optimizer phase, and what a report costs ---------------------------------------------------------


@pytest.mark.parametrize(("clears", "floor"), [(True, 44), (False, 40)])
def test_the_phase_is_compared_on_the_same_gradients_beside_the_floor(clears: bool, floor: int) -> None:
    found = phase.compare(load("10x1000"), 3, "cpu", clears)
    assert found["floor_bytes"] == floor * 10_000
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]
    assert {found[key]["count"] for key in ("ratio", "host_ratio", "roof_share")} == {3}
    assert {found[key][name]["count"] for key in ("seconds", "host_seconds") for name in phase.RECIPES} == {3}
    assert f"floor {floor} bytes a parameter" in "\n".join(phase.lines(found))


def test_on_a_gpu_device_and_host_are_told_apart() -> None:
    """The words and the row of the report for a record as a GPU would give it."""
    found = {**phase.compare(load("3x50"), 2, "cpu"), "device": "cuda", "kernel_durations": ["torch"]}
    found |= {"exposed_rounds": {"torch": 1}, "host_ratio": {"median": 16.0, "low": 15.5, "high": 16.5, "count": 2}}
    text = "\n".join(phase.lines(found))
    for part in (" on the device: ", " on the host: ", "ratio 16.0 [15.5, 16.5]", "sum of kernel", "in 1 rounds"):
        assert part in text
    row = dict(zip(present.PHASE_HEADINGS, present.phase_cells(found), strict=True))
    assert row["ratio of host"] == "16.0 [15.5, 16.5]"
    assert row["threads"] == present.MISSING


def test_both_recipes_of_the_phase_clear_gradients_or_both_do_not() -> None:
    for clears in (True, False):
        for recipe in phase.RECIPES.values():
            params = Parameters(load("3x40"), "float32", "cpu")
            params.refill(gradients(load("3x40"), "float32", "cpu"))
            recipe(params, clears)()
            assert all(bool(param.grad.any()) != clears for param in params.flat if param.grad is not None)


def test_a_phase_that_arrives_elsewhere_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    same, other = (Parameters(load("1x5"), "float32", "cpu").flat for _ in range(2))
    phase.check_equal(same, other, 1)
    other[0].data[3] += 1e-3
    with pytest.raises(AssertionError, match="not close"):
        phase.check_equal(same, other, 1)
    monkeypatch.setitem(phase.RECIPES, "fusedopt", lambda params, clears: lambda: None)
    with pytest.raises(AssertionError, match="not close"):
        phase.sides_of(load("2x5"), "cpu", clears=True)


@pytest.mark.parametrize("name", ["groups-465", "mixed-dtypes"])
def test_sides_have_the_groups_rates_and_dtypes_of_the_workload(name: str) -> None:
    workload = load(name)
    small = replace(workload, groups=tuple(replace(group, runs=((2, (50,)),)) for group in workload.groups[:5]))
    params = Parameters(small, "float32", "cpu")
    assert [group["lr"] for group in params.groups] == [
        LEARNING_RATES[group.torch_dtype("float32")] * group.lr_scale for group in small.groups
    ]
    wanted = [group.torch_dtype("float32") for group in small.groups for _ in range(2)]
    assert (
        [param.dtype for param in params.flat]
        == [value.dtype for value in gradients(small, "float32", "cpu")]
        == wanted
    )
    assert all(
        torch.equal(one, two) for one, two in zip(params.flat, Parameters(small, "float32", "cpu").flat, strict=True)
    )
    found = reported.compare(small, "float32", 2, "cpu")
    assert found["dtype"] == ("float32" if name == "groups-465" else "mixed")


def test_a_reports_sides_must_arrive_at_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [side.name for side in reported.sides_of(load("2x30"), "bfloat16", "cpu")] == ["plain", "report"]
    made = fusedopt.AdamW
    monkeypatch.setattr(fusedopt, "AdamW", lambda groups, report: made(groups, report=report, eps=1e-8 + report))
    with pytest.raises(AssertionError, match="did not arrive"):
        reported.sides_of(load("2x30"), "bfloat16", "cpu")


def test_records_of_the_phase_are_kept_beside_the_others_and_shown_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for words in (
        "--workload 3x50 --rounds 2 --out",
        "--workload 3x50 --rounds 3 --out",
        "--workload 2x50 --rounds 2 --out",
    ):
        phase.main(words.split())
    reported.main("--workload 3x50 --rounds 2 --out".split())
    (tmp_path / "other").mkdir()
    phase.main(f"--workload 3x50 --rounds 2 --out {tmp_path / 'other'}".split())
    assert len(records.read([tmp_path / "other" / "phase.jsonl"], "phase")) == 1
    shutil.rmtree(tmp_path / "other")
    kept = sorted(tmp_path.rglob("*.jsonl"))
    folder = kept[0].parent
    assert [path.name[10:] for path in kept] == ["-phase.jsonl", "-reported.jsonl"]
    assert folder.name == records.machine("cpu")["name"]
    shown = records.phases([folder])
    assert [(record["workload"], record["rounds"]) for record in shown] == [("2x50", 2), ("3x50", 3)], (
        "the newest of each"
    )

    canned = [json.loads(line) for line in (Path(__file__).parent / "data" / "bench.jsonl").read_text().splitlines()]
    records.write([{**record, "machine": records.machine("cpu")} for record in canned], folder / "run.jsonl")
    assert main(["report", str(folder), "--out", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    for record in shown:
        assert "".join(f"<td>{cell}</td>" for cell in present.phase_cells(record)) in page
    assert len(present.phase_cells(shown[0])) == len(present.PHASE_HEADINGS)


def test_the_list_names_every_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--device", "cpu"]) == 0
    page = capsys.readouterr().out
    assert all(f"python -m bench.{name} " in page for name in script.PROGRAMS)


def test_the_readme_has_the_formats_of_the_tables() -> None:
    canned = [json.loads(line) for line in (Path(__file__).parent / "data" / "bench.jsonl").read_text().splitlines()]
    text = readme.section(canned, "docs/images/benchmark.png", "python -m bench")
    for record in canned:
        if record["peer"] in readme.PEERS and record["status"] == "ok":
            assert f"| {present.seconds(record['seconds']['median'])} |" in text
        if record["peer"] == "fusedopt-cpu" and record["status"] == "ok":
            assert (
                f"**{present.digits(record['ratio']['median'])}×** [{present.digits(record['ratio']['low'])}, " in text
            )
