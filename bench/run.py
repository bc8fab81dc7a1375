"""Runs cases: builds the contenders, checks them, times them in turns, and makes the records."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import memory, records, timing, trace
from bench.case import Case
from bench.check import Accuracy, WorkloadCheck
from bench.contender import Contender, Gradients
from bench.peers import BASELINE, REFERENCE, Peer, is_ours
from bench.records import Record
from bench.roofs import Roof, best_by_round, bytes_of_buffers, roofs_for
from bench.timing import Clock, Measured, Rules

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the case that is done."""


class Runner:
    """Runs cases one after the other, keeping what they share: the clock and the accuracy of each peer.

    Args:
        rules: How long and how often to measure.
        device: `cpu` or `cuda`.
    """

    def __init__(self, rules: Rules, device: str) -> None:
        self.rules = rules
        self.device = device
        self.accuracy = Accuracy()
        self.clock: Clock = timing.clock_for(device)
        self.captures = device == "cuda"

    def run(self, case: Case, peers: Sequence[Peer], progress: Progress = lambda what, share: None) -> list[Record]:
        """One record per peer, right, wrong, failed or skipped."""
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads)
        try:
            return _CaseRun(self, case, progress).records(peers)
        finally:
            torch.set_num_threads(threads)
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()


class _CaseRun:
    """One case while it runs."""

    def __init__(self, runner: Runner, case: Case, progress: Progress) -> None:
        self.runner = runner
        self.case = case
        self.progress = progress
        self.found: dict[str, Record] = {}

    def records(self, peers: Sequence[Peer]) -> list[Record]:
        """Checks, times, and describes every peer."""
        case = self.case
        elements = case.shapes.elements
        reasons = {peer.name: peer.unfit(case.optimizer, case.gradients, case.device, elements) for peer in peers}
        fit = [peer for peer in peers if reasons[peer.name] is None]
        resident = memory.residency(
            case, len(fit), bytes_of_buffers(case.device, case.optimizer), memory.available_bytes(case.device)
        )
        if resident is None:
            reasons.update((peer.name, "does not fit this machine's memory") for peer in fit)
            fit = []
        for peer in peers:
            reason = reasons[peer.name]
            if reason is not None:
                self._note(peer, status="skipped", reason=reason)
        if fit:
            self._measure(fit, bool(resident))
        head = {**records.head(case.device), **records.for_case(case), "baseline": BASELINE}
        return [{**head, **self.found[peer.name]} for peer in peers]

    def _note(self, peer: Peer, **fields: Any) -> None:
        self.found.setdefault(peer.name, {"peer": peer.name}).update(fields)

    # ---- before timing

    def _measure(self, peers: Sequence[Peer], resident: bool) -> None:
        gradients = Gradients(self.case)
        check = WorkloadCheck(self.case)
        contenders = []
        for index, peer in enumerate(peers):
            self.progress(f"checking {peer.name}", 0.3 * index / len(peers))
            contender = Contender(peer, self.case, gradients, resident)
            if self._is_right(contender, check):
                contenders.append(contender)
            else:
                contender.free()
        if not contenders:
            return
        roofs = roofs_for(self.case.device, self.case.optimizer)
        self._time(contenders, roofs)

    def _is_right(self, contender: Contender, check: WorkloadCheck) -> bool:
        """Checks a contender and notes the outcome; a peer that raises is noted as failed."""
        peer, case = contender.peer, self.case
        dtypes = dict.fromkeys(group.torch_dtype(case.dtype) for group in case.shapes.groups)
        try:
            contender.build()
            on_workload = check.run(contender)
            after_100 = {
                f"after 100 steps in {str(dtype).removeprefix('torch.')}": self.runner.accuracy.run(
                    peer, case.optimizer, dtype, case.device
                )
                for dtype in dtypes
            }
            self._note(peer, **self._costs(contender))
        except Exception as error:  # whatever a peer raises is its result
            self._note(peer, status="failed", reason=f"{type(error).__name__}: {error}".splitlines()[0][:300])
            return False
        if not contender.resident:
            contender.free()
        worst = max(check.error for check in after_100.values())
        self._note(peer, ulps_after_100=_finite(worst), note=on_workload.note)
        checks = {"on this workload": on_workload, **after_100}
        wrong = next((f"{where} {check.fault}" for where, check in checks.items() if not check.right), None)
        self._note(peer, status="wrong" if wrong else "ok", reason=wrong)
        return wrong is None

    def _costs(self, contender: Contender) -> Record:
        """Launches, state and peak memory of a step of a contender that is in memory."""
        device, peer = self.case.device, contender.peer
        found: Record = {
            "resident": contender.resident,
            "state_bytes": memory.state_bytes(contender.optimizer),
        }
        contender.prepare()
        before = peer.launches() if peer.launches else None
        found["peak_bytes"] = memory.peak_bytes(contender.step, device)
        if peer.launches and before is not None:
            found["launches"] = peer.launches() - before
        if device == "cuda":
            kernels = trace.kernels_of(contender, 3)
            found["launches"] = kernels.launches
            found["copies"] = kernels.copies
        return found

    # ---- timing

    def _time(self, contenders: Sequence[Contender], roofs: Sequence[Roof]) -> None:
        measured = timing.run_rounds(
            [*contenders, *roofs],
            self.runner.clock,
            self.runner.rules,
            BASELINE,
            lambda share: self.progress("timing", 0.3 + 0.7 * share),
        )
        roof = best_by_round(roofs, measured)
        names = [contender.name for contender in contenders]
        best = best_peer({name: measured[name] for name in names})
        for contender in contenders:
            self._note(contender.peer, **self._describe(contender, measured, roof, best))
        if self.case.gradients == "kept":
            self._replay([c for c in contenders if c.name != REFERENCE])

    def _describe(
        self, contender: Contender, measured: dict[str, Measured], roof: dict[int, float], best: str | None
    ) -> Record:
        mine = measured[contender.name]
        moved = self.case.bytes_moved
        found: Record = {
            "cache": "cold" if self.case.device == "cuda" else "as left by the step before",
            "kernel_durations": mine.by_kernels,
            "exposed_rounds": mine.exposed,
            "steps_per_block": mine.steps_per_block,
            "samples": [_short(seconds) for seconds in mine.device.values()],
            "seconds": asdict(timing.spread(list(mine.device.values()))),
            "host_seconds": asdict(timing.spread(list(mine.host.values()))),
            "roof_bytes_per_s": timing.spread(list(roof.values())).median if roof else None,
            "best_peer": best,
        }
        for field, against in (("ratio", BASELINE), ("ratio_to_best_peer", best)):
            if against in measured:
                found[field] = asdict(timing.bootstrap(timing.paired(measured[against].device, mine.device)))
                found[f"host_{field}"] = asdict(timing.bootstrap(timing.paired(measured[against].host, mine.host)))
                if field == "ratio":
                    found["ratio_samples"] = [_short(r) for r in timing.paired(measured[against].device, mine.device)]
        if roof and self.case.gradients != "first":
            rates = {round_: moved / seconds for round_, seconds in mine.device.items()}
            found["roof_share"] = asdict(timing.bootstrap(timing.paired(rates, roof)))
        return found

    def _replay(self, contenders: Sequence[Contender]) -> None:
        """Notes the slope over replays of fusedopt's steps, or why one cannot be captured.

        After a capture that failed there are no more: it may have left the device in a state that spoils what
        follows. torch fused has a graph as a peer of its own.
        """
        for contender in contenders:
            if not self.runner.captures or not is_ours(contender.name):
                continue
            found: Record = {"graph_replay_seconds": None}
            with contender.present():
                try:
                    found["graph_replay_seconds"] = timing.graph_replay_seconds(contender.step)
                except Exception as error:  # not being capturable is a result
                    found["not_captured"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    self.runner.captures = False
            self._note(contender.peer, **found)


def best_peer(measured: dict[str, Measured]) -> str | None:
    """The fastest contender that is not fusedopt, by median device time."""
    times = {name: timing.spread(list(m.device.values())).median for name, m in measured.items() if not is_ours(name)}
    return min(times, key=times.__getitem__) if times else None


def _short(value: float) -> float:
    """Five significant digits: files stay small, and no measurement has more."""
    return float(f"{value:.5g}")


def _finite(value: float) -> float | None:
    return value if value < float("inf") else None
