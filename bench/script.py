"""Command lines of the programs beside `python -m bench`: how they look, refuse, show and keep."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import records
from bench.workloads import Workload, load

T = TypeVar("T")

LINE_EVERY_S = 20.0

PROGRAMS = {
    "phase": "the optimizer phase (unscale, check, clip, AdamW, average, clear): torch's best recipe, one fused launch",
    "reported": "what a step with a report costs beside one without",
    "modes": "bytes, and time, of every precision mode beside other libraries'",
    "drift": "how far each precision mode lies from float64 after 1, 100 and 10,000 steps",
    "quality": "final losses of two models in each precision mode",
    "codes": "codes for 8-bit states, compared",
    "scale": "docs/scale.md: what a step would take on thousands of GPUs",
    "readme": "the README's table from the records of a run",
}
"""The programs and what each is for; `python -m bench.NAME --help` has more."""


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option that has one to show, and the description's own lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            super()._get_help_string(action)
            if isinstance(action.default, int | float | Path) and action.default is not False
            else action.help
        )


# ---- options ----------------------------------------------------------------------------------------------


def parser(doc: str | None, module: str, threads: bool = True) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring.

    Args:
        doc: the docstring.
        module: the name that `python -m` takes.
        threads: whether the number of CPU threads is to be chosen.
    """
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=_Formatter)
    if threads:
        made.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads")
    return made


def add_workload(made: argparse.ArgumentParser, default: str) -> None:
    """`--workload`, which comes out as the workload itself."""
    made.add_argument(
        "--workload",
        type=workload,
        default=default,
        metavar="NAME",
        help="COUNTxNUMEL or a name (default: %(default)s)",
    )


def add_device(made: argparse.ArgumentParser) -> None:
    """`--device`."""
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")


def add_rounds(made: argparse.ArgumentParser, default: int) -> None:
    """`--rounds`: at least 2, as one has no interval."""
    made.add_argument("--rounds", type=at_least(2), default=default, metavar="N", help="turns that are measured")


def add_out(made: argparse.ArgumentParser) -> None:
    """`--out`, for `keep`."""
    made.add_argument(
        "--out",
        type=file_to_write,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="JSON lines that the record is added to (without FILE: bench/results/<machine>/<date>-<program>.jsonl)",
    )


def parsed(made: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The options; torch keeps to the threads asked for, and a GPU asked for is there."""
    options = made.parse_args(words)
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        made.error("torch finds no CUDA device")
    if hasattr(options, "threads"):
        torch.set_num_threads(options.threads)
    return options


@contextmanager
def refusals(made: argparse.ArgumentParser) -> Iterator[None]:
    """What cannot be done ends the program with a message, as an option that cannot be read does."""
    try:
        yield
    except (ValueError, OSError) as error:
        made.error(str(error))


def at_least(least: int) -> Callable[[str], int]:
    """For `type=`: whole numbers from `least` on."""

    def number(word: str) -> int:
        try:
            found = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {word!r}") from None
        if found < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {found}")
        return found

    return number


count = at_least(1)


def folder(word: str) -> Path:
    """For `type=`: a folder that files can be written to, which is made."""
    path = Path(word)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no folder can be made at {path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} can not be written to")
    return path


def file_to_write(word: str) -> Path:
    """For `type=`: a file whose folder can be written to, which is made; or such a folder."""
    path = Path(word)
    folder(str(path if path.is_dir() else path.parent))
    return path


def finite(word: str) -> float:
    """For `type=`: numbers from 0 on that are finite."""
    try:
        found = float(word)
    except ValueError:
        found = nan
    if not 0 <= found < inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {word!r}")
    return found


def workload(word: str) -> Workload:
    """For `type=`: a workload by its name."""
    try:
        return load(word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---- progress and results ---------------------------------------------------------------------------------


def keep(options: argparse.Namespace, found: records.Record, kind: str) -> None:
    """Adds what was found to the file that `--out` names, if it does, as a record of a kind."""
    if options.out is None:
        return
    path: Path = records.added_to(options.device, kind) if options.out == Path() else options.out
    if path.is_dir():
        path /= f"{kind}.jsonl"
    records.add({**records.head(options.device, kind), **found}, path)
    print(f"added to {path}")


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A bar on the error stream for work that tells its share, from 0 to 1; nothing in a file."""
    console = Console(stderr=True)
    with Progress(
        TextColumn(what), BarColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Goes through items with a bar on the error stream, which is gone at the end; in a file, a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _in_lines(items, total, what)
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total)


def _in_lines(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    last = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - last > LINE_EVERY_S:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
        yield item
