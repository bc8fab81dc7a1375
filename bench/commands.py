"""What each command of the command line does."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from bench import plots, present, records, report, roofline, table, workloads
from bench.case import Case
from bench.compare import compare
from bench.gate import gate
from bench.peers import PEERS, Peer
from bench.profile import profile
from bench.records import Record
from bench.run import Runner
from bench.script import PROGRAMS
from bench.suites import SUITES, Rows, cases_of, thread_counts
from bench.timing import Rules
from bench.train import train

Command = Callable[[argparse.Namespace, Console], int]


# ---- run --------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, console: Console) -> int:
    """Measures, prints a table per case and a summary, writes JSON lines, picture and report."""
    suites = options.suite or ([] if options.workload else ["main"])
    cases = cases_of(_rows(options, suites), options.device, thread_counts(options.device, options.threads))
    peers, absent = choose_peers(options.peer, options.device, suites)
    if not peers:
        raise ValueError("no peer to measure: " + "; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    for name, reason in absent.items():
        console.print(f"not here: {name}: {reason}", style="dim", highlight=False)
    label = "-".join(suites) or "custom"
    keep = bool(suites) and not options.quick
    stem = options.out / f"bench-{label}" if options.out else records.default_stem(options.device, label, keep)
    kept = stem.with_suffix(".jsonl")
    found = measure(cases, peers, _rules(options), options.device, kept, console)
    table.print_run(console, records.by_case(found))
    for path in (kept, *show_all(found, stem)):
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    if not any(record["status"] == "ok" for record in found):
        raise ValueError("nothing was measured: the table says why of each case")
    return 0


def _rows(options: argparse.Namespace, suites: Sequence[str]) -> list[Rows]:
    """The rows of the chosen suites, or those put together on the command line."""
    if options.workload and suites:
        raise ValueError("--workload and --suite exclude each other")
    if not options.workload:
        given = [name for name in ("optimizer", "dtype", "gradients") if getattr(options, name)]
        if given:
            raise ValueError(f"--{given[0]} needs --workload; a suite fixes it")
        chosen = list(SUITES) if "all" in suites else suites
        return [rows for name in chosen for rows in SUITES[name].rows]
    return [
        Rows(
            tuple(options.workload),
            tuple(options.optimizer or ("adamw", "sgd")),
            tuple(options.dtype or ("float32",)),
            tuple(options.gradients or ("kept",)),
        )
    ]


def _rules(options: argparse.Namespace) -> Rules:
    rules = Rules.on(options.device)
    if options.quick:
        rules = rules.quick()
    if options.budget is not None:
        if not 0 < options.budget < inf:
            raise ValueError(f"--budget must be a positive number of seconds, got {options.budget}")
        rules = replace(rules, budget_s=options.budget)
    return rules


def choose_peers(
    names: Sequence[str] | None, device: str, suites: Sequence[str] = ()
) -> tuple[list[Peer], dict[str, str]]:
    """Peers that can run on a device here, and why the others cannot.

    Args:
        names: Those asked for; None for the suites' own, or else all that need not be asked for.
        device: Device type.
        suites: Chosen suites; a peer takes part if any of them has it.

    Raises:
        ValueError: a name is unknown.
    """
    for name in names or ():
        if name not in PEERS:
            raise ValueError(f"unknown peer {name!r}: expected some of {', '.join(PEERS)}")
    absent: dict[str, str] = {}
    here = []
    for peer in PEERS.values():
        if names is not None and peer.name not in names:
            continue
        if names is None and not _invited(peer, suites):
            continue
        reason = peer.missing(device)
        if reason is None and names is None and device not in peer.default_devices:
            reason = f"takes long to compile on {device}; name it with --peer"
        if reason is None:
            here.append(peer)
        elif names is not None or device in peer.devices:
            absent[peer.name] = reason
    return here, absent


def _invited(peer: Peer, suites: Sequence[str]) -> bool:
    known = [SUITES[name] for name in suites if name in SUITES]
    return len(known) < len(suites) or not known or any(suite.invites(peer.name) for suite in known)


def measure(
    cases: Sequence[Case], peers: Sequence[Peer], rules: Rules, device: str, kept: Path, console: Console
) -> list[Record]:
    """Runs all cases under progress bars, printing each one's table and writing all so far when it is done."""
    runner = Runner(rules, device)
    found: list[Record] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("all cases", total=len(cases))
        current = progress.add_task("", total=1.0)
        for number, case in enumerate(cases):

            def show(what: str, share: float, label: str = case.label(), number: int = number) -> None:
                progress.update(current, description=f"{label}: {what}", completed=share)
                progress.update(overall, completed=number + share)

            show("starting", 0.0)
            done = runner.run(case, peers, show)
            found += done
            records.write(found, kept)
            progress.console.print(table.case_table(case, done, console.width))
            progress.update(overall, completed=number + 1)
    return found


def show_all(found: Sequence[Record], stem: Path) -> list[Path]:
    """Picture and report of a run, beside each other."""
    written = []
    figure = plots.picture(records.by_case(found))
    if figure:
        written.append(report.save_png(figure, stem.with_suffix(".png")))
    written.append(report.write(found, stem.with_suffix(".html")))
    return written


# ---- the others -------------------------------------------------------------------------------------------


def show_list(options: argparse.Namespace, console: Console) -> int:
    """Prints workloads, suites, peers, and the programs of their own."""
    sizes = Table(title="Workloads (and COUNTxNUMEL)", title_justify="left")
    for heading, justify in (("name", "left"), ("tensors", "right"), ("elements", "right"), ("what", "left")):
        sizes.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name in workloads.names():
        workload = workloads.load(name)
        sizes.add_row(name, f"{workload.tensors:,}", f"{workload.elements:,}", workload.description)
    suites = Table("name", "what", title="Suites", title_justify="left")
    for name, suite in SUITES.items():
        suites.add_row(name, suite.description)
    peers = Table("name", f"on {options.device}", title="Peers", title_justify="left")
    for peer in PEERS.values():
        peers.add_row(peer.name, peer.missing(options.device) or "here")
    programs = Table("command", "what", title="Programs beside these commands", title_justify="left")
    for name, what in PROGRAMS.items():
        programs.add_row(f"python -m bench.{name}", what)
    for shown in (sizes, suites, peers, programs):
        console.print(shown)
    return 0


def make_report(options: argparse.Namespace, console: Console) -> int:
    """Writes report and picture from results."""
    found = records.read(options.results)
    written = [report.write(found, options.out / "report.html", records.phases(options.results))]
    figure = plots.picture(records.by_case(found))
    if figure:
        written.append(report.save_png(figure, options.out / "report.png"))
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def show_roofline(options: argparse.Namespace, console: Console) -> int:
    """Prints predictions, and what measurements say of them."""
    names = options.gpu or list(roofline.MACHINES)
    rows = report.held_rows(records.read(options.results)) if options.results else []
    for name in names:
        if name not in roofline.MACHINES:
            raise ValueError(f"unknown GPU {name!r}: expected some of {', '.join(roofline.MACHINES)}")
    console.print(roofline_table([roofline.MACHINES[name] for name in names]))
    console.print(
        f"time = {roofline.LAUNCH_S * 1e6:.0f} µs + bytes / ({roofline.EFFICIENCY} × data-sheet bandwidth),"
        f" cold caches; assumptions in bench/roofline.py. {present.MISSING}: does not fit.",
        style="dim",
    )
    if rows:
        held = Table("case", "backend", "predicted", "measured", "measured ÷ predicted", "bandwidth from")
        for row in rows:
            held.add_row(*row)
        console.print(held)
    elif options.results:
        console.print("no timed result of fusedopt to hold the model against")
    return 0


def roofline_table(machines: Sequence[roofline.Machine]) -> Table:
    """Predicted times of every workload on some GPUs."""
    shown = Table(title="Predicted time of a step", title_justify="left")
    for heading in ("workload", "optimizer", "dtype"):
        shown.add_column(heading)
    for machine in machines:
        shown.add_column(machine.name, justify="right")
    for name in workloads.names():
        workload = workloads.load(name)
        for optimizer, dtype in (("adamw", "float32"), ("adamw", "bfloat16"), ("sgd", "float32")):
            moved = roofline.bytes_per_step(workload, optimizer, dtype)
            cells = [
                present.seconds(roofline.predict(moved, m.bandwidth))
                if roofline.fits(workload, optimizer, dtype, m)
                else present.MISSING
                for m in machines
            ]
            shown.add_row(name, optimizer, dtype, *cells)
    return shown


def compare_runs(options: argparse.Namespace, console: Console) -> int:
    """Prints what changed; 1 if something got slower."""
    return compare(records.read([options.old]), records.read([options.new]), options.tolerance, console)


COMMANDS: dict[str, Command] = {
    "run": run,
    "list": show_list,
    "report": make_report,
    "roofline": show_roofline,
    "compare": compare_runs,
    "gate": lambda options, console: gate(options.device, options.backend or options.device, console),
    "profile": lambda options, console: profile(options, console),
    "train": lambda options, console: train(options, console),
}
"""Commands by name; each returns the exit code."""
