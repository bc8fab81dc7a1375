"""Writes docs/conformance.md from what ran: every behaviour on fusedopt's backends and on torch's own implementations.

make conformance
python -m tests.contract.page --check    # exit code 1 where fusedopt is wrong somewhere
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

import torch
from rich.progress import track

import fusedopt

from .behaviour import Behaviour, Outcome, attempt
from .conformance import ALL
from .kit import Kit, fused_kit, torch_kits

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
MARKS = {"same": "same", "refused": "refused", "wrong": "**wrong**"}

HEAD = """# Conformance

What a training script relies on, tried on every backend of fusedopt and on torch's own three implementations.
Made by `make conformance`; not written by hand.

- **same**: what the behaviour promises happens; numbers agree with torch's for-loop within rounding.
- **refused**: an error says that it is not supported, and nothing was changed.
- **wrong**: something else happens, and nobody says so.

"""


def kits(device: str) -> list[Kit]:
    """Fusedopt's backends on a device, then torch's own implementations there."""
    return [*(fused_kit(name, device) for name in fusedopt.available_backends(device)), *torch_kits(device)]


def table(title: str, rows: Sequence[tuple[Behaviour, list[Outcome]]], columns: Sequence[Kit]) -> str:
    """The behaviours of one area as a table."""
    names = [f"torch {kit.name}" if kit.is_torch else kit.name for kit in columns]
    lines = [f"## {title}", "", "| behaviour | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for one, outcomes in rows:
        lines.append(f"| {one.sentence} | " + " | ".join(MARKS[outcome.verdict] for outcome in outcomes) + " |")
    return "\n".join(lines) + "\n"


def exceptions(rows: Sequence[tuple[Behaviour, list[Outcome]]], columns: Sequence[Kit]) -> str:
    """What fusedopt refuses, in its own words, each once."""
    lines = ["## What fusedopt refuses", ""]
    for one, outcomes in rows:
        words = [out.words for kit, out in zip(columns, outcomes, strict=True) if not kit.is_torch and out.words]
        if words:
            lines.append(f"- {one.sentence}: `{words[0]}`")
    return "\n".join(lines) + "\n"


def page(device: str) -> tuple[str, bool]:
    """The page, and whether fusedopt is wrong nowhere."""
    columns = kits(device)
    behaviours = [one for one in ALL if torch.device(device).type in one.devices]
    rows = [(one, [attempt(one, kit) for kit in columns]) for one in track(behaviours, description="trying behaviours")]
    parts = [HEAD]
    parts.append(
        f"{len(rows)} behaviours, fusedopt {fusedopt.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, device {device}, {date.today()}. "
        "Columns that need a GPU are here only where the page was made on one; on a CPU Triton's interpreter runs its "
        "kernels.\n"
    )
    for area, members in groupby(rows, key=lambda row: row[0].area):
        parts.append(table(area, list(members), columns))
    parts.append(exceptions(rows, columns))
    fine = all(
        outcome.verdict != "wrong"
        for _, outcomes in rows
        for kit, outcome in zip(columns, outcomes, strict=True)
        if not kit.is_torch
    )
    return "\n".join(parts), fine


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where fusedopt is wrong")
    arguments = parser.parse_args()
    text, fine = page(arguments.device)
    if not arguments.check:
        arguments.out.write_text(text)
        print(f"wrote {os.path.relpath(arguments.out)}")
    if not fine:
        print("fusedopt is wrong somewhere: look for **wrong** in its columns")
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
