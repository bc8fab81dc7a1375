"""Every behaviour on every backend: kept, or refused in so many words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..running import ONE_RUN_EACH, Run, as_params
from .behaviour import Behaviour, Outcome, attempt
from .conformance import ALL
from .kit import fused_kit, torch_kits


def _cases() -> list[object]:
    return [
        pytest.param(run.values[0], one, id=f"{run.id}-{one.id}", marks=run.marks)
        for run in as_params(ONE_RUN_EACH)
        for one in ALL
        if run.values[0].device in one.devices
    ]


@pytest.mark.parametrize(("run", "one"), _cases())
def test_fusedopt(settings: Run, one: Behaviour) -> None:
    outcome = attempt(one, fused_kit(settings.backend, settings.device))
    if one.refused:
        assert outcome.verdict == "refused", outcome
        assert re.search(one.refused, outcome.words), outcome
    else:
        assert outcome == Outcome("same")


def test_a_fault_is_found() -> None:
    """Torch's fused path on the CPU gets dense-but-different layouts wrong: the behaviours must see that."""
    fused = torch_kits()[2]
    transposed = next(one for one in ALL if one.sentence == "a transposed gradient")
    assert attempt(transposed, fused).verdict == "wrong"


def test_sentences_are_unique_and_all_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs/conformance.md").read_text()
    told = re.findall(r"^\| (.+?) \|.*\b(?:same|refused)\b", page, re.MULTILINE)
    assert sorted(told) == sorted({one.sentence for one in ALL}), "make conformance"
    assert len(told) == len(ALL)
