"""Why a step takes what it takes: launches, time by kernel, bandwidth, Python time, and a Chrome trace."""

from __future__ import annotations

import argparse
import cProfile
import pstats
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from bench import memory, ncu, present, timing, trace
from bench.case import Case
from bench.contender import Contender, Gradients
from bench.peers import PEERS, Peer, is_ours
from bench.roofs import bytes_of_buffers, roofs_for
from bench.suites import thread_counts
from bench.timing import Rules

ROWS = 15
"""Rows of a table of functions or kernels."""

TRACED_STEPS = 3


@dataclass(frozen=True)
class HostRow:
    """One function of the host's time: calls and seconds per step, its own and with what it calls."""

    function: str
    calls: float
    own: float
    total: float


def profile(options: argparse.Namespace, console: Console) -> int:
    """Profiles one case for each chosen peer."""
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    threads = thread_counts(options.device, [options.threads])[0]
    bound = all(group.dtype for group in Case(options.workload, options.optimizer).shapes.groups)
    dtype = "mixed" if bound else options.dtype
    case = Case(options.workload, options.optimizer, dtype, options.device, threads, options.gradients)
    peers = _peers(options.peer, case)
    roof_bytes = bytes_of_buffers(case.device, case.optimizer)
    if memory.residency(case, 1, roof_bytes, memory.available_bytes(case.device)) is None:
        raise ValueError(f"{case.label()}: does not fit this machine's memory")
    torch.set_num_threads(threads)
    for peer in peers:
        console.rule(f"[bold]{peer.name}[/]: {case.label()}", align="left")
        _profile_peer(peer, case, options, console)
    return 0


def _peers(names: Sequence[str] | None, case: Case) -> list[Peer]:
    """The chosen peers, or fusedopt's backends that are here.

    Raises:
        ValueError: a peer is unknown or cannot run the case, or there is none.
    """
    for name in names or ():
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}: expected some of {', '.join(PEERS)}")
    wanted = [PEERS[name] for name in names] if names else [peer for peer in PEERS.values() if is_ours(peer.name)]
    facts = (case.optimizer, case.gradients, case.device, case.shapes.elements)
    reasons = {peer.name: peer.missing(case.device) or peer.unfit(*facts) for peer in wanted}
    here = [peer for peer in wanted if reasons[peer.name] is None]
    if (names and len(here) < len(wanted)) or not here:
        raise ValueError(
            "cannot profile " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
        )
    return here


def _profile_peer(peer: Peer, case: Case, options: argparse.Namespace, console: Console) -> None:
    contender = Contender(peer, case, Gradients(case), resident=True)
    with contender.present():
        _show_speed(contender, case, console)
        if case.device == "cuda":
            _show_kernels(contender, options.steps, console)
        else:
            _show_launches(contender, console)
        console.print(host_table(host_rows(contender, options.steps)))
        path = options.out / f"{case.workload}-{case.optimizer}-{peer.name}.trace.json"
        write_trace(contender, case.device, path)
        console.print(f"wrote {path} (open in chrome://tracing or ui.perfetto.dev)", soft_wrap=True, highlight=False)
    if case.device == "cuda" and not options.no_ncu:
        _show_counters(case, peer, console)


def _show_speed(contender: Contender, case: Case, console: Console) -> None:
    """Time, and bandwidth beside the roof, by the benchmark's own rules."""
    roofs = roofs_for(case.device, case.optimizer)
    rules = Rules(budget_s=3.0, min_rounds=5)
    measured = timing.run_rounds([contender, *roofs], timing.clock_for(case.device), rules, None)
    mine = measured[contender.name]
    seconds = timing.spread(list(mine.device.values()))
    host = timing.spread(list(mine.host.values()))
    console.print(
        f"a step {present.seconds(seconds.median)} ({present.relative_spread(vars(seconds))}),"
        f" host {present.seconds(host.median)}; moves {present.amount(case.bytes_moved)} at"
        f" {present.digits(case.bytes_moved / seconds.median / 1e9)} GB/s"
    )
    for roof in roofs:
        rate = roof.bytes / timing.spread(list(measured[roof.name].device.values())).median
        console.print(f"  {roof.name}: {present.digits(rate / 1e9)} GB/s")


def _show_launches(contender: Contender, console: Console) -> None:
    if contender.peer.launches is None:
        console.print("launches: this peer does not count them on a CPU")
        return
    before = contender.peer.launches()
    contender.prepare()
    contender.step()
    console.print(f"launches per step: {contender.peer.launches() - before}")


def _show_kernels(contender: Contender, steps: int, console: Console) -> None:
    kernels = trace.kernels_of(contender, steps)
    console.print(f"launches per step: {kernels.launches:g}, copies and sets: {kernels.copies:g}")
    shown = Table("kernel", "launches a step", "time a step", "share", title="Kernels (warm)", title_justify="left")
    for name, (launches, seconds) in list(kernels.by_name.items())[:ROWS]:
        shown.add_row(name[:100], f"{launches:g}", present.seconds(seconds), f"{seconds / kernels.seconds:.0%}")
    console.print(shown)


# ---- host -------------------------------------------------------------------------------------------------


def host_rows(contender: Contender, steps: int) -> list[HostRow]:
    """Where Python time goes, per step, most own time first. The profiler itself adds to every call."""
    profiler = cProfile.Profile()
    for _ in range(steps):
        contender.prepare()
        profiler.enable()
        contender.step()
        profiler.disable()
    if contender.case.device == "cuda":
        torch.cuda.synchronize()
    stats: dict[Any, Any] = vars(pstats.Stats(profiler))["stats"]
    rows = [
        HostRow(_function_name(*where), calls / steps, own / steps, total / steps)
        for where, (_, calls, own, total, _) in stats.items()
        if "_lsprof" not in where[2]
    ]
    return sorted(rows, key=lambda row: row.own, reverse=True)


def _function_name(file: str, line: int, function: str) -> str:
    """`folder/file.py:12 function`, or the built-in's own name."""
    if file == "~":
        return function
    path = Path(file)
    return f"{path.parent.name}/{path.name}:{line} {function}"


def host_table(rows: Sequence[HostRow]) -> Table:
    """The longest rows as a table."""
    whole = sum(row.own for row in rows)
    shown = Table(title=f"Host time under cProfile, {present.seconds(whole)} a step", title_justify="left")
    for heading in ("function", "calls a step", "own", "share", "with callees"):
        shown.add_column(heading, justify="left" if heading == "function" else "right")
    for row in rows[:ROWS]:
        share = row.own / whole if whole else 0.0
        shown.add_row(
            row.function,
            f"{row.calls:g}",
            present.seconds(row.own),
            f"{share:.0%}",
            present.seconds(row.total),
        )
    return shown


def write_trace(contender: Contender, device: str, path: Path) -> Path:
    """Writes a Chrome trace of a few steps, with Python stacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch_profile(activities=activities, with_stack=True) as profiler:
        for _ in range(TRACED_STEPS):
            contender.prepare()
            with record_function("step"):
                contender.step()
                if device == "cuda":
                    torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return path


def _show_counters(case: Case, peer: Peer, console: Console) -> None:
    if not ncu.installed():
        console.print("Nsight Compute (ncu) is not installed: no hardware counters")
        return
    try:
        kernels = ncu.measure(case, peer)
    except ncu.NcuError as error:
        console.print(f"Nsight Compute gave no counters: {error}")
        return
    shown = Table("kernel", *ncu.METRICS.values(), title="Hardware counters (ncu)", title_justify="left")
    for kernel in kernels:
        shown.add_row(kernel.name[:80], *(kernel.values.get(metric, present.MISSING) for metric in ncu.METRICS))
    console.print(shown)
