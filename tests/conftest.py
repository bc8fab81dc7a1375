"""What all tests share: the choice of backends, GPU skips, and the figures printed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from . import interpreter
from .running import INTERPRETED, Run, settings_of

if INTERPRETED:
    interpreter.patch_once_a_launch()

# These come first, in this order: at the end one worker would wait minutes for the other, which compiles.
LONGEST = ("test_sanitizers.py", "test_triton_interpreter.py")

# Names of backends, separated by commas: tests of others are left out. For the run under Triton's interpreter.
ONLY_BACKENDS = os.environ.get("FUSEDOPT_TEST_BACKENDS", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips GPU tests where there is no GPU, leaves out backends that were not asked for, puts the longest first."""
    no_gpu = pytest.mark.skip(reason=f"no GPU: torch {torch.__version__} finds no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    if ONLY_BACKENDS:
        kept = [item for item in items if _backend_of(item) in ONLY_BACKENDS.split(",")]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    items.sort(key=_place_in_the_run)


def _place_in_the_run(item: pytest.Item) -> int:
    return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)


def _backend_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    run = callspec.params.get("run") if callspec else None
    return run.backend if isinstance(run, Run) else None


@pytest.fixture
def settings(run: Run) -> Iterator[Run]:
    """The settings of a test's ``run`` parameter."""
    with settings_of(run):
        yield run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what tests recorded under "figure", in whichever process they ran."""
    counts: dict[str, int] = {}
    lines: list[str] = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "figure" and report.when == "call":
                    lines.append(str(value))
                elif name.startswith("count:") and report.when == "call":
                    counts[name[6:]] = counts.get(name[6:], 0) + int(value)
    if counts or lines:
        terminalreporter.section("figures")
        for name, count in sorted(counts.items()):
            terminalreporter.write_line(f"{name}: {count:,}")
        for line in sorted(set(lines)):
            terminalreporter.write_line(line)
