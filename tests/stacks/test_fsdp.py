"""FSDP2: sharded parameters, gradients and states give the bits of the same training in one piece."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fusedopt

from .team import device, on_ranks
from .twin import (
    OPTIMIZERS,
    Net,
    Twin,
    backward,
    make_model,
    train_beside_twin,
    train_two_ranks_beside_one_process,
    whole,
)

WEIGHTS = sum(param.numel() for param in Net().parameters())

each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def shard(model: Net, **options: object) -> Net:
    """Every layer by itself, then what is left."""
    for layer in (model.first, model.last):
        fully_shard(layer, **options)  # type: ignore[call-overload]
    fully_shard(model, **options)  # type: ignore[call-overload]
    return model


@each_optimizer
@on_ranks(2, 4)
def test_uneven_and_empty_shards_get_the_bits_of_the_whole(name: str) -> None:
    model = shard(make_model())
    sizes = [param.to_local().numel() for param in model.parameters()]  # type: ignore[attr-defined]
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, sizes)
    assert everyone[0] != everyone[-1], "the shards are meant to be uneven"
    assert dist.get_world_size() == 2 or 0 in everyone[-1]
    optimizer = train_beside_twin(model, OPTIMIZERS[name])
    for param, state in optimizer.state.items():
        for key, value in state.items():
            assert key == "step" or (isinstance(value, DTensor) and value.placements == param.placements)


@each_optimizer
@on_ranks(2)
def test_a_run_of_two_ranks_is_bit_for_bit_the_run_of_one_process_with_both_batches(name: str) -> None:
    train_two_ranks_beside_one_process(shard(make_model()), OPTIMIZERS[name])


@on_ranks(4)
def test_replicated_and_sharded_meshes_get_the_bits_of_the_whole() -> None:
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("replicate", "shard"))
    train_beside_twin(shard(make_model(), mesh=mesh), OPTIMIZERS["AdamW"])


@pytest.mark.parametrize(
    "policy",
    [
        MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    ],
    ids=["bfloat16", "reduced in float32"],
)
@on_ranks(2)
def test_mixed_precision_policies_keep_float32_state(policy: MixedPrecisionPolicy) -> None:
    optimizer = train_beside_twin(shard(make_model(), mp_policy=policy), OPTIMIZERS["AdamW"])
    for state in optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


@on_ranks(2)
def test_offloaded_parameters_are_updated_on_the_cpu() -> None:
    model = shard(make_model(), offload_policy=CPUOffloadPolicy(pin_memory=device().type == "cuda"))
    optimizer = train_beside_twin(model, OPTIMIZERS["AdamW"])
    assert {param.device.type for param in optimizer.state} == {"cpu"}


def parallelize(model: Net, data: int) -> Net:
    """Tensor and sequence parallel along one dimension of a mesh, FSDP2 over `data` ranks along the other."""
    mesh = init_device_mesh(device().type, (data, dist.get_world_size() // data), mesh_dim_names=("data", "tensor"))
    plan = {
        "first": ColwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
        "last": RowwiseParallel(input_layouts=Shard(0)),
    }
    parallelize_module(model, mesh["tensor"], plan)
    return shard(model, mesh=mesh["data"]) if data > 1 else model


@each_optimizer
@on_ranks(4)
def test_tensor_parallel_with_fsdp_on_a_mesh_of_two_dimensions_gets_the_bits_of_the_whole(name: str) -> None:
    model = parallelize(make_model(), data=2)
    assert {param.device_mesh.ndim for param in model.parameters()} == {2}  # type: ignore[attr-defined]
    train_beside_twin(model, OPTIMIZERS[name], rank=dist.get_rank() // 2)


@on_ranks(2)
def test_tensor_parallel_alone_sums_the_partial_gradients_of_replicated_parameters() -> None:
    model = parallelize(make_model(), data=1)
    seen = set()

    def look(step: int) -> None:
        seen.update(param.grad.placements for param in model.parameters())  # type: ignore[union-attr]

    train_beside_twin(model, OPTIMIZERS["AdamW"], before_step=look, rank=0)
    assert (Partial(),) in seen, "a norm's gradients are sums over the parts of the sequence"


@pytest.mark.parametrize("data", [1, 2], ids=["tensor parallel", "FSDP2"])
@on_ranks(2)
def test_torchs_gradient_clipping_works_unchanged_across_ranks(data: int) -> None:
    model = parallelize(make_model(), data)
    plain = make_model()
    norms = []

    def clip(step: int) -> None:
        for own, param in zip(plain.parameters(), model.parameters(), strict=True):
            own.grad = whole(param.grad)  # type: ignore[arg-type]
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        # Two sums of the same squares, in other orders.
        torch.testing.assert_close(norms[-1], expected, rtol=WEIGHTS * torch.finfo(torch.float32).eps, atol=0)

    train_beside_twin(model, OPTIMIZERS["AdamW"], before_step=clip, rank=0 if data == 1 else None)
    assert min(norms) > 0.05, "the norms are meant to be clipped"


@on_ranks(2)
def test_an_infinite_gradient_on_one_rank_skips_the_scaled_step_on_all() -> None:
    model = shard(make_model())
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    twin = Twin(model.parameters(), OPTIMIZERS["AdamW"])
    scaler = torch.amp.GradScaler(device().type, init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step, scale=float(scaler.scale(torch.ones((), device=device()))))
        if step != 1:
            twin.step(scale=1 / scaler.get_scale())
        elif dist.get_rank() == 1:
            model.last.weight.grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        twin.check(optimizer)
    assert scaler.get_scale() == 2.0, "the scale is halved once"


@on_ranks(2)
def test_gradients_may_accumulate_and_parameters_may_freeze_for_a_while() -> None:
    model = shard(make_model())
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01)
    twin = Twin(model.parameters(), OPTIMIZERS["AdamW"])
    for step in range(6):
        optimizer.zero_grad()
        model.set_requires_gradient_sync(False)  # type: ignore[operator]
        backward(model, 2 * step)
        model.set_requires_gradient_sync(True)  # type: ignore[operator]
        backward(model, 2 * step + 1)
        if step % 2:
            model.norm.weight.grad = None
        twin.step()
        optimizer.step()
        twin.check(optimizer)
