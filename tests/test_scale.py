"""docs/scale.md: its models are those of the papers, its shares add up, and it says what the record says."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import pytest

from bench import scale

WORKLOADS = Path(scale.__file__).parent / "workloads"
# Tensors and parameters as the checkpoints that Meta released have them.
KNOWN = {
    "Llama 3 8B": (291, 8_030_261_248),
    "Llama 3 70B": (723, 70_553_706_496),
    "Llama 3 405B": (1137, 405_853_388_800),
}
each_model = pytest.mark.parametrize("model", scale.MODELS, ids=lambda model: model.name)


def test_the_page_is_what_the_record_makes_of_it() -> None:
    assert scale.PAGE.read_text() == scale.page(json.loads(scale.RECORD.read_text()))


@each_model
def test_models_have_the_sizes_of_the_papers(model: scale.Model) -> None:
    if model.name in KNOWN:
        assert (len(model.shapes), model.parameters) == KNOWN[model.name]
    else:
        assert len(model.shapes) == pytest.approx(20_000, rel=0.01)


def test_the_small_model_has_the_shapes_of_the_workload() -> None:
    groups = json.loads((WORKLOADS / "llama3-8b.json").read_text())["groups"]
    shapes = Counter({tuple(shape): 0 for shape in scale.MODELS[0].shapes})
    for group in groups:
        for count, shape in group["tensors"]:
            shapes[tuple(shape)] += count
    assert shapes == Counter(scale.MODELS[0].shapes)


@each_model
@pytest.mark.parametrize("ranks", scale.RANKS)
def test_no_rank_has_less_than_its_part_and_none_more_than_a_row_above_it(model: scale.Model, ranks: int) -> None:
    share = sum(scale.fsdp2(model, ranks).numels)
    rows = sum(prod(shape[1:]) for shape in model.shapes)
    assert model.parameters / ranks <= share <= model.parameters / ranks + rows
    assert 0 <= scale.zero1(model, ranks).numels[0] - model.parameters / ranks < 1


def test_a_launch_of_torch_is_cut_by_tensors_and_by_chunks() -> None:
    assert scale.Share((1,) * 253).torch_launches == 2
    assert scale.Share((2240 * 65536,)).torch_launches == 1
    assert scale.Share((2240 * 65536 + 1,)).torch_launches == 2


def test_host_times_are_measured_of_sharded_and_of_plain_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "COUNTS", (1, 5))
    hosts = scale.measure(rounds=1)
    assert set(hosts) == {name + kind for name in scale.OPTIMIZERS for kind in ("", " plain")}
    assert all(host.fixed + host.tensor > 0 for host in hosts.values())
