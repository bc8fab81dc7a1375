"""A small residual network on scikit-learn's 8 x 8 digits: the vision model of `python -m bench train`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, relu

Batch = tuple[Tensor, Tensor]

VALIDATION = 360
"""Images kept for validation, of 1797."""

WIDTH = 32
BLOCKS = 6
BATCH = 32


class Block(nn.Module):
    """Two 3 x 3 convolutions, each normalised, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, 8, 8) to the same."""
        return relu(x + self.norm2(self.second(relu(self.norm1(self.first(x))))))


class Net(nn.Module):
    """(batch, 1, 8, 8) images in 0..1 to (batch, 10) scores."""

    def __init__(self, width: int = WIDTH, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits."""
        scores: Tensor = self.head(self.blocks(relu(self.norm(self.stem(x)))).mean(dim=(2, 3)))
        return scores


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) in 0..1 and labels (n,) for training and validation."""

    train: Batch
    val: Batch

    @property
    def seen(self) -> Batch:
        """As many of the training images as there are for validation, to follow the training loss by."""
        images, labels = self.train
        return images[:VALIDATION], labels[:VALIDATION]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless random batches of training images, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.train
        while True:
            for chosen in torch.randperm(len(labels), generator=generator).split(BATCH)[:-1]:
                yield images[chosen.to(images.device)], labels[chosen.to(labels.device)]


def load(device: str, seed: int) -> Images:
    """The digits, shuffled and split by `seed`."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = (torch.from_numpy(digits.images).float() / 16)[order].unsqueeze(1).to(device)
    labels = torch.from_numpy(digits.target).long()[order].to(device)
    return Images((images[VALIDATION:], labels[VALIDATION:]), (images[:VALIDATION], labels[:VALIDATION]))


def build(device: str, seed: int) -> Net:
    """The network with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().to(device)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    images, labels = batch
    return cross_entropy(model(images), labels)
