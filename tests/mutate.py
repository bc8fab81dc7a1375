"""``python -m tests.mutate``: plants the faults of tests/faults.py, one at a time; each must be caught by a test.

Works on a copy of the tree under build/mutate, where the extension is built without optimisation, and loops of their
own for the usual storages are compiled for the best instruction set alone: that changes no bit and takes seconds. A
suite must pass on the copy as it is before it may speak. Writes docs/mutation.md; ends with 1 where a fault survives.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .faults import FAULTS, LEAST_TESTS, Fault, Suite

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build/mutate"
PAGE = ROOT / "docs/mutation.md"
COPIED = ("build_support", "csrc", "fusedopt", "triton_kernels", "tests", "bench", "pyproject.toml")
COMPILED = ("csrc/", "build_support/")  # a fault here wants a new build
LONGEST = 600  # seconds that a suite may take before it counts as hung

BUILD = """
from build_support import extension, host
from build_support.settings import ROOT
host.CXX_FLAGS = [flag for flag in host.CXX_FLAGS if not flag.startswith("-O")] + ["-O0"]
host.COLD_FLAGS = []
extension.link_triton_kernels()
extension.build(ROOT / "fusedopt")
"""


class Problem(Exception):
    """The run itself can not go on: nothing is known about the fault."""


@dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        caught_by: the first test that failed; empty: none, the fault survived.
        seconds: that building and testing took.
    """

    caught_by: str
    seconds: float


def main() -> int:
    """Plants the faults asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--list", action="store_true", help="only list the faults")
    parser.add_argument(
        "--only", nargs="+", metavar="WORDS", help="only faults whose name or file contains one of these"
    )
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if wanted(fault, arguments.only)]
    console = Console()
    if arguments.list:
        for fault in faults:
            console.print(f"{fault.name}  [dim]{fault.path}[/dim]", highlight=False)
        return 0
    if not faults:
        parser.error(f"no fault is called {arguments.only}")
    try:
        outcomes = run(faults, console)
    except Problem as problem:
        console.print(f"[red]error[/red]: {problem}", highlight=False)
        return 2
    console.print(summary(outcomes))
    survivors = [fault.name for fault, outcome in outcomes.items() if not outcome.caught_by]
    console.print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} faults caught", highlight=False)
    return 1 if survivors else 0


def wanted(fault: Fault, words: Iterable[str] | None) -> bool:
    """Whether one of the words is in the fault's name or file."""
    return words is None or any(word in fault.name or word in fault.path for word in words)


def run(faults: list[Fault], console: Console) -> dict[Fault, Outcome]:
    """Plants each fault; shows how far it is, and writes the page after each, so that a run may be interrupted."""
    outcomes: dict[Fault, Outcome] = {}
    commit = describe_commit()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        suites = list(dict.fromkeys(suite for fault in faults for suite in fault.suites))
        task = progress.add_task("copy of the tree", total=len(suites) + len(faults))
        prepare_copy()
        for cuda in sorted({suite.cuda for suite in suites}):
            build(cuda)
            for suite in (suite for suite in suites if suite.cuda == cuda):
                progress.update(task, description=f"without a fault: {suite.name}")
                failed = first_failure(suite)
                if failed:
                    raise Problem(f"{suite.name} fails without any fault: {failed}")
                progress.advance(task)
        for fault in sorted(faults, key=is_compiled):  # the others first, while the extension has no fault
            progress.update(task, description=fault.name)
            outcomes[fault] = outcome = try_fault(fault)
            write_page(outcomes, commit)
            progress.console.print(
                f"{'[green]caught[/green]' if outcome.caught_by else '[red]SURVIVED[/red]'} {fault.name}"
            )
            progress.advance(task)
    return outcomes


def is_compiled(fault: Fault) -> bool:
    """Whether a fault wants a new build, which stays until the next one."""
    return fault.path.startswith(COMPILED)


def prepare_copy() -> None:
    """Brings the copy up to date; files that did not change keep their times, so that little is built anew."""
    COPY.mkdir(parents=True, exist_ok=True)
    kept: dict[Path, tuple[bytes, int]] = {}
    for name in COPIED:
        source, target = ROOT / name, COPY / name
        for path in [target, *target.rglob("*")]:
            if path.is_file():
                kept[path] = path.read_bytes(), path.stat().st_mtime_ns
        if source.is_dir():
            built = ("_C*.so", "_build_info.json", "triton_kernels") if name == "fusedopt" else ()
            shutil.rmtree(target, ignore_errors=True)
            ignore = shutil.ignore_patterns("__pycache__", *built)
            shutil.copytree(source, target, ignore=ignore, copy_function=shutil.copy)
        else:
            shutil.copy(source, target)
    for path, (content, time_ns) in kept.items():
        if path.exists() and path.read_bytes() == content:
            os.utime(path, ns=(time_ns, time_ns))


def build(cuda: bool) -> None:
    """Builds the extension in the copy."""
    environment = environment_with(
        {
            "FUSEDOPT_EXTENSION": "1",
            "FUSEDOPT_CUDA": str(int(cuda)),
            "FUSEDOPT_CUDA_ARCHS": "90+ptx",
            "FUSEDOPT_QUICK": str(int(not cuda)),  # what is looked at in CUDA images is how well they are compiled
        }
    )
    result = subprocess.run([sys.executable, "-c", BUILD], cwd=COPY, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise Problem(f"the copy does not build:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")


def environment_with(variables: dict[str, str]) -> dict[str, str]:
    """The environment, the copy before everything else that Python may import."""
    return {**os.environ, "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1", **variables}


def try_fault(fault: Fault) -> Outcome:
    """Plants a fault, builds, looks for it, and takes it out."""
    started = time.monotonic()
    caught_by = ""
    with planted(fault):
        built: bool | None = None
        for suite in fault.suites:
            if is_compiled(fault) and built != suite.cuda:
                build(suite.cuda)
                built = suite.cuda
            caught_by = first_failure(suite)
            if caught_by:
                break
    return Outcome(caught_by, time.monotonic() - started)


@contextmanager
def planted(fault: Fault) -> Iterator[None]:
    """The copy with a fault in it."""
    path = COPY / fault.path
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise Problem(f"{fault.name}: its text stands {text.count(fault.old)} times in {fault.path}")
    path.write_text(text.replace(fault.old, fault.new))
    try:
        yield
    finally:
        path.write_text(text)


def first_failure(suite: Suite) -> str:
    """Runs a suite up to the first test that fails; its name, or how the process ended; empty: all passed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", LEAST_TESTS, *suite.arguments]
    environment = environment_with(suite.environment)
    try:
        result = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return f"{suite.arguments[0]}: hangs"
    if result.returncode == 0:
        if "does not load" in result.stdout or not re.search(r"\d+ passed", result.stdout):
            raise Problem(f"{suite.name} did not run:\n{result.stdout[-2000:]}")
        return ""
    if result.returncode < 0:
        return f"{suite.arguments[0]}: the process dies of signal {-result.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", result.stdout, re.MULTILINE)
    if result.returncode != 1 or failed is None:
        raise Problem(f"{suite.name} did not run:\n{result.stdout[-3000:]}{result.stderr[-1000:]}")
    return failed[1]


def summary(outcomes: dict[Fault, Outcome]) -> Table:
    """The outcomes, for a terminal."""
    table = Table("fault", "caught by", "s")
    for fault, outcome in outcomes.items():
        table.add_row(fault.name, outcome.caught_by or "[red]nothing[/red]", f"{outcome.seconds:.0f}")
    return table


HEAD = """# Faults that tests must catch

`make mutate` plants each of the faults of [tests/faults.py](../tests/faults.py) in a copy of the tree, builds it and
runs the tests named there until one fails. This page is written by it: the last result of each fault.

| fault | in | caught by | when | commit |
|---|---|---|---|---|
"""


def write_page(outcomes: dict[Fault, Outcome], commit: str) -> None:
    """Writes docs/mutation.md; faults that were not tried keep what the page says of them."""
    old = dict(re.findall(r"^(\| (.*?) \| `.*)$", PAGE.read_text(), re.MULTILINE)) if PAGE.exists() else {}
    known = {name: row for row, name in old.items()}
    today = datetime.datetime.now(datetime.timezone.utc).date()
    rows = []
    for fault in FAULTS:
        if fault in outcomes:
            caught = outcomes[fault].caught_by
            rows.append(
                f"| {fault.name} | `{fault.path}` | {f'`{caught}`' if caught else '**nothing**'} | {today} | {commit} |"
            )
        else:
            rows.append(known.get(fault.name, f"| {fault.name} | `{fault.path}` | not tried yet | | |"))
    PAGE.write_text(HEAD + "\n".join(rows) + "\n")


def describe_commit() -> str:
    """The commit, with a plus sign where what is copied differs from it."""
    commit = git("rev-parse", "--short=7", "HEAD") or "unknown"
    return commit + "+" * bool(git("status", "--porcelain", "--", *COPIED))


def git(*words: str) -> str:
    """What git says in the repository; empty where there is neither."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
