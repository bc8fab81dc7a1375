"""The benchmark itself: its data, its statistics, its verdicts, its exit codes, its report."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench import (
    commands,
    digits,
    ncu,
    plots,
    present,
    records,
    report,
    roofline,
    roofs,
    stream_kernel,
    timing,
    trace,
    train,
    workloads,
)
from bench.case import Case
from bench.check import Accuracy, WorkloadCheck, ulps
from bench.cli import main
from bench.compare import change_of_speed, changes
from bench.contender import Contender, Gradients, fill
from bench.gate import ATTEMPTS, FLOORS, gate
from bench.memory import residency
from bench.peers import BASELINE, HYPER, PEERS, Hyper, ParamGroups, Peer
from bench.peers.torch_optim import make
from bench.records import Record
from bench.run import Runner
from bench.suites import SUITES, cases_of, thread_counts
from bench.timing import Rules, Sample, Spread

pytestmark = pytest.mark.filterwarnings("ignore:Profiler clears events")


@pytest.fixture(autouse=True)
def _small_and_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and waiting for them is slow on a busy machine."""
    monkeypatch.setitem(roofs.ELEMENTS, "cpu", 2**12)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SHORT = Rules(budget_s=0.0, min_rounds=2, max_rounds=2, block_s=0.0, warmup=0)
SILENT = Console(quiet=True)

SIZES = {
    "gpt2-124m": (148, 124_439_808),
    "gpt2-1.5b": (580, 1_557_611_200),
    "resnet50": (161, 25_557_032),
    "vit-l": (392, 304_326_632),
    "bert-large": (398, 336_226_108),
    "llama3-8b": (291, 8_030_261_248),
    "sdxl-unet": (1680, 2_567_463_684),
    "lora-448": (448, 448 * 65_536),
    "one-64x1024": (1, 65_536),
    "1000x16": (1000, 16_000),
    "1000x4097": (1000, 4_097_000),
}
"""Tensors and elements as the models' publishers or papers give them."""


# ---- workloads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_a_workload_has_its_models_size(name: str) -> None:
    workload = workloads.load(name)
    assert (workload.tensors, workload.elements) == SIZES[name]


@pytest.mark.parametrize("name", workloads.names())
def test_a_workload_file_is_complete(name: str) -> None:
    workload = workloads.load(name)
    assert workload.name == name
    assert workload.description
    assert workload.source
    assert sum(1 for group in workload.groups for _ in group.shapes()) == workload.tensors
    assert all(size > 0 for group in workload.groups for shape in group.shapes() for size in shape)


def test_shards_of_llama_add_up_to_at_least_the_whole() -> None:
    whole = workloads.load("llama3-8b").elements
    for ranks in (8, 64):
        share = workloads.load(f"llama3-8b-shard{ranks}").elements
        assert whole <= share * ranks < whole * 1.001


def test_the_hard_lists_are_hard_in_the_way_they_say() -> None:
    assert workloads.load("over-2-31").elements > 2**31
    assert len(workloads.load("groups-465").groups) == 465
    assert len({group.lr_scale for group in workloads.load("groups-465").groups}) == 465
    dtypes = [group.dtype for group in workloads.load("mixed-dtypes").groups]
    assert dtypes == ["float32", "float16", "bfloat16"]
    assert len(list(workloads.load("moe-2b").groups[0].shapes())) > 24 * 8 * 3


@pytest.mark.parametrize("name", ["nonsense", "0x16", "5x0", "12x"])
def test_an_unknown_workload_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        workloads.load(name)


def test_bytes_moved_follow_dtype_and_optimizer() -> None:
    assert Case("1000x16", "adamw").bytes_moved == 28 * 16_000
    assert Case("1000x16", "sgd").bytes_moved == 20 * 16_000
    assert Case("1000x16", "adam", "bfloat16").bytes_moved == 14 * 16_000
    mixed = workloads.load("mixed-dtypes")
    by_group = [sum(count * torch.Size(shape).numel() for count, shape in group.runs) for group in mixed.groups]
    assert Case("mixed-dtypes", "adamw", "mixed").bytes_moved == 7 * (
        4 * by_group[0] + 2 * by_group[1] + 2 * by_group[2]
    )


def test_every_suite_makes_cases() -> None:
    for name, suite in SUITES.items():
        cases = cases_of(suite.rows, "cpu", [1])
        assert len(cases) == len(set(cases)) > 0, name
    dtypes = {case.dtype for case in cases_of(SUITES["shapes"].rows, "cpu", [1]) if case.workload == "mixed-dtypes"}
    assert dtypes == {"mixed"}


def test_the_main_suite_is_the_main_job() -> None:
    cases = cases_of(SUITES["main"].rows, "cpu", [1, 2])
    assert {case.workload for case in cases} == {"1000x16", "resnet50", "gpt2-124m"}
    assert {case.optimizer for case in cases} == {"adamw", "sgd"}
    assert {case.threads for case in cases} == {1, 2}
    assert SUITES["main"].invites("fusedopt-triton")
    assert not SUITES["main"].invites("bitsandbytes")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("wanted", ["0", "-1", "many", "100000"])
def test_a_bad_thread_count_is_refused(wanted: str, device: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(wanted))):
        thread_counts(device, [wanted])


# ---- statistics -------------------------------------------------------------------------------------------


def test_spread_is_median_and_quartiles() -> None:
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0, 5)


def test_bootstrap_brackets_the_median_and_repeats_itself() -> None:
    values = [1.0 + 0.01 * i for i in range(21)]
    found = timing.bootstrap(values)
    assert found.median == pytest.approx(1.1)
    assert found.low < found.median < found.high
    assert found == timing.bootstrap(values)
    assert timing.bootstrap([2.0]) == Spread(2.0, 2.0, 2.0, 1)


def test_a_wider_scatter_gives_a_wider_interval() -> None:
    narrow, wide = (timing.bootstrap([1 + scale * (i % 7 - 3) for i in range(30)]) for scale in (0.001, 0.1))
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)


@pytest.mark.parametrize("statistic", [timing.spread, timing.bootstrap])
def test_statistics_of_nothing_are_refused(statistic: Callable[[list[float]], Spread]) -> None:
    with pytest.raises(ValueError, match="no values"):
        statistic([])


def test_ratios_pair_only_rounds_that_both_were_in() -> None:
    assert timing.paired({0: 2.0, 1: 9.0, 4: 6.0}, {0: 1.0, 4: 2.0, 5: 7.0}) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.01, 1.1, "faster"), (0.99, 1.1, "tie"), (0.9, 0.985, "tie"), (0.5, 0.97, "slower")],
)
def test_verdicts_go_by_the_interval(low: float, high: float, expected: str) -> None:
    assert timing.verdict(Spread((low + high) / 2, low, high, 9)) == expected


class Scripted:
    """A contender that costs what it is told, and a clock that believes it."""

    prepares = False

    def __init__(self, name: str, seconds: float) -> None:
        self.name = name
        self.seconds = seconds
        self.log: list[str] = []

    def present(self) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def prepare(self) -> None:
        self.log.append("prepare")

    def step(self) -> None:
        self.log.append("step")


class ScriptedClock:
    sums_kernels = True

    def __init__(self, exposed: tuple[str, ...] = ()) -> None:
        self.order: list[str] = []
        self.by_kernels: set[str] = set()
        self.exposed = exposed

    def begin(self) -> None:
        self.order.clear()

    def measure(self, timed: Any, steps: int, by_kernels: bool) -> Sample:
        self.order.append(timed.name)
        self.by_kernels |= {timed.name} if by_kernels else set()
        return Sample(timed.seconds, timed.seconds / 2, by_kernels or timed.name not in self.exposed)


def test_rounds_time_everyone_in_turns_and_slow_ones_less_often() -> None:
    clock = ScriptedClock()
    contenders = [Scripted("base", 1.0), Scripted("fast", 0.1), Scripted("slow", 7.0)]
    rules = Rules(budget_s=0.0, min_rounds=6, max_rounds=40, slow_factor=3.0)
    found = timing.run_rounds(contenders, clock, rules, "base")
    assert (found["base"].stride, found["fast"].stride, found["slow"].stride) == (1, 1, 3)
    assert len(found["base"].device) == len(found["fast"].device) == 6
    assert list(found["slow"].device) == [0, 3]
    assert found["fast"].host[0] == 0.05


def test_everyone_is_first_in_some_rounds_and_last_in_others() -> None:
    clock = ScriptedClock()
    names = ["a", "b", "c"]
    rules = Rules(budget_s=0.0, min_rounds=6)
    timing.run_rounds([Scripted(name, 1.0) for name in names], clock, rules, None)
    rounds = [clock.order[start : start + 3] for start in range(3, 21, 3)]  # after one each to plan by
    assert sorted(rounds) == sorted(map(list, permutations(names)))


def test_blocks_are_long_enough_and_warmed() -> None:
    fast = Scripted("fast", 0.001)
    found = timing.run_rounds([fast], ScriptedClock(), Rules(budget_s=0, min_rounds=2, block_s=0.02), None)
    assert found["fast"].steps_per_block == 20
    assert fast.log.count("step") == 1 + 2, "one warm-up, and one step before each of the two blocks"


@pytest.mark.parametrize(
    ("fast", "exposed", "expected"),
    [
        (1e-3, (), set()),
        (1e-3, ("slow",), {"slow"}),
        (50e-6, (), {"fast", "slow"}),
        (50e-6, ("slow",), {"fast", "slow"}),
    ],
)
def test_kernel_durations_are_taken_where_events_are_too_coarse_or_a_host_shows(
    fast: float, exposed: tuple[str, ...], expected: set[str]
) -> None:
    clock = ScriptedClock(exposed)
    contenders = [Scripted("fast", fast), Scripted("slow", 2e-3)]
    found = timing.run_rounds(contenders, clock, SHORT, None)
    assert {name for name, measured in found.items() if measured.by_kernels} == clock.by_kernels == expected
    assert not any(measured.exposed for measured in found.values())


def test_a_clock_without_kernels_takes_none() -> None:
    clock = ScriptedClock(("slow",))
    clock.sums_kernels = False
    found = timing.run_rounds([Scripted("slow", 1e-6)], clock, SHORT, None)["slow"]
    assert not found.by_kernels
    assert found.exposed == len(found.device) == 2


SPANS = {
    "a host as fast as it was": ([True], [2.05e-3]),
    "held up once": ([False, True], [2.05e-3, 8.2e-3]),
    "held up until the spin is the longest": ([False, False, False], [2.05e-3, 8.2e-3, 32.8e-3]),
}


@pytest.mark.parametrize("what", SPANS)
def test_a_span_is_tried_again_behind_a_longer_spin(what: str) -> None:
    outcomes, spins = SPANS[what]
    seen: list[float] = []

    def span(spin_s: float) -> tuple[float, bool]:
        seen.append(spin_s)
        return float(len(seen)), outcomes[len(seen) - 1]

    assert timing.hidden_span(span, 1e-3) == (float(len(spins)), outcomes[-1])
    assert seen == pytest.approx(spins)


class FakeGpu:
    """A GPU in virtual time, which does what is queued in order, and a host beside it.

    Clocked at 345 MHz until it has worked for 0.2 s, then at 1,980.
    """

    QUEUE = 1000

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.device = self.worked = 0.0
        self.spun = 0.0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", self.spin)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(L2_cache_size=50 * 2**20))
        monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(zero_=lambda: self.work(100e-6)))

    def work(self, seconds: float) -> None:
        self.device = max(self.device, self.host) + seconds
        self.worked += seconds

    def spin(self, cycles: int) -> None:
        self.work(cycles / (345e6 if self.worked < 0.2 else 1980e6))
        self.spun = self.device

    def wait(self) -> None:
        self.host = max(self.host, self.device)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.device, self.gpu.host)

    def query(self) -> bool:
        return self.gpu.host >= self.at

    def synchronize(self) -> None:
        self.gpu.wait()

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


class OnFakeGpu(Scripted):
    """Launches 1 µs of work each, the host between them taking its time; a full queue makes it wait."""

    def __init__(self, gpu: FakeGpu, launches: int, host_s: float) -> None:
        super().__init__("fake", 0.0)
        self.gpu, self.launches, self.host_s = gpu, launches, host_s

    def step(self) -> None:
        for launch in range(self.launches):
            if launch >= self.gpu.QUEUE:
                self.gpu.host = max(self.gpu.host, self.gpu.spun)
            self.gpu.host += self.host_s / self.launches
            self.gpu.work(1e-6)


@pytest.mark.parametrize(
    ("launches", "host_s", "hidden"),
    [(1, 5e-6, True), (500, 10e-3, True), (500, 45e-3, True), (500, 200e-3, False), (5000, 10e-3, False)],
)
def test_a_span_on_a_gpu_has_no_host_time_in_it_or_is_known_to(
    launches: int, host_s: float, hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a short step, one near the longest spin, one beyond it, and one of more launches than are queued."""
    gpu = FakeGpu(monkeypatch)
    clock = timing.CudaClock()
    clock.begin()
    found = clock.measure(OnFakeGpu(gpu, launches, host_s), 3, by_kernels=False)
    assert found.host_seconds == pytest.approx(host_s)
    assert found.hidden is hidden
    assert (found.seconds == pytest.approx(launches * 1e-6)) == hidden


def test_a_spin_is_measured_out_by_the_clock_of_a_busy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    clock = timing.CudaClock()
    clock.begin()
    before = gpu.host
    gpu.spin(int(0.01 * clock._cycles_per_s))
    gpu.wait()
    assert gpu.host - before == pytest.approx(0.01)


def test_a_host_slower_than_the_longest_spin_is_not_tried_again() -> None:
    seen: list[float] = []
    assert timing.hidden_span(lambda spin_s: seen.append(spin_s) or (1.0, False), 1.0) == (1.0, False)
    assert seen == [timing.LONGEST_SPIN_S]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ([{"kernel_durations": True}, {}], "sum of kernel durations"),
        ([{"exposed_rounds": 2}, {}], "in 2 of 5 rounds the device waited for it"),
        ([{"kernel_durations": True}] * 2, ""),
        ([{}, {}], ""),
    ],
)
def test_a_table_says_how_device_time_was_taken(fields: list[Record], word: str) -> None:
    timed = [record for record in CANNED if record["status"] == "ok"][:2]
    found = [{**record, **more} for record, more in zip(timed, fields, strict=True)]
    lines = [line for _, line in present.remarks(found)]
    assert all(line.startswith(f"{timed[0]['peer']}: ") and word in line for line in lines)
    assert bool(lines) == bool(word)
    both = all(field.get("kernel_durations") for field in fields)
    assert present.title(records.case_of(timed[0]), found).endswith("; sums of kernel durations") == both


def test_the_cpu_clock_leaves_preparation_out() -> None:
    import time

    class Slow(Scripted):
        prepares = True

        def prepare(self) -> None:
            time.sleep(0.02)

    assert timing.CpuClock().measure(Slow("slow", 0.0), 2).seconds < 0.01


# ---- contenders -------------------------------------------------------------------------------------------


def test_filling_keeps_away_from_zero_and_repeats_itself() -> None:
    first, second = ([torch.empty(1_500_000), torch.empty(7)] for _ in range(2))
    fill(first, 5, signed=True)
    fill(second, 5, signed=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    values = torch.cat(first)
    assert 0.5 <= values.abs().min() <= values.abs().max() <= 1.5
    assert (values > 0).any()
    assert (values < 0).any()


def contender(gradients: str, peer: str = BASELINE) -> Contender:
    case = Case("5x7", "adamw", gradients=gradients)
    made = Contender(PEERS[peer], case, Gradients(case), resident=True)
    made.build()
    return made


def test_fresh_gradients_are_new_tensors_with_the_same_values() -> None:
    made = contender("fresh")
    made.prepare()
    seen = [p.grad for p in made.params]
    made.prepare()
    for param, old, values in zip(made.params, seen, made.gradients.flat, strict=True):
        assert param.grad is not old
        assert param.grad is not None
        assert param.grad.data_ptr() != values.data_ptr()
        assert torch.equal(param.grad, values)


def test_toggled_gradients_are_missing_in_every_other_step() -> None:
    made = contender("toggle")
    present_each_time = []
    for _ in range(4):
        made.prepare()
        present_each_time.append([p.grad is not None for p in made.params])
    assert present_each_time == [[True] * 5, [True, False] * 2 + [True]] * 2


def test_a_first_step_makes_the_optimizer_anew() -> None:
    made = contender("first")
    before = made.optimizer
    made.prepare()
    made.step()
    assert made.optimizer is not before


def test_memory_decides_who_stays() -> None:
    case = Case("1x1000000", "adamw")
    each, shared = 12e6, 16e6
    assert residency(case, 3, 0, int((3 * each + shared) / 0.79)) is True
    assert residency(case, 3, 0, int((2 * each + shared) / 0.8)) is False
    assert residency(case, 3, 0, int(each)) is None


# ---- correctness before timing ----------------------------------------------------------------------------


def test_ulps_count_last_places() -> None:
    one = torch.ones(3, dtype=torch.float64)
    assert ulps(one, one, torch.float32) == 0
    assert ulps(one + 2.0**-23, one, torch.float32) == 1
    assert ulps(one - 3 * 2.0**-7, one, torch.bfloat16) == 3
    assert ulps(torch.tensor([float("nan")]), torch.ones(1), torch.float32) == float("inf")
    assert ulps(torch.tensor([2.0**-149]), torch.zeros(1), torch.float32) == 1


class Spoiled:
    """torch's fused optimizer with a fault after each step."""

    def __init__(self, groups: ParamGroups, hyper: Hyper, fault: Callable[[list[Tensor]], None]) -> None:
        self.params = [p for group in groups for p in group["params"]]
        self.optimizer = make(groups, hyper, fused=True)
        self.fault = fault

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.fault(self.params)


def spoiled(fault: Callable[[list[Tensor]], None]) -> Peer:
    return Peer("spoiled", lambda groups, hyper: Spoiled(groups, hyper, fault))


def _last_element(params: list[Tensor]) -> None:
    params[-1].view(-1)[-1] += 0.01


def _swapped_beta(groups: ParamGroups, hyper: Hyper) -> Any:
    return make(groups, replace(hyper, betas=(0.9, 0.99)), fused=True)


def _no_decay(groups: ParamGroups, hyper: Hyper) -> Any:
    return make(groups, replace(hyper, weight_decay=0.0), fused=True)


WRONG = {
    "one element of the last tensor": spoiled(_last_element),
    "NaN": spoiled(lambda params: params[0].view(-1)[:1].fill_(float("nan"))),  # type: ignore[arg-type, return-value]
    "another beta": Peer("wrong", _swapped_beta),
    "no weight decay": Peer("wrong", _no_decay),
}


def run_case(case: Case, *peers: Peer, rules: Rules = SHORT) -> dict[str, Record]:
    return {record["peer"]: record for record in Runner(rules, "cpu").run(case, list(peers))}


@pytest.mark.parametrize("fault", WRONG)
@pytest.mark.parametrize("gradients", ["kept", "fresh"])
def test_a_wrong_peer_is_marked_wrong_and_not_ranked(fault: str, gradients: str) -> None:
    peer = replace(WRONG[fault], name="wrong")
    found = run_case(Case("3x5000", "adamw", gradients=gradients), PEERS[BASELINE], peer)
    assert found[BASELINE]["status"] == "ok"
    assert found["wrong"]["status"] == "wrong"
    assert "ulp" in found["wrong"]["reason"]
    assert "seconds" not in found["wrong"]
    assert "seconds" in found[BASELINE]


@pytest.mark.parametrize("gradients", timing.GRADIENTS)
@pytest.mark.parametrize("optimizer", HYPER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torchs_loop_and_foreach_are_right(optimizer: str, dtype: str, gradients: str) -> None:
    case = Case("7x100", optimizer, dtype, gradients=gradients)
    check = WorkloadCheck(case)
    for name in ("torch-loop", "torch-foreach"):
        made = Contender(PEERS[name], case, Gradients(case), resident=True)
        made.build()
        outcome = check.run(made)
        assert outcome.right, (name, outcome)
        assert not outcome.note


@pytest.mark.parametrize("optimizer", HYPER)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torchs_foreach_is_as_accurate_as_its_loop_after_100_steps(optimizer: str, dtype: str) -> None:
    accuracy = Accuracy()
    loop, foreach = (
        accuracy.run(PEERS[name], optimizer, workloads.DTYPES[dtype], "cpu") for name in ("torch-loop", "torch-foreach")
    )
    assert loop.right
    assert foreach.error == pytest.approx(loop.error, rel=0.5)


@pytest.mark.parametrize("name", ["groups-465", "mixed-dtypes"])
def test_groups_with_their_own_rates_and_dtypes_are_checked_each_by_its_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = tuple(replace(group, runs=((2, (50,)),)) for group in workloads.load(name).groups[:5])
    small = replace(workloads.load(name), groups=groups)
    monkeypatch.setattr(workloads, "load", lambda name: small)
    case = Case(name, "adamw", "float32" if name == "groups-465" else "mixed")
    made = Contender(PEERS[BASELINE], case, Gradients(case), resident=True)
    made.build()
    assert WorkloadCheck(case).run(made).right


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_peer_that_is_wrong_in_one_dtype_of_a_mixed_workload_is_wrong(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 100 steps, of which three on the workload itself show nothing."""
    small = replace(workloads.load("mixed-dtypes"), groups=tuple(
        replace(group, runs=((2, (50,)),)) for group in workloads.load("mixed-dtypes").groups
    ))  # fmt: skip
    monkeypatch.setattr(workloads, "load", lambda name: small)

    class LateFault(Spoiled):
        """Off from the 50th step on, in one dtype."""

        def step(self) -> None:
            self.taken = getattr(self, "taken", 0) + 1
            self.optimizer.step()
            for param in self.params:
                if self.taken == 50 and param.dtype == workloads.DTYPES[dtype]:
                    param.data += 1.0

    peer = Peer("late", lambda groups, hyper: LateFault(groups, hyper, lambda params: None))
    found = run_case(Case("mixed-dtypes", "adamw", "mixed"), peer)["late"]
    assert found["status"] == "wrong"
    assert found["reason"].startswith(f"after 100 steps in {dtype} off by ")


def test_writing_into_the_gradients_is_noticed_and_not_held_against_the_result() -> None:
    peer = spoiled(lambda params: [p.grad.mul_(0.5) for p in params if p.grad is not None] and None)
    found = run_case(Case("3x50", "adamw"), peer)["spoiled"]
    assert found["status"] == "ok"
    assert found["note"] == "writes into the gradients"


def test_a_peer_that_raises_is_reported_as_failed() -> None:
    def raising(groups: ParamGroups, hyper: Hyper) -> Any:
        raise RuntimeError("no such kernel\nand more")

    found = run_case(Case("3x50", "adamw"), PEERS[BASELINE], Peer("raising", raising))
    assert found["raising"]["status"] == "failed"
    assert found["raising"]["reason"] == "RuntimeError: no such kernel"
    assert found[BASELINE]["status"] == "ok"


def test_what_a_peer_cannot_do_is_skipped_with_its_reason() -> None:
    adam_only = replace(PEERS[BASELINE], name="adam-only", optimizers=("adam",))
    assert run_case(Case("3x50", "sgd"), adam_only)["adam-only"]["reason"] == "has no sgd"


def test_what_does_not_fit_is_skipped_with_a_word() -> None:
    found = run_case(Case("llama3-8b", "adamw", "float64"), PEERS[BASELINE])[BASELINE]
    assert found["status"] == "skipped"
    assert "memory" in found["reason"]


@pytest.mark.parametrize("resident", [True, False])
def test_a_record_has_all_that_was_measured(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.memory.residency", lambda *args: resident)
    found = run_case(Case("4x100", "adamw"), PEERS["torch-loop"], PEERS[BASELINE])["torch-loop"]
    assert found["status"] == "ok"
    assert found["resident"] is resident
    assert found["seconds"]["count"] == len(found["samples"]) == len(found["ratio_samples"])
    assert found["ratio"]["median"] > 0
    assert found["roof_share"]["median"] > 0
    assert found["best_peer"] in ("torch-loop", BASELINE)
    assert found["state_bytes"] >= 2 * 4 * 400
    assert found["ulps_after_100"] > 0
    assert found["machine"]["name"]
    assert found["versions"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found, allow_nan=False))["date"].startswith("20")


@pytest.mark.parametrize("name", ["fusedopt-cpu", "fusedopt-reference"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fusedopt_is_right_in_the_benchmarks_own_eyes(name: str, optimizer: str) -> None:
    peer = PEERS[name]
    reason = peer.missing("cpu")
    if reason:
        pytest.skip(reason)
    found = run_case(Case("6x100", optimizer), PEERS[BASELINE], peer)[name]
    assert found["status"] == "ok", found["reason"]
    assert found["launches"] == 1


# ---- peers ------------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_says_so() -> None:
    absent = Peer("absent", make, package="no_such_package_anywhere")
    assert absent.missing("cpu") == "no_such_package_anywhere is not installed"


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_is_either_here_or_has_a_reason(name: str) -> None:
    reason = PEERS[name].missing("cpu")
    assert reason is None or reason.strip()


def test_versions_are_noted_of_every_peers_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names that it is installed by: a new peer needs no second place to be named in."""
    monkeypatch.setitem(PEERS, "new", Peer("new", make, package="yaml", distribution="numpy"))
    records.versions.cache_clear()
    try:
        found = records.versions()
    finally:
        records.versions.cache_clear()
    assert list(found)[:2] == ["python", "torch"]
    assert "numpy" in found
    assert PEERS["optimi"].distribution == "torch-optimi"


def test_choosing_peers_names_the_unknown() -> None:
    with pytest.raises(ValueError, match="'nobody'"):
        commands.choose_peers(["nobody"], "cpu")
    here, absent = commands.choose_peers(["torch-fused", "apex"], "cpu")
    assert [peer.name for peer in here] == ["torch-fused"]
    assert "apex" in absent


# ---- comparing and gating ---------------------------------------------------------------------------------

CANNED: list[Record] = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "bench.jsonl").read_text().splitlines()
]


def slowed(found: list[Record], factor: float) -> list[Record]:
    """The same results with fusedopt's speeds scaled by `factor`."""
    changed = copy.deepcopy(found)
    for record in changed:
        if record["peer"].startswith("fusedopt") and record["status"] == "ok":
            record["ratio_samples"] = [value * factor for value in record["ratio_samples"]]
            record["samples"] = [value / factor for value in record["samples"]]
    return changed


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 0), (0.5, 1)])
def test_compare_fails_exactly_when_something_got_slower(factor: float, code: int, tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    records.write(CANNED, old)
    records.write(slowed(CANNED, factor), new)
    assert main(["compare", str(old), str(new)]) == code


def test_compare_does_not_mistake_a_slower_machine_for_slower_code(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    slow_machine = [{**r, "samples": [3 * v for v in r.get("samples", [])]} for r in CANNED]
    records.write(CANNED, old)
    records.write(slow_machine, new)
    assert main(["compare", str(old), str(new)]) == 0


def test_compare_fails_when_a_result_became_wrong(tmp_path: Path) -> None:
    broken = [{**r, "status": "wrong", "reason": "off"} if r["peer"] == "fusedopt-cpu" else r for r in CANNED]
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    records.write(CANNED, old)
    records.write(broken, new)
    assert main(["compare", str(old), str(new)]) == 1


@pytest.mark.parametrize("tolerance", ["nan", "-0.1", "1", "inf"])
def test_a_tolerance_that_lets_everything_pass_is_bad_input(
    tolerance: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = records.write(CANNED, tmp_path / "run.jsonl")
    assert main(["compare", str(path), str(path), "--tolerance", tolerance]) == 2
    assert f"--tolerance must be at least 0 and below 1, got {float(tolerance)}" in capsys.readouterr().err


def test_compare_of_runs_without_common_cases_is_bad_input(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    records.write(CANNED, old)
    records.write([{**r, "workload": "9x9"} for r in CANNED], new)
    assert main(["compare", str(old), str(new)]) == 2
    assert main(["compare", str(old), str(tmp_path / "absent.jsonl")]) == 2


def test_noise_alone_is_no_change() -> None:
    old, new = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2], [0.95, 1.25, 0.75, 1.05, 0.85, 1.15]
    assert timing.verdict(change_of_speed(old, new)) == "tie"


def test_only_fusedopt_is_compared_where_it_is_there() -> None:
    assert {change.record["peer"] for change in changes(CANNED, CANNED)} == {"fusedopt-cpu"}


def scripted_gate(ratios: list[tuple[float, float]], status: str = "ok") -> tuple[int, int]:
    """The gate's exit code when successive measurements have these intervals, and how many it took."""
    calls = 0

    def measure(case: Case, peers: Any) -> list[Record]:
        nonlocal calls
        low, high = ratios[min(calls, len(ratios) - 1)]
        calls += 1
        ratio = asdict(Spread((low + high) / 2, low, high, 9))
        return [{"peer": peers[1].name, "status": status, "reason": "off", "ratio": ratio}]

    return gate("cpu", "cpu", SILENT, measure), calls


@pytest.fixture
def cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's peer taken for present, whatever is built here."""
    peer = replace(PEERS["fusedopt-cpu"], package=None, unavailable=lambda device: None)
    monkeypatch.setitem(PEERS, "fusedopt-cpu", peer)


@pytest.mark.usefixtures("cpu_backend")
def test_the_gate_opens_when_every_floor_holds() -> None:
    assert scripted_gate([(50.0, 60.0)]) == (0, len(FLOORS["cpu"]))


@pytest.mark.usefixtures("cpu_backend")
def test_the_gate_shuts_when_a_floor_is_missed_every_time() -> None:
    assert scripted_gate([(0.1, 0.2)]) == (1, ATTEMPTS * len(FLOORS["cpu"]))


@pytest.mark.usefixtures("cpu_backend")
def test_one_bad_measurement_does_not_shut_the_gate() -> None:
    assert scripted_gate([(0.1, 0.2), (50.0, 60.0)])[0] == 0


@pytest.mark.usefixtures("cpu_backend")
def test_a_wrong_result_shuts_the_gate() -> None:
    assert scripted_gate([(50.0, 60.0)], status="wrong")[0] == 1


def test_a_gate_that_cannot_run_is_bad_input() -> None:
    assert main(["gate", "--backend", "nothing"]) == 2
    assert main(["gate", "--backend", "triton", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("words", "device", "backend"),
    [
        ([], "cpu", "cpu"),
        (["--device", "cuda"], "cuda", "cuda"),
        (["--device", "cuda", "--backend", "triton"], "cuda", "triton"),
    ],
)
def test_the_gate_is_on_the_cpu_unless_told_and_its_backend_is_the_devices(
    words: list[str], device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is a GPU."""
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(commands, "gate", lambda *found: seen.append(found[:2]) or 0)
    assert main(["gate", *words]) == 0
    assert seen == [(device, backend)]


# ---- showing ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    """The report of the canned results."""
    return report.render(CANNED)


def test_the_report_is_one_file_with_every_figure_and_every_peer(page: str) -> None:
    assert page.count('<img src="data:image/svg+xml;base64,') >= 2
    assert not re.search(r'(src|href)="(?!data:)', page), "nothing may be fetched from elsewhere"
    assert "<script" not in page
    for record in CANNED:
        assert record["peer"] in page
    assert CANNED[0]["machine"]["cpu"] in page
    assert CANNED[0]["date"][:10] in page


def test_the_report_says_who_is_wrong(page: str) -> None:
    wrong = next(record for record in CANNED if record["status"] == "wrong")
    assert f'<li class="wrong">{wrong["peer"]}: wrong: {wrong["reason"]}</li>' in page


def test_a_report_of_two_machines_is_refused() -> None:
    other = {**CANNED[0], "machine": {**CANNED[0]["machine"], "name": "other"}}
    with pytest.raises(ValueError, match="one machine"):
        report.render([*CANNED, other])


def curve_records() -> list[Record]:
    """The canned results again at several sizes and counts, for the figures that need them."""
    template = [record for record in CANNED if record["status"] == "ok" and record["workload"] == "1000x16"]
    found = []
    for workload in ("1x1024", "1x1048576", "10x16", "1000x16"):
        shapes = workloads.load(workload)
        for record in template:
            size = {
                "tensors": shapes.tensors,
                "elements": shapes.elements,
                "bytes_moved": 28 * shapes.elements,
            }
            found.append({**record, "workload": workload, **size})
    return found


def test_every_peer_has_a_colour_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: plots.colour(name) for name in PEERS}
    for number in range(20):
        monkeypatch.setitem(PEERS, f"new-{number}", Peer(f"new-{number}", make))
    assert {name: plots.colour(name) for name in known} == known
    assert plots.colour("new-19") in plots.PALETTE


@pytest.mark.parametrize("heading", plots.FIGURES)
def test_every_figure_can_be_drawn(heading: str) -> None:
    figure = plots.FIGURES[heading](records.by_case(curve_records()))
    assert figure is not None
    figure.draw_without_rendering()
    assert plots.FIGURES[heading]({}) is None


def test_results_survive_writing_and_reading(tmp_path: Path) -> None:
    kept = [{**record, "kind": "step", "run": "x"} for record in CANNED]
    assert records.read([records.write(CANNED, tmp_path / "deep" / "x.jsonl")]) == kept
    assert records.read([tmp_path]) == kept


def test_a_case_has_the_peers_of_one_run_the_newest() -> None:
    case = [{**CANNED[0], "peer": peer} for peer in ("torch-fused", "fusedopt-cpu", "optimi")]
    runs = {"last": [*case[1:], case[1]], "many": case, "first": case[:2]}
    dates = {"last": "2026-01-03", "many": "2026-01-02", "first": "2026-01-01"}
    found = [{**record, "run": name, "date": dates[name]} for name, members in runs.items() for record in members]
    ((_, chosen),) = records.by_case(found).items()
    assert [(record["peer"], record["run"]) for record in chosen] == [("fusedopt-cpu", "last"), ("optimi", "last")]
    assert [record["run"] for record in records.runs_of(found)] == list(runs)


SECOND_LINES = {
    "no JSON": ("a step 3.5 ms", "no JSON: Expecting value"),
    "half a line": ('{"schema": 1, "date"', "no JSON: Expecting"),
    "another schema": (json.dumps({**CANNED[0], "schema": 99}), "the record has schema 99, this program reads 1"),
    "no object": ("[1, 2]", "no record of this benchmark: it has no schema"),
    "another program's": ('{"step": 3}', "no record of this benchmark: it has no schema"),
    "no step": (
        '{"schema": 1, "model": "charlm"}',
        "no step record: it has no date, commit, versions, machine, workload",
    ),
    "a part of a phase": ('{"schema": 1, "kind": "phase", "date": ""}', "no phase record: it has no commit"),
}


@pytest.mark.parametrize("what", SECOND_LINES)
def test_a_line_that_is_no_record_is_refused_by_file_and_number(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, message = SECOND_LINES[what]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(CANNED[0]) + "\n" + line + "\n")
    assert main(["report", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert f"python -m bench: {path}, line 2: {message}" in capsys.readouterr().err


def test_what_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"x\.jsonl is no text"):
        records.read([path])


def test_records_of_other_kinds_lie_beside_without_being_read(tmp_path: Path) -> None:
    records.write(CANNED, tmp_path / "run.jsonl")
    quality = records.write([{**records.head("cpu", "quality"), "model": "charlm"}], tmp_path / "quality.jsonl")
    assert len(records.read([tmp_path])) == len(CANNED)
    assert len(records.read([tmp_path], "quality")) == 1
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    with pytest.raises(ValueError, match=r"no step records in .*, only quality"):
        records.read([quality])


@pytest.mark.parametrize("keep", [True, False])
def test_no_run_takes_the_name_of_another(keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "ELSEWHERE", tmp_path / "elsewhere")
    names = []
    for suffix in (".jsonl", ".png", ".jsonl"):
        stem = records.default_stem("cpu", "main", keep)
        records.write([], stem.with_suffix(suffix))
        names.append(stem.name[10:])
    assert names == ["-main", "-main-2", "-main-3"]
    assert records.default_stem("cpu", "main-2", keep).name[10:] == "-main-2-2"
    assert (stem.parent == tmp_path / "elsewhere") == (not keep)


@pytest.mark.parametrize(
    ("words", "kept"), [(["--suite", "main"], True), (["--quick"], False), (["--workload", "2x2"], False)]
)
def test_only_whole_runs_of_suites_go_to_the_kept_results(
    words: list[str], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr(records, "ELSEWHERE", tmp_path)
    monkeypatch.setattr(commands, "measure", lambda *given: written.append(given[4]) or CANNED)
    monkeypatch.setattr(commands, "show_all", lambda found, stem: [])
    assert main([*words, "--device", "cpu"]) == 0
    assert records.RESULTS in written[0].parents or not kept
    assert tmp_path in written[0].parents or kept


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00385, "3.85 ms"), (2.0, "2.00 s"), (1.2e-4, "120 µs"), (5e-7, "0.50 µs"), (None, "–")],
)
def test_times_are_worded_with_a_fitting_unit(value: float | None, text: str) -> None:
    assert present.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1, "1"), (1.5, "1.5"), (10, "10"), (12.5, "12.5"), (100, "100"), (1000, "1,000"), (12000, "12,000")],
)
def test_launches_are_worded_as_whole_numbers_where_they_are(value: float, text: str) -> None:
    assert present.count(value) == text
    record = next(record for record in CANNED if record["status"] == "ok")
    assert present.cells({**record, "launches": value})[present.HEADINGS.index("launches")] == text


# ---- the model and the traces -----------------------------------------------------------------------------


def test_the_roofline_predicts_28_bytes_an_element() -> None:
    bandwidth = roofline.MACHINES["H100 SXM"].bandwidth
    moved = roofline.bytes_per_step(workloads.load("gpt2-1.5b"), "adamw", "float32")
    seconds = roofline.predict(moved, bandwidth)
    assert seconds == pytest.approx(28 * 1_557_611_200 / (bandwidth * roofline.EFFICIENCY), rel=1e-3)
    assert roofline.predict(0, bandwidth, launches=3) == pytest.approx(3 * roofline.LAUNCH_S)
    with pytest.raises(ValueError, match="positive"):
        roofline.predict(1, 0)


def test_the_roofline_is_held_against_fused_results_only() -> None:
    held = roofline.hold_against(CANNED)
    assert held
    assert {item.record["peer"] for item in held} == {"fusedopt-cpu"}
    assert all(
        item.predicted == pytest.approx(item.record["bytes_moved"] / item.record["roof_bytes_per_s"]) for item in held
    )


def test_kernels_are_counted_inside_windows_only() -> None:
    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("user_annotation", trace.WINDOW, 100, 50),
        event("user_annotation", trace.WINDOW, 300, 50),
        event("gpu_memset", "flush", 90, 5),
        event("kernel", "adamw", 110, 8),
        event("kernel", "adamw", 310, 10),
        event("kernel", "step", 320, 2),
        event("gpu_memcpy", "copy", 125, 4),
        event("kernel", "outside", 200, 99),
    ]
    found = trace.read_kernels(events)
    assert found.launches == 1.5
    assert found.copies == 0.5
    assert found.seconds == pytest.approx(12e-6)
    assert list(found.by_name) == ["adamw", "step"]
    with pytest.raises(ValueError, match="annotation"):
        trace.read_kernels([])


def test_ncus_counters_are_read_with_their_units() -> None:
    output = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","dram__bytes_read.sum","launch__registers_per_thread"\n'
        '"","","Mbyte","register/thread"\n'
        '"0","adamw_kernel","1,992.11","45"\n'
    )
    (kernel,) = ncu.parse(output)
    assert kernel.name == "adamw_kernel"
    assert kernel.values == {
        "dram__bytes_read.sum": "1,992.11 Mbyte",
        "launch__registers_per_thread": "45 register/thread",
    }
    assert ncu.parse("==ERROR== no permission") == []


STREAMS_PROGRAM = """
import sys, torch
from triton.runtime.interpreter import interpreter_builder as builder
from bench.roofs import SameStreams

moved = []
for name in ("create_masked_load", "create_masked_store", "create_load", "create_store"):
    def counted(*args, inner=getattr(builder, name), **kwargs):
        moved.append(inner)
        return inner(*args, **kwargs)
    setattr(builder, name, counted)
states = int(sys.argv[1])
roof = SameStreams(states, [torch.ones(7) for _ in range(4)])
roof.step()
print(roof.streams, len(moved), *(int(buffer.sum()) for buffer in roof.buffers))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.parametrize(("states", "sums"), [(1, (14, 7, 14, 7)), (2, (14, 7, 14, 14))])
def test_the_stream_kernel_moves_the_streams_that_are_counted(states: int, sums: tuple[int, ...]) -> None:
    """One program of it in Triton's interpreter: each load and store moves a block of one stream, once."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", STREAMS_PROGRAM, str(states)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    streams = 3 + 2 * states
    assert tuple(map(int, done.stdout.split())) == (streams, streams, *sums)


def test_the_stream_kernel_refuses_what_it_cannot_move() -> None:
    with pytest.raises(ValueError, match="states=3"):
        stream_kernel.launch(3, [torch.zeros(4)] * 5)


# ---- commands ---------------------------------------------------------------------------------------------


def test_a_run_writes_table_json_picture_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--workload",
        "4x16",
        "--optimizer",
        "adamw",
        "--peer",
        "torch-loop",
        BASELINE,
        "--threads",
        "1",
        "--quick",
    ]
    assert main([*words, "--device", "cpu", "--budget", "0.01", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "torch-loop" in printed
    assert "× torch fused" in printed
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".html", ".jsonl", ".png"]
    found = records.read([tmp_path / "bench-custom.jsonl"])
    assert [record["status"] for record in found] == ["ok", "ok"]
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "report.html").exists()


BAD_INPUT = {
    "an unknown workload": ["--workload", "nonsense"],
    "an unknown peer": ["--workload", "2x2", "--peer", "nobody"],
    "both ways to choose": ["--workload", "2x2", "--suite", "main"],
    "an option that a suite fixes": ["--dtype", "bfloat16"],
    "a bad thread count": ["--workload", "2x2", "--threads", "0"],
    "no budget": ["--workload", "2x2", "--budget", "0"],
    "a budget that is no number": ["--workload", "2x2", "--budget", "nan"],
    "a workload without elements": ["--workload", "5x0"],
    "no peer that is here": ["--workload", "2x2", "--peer", "apex"],
    "an unknown GPU": ["roofline", "--gpu", "abacus"],
    "no steps to profile": ["profile", "--workload", "2x2", "--steps", "0"],
    "no steps to train": ["train", "--steps", "0"],
    "nothing that fits": ["--workload", "1x999999999999", "--threads", "1"],
    "no results for the roofline": ["roofline", "/dev/null/x"],
    "too much to profile": ["profile", "--workload", "1x999999999999"],
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_ends_with_a_message_and_exit_code_2(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if BAD_INPUT[what][0] == "roofline" else ["--device", "cpu"]
    assert main([*BAD_INPUT[what], *device]) == 2
    assert capsys.readouterr().err.startswith("python -m bench: ")


@pytest.mark.parametrize("command", ["run", "report .", "profile --workload 2x2", "train"])
def test_a_folder_that_can_not_be_made_is_said_before_anything_is_measured(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([*command.split(), "--out", "/dev/null/x"])
    assert left.value.code == 2
    assert "no folder can be made at /dev/null/x" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["list", "--device", "cpu"], ["roofline"]])
def test_commands_that_only_show_something_work(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 0
    assert "gpt2-124m" in capsys.readouterr().out


def test_a_profile_shows_python_time_and_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "profile",
        "--workload",
        "3x16",
        "--peer",
        BASELINE,
        "--device",
        "cpu",
        "--steps",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "_fused_adamw_" in printed
    assert "GB/s" in printed
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["traceEvents"]


def test_training_reports_time_to_a_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "VALIDATION", 32)
    results = train.train_in_turns(
        replace(train.PLANS["digits"], eval_every=1),
        "cpu",
        2,
        {"torch fused": torch.optim.AdamW, "fusedopt": torch.optim.AdamW},
        SILENT,
    )
    rows = train.summarise(results, goal=1e9)
    assert rows["fusedopt"]["steps_to_goal"] == 0
    assert train.summarise(results, goal=0.0)["fusedopt"]["seconds_to_goal"] is None
    assert results["fusedopt"].losses == results["torch fused"].losses
    assert train.draw({"digits": (1.0, results, rows)}) is not None
    assert SimpleNamespace(**rows["fusedopt"]).optimizer_share > 0


# ---- on a machine with a GPU ------------------------------------------------------------------------------

MAKEFILE = Path(__file__).parent.parent / "Makefile"
GPU_PARTS = re.findall(r"^GPU_PARTS \?= (.*)$", MAKEFILE.read_text(), re.MULTILINE)[0].split()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize("part", GPU_PARTS)
def test_every_part_for_a_gpu_ends_within_ten_minutes_and_is_interrupted_not_killed(part: str) -> None:
    """At an interrupt pytest writes its summary and its XML; when it is terminated it writes neither."""
    command = ["make", "-n", f"gpu-{part}", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTEST"))}
    done = subprocess.run(command, cwd=MAKEFILE.parent, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if sys.executable in line]
    assert lines
    for line in lines:
        limit = re.search(r"\btimeout -s INT -k (\d+) (\d+) ", line)
        assert limit, line
        assert int(limit[1]) + int(limit[2]) <= 600
        spreads = " -n " in line
        assert spreads == (part == "tests" and importlib.util.find_spec("xdist") is not None), line


def test_an_interrupted_run_says_so_and_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(commands.COMMANDS, "list", interrupted)
    assert main(["list", "--device", "cpu"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: 17\n", "AMD EPYC family 25 model 17"),
        (
            "model name\t: AMD EPYC 9654 96-Core Processor\ncpu family\t: 25\nmodel\t\t: 17\n",
            "AMD EPYC 9654 96-Core Processor",
        ),
        ("model name\t: Virtual\n", "Virtual"),
    ],
)
def test_a_processor_is_named_so_that_two_kinds_have_two_names(told: str, name: str, tmp_path: Path) -> None:
    table = tmp_path / "cpuinfo"
    table.write_text(told)
    assert records.processor(str(table)) == name
