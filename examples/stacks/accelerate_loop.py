"""Accelerate: a training loop of one's own on any number of processes; clipping, bfloat16, accumulation, checkpoints.

python examples/stacks/accelerate_loop.py --steps 40 --out out/accelerate
torchrun --standalone --nproc-per-node 2 examples/stacks/accelerate_loop.py --steps 40 --out out/accelerate
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import TRAIN, accuracy, digits, network
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fusedopt[hf]'") from None


def main() -> None:
    """Trains, saves, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("out/accelerate"), help="folder of the checkpoint")
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    images, labels = digits()
    data = DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), batch_size=32, shuffle=True)
    model = network()
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.steps)
    model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, data, scheduler)
    steps = 0
    while steps < options.steps:
        for pictures, classes in data:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(pictures), classes)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    steps += 1
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if steps == options.steps:
                break
    accelerator.save_state(options.out)
    accelerator.print(f"loss {loss.item():.3f}, test accuracy {accuracy(model, accelerator.device):.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
