"""DistributedDataParallel: gradients that are views of its buckets, accumulation, and the run of one process."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt

from .team import device, on_ranks
from .twin import OPTIMIZERS, Net, Twin, backward, make_model, train_beside_twin, train_two_ranks_beside_one_process

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Branching(Net):
    """Every other step leaves the norm out, whose gradients are then None or 0."""

    steps = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        hidden = torch.relu(self.first(inputs))
        outputs: torch.Tensor = self.last(self.norm(hidden) if self.steps % 2 else hidden)
        return outputs


def wrap(model: nn.Module, **options: bool) -> DistributedDataParallel:
    """Buckets of one or two parameters, which are laid out anew after the first step."""
    ids = [device().index] if device().type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=0.0001, **options)  # type: ignore[arg-type]


@each_optimizer
@pytest.mark.parametrize("views", [False, True], ids=["copies", "bucket views"])
@on_ranks(2, 4)
def test_ranks_stay_equal_and_get_the_bits_of_one_process(name: str, views: bool) -> None:
    model = wrap(make_model(), gradient_as_bucket_view=views)
    train_beside_twin(model, OPTIMIZERS[name], steps=4)
    for param in model.parameters():
        everyone = [torch.empty_like(param) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, param.detach())
        assert all(torch.equal(everyone[0], other) for other in everyone)


@on_ranks(2)
def test_a_run_of_two_ranks_is_bit_for_bit_the_run_of_one_process_with_both_batches() -> None:
    train_two_ranks_beside_one_process(wrap(make_model(), gradient_as_bucket_view=True), OPTIMIZERS["AdamW"])


@pytest.mark.parametrize("keep", [False, True], ids=["gradients made anew", "gradients zeroed"])
@on_ranks(2)
def test_gradients_accumulate_without_synchronisation(keep: bool) -> None:
    model = wrap(make_model(), gradient_as_bucket_view=True)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    twin = Twin(model.parameters(), OPTIMIZERS["AdamW"])
    for step in range(3):
        optimizer.zero_grad(set_to_none=not keep)
        for part in range(3):
            with model.no_sync() if part < 2 else nullcontext():
                backward(model, 3 * step + part)
        twin.step()
        optimizer.step()
        twin.check(optimizer)


@on_ranks(2)
def test_parameters_that_a_step_does_not_use_are_found_and_updated_as_in_one_process() -> None:
    torch.manual_seed(1)
    model = wrap(Branching().to(device()), gradient_as_bucket_view=True, find_unused_parameters=True)
    train_beside_twin(model, OPTIMIZERS["AdamW"], steps=5)
