"""DeepSpeed with fusedopt as the client's optimizer: steps as torch's but for rounding; a checkpoint resumes."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import fusedopt

from .beside_torch import BesideTorch
from .team import Team, on_ranks
from .twin import batch, make_model

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install 'fusedopt[stacks]'"
)


def engine(stage: int, bf16: bool) -> tuple[Any, BesideTorch]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.init_distributed()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
    }
    model = make_model()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return made, BesideTorch(optimizer)


def train(made: Any, first: int, last: int) -> None:
    for step in range(2 * first, 2 * last):
        inputs, classes = batch(step)
        made.backward(cross_entropy(made(inputs.to(next(made.parameters()).dtype)).float(), classes))
        made.step()


@pytest.fixture(scope="module", autouse=True)
def _processes_of_its_own(team: Team) -> Iterator[None]:
    """DeepSpeed keeps the process groups that it made: no other group can follow in the same processes."""
    team.stop()
    yield
    team.stop()


@needs_deepspeed
@on_ranks(2)
def test_zero_stages_step_clip_accumulate_save_and_resume(tmp_path: Path) -> None:
    for stage, bf16 in itertools.product((0, 1, 2), (False, True)):
        folder = tmp_path / f"{stage} {bf16}"
        straight, beside = engine(stage, bf16)
        train(straight, 0, 3)
        straight.save_checkpoint(folder)
        train(straight, 3, 5)
        assert beside.steps == 5
        resumed, beside = engine(stage, bf16)
        resumed.load_checkpoint(folder)
        train(resumed, 3, 5)
        assert beside.steps == 2
        for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, other)
