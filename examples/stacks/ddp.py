"""DistributedDataParallel: every rank holds all parameters; gradients are averaged, in buckets, two batches at a time.

torchrun --standalone --nproc-per-node 2 examples/stacks/ddp.py --steps 40
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from common import accuracy, batch, end_rank, network, say, start_rank
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import fusedopt


def main() -> None:
    """Trains and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the optimizer")
    options = parser.parse_args()
    device = start_rank()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(network().to(device), device_ids=ids, gradient_as_bucket_view=True)
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        with model.no_sync():
            images, labels = batch(2 * step, rank, ranks, device)
            (cross_entropy(model(images), labels) / 2).backward()
        images, labels = batch(2 * step + 1, rank, ranks, device)
        loss = cross_entropy(model(images), labels) / 2
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            say(f"step {step}: loss {2 * loss.item():.3f}")
    say(f"test accuracy {accuracy(model.module, device):.3f}")
    end_rank()


if __name__ == "__main__":
    main()
