"""ZeRO-1: every rank updates its part of the parameters and holds the state of those alone.

torchrun --standalone --nproc-per-node 2 examples/stacks/zero1.py --steps 40
"""

from __future__ import annotations

import argparse

import torch.distributed as dist
from common import accuracy, batch, end_rank, network, say, start_rank
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fusedopt


def main() -> None:
    """Trains and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the optimizer")
    options = parser.parse_args()
    device = start_rank()
    ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(network().to(device), device_ids=ids)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fusedopt.AdamW, lr=3e-3)
    for step in range(options.steps):
        images, labels = batch(step, dist.get_rank(), dist.get_world_size(), device)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            say(f"step {step}: loss {loss.item():.3f}")
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        print(f"the whole state: {len(optimizer.state_dict()['state'])} parameters")
    say(f"test accuracy {accuracy(model.module, device):.3f}")
    end_rank()


if __name__ == "__main__":
    main()
