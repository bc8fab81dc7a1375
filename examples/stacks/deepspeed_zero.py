"""DeepSpeed ZeRO: fusedopt as the client's optimizer, over the flat partitions that DeepSpeed makes of the parameters.

DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/stacks/deepspeed_zero.py --steps 40
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from common import accuracy, batch, end_rank, network, say
from torch.nn.functional import cross_entropy

import fusedopt

try:
    import deepspeed
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fusedopt[deepspeed]'") from None

CONFIG = {
    "train_micro_batch_size_per_gpu": 64,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,  # DeepSpeed knows its own optimizers and torch's by name
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
}


def main() -> None:
    """Trains, saves, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of the optimizer")
    parser.add_argument("--out", type=Path, default=Path("out/deepspeed"), help="folder of the checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo")
    model = network()
    optimizer = fusedopt.AdamW(model.parameters(), lr=3e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    for step in range(options.steps):
        images, labels = batch(step, dist.get_rank(), dist.get_world_size(), engine.device)
        loss = cross_entropy(engine(images.bfloat16()).float(), labels)
        engine.backward(loss)
        engine.step()
        if step % 10 == 0:
            say(f"step {step}: loss {loss.item():.3f}")
    engine.save_checkpoint(options.out)
    say(f"test accuracy {accuracy(lambda images: engine(images.bfloat16()), engine.device):.3f}")
    end_rank()


if __name__ == "__main__":
    main()
