"""FSDP2: every rank holds a shard of parameters, gradients and state; checkpoints that any number of ranks resume.

torchrun --standalone --nproc-per-node 2 examples/stacks/fsdp2.py --steps 40 --out out/fsdp2
torchrun --standalone --nproc-per-node 4 examples/stacks/fsdp2.py --steps 60 --out out/fsdp2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from common import accuracy, batch, end_rank, network, say, start_rank
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import fusedopt


def main() -> None:
    """Resumes the newest checkpoint if there is one, trains, saves, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="the step to stop at")
    parser.add_argument("--out", type=Path, default=Path("out/fsdp2"), help="folder of the checkpoints")
    options = parser.parse_args()
    device = start_rank()
    model = network().to(device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3)

    # Metadata are written last: a folder that has them is whole, whatever happened to those after it.
    done = max((int(path.parent.name) for path in options.out.glob("*/.metadata")), default=0)
    if done:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=options.out / str(done))
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        say(f"resumed from step {done}")
    for step in range(done, options.steps):
        images, labels = batch(step, dist.get_rank(), dist.get_world_size(), device)
        loss = cross_entropy(model(images).float(), labels)
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            say(f"step {step}: loss {loss.item():.3f}")
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=options.out / str(options.steps))
    say(f"test accuracy {accuracy(model, device):.3f}")
    end_rank()


if __name__ == "__main__":
    main()
