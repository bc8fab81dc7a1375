"""The data: the source of Python's standard library, which is on every machine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import Config

EVAL_BATCHES = 8
"""Batches of fixed windows over which a training or validation loss is averaged."""


@dataclass(frozen=True)
class Text:
    """The text as numbers.

    Attributes:
        train, val: Index into `characters` of each character of the two parts, 1-d int64 on the CPU.
        characters: Those that occur, sorted.
    """

    train: Tensor
    val: Tensor
    characters: str

    def batches(self, config: Config) -> Iterator[Tensor]:
        """Endless (batch, block + 1) random windows of the training text, the same for the same seed."""
        generator = torch.Generator().manual_seed(config.seed)
        while True:
            starts = torch.randint(len(self.train) - config.block, (config.batch,), generator=generator)
            yield _windows(self.train, starts, config)


def fixed_batches(part: Tensor, config: Config) -> list[Tensor]:
    """`EVAL_BATCHES` batches of windows spread evenly over one part of the text."""
    count = EVAL_BATCHES * config.batch
    starts = torch.linspace(0, len(part) - config.block - 1, count, dtype=torch.float64).long()
    return [_windows(part, some, config) for some in starts.split(config.batch)]


def _windows(part: Tensor, starts: Tensor, config: Config) -> Tensor:
    return part[starts[:, None] + torch.arange(config.block + 1)].to(config.device)


def build_text(config: Config) -> Text:
    """Reads the standard library's modules in the order of their names, up to `config.text_size` characters.

    Every tenth module is validation text, so that no text stands on both sides.

    Raises:
        ValueError: The library's source is not on this machine, or the text is too short for one window.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[str]] = {"train": [], "val": []}
    left = config.text_size
    for index, path in enumerate(sorted(folder.glob("*.py"))):
        source = path.read_text(encoding="utf-8", errors="replace")[:left]
        parts["val" if index % 10 == 4 else "train"].append(source)
        left -= len(source)
    train, val = ("".join(part) for part in parts.values())
    if min(len(train), len(val)) <= config.block:
        raise ValueError(
            f"text_size={config.text_size} gives {len(train)} training and {len(val)} validation characters"
            f" from {folder}: both must be more than block={config.block}"
        )
    characters = "".join(sorted(set(train + val)))
    number = {character: i for i, character in enumerate(characters)}
    train_numbers, val_numbers = (torch.tensor([number[c] for c in part]) for part in (train, val))
    return Text(train_numbers, val_numbers, characters)
