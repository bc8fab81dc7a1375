"""ZeRO-1 of torch: each rank holds the state of its part of the parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import fusedopt

from .team import device, on_ranks
from .twin import Twin, backward, make_model

CLASSES = {
    "AdamW": (fusedopt.AdamW, {"lr": 0.01}),
    "Adam": (fusedopt.Adam, {"lr": 0.01, "amsgrad": True}),
    "SGD": (fusedopt.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("as_views", [False, True], ids=["parameters", "parameters as bucket views"])
@on_ranks(2, 4)
def test_parts_of_the_state_give_the_bits_of_the_whole_through_a_change_of_lr_and_a_checkpoint(
    name: str, as_views: bool
) -> None:
    cls, options = CLASSES[name]
    model = make_model()
    ids = [device().index] if device().type == "cuda" else None
    model = DistributedDataParallel(model, device_ids=ids)  # type: ignore[assignment]

    def make() -> ZeroRedundancyOptimizer:
        return ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=cls, parameters_as_bucket_view=as_views, **options
        )

    optimizer = make()
    twin = Twin(model.parameters(), lambda params: cls(params, **options))
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        twin.step()
        optimizer.step()
        twin.check_params()
        if step == 1:
            for group in (*optimizer.param_groups, *twin.optimizer.param_groups):
                group["lr"] *= 0.5
        if step == 2:
            saved = [None]
            optimizer.consolidate_state_dict(to=0)
            if dist.get_rank() == 0:
                saved = [optimizer.state_dict()]  # type: ignore[list-item]
            dist.broadcast_object_list(saved, src=0)
            optimizer = make()
            optimizer.load_state_dict(saved[0])  # type: ignore[arg-type]
    held = sum(len(optimizer.optim.state.get(param, {})) > 0 for param in model.parameters())  # type: ignore[attr-defined]
    assert held < len(list(model.parameters())), "a rank holds but a part of the state"


@on_ranks(2)
def test_the_consolidated_state_is_that_of_one_process_and_loads_into_torch() -> None:
    model = make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fusedopt.AdamW, lr=0.01)
    twin = Twin(model.parameters(), lambda params: fusedopt.AdamW(params, lr=0.01))
    for step in range(2):
        optimizer.zero_grad()
        backward(model, step, rank=0)
        twin.step()
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        alone = torch.optim.AdamW(model.parameters(), lr=1.0)
        alone.load_state_dict(optimizer.state_dict())
        assert alone.param_groups[0]["lr"] == 0.01
        twin.check(alone)
