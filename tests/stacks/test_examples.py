"""The examples of the stacks run as a user starts them, learn, and are at most a page."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fusedopt

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "stacks"
PAGE = 80  # lines


class Example(NamedTuple):
    """An example: its file, its ranks (0: started by itself), its options, and the package it needs."""

    file: str
    ranks: int
    options: str
    package: str = "torch"


RUNS = [
    Example("ddp.py", 2, "--steps 20"),
    Example("fsdp2.py", 4, "--steps 20 --out OUT"),
    Example("tensor_parallel.py", 4, "--steps 20"),
    Example("zero1.py", 2, "--steps 20"),
    Example("hf_trainer.py", 0, "--steps 40 --out OUT", "transformers"),
    Example("accelerate_loop.py", 2, "--steps 20 --out OUT", "accelerate"),
    Example("lightning_module.py", 0, "--steps 20 --out OUT", "lightning"),
    Example("deepspeed_zero.py", 2, "--steps 20 --out OUT", "deepspeed"),
]
# Started again in the same folder: with another number of ranks, or told to go on.
RESUMED = {
    "fsdp2.py": Example("fsdp2.py", 2, "--steps 40 --out OUT"),
    "hf_trainer.py": Example("hf_trainer.py", 2, "--steps 60 --out OUT --resume"),
    "lightning_module.py": Example("lightning_module.py", 0, "--steps 40 --out OUT --resume"),
}


def start(example: Example, out: Path) -> str:
    """What it prints."""
    words = [str(EXAMPLES / example.file), *example.options.replace("OUT", str(out)).split()]
    if example.ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(example.ranks)]
        words = [*launcher, *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(fusedopt.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        env={**environment, "DS_ACCELERATOR": "cpu"},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def accuracy(printed: str) -> float:
    return float(printed.rpartition("test accuracy ")[2].split()[0])


@pytest.mark.parametrize("example", RUNS, ids=lambda example: example.file)
def test_an_example_learns_and_goes_on_where_it_stopped(example: Example, tmp_path: Path) -> None:
    for package in (example.package, "sklearn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'fusedopt[stacks]'")
    first = accuracy(start(example, tmp_path))
    assert first > 0.5, "a tenth is chance"
    if example.file in RESUMED:
        printed = start(RESUMED[example.file], tmp_path)
        assert "resum" in printed.lower() or "restor" in printed.lower() or example.package == "transformers"
        assert accuracy(printed) > first - 0.05


def test_every_example_is_run() -> None:
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"common.py"}
    assert {example.file for example in RUNS} == scripts


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= PAGE
