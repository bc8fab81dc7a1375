"""The Trainer of Hugging Face: a small residual network; clipping, bfloat16, checkpoints.

python examples/stacks/hf_trainer.py --steps 60 --out out/hf
python examples/stacks/hf_trainer.py --steps 90 --out out/hf --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import TRAIN, accuracy, digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import fusedopt

try:
    from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fusedopt[hf]'") from None


class Digits(Dataset[dict[str, Tensor]]):
    """The training images as the model's keyword arguments."""

    def __len__(self) -> int:
        return TRAIN

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images, labels = digits()
        return {"pixel_values": images[index], "labels": labels[index]}


def make_model() -> nn.Module:
    """A residual network from its configuration: two stages of one block."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **size))


def make_trainer(out: Path, steps: int, **options: Any) -> Trainer:
    """A trainer whose optimizer is the fused one; the rest is as always."""
    arguments = {"max_steps": steps, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "weight_decay": 0.01}
    more = {"max_grad_norm": 1.0, "bf16": True, "logging_steps": 10, "save_steps": 20, "report_to": "none"}
    use_cpu = not torch.cuda.is_available()
    return Trainer(
        model=make_model(),
        args=TrainingArguments(str(out), use_cpu=use_cpu, disable_tqdm=True, **{**arguments, **more, **options}),
        train_dataset=Digits(),
        optimizer_cls_and_kwargs=(fusedopt.AdamW, {"lr": 3e-3}),
    )


def main() -> None:
    """Trains, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="the step to stop at")
    parser.add_argument("--out", type=Path, default=Path("out/hf"), help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    options = parser.parse_args()
    trainer = make_trainer(options.out, options.steps)
    trainer.train(resume_from_checkpoint=options.resume)
    model = trainer.model.eval()
    print(f"test accuracy {accuracy(lambda images: model(images).logits, trainer.args.device):.3f}")


if __name__ == "__main__":
    main()
