"""Lightning: a module whose configure_optimizers returns the fused optimizer; clipping, bfloat16, checkpoints.

python examples/stacks/lightning_module.py --steps 40 --out out/lightning
python examples/stacks/lightning_module.py --steps 80 --out out/lightning --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import TRAIN, accuracy, digits, network
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

try:
    import lightning
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fusedopt[lightning]'") from None


class Perceptron(lightning.LightningModule):
    """A perceptron, its loss and its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; with fused=False the scaler unscales, as Lightning wants it where it clips and scales."""
        return fusedopt.AdamW(self.parameters(), lr=3e-3, fused=False)


def make_trainer(out: Path, steps: int, **options: Any) -> lightning.Trainer:
    """A trainer that clips, in mixed precision."""
    usual = {"precision": "bf16-mixed", "gradient_clip_val": 1.0, "enable_progress_bar": False, "logger": False}
    return lightning.Trainer(max_steps=steps, default_root_dir=out, **{**usual, **options})


def data() -> DataLoader[Any]:
    """The training images and labels."""
    images, labels = digits()
    return DataLoader(TensorDataset(images[:TRAIN], labels[:TRAIN]), batch_size=64)


def main() -> None:
    """Trains, saves, and prints the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="the step to stop at")
    parser.add_argument("--out", type=Path, default=Path("out/lightning"), help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    options = parser.parse_args()
    file = options.out / "last.ckpt"
    module = Perceptron()
    trainer = make_trainer(options.out, options.steps, enable_checkpointing=False)
    trainer.fit(module, data(), ckpt_path=file if options.resume else None)
    trainer.save_checkpoint(file)
    print(f"test accuracy {accuracy(module.network, module.device):.3f}")


if __name__ == "__main__":
    main()
