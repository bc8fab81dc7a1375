"""Results as JSON lines: a record per case and peer, with machine, versions, commit and date.

Programs beside the main one write records of other kinds, which "kind" tells apart; they may lie beside each other.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from bench.case import Case
from bench.peers import PEERS

Record = dict[str, Any]

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
ELSEWHERE = Path("out/bench")
"""Where runs go that are no results to keep."""
CASE_KEYS = ("workload", "optimizer", "dtype", "device", "threads", "gradients")
PHASE_KEYS = ("workload", "device", "threads", "clears")
HEAD_KEYS = ("date", "commit", "versions", "machine")
KEYS = {
    "step": (*HEAD_KEYS, *CASE_KEYS, "tensors", "elements", "groups", "bytes_moved", "peer", "status"),
    "phase": (
        *HEAD_KEYS,
        *PHASE_KEYS,
        "rounds",
        "seconds",
        "host_seconds",
        "ratio",
        "host_ratio",
        "roof_share",
    ),
}
"""What a record of each kind that is read has at least; one without "kind" is a step's."""


# ---- where and what ---------------------------------------------------------------------------------------


def _first_line(path: str, start: str) -> str | None:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(start):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


@cache
def machine(device: str) -> Record:
    """What the machine is: processor, cores, memory, caches, and the GPU where one is used."""
    memory = _first_line("/proc/meminfo", "MemTotal")
    found: Record = {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": int(memory.split()[0]) * 1024 if memory else None,
        "cache_bytes": last_cache_bytes(),
        "system": platform.platform(),
        "gpu": None,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
        found["driver"] = _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["name"] = machine_name(found)
    return found


def processor(table: str = "/proc/cpuinfo") -> str:
    """The processor's name; where a virtual machine hides which one it is, its family and model too."""
    name = _first_line(table, "model name") or platform.processor() or platform.machine()
    family, model = _first_line(table, "cpu family"), _first_line(table, "model\t")
    return name if re.search(r"\d", name) or not (family and model) else f"{name} family {family} model {model}"


def machine_name(found: Record) -> str:
    """A short name for a folder: the GPU's, or the CPU's with its number of cores."""
    words = found["gpu"] or f"{found['cpu']} {found['cores']} cores"
    words = re.sub(r"\((r|tm)\)|processor|cpu @.*?ghz", " ", words.lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def last_cache_bytes() -> int:
    """Size of the CPU's largest cache; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes) or 2**25


def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


@cache
def commit() -> str | None:
    """The repository's commit, with `-dirty` where code differs from it; None without git or commits."""
    head = _command("git", "rev-parse", "--short=12", "HEAD")
    code = (":/", *(f":(top,exclude){words}" for words in ("docs", "bench/results", "*.md")))
    return head and head + (
        "-dirty" if _command("git", "status", "--porcelain", "--untracked-files=no", "--", *code) else ""
    )


@cache
def versions() -> dict[str, str]:
    """Versions of Python, torch, Triton, fusedopt and of every peer's package, where they are installed."""
    found = {"python": platform.python_version()}
    peers = (peer.distribution or peer.package for peer in PEERS.values())
    for package in dict.fromkeys(("torch", "triton", "fusedopt", *filter(None, peers))):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # with what it was built for, which its package does not always say
    if "fusedopt" not in found and importlib.util.find_spec("fusedopt"):
        import fusedopt  # from a checkout that is not installed

        found["fusedopt"] = fusedopt.__version__
    return found


def head(device: str, kind: str = "step") -> Record:
    """What every record of a run begins with."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(device),
    }


def for_case(case: Case) -> Record:
    """A case's own fields."""
    workload = case.shapes
    return {
        **asdict(case),
        "tensors": workload.tensors,
        "elements": workload.elements,
        "groups": len(workload.groups),
        "bytes_moved": case.bytes_moved,
    }


# ---- files ------------------------------------------------------------------------------------------------


def write(records: Iterable[Record], path: Path) -> Path:
    """Writes records as JSON lines, making the folder, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    return path


def add(record: Record, path: Path) -> Path:
    """Adds a record to a file of JSON lines, making it, and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")
    return path


def phases(paths: Sequence[Path]) -> list[Record]:
    """Records of the optimizer phase, if there are any: of each kind of run the newest, in order.

    Raises:
        ValueError: see `read`.
    """
    newest: dict[tuple[Any, ...], Record] = {}
    for record in sorted(read(paths, "phase", needed=False), key=lambda record: str(record["date"])):
        newest[tuple(record[name] for name in PHASE_KEYS)] = record
    return [newest[which] for which in sorted(newest)]


def read(paths: Sequence[Path], kind: str = "step", needed: bool = True) -> list[Record]:
    """Records of one kind from files, or from every `.jsonl` file in a folder; "run" is the name of a record's file.

    Args:
        paths: Files and folders.
        kind: What to read; records of other kinds are passed over.
        needed: Whether it is an error that there is none.

    Raises:
        ValueError: a path does not exist or holds no record of the kind, or a line is no record that can be read; the
            message names the file, and the line.
    """
    records: list[Record] = []
    others: set[str] = set()
    for path in paths:
        files = sorted(path.glob("**/*.jsonl")) if path.is_dir() else [path]
        if not files or not files[0].exists():
            raise ValueError(f"no results at {path}")
        for file in files:
            for record in _records_of(file):
                if record["kind"] == kind:
                    records.append({**record, "run": file.stem})
                else:
                    others.add(record["kind"])
    if needed and not records:
        beside = f", only {' and '.join(sorted(others))}" if others else ""
        raise ValueError(f"no {kind} records in {', '.join(map(str, paths))}{beside}")
    return records


def _records_of(file: Path) -> Iterator[Record]:
    """The records of a file, of whatever kind.

    Raises:
        ValueError: see `read`.
    """
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{file}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: no JSON: {error}") from None
            yield _checked(record, where)


def _checked(record: Any, where: str) -> Record:
    """The record, with its kind, if it has what its kind needs."""
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f"{where}: no record of this benchmark: it has no schema")
    if record["schema"] != SCHEMA:
        raise ValueError(f"{where}: the record has schema {record['schema']}, this program reads {SCHEMA}")
    kind = record.get("kind", "step")
    absent = [name for name in KEYS.get(kind, ()) if name not in record]
    if absent:
        raise ValueError(f"{where}: no {kind} record: it has no {', '.join(absent)}")
    return {**record, "kind": kind}


def key(record: Record) -> tuple[Any, ...]:
    """What makes two records comparable: case and peer."""
    return (*(record[name] for name in CASE_KEYS), record["peer"])


def case_of(record: Record) -> Case:
    """The case of a record."""
    return Case(**{name: record[name] for name in CASE_KEYS})


def by_case(records: Iterable[Record]) -> dict[Case, list[Record]]:
    """Records grouped by case, in order: those of one run, as only times of one run can be compared.

    Where several runs have a case, it is the newest; a later record of a peer replaces an earlier one of its run.
    """
    by_run: dict[Case, dict[str, dict[str, Record]]] = {}
    for record in records:
        run = by_run.setdefault(case_of(record), {}).setdefault(record.get("run", ""), {})
        run[record["peer"]] = record
    runs_of_case = {case: [list(run.values()) for run in runs.values()] for case, runs in by_run.items()}
    return {case: max(runs, key=lambda run: str(run[0]["date"])) for case, runs in runs_of_case.items()}


def runs_of(records: Iterable[Record]) -> list[Record]:
    """The first record of each run: what tells its commit, versions and date."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record.get("run", ""), record)
    return list(first.values())


def added_to(device: str, label: str) -> Path:
    """The file that a day's records of one program are added to: `bench/results/<machine>/<date>-<label>.jsonl`."""
    return RESULTS / str(machine(device)["name"]) / f"{_today()}-{label}.jsonl"


def _today() -> str:
    return f"{datetime.now(timezone.utc):%Y-%m-%d}"


def default_stem(device: str, label: str, keep: bool = True) -> Path:
    """Where a run's files go unless told otherwise, without suffix: a name that no file has.

    Args:
        device: Device type.
        label: What was run.
        keep: Whether it is a result to keep: `bench/results/<machine>/<date>-<label>`. If not, it is under `out/bench`.
    """
    folder = RESULTS / str(machine(device)["name"]) if keep else ELSEWHERE
    name = f"{_today()}-{label}"
    taken = {path.name.partition(".")[0] for path in folder.glob(f"{name}*")}
    return folder / next(free for free in chain([name], (f"{name}-{n}" for n in count(2))) if free not in taken)
