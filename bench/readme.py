"""Puts a run's figures into the README, between its benchmark marks, with command, machine and date.

    python -m bench.readme bench/results/<machine>/<run>.jsonl

Formats are those of the benchmark's own tables; the picture beside the records becomes the README's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from bench import present, records, script
from bench.records import Record

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- benchmark:start -->", "<!-- benchmark:end -->"
PEERS = ("torch-loop", "torch-foreach", "torch-fused", "fusedopt-cpu", "fusedopt-cuda", "fusedopt-triton")


def time_of(record: Record | None) -> str:
    """A median, or why there is none."""
    if record is None:
        return "not measured"
    return present.seconds(record["seconds"]["median"]) if record["status"] == "ok" else str(record["status"])


def ratio_of(record: Record | None) -> str:
    """The speed against torch fused, in bold, with its interval."""
    ratio = (record or {}).get("ratio")
    return f"**{present.interval(ratio).replace(' ', '×** ', 1)}" if ratio else "not measured"


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
        cells = [case.workload, case.optimizer, case.gradients, str(case.threads)]
        cells += [time_of(of.get(peer)) for peer in peers] + [ratio_of(of.get(peer)) for peer in ours]
        lines.append(f"| {' | '.join(cells)} |")
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


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = script.parser(__doc__, "bench.readme", threads=False)
    parser.add_argument("records", type=Path, help="the JSON lines of a run; its picture lies beside it")
    parser.add_argument("--command", default="python -m bench", help="what made them (default: %(default)s)")
    options = script.parsed(parser, words)
    with script.refusals(parser):
        found = records.read([options.records])
    drawn = options.records.with_suffix(".png")
    if not drawn.exists():
        parser.error(f"there is no picture {drawn}")
    picture = ROOT / "docs" / "images" / "benchmark.png"
    shutil.copy(drawn, picture)
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    readme.write_text(before + section(found, os.path.relpath(picture, ROOT), options.command) + after)


if __name__ == "__main__":
    main()
