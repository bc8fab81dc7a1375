"""Puts a run's figures into the README, between its benchmark marks, with command, machine and date.

python -m bench.readme bench/results/<machine>/<run>.jsonl
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench import records
from bench.records import Record

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
PEERS = ("torch-loop", "torch-foreach", "torch-fused", "fusedopt-cpu", "fusedopt-cuda", "fusedopt-triton")


def milliseconds(record: Record | None) -> str:
    """A median, or why there is none."""
    if record is None:
        return "not measured"
    if record["status"] != "ok":
        return str(record["status"])
    return f"{float(record['seconds']['median']) * 1e3:.3g} ms"


def section(found: Sequence[Record], picture: str, command: str) -> str:
    """The marked part of the README."""
    grouped = records.by_case(found)
    peers = [peer for peer in PEERS if any(record["peer"] == peer for record in found)]
    ours = [peer for peer in peers if peer.startswith("fusedopt")]
    lines = [
        "| workload | optimizer | gradients | threads | "
        + " | ".join(peers)
        + " | "
        + " | ".join(f"{peer} against torch-fused" for peer in ours)
        + " |",
        "|---" * (4 + len(peers) + len(ours)) + "|",
    ]
    for case, members in grouped.items():
        of = {record["peer"]: record for record in members}
        ratios = []
        for peer in ours:
            ratio = (of.get(peer) or {}).get("ratio")
            ratios.append(
                f"**{ratio['median']:.2f}×** ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "not measured"
            )
        cells = [case.workload, case.optimizer, case.gradients, str(case.threads)]
        lines.append("| " + " | ".join([*cells, *(milliseconds(of.get(peer)) for peer in peers), *ratios]) + " |")
    head = found[0]
    where = f"{head['machine']['cpu']}, {head['machine']['cores']} cores"
    if head["machine"].get("gpu"):
        where = str(head["machine"]["gpu"])
    caption = (
        f"Medians of a step, float32, all tensors; ratios are medians over alternating rounds, their 95 % interval in "
        f"brackets. `{command}`, {where}, torch {head['versions']['torch']}, {str(head['date'])[:10]}. "
        f"{gpus()}"
    )
    return "\n".join([START, "", *lines, "", caption, "", f"![Speed of each implementation]({picture})", "", END])


def gpus() -> str:
    """Which GPUs have results beside these."""
    found = {str(record["machine"]["gpu"]) for record in records.read([records.RESULTS]) if record["machine"]["gpu"]}
    return f"Measured too: {', '.join(sorted(found))}." if found else "No GPU has been measured yet."


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path, help="the JSON lines of a run; its picture lies beside it")
    parser.add_argument("--command", default="python -m bench", help="what made them")
    arguments = parser.parse_args()
    found = records.read([arguments.records])
    picture = ROOT / "docs" / "images" / "benchmark.png"
    shutil.copy(arguments.records.with_suffix(".png"), picture)
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    readme.write_text(before + section(found, os.path.relpath(picture, ROOT), arguments.command) + after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
