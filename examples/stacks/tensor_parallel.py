"""Tensor parallel and FSDP2 on a mesh of two dimensions: each layer's rows or columns, then shards of those.

torchrun --standalone --nproc-per-node 4 examples/stacks/tensor_parallel.py --steps 40
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from common import accuracy, batch, end_rank, network, say, start_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import fusedopt


def main() -> None:
    """Trains and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the optimizer")
    options = parser.parse_args()
    device = start_rank()
    mesh = init_device_mesh(device.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    model = network().to(device)
    plan = {
        "1": ColwiseParallel(),
        "3": RowwiseParallel(output_layouts=Shard(0)),  # the batch takes the place of the sequence
        "4": SequenceParallel(sequence_dim=0),
        "5": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        # Ranks that share a piece of the model take the same batch.
        images, labels = batch(step, mesh.get_local_rank("data"), mesh["data"].size(), device)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            say(f"step {step}: loss {loss.item():.3f}")
    say(f"test accuracy {accuracy(model, device):.3f}")
    end_rank()


if __name__ == "__main__":
    main()
