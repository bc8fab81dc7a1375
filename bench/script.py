"""Command lines of the programs beside `python -m bench`: one look of their --help, one way to show progress."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

LINE_EVERY_S = 20.0


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each option that has one to show, and the description's own lines."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            super()._get_help_string(action)
            if isinstance(action.default, int | float | Path) and action.default is not False
            else action.help
        )


def parser(doc: str | None, module: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring.

    Args:
        doc: the docstring.
        module: the name that `python -m` takes.
    """
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=_Formatter)
    made.add_argument("--threads", type=count, default=1, metavar="N", help="CPU threads")
    return made


def parsed(made: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The options; torch keeps to the threads asked for."""
    options = made.parse_args(words)
    torch.set_num_threads(options.threads)
    return options


def count(word: str) -> int:
    """A whole number of at least 1, for `type=`."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


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
