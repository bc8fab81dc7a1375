"""The soak in small: some hundred steps drift no further than torch fused does, and a drift that is too far is told."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from . import soak

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", soak.CASES, ids=[case.name for case in soak.CASES])
def test_a_few_hundred_steps_stay_within_the_bounds(case: soak.Case, device: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        drifts = soak.run(case, 500, device, {100}, lambda count: None)
    finally:
        torch.set_num_threads(threads)
    assert [drift.steps for drift in drifts] == [100, 500]
    assert not soak.problems(case, drifts)
    assert case.name in soak.page({case.name: drifts}, 500, device)


def test_what_is_out_of_bounds_is_told() -> None:
    good = soak.Drift(10, 1.0, 2.0, 1.0, 10.0)
    case = soak.CASES[1]
    assert not soak.problems(case, [good])
    for bad in (replace(good, mean=2.0), replace(good, mean=math.nan), replace(good, count=9.0)):
        assert len(soak.problems(case, [bad])) == 1
