"""Every timing rule of the benchmark. Nothing else in this package reads a clock for a result.

`bench train` alone takes its times from the training loop of `examples/`, which has a clock for each part of a step.

The rules, each with its reason:

* **Rounds.** All contenders of a case are timed in turns, one block of steps each per round; the order
  rotates and is reversed every other round. A machine's speed drifts by tens of percent within minutes, so
  only times of the same round are compared.
* **Ratios** are medians over the rounds of the paired ratio, with a bootstrap interval. A tie is at least
0.98.
* **Times** are medians over the rounds, with the quartiles as spread.
* **Blocks** repeat a step until they last `block_s`; one untimed step before each block brings the
  contender's data back after the others had the caches, and before that nothing runs for `IDLE_S`: threads of
  the contender before go on looking for work for milliseconds, OpenMP's do, and would share the cores.
  Python's garbage collector is off inside a block, as in `timeit`.
* **Warm-up** steps come first, most of them in the check: state appears in the first step, and just-in-time
  compilers compile.
* **Slow contenders** take part in fewer rounds, and the table says in how many each was.
* **Roofs** (see `roofs.py`) are contenders like any other, so they are measured in the same rounds.
* **Gradients** are *kept* (the same tensors each step), *fresh* (new tensors each step, made by autograd and
  not yet seen by Python, as after `zero_grad()` and `backward()`), or *toggled* (half of them are None in
  every other step). Making them is not timed. *first* times construction and first step of a new optimizer
  instead.
* **On a GPU** host time is what `step()` takes to return with an idle device. Device time is the span between
  two events with the launches queued behind a spinning kernel, so that a slow host does not show in it, and
  with the L2 cache flushed before (cold). The spin is counted in clock cycles of a device that was kept busy
  before: an idle one is clocked several times lower. Below `small_device_s` an event is too coarse: there the
  sum of kernel durations from the profiler (CUPTI) is taken for every contender of the case. It is also taken
  for a contender that the spin cannot hide, and the table says so: one whose host is slower than the longest
  spin, that launches more than the device's queue holds, or that waits for the device. That it was hidden is
  not assumed but seen: the spin still runs when `step()` returns. The slope over graph replays is recorded
  beside it (warm).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from math import ceil, inf
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bench.trace import kernels_of

TIE = 0.98
"""A ratio from here up to 1 counts as a tie."""

IDLE_S = 0.01
"""Rest before a block."""

LONG_STEP_S = 0.5
"""A step that takes longer than this needs no more warm-up than the check has given it."""

GRADIENTS = ("kept", "fresh", "toggle", "first")
"""How gradients appear between two steps; `first` times construction and first step."""


@dataclass(frozen=True)
class Rules:
    """How long and how often to measure. Times in seconds.

    Attributes:
        budget_s: Time after which a case ends once every contender has had `min_rounds`.
        min_rounds: Fewest rounds; a slow contender is in its share of them, but never in fewer than two.
        max_rounds: Most rounds of a case.
        block_s: What a block of steps should last at least.
        max_steps: Most steps in a block.
        warmup: Untimed steps before the rounds, on top of those that checked the contender.
        slow_factor: A contender this much slower than the baseline sits out rounds in proportion.
        max_stride: A contender takes part at least in every so many rounds.
        small_device_s: Below this device time, kernel durations replace events.
    """

    budget_s: float = 8.0
    min_rounds: int = 7
    max_rounds: int = 40
    block_s: float = 0.02
    max_steps: int = 50
    warmup: int = 1
    slow_factor: float = 3.0
    max_stride: int = 6
    small_device_s: float = 100e-6

    @staticmethod
    def on(device: str) -> Rules:
        """The rules for a device type: a GPU's times vary less, and its profiler takes long to start."""
        return Rules(budget_s=5.0, min_rounds=5, max_steps=20) if device == "cuda" else Rules()

    def exactly(self, rounds: int) -> Rules:
        """The same rules with so many rounds, and everyone in each: for programs that compare a few sides."""
        return replace(self, budget_s=0.0, min_rounds=rounds, max_rounds=rounds, slow_factor=inf)

    def quick(self) -> Rules:
        """The same rules with fewer rounds, for a first look: intervals get wide."""
        return replace(self, budget_s=1.5, min_rounds=3, max_rounds=9, block_s=0.01)


# ---- statistics -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A median with what lies around it: quartiles for times, a bootstrap interval for ratios."""

    median: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("spread of no values")
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Spread(float(median), float(low), float(high), len(values))


def bootstrap(values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Spread:
    """Median with the percentile bootstrap interval of the median; the same values give the same interval.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("bootstrap of no values")
    medians = resampled_medians(values, resamples, seed)
    low, high = np.quantile(medians, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Spread(float(np.median(values)), float(low), float(high), len(values))


def resampled_medians(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """Medians of `resamples` draws with replacement, each as long as `values`."""
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(data), size=(resamples, len(data)))
    return np.asarray(np.median(data[draws], axis=1))


def paired(numerator: dict[int, float], denominator: dict[int, float]) -> list[float]:
    """`numerator / denominator` for each round in which both took part."""
    return [value / denominator[round_] for round_, value in numerator.items() if round_ in denominator]


def verdict(ratio: Spread) -> str:
    """`faster`, `tie` or `slower` for a ratio of speeds: beyond its interval, and beyond a tie."""
    if ratio.low > 1:
        return "faster"
    return "slower" if ratio.high < TIE else "tie"


# ---- clocks -----------------------------------------------------------------------------------------------


class Timed(Protocol):
    """What can be timed."""

    @property
    def name(self) -> str:
        """Unique in its case."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` has to run before every step."""

    def present(self) -> AbstractContextManager[None]:
        """Holds the tensors in memory while it is entered."""

    def prepare(self) -> None:
        """Untimed work before a step."""

    def step(self) -> None:
        """The work to time."""


@dataclass(frozen=True)
class Sample:
    """Seconds of one step, averaged over a block: on the device, and on the host until the call returned.

    Attributes:
        seconds: On the device.
        host_seconds: On the host.
        hidden: Whether no time that the device waited for the host is in `seconds`.
    """

    seconds: float
    host_seconds: float
    hidden: bool = True


class Clock(Protocol):
    """Times blocks of steps on one kind of device."""

    @property
    def sums_kernels(self) -> bool:
        """Whether it can take the sum of kernel durations for device time."""

    def begin(self) -> None:
        """Called before the contenders of a case are timed."""

    def measure(self, timed: Timed, steps: int, by_kernels: bool) -> Sample:
        """Average seconds of `steps` steps; `by_kernels`: device time is the sum of kernel durations."""


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _host_seconds(timed: Timed, steps: int, settle: Callable[[], None] = lambda: None) -> float:
    """Seconds per step by the machine's clock; `settle` runs untimed before each step."""
    total = 0.0
    with _no_garbage_collection():
        for _ in range(steps):
            timed.prepare()
            settle()
            start = time.perf_counter()
            timed.step()
            total += time.perf_counter() - start
    return total / steps


class CpuClock:
    """Wall time. A CPU step has ended when it returns, so device and host time are the same."""

    sums_kernels = False

    def begin(self) -> None:
        """Nothing to do."""

    def measure(self, timed: Timed, steps: int, by_kernels: bool = False) -> Sample:
        """Average seconds of `steps` steps; in one piece where nothing has to be prepared between them."""
        if timed.prepares:
            seconds = _host_seconds(timed, steps)
        else:
            with _no_garbage_collection():
                start = time.perf_counter()
                for _ in range(steps):
                    timed.step()
                seconds = (time.perf_counter() - start) / steps
        return Sample(seconds, seconds)


def event_seconds(work: Callable[[], None]) -> float:
    """Device seconds between two events around `work`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


LONGEST_SPIN_S = 0.1
"""What takes the host longer is not worth hiding: the device would spin longer than it works."""


def hidden_span(span: Callable[[float], tuple[float, bool]], host_s: float, tries: int = 3) -> tuple[float, bool]:
    """Device seconds of a step that is queued behind a spin, and whether the spin outlasted the host's work.

    Args:
        span: Given the seconds to spin, steps once and returns both.
        host_s: What the host needs, as measured; now and then it is held up and needs more.
        tries: How often to try, with longer and longer spins.
    """
    spin_s = 2 * host_s + 50e-6
    for _ in range(tries):
        seconds, hidden = span(min(spin_s, LONGEST_SPIN_S))
        if hidden or spin_s >= LONGEST_SPIN_S:
            break
        spin_s *= 4
    return seconds, hidden


class CudaClock:
    """Device time by events or by kernel durations; host time beside it."""

    sums_kernels = True

    BUSY_S = 0.5
    """How long the device is kept busy before its clock rate is taken."""

    TRIES = 3
    """How many traces may be taken of a block until the profiler has seen a kernel in one."""

    def __init__(self) -> None:
        l2_bytes = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0)
        self._flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device="cuda")
        self._cycles_per_s = 1e9

    def begin(self) -> None:
        """Brings the device to the clock rate that it has under load, and finds how long a cycle lasts there."""
        start = time.perf_counter()
        while time.perf_counter() - start < self.BUSY_S:
            for _ in range(20):
                self.flush()
            torch.cuda.synchronize()
        cycles = 10_000_000
        self._cycles_per_s = max(cycles / event_seconds(lambda: torch.cuda._sleep(cycles)) for _ in range(3))

    def flush(self) -> None:
        """Overwrites the L2 cache."""
        self._flush.zero_()

    def measure(self, timed: Timed, steps: int, by_kernels: bool) -> Sample:
        """Average host seconds of `steps` steps, then device seconds of as many more."""
        host = _host_seconds(timed, steps, torch.cuda.synchronize)
        torch.cuda.synchronize()
        if by_kernels:
            return Sample(self._kernel_seconds(timed, steps), host)
        with _no_garbage_collection():
            spans = [hidden_span(lambda spin_s: self._span(timed, spin_s), host) for _ in range(steps)]
        return Sample(sum(seconds for seconds, _ in spans) / steps, host, all(hidden for _, hidden in spans))

    def _kernel_seconds(self, timed: Timed, steps: int) -> float:
        for _ in range(self.TRIES):
            seconds = kernels_of(timed, steps, self.flush).seconds
            if seconds > 0:
                return seconds
        raise RuntimeError(
            f"{timed.name}: the profiler saw no kernel in {self.TRIES} traces; is CUPTI in use elsewhere?"
        )

    def _span(self, timed: Timed, spin_s: float) -> tuple[float, bool]:
        """Seconds between events around a step behind a spin, and whether the spin still ran when it was queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        timed.prepare()
        self.flush()
        torch.cuda._sleep(int(spin_s * self._cycles_per_s))
        start.record()
        timed.step()
        hidden = not start.query()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3, hidden


def clock_for(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()


def graph_replay_seconds(step: Callable[[], None], replays: int = 20) -> float:
    """Device seconds of one replay of a captured step, warm: the slope from `replays` to twice as many.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()

    def replay(times: int) -> None:
        for _ in range(times):
            graph.replay()

    def seconds(times: int) -> float:
        torch.cuda.synchronize()
        return event_seconds(lambda: replay(times))

    seconds(replays)
    slopes = [(seconds(2 * replays) - seconds(replays)) / replays for _ in range(7)]
    return spread(slopes).median


# ---- rounds -----------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What the rounds gave for one contender.

    Attributes:
        steps_per_block: Steps that each time is the mean of.
        stride: It is in every so many rounds.
        by_kernels: Whether its device time is the sum of kernel durations.
        exposed: Rounds in which its device time holds time that the device waited for the host.
        device: Seconds of a step on the device, by number of round.
        host: Seconds of a step on the host, by number of round.
    """

    steps_per_block: int
    stride: int
    by_kernels: bool = False
    exposed: int = 0
    device: dict[int, float] = field(default_factory=dict)
    host: dict[int, float] = field(default_factory=dict)

    def needed(self, rules: Rules) -> int:
        """Fewest rounds this contender has to be in."""
        return max(min(2, rules.min_rounds), ceil(rules.min_rounds / self.stride))


def run_rounds(
    contenders: Sequence[Timed],
    clock: Clock,
    rules: Rules,
    baseline: str | None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Measured]:
    """Times all contenders in turns.

    Args:
        contenders: What to time; names must be unique.
        clock: Times a block.
        rules: How long and how often.
        baseline: Name of the contender that decides who is slow; the first one where None or absent.
        on_progress: Called with the share of the work that is done, from 0 to 1.

    Returns:
        Times by contender.
    """
    if not contenders:
        return {}
    clock.begin()
    plans = _plan(contenders, clock, rules, baseline)
    rounds_needed = max(1 + (plan.needed(rules) - 1) * plan.stride for plan in plans.values())
    start = time.perf_counter()
    rounds, elapsed = 0, 0.0
    while rounds < rules.max_rounds and (elapsed < rules.budget_s or rounds < rounds_needed):
        for timed in _order(contenders, rounds):
            plan = plans[timed.name]
            if rounds % plan.stride == 0:
                _time_block(timed, clock, rounds, plan)
        rounds += 1
        elapsed = time.perf_counter() - start
        spent = elapsed / rules.budget_s if rules.budget_s else 1.0
        on_progress(min(1.0, max(rounds / rules.max_rounds, min(spent, rounds / rounds_needed))))
    on_progress(1.0)
    return plans


def _plan(contenders: Sequence[Timed], clock: Clock, rules: Rules, baseline: str | None) -> dict[str, Measured]:
    """Warms up those whose steps are short; chooses each one's steps per block and share of the rounds."""
    first: dict[str, Sample] = {}
    for timed in contenders:
        with timed.present():
            first[timed.name] = clock.measure(timed, 1, False)
            if first[timed.name].host_seconds < LONG_STEP_S:
                for _ in range(rules.warmup):
                    timed.prepare()
                    timed.step()
                first[timed.name] = clock.measure(timed, 1, False)
    by_kernels = told_by_kernels(first, rules) if clock.sums_kernels else set()
    longest = {name: max(sample.seconds, sample.host_seconds) for name, sample in first.items()}
    reference = longest.get(baseline or "", longest[contenders[0].name])
    return {
        name: Measured(
            steps_per_block=max(1, min(rules.max_steps, ceil(rules.block_s / seconds))),
            stride=max(1, min(rules.max_stride, ceil(seconds / (rules.slow_factor * reference)))),
            by_kernels=name in by_kernels,
        )
        for name, seconds in longest.items()
    }


def told_by_kernels(first: Mapping[str, Sample], rules: Rules) -> set[str]:
    """Contenders whose device time is the sum of kernel durations.

    All of them where an event is too coarse for the fastest, as only like is to be compared with like; else those
    whose host cannot be hidden.
    """
    if min(sample.seconds for sample in first.values()) < rules.small_device_s:
        return set(first)
    return {name for name, sample in first.items() if not sample.hidden}


def _order(contenders: Sequence[Timed], round_: int) -> list[Timed]:
    """The contenders' order in a round: rotated, and reversed every other round."""
    start = round_ % len(contenders)
    order = [*contenders[start:], *contenders[:start]]
    return order[::-1] if round_ % 2 else order


def _time_block(timed: Timed, clock: Clock, round_: int, plan: Measured) -> None:
    with timed.present():
        time.sleep(IDLE_S)
        if plan.steps_per_block > 1:
            timed.prepare()
            timed.step()
        sample = clock.measure(timed, plan.steps_per_block, plan.by_kernels)
    plan.device[round_] = sample.seconds
    plan.host[round_] = sample.host_seconds
    plan.exposed += not sample.hidden
