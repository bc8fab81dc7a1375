"""The models of `bench.quality`: each with its batches, its loss and its optimizer, as every mode trains it."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench import digits
from bench.train import example_package


class Task(ABC):
    """A model with its batches and its optimizer, as every mode trains it.

    Attributes:
        model: what is trained.
        optimizer: of fusedopt.
        schedule: of the learning rate.
        batches: endless.
        val: batches for validation.
    """

    model: nn.Module
    optimizer: Any
    schedule: Any
    batches: Iterator[Any]
    val: list[Any]

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a model on a batch, the scores that it is of, and what they should be."""

    def step(self) -> None:
        """One update."""
        self.optimizer.zero_grad()
        self.loss(self.model, next(self.batches))[0].backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Loss and accuracy of the parameters as they are stored, in float32."""
        wide = copy.deepcopy(self.model).float().eval()
        found = [self.loss(wide, batch) for batch in self.val]
        right = [float((scores.argmax(dim=1) == labels).double().mean()) for _, scores, labels in found]
        return mean(float(loss) for loss, _, _ in found), mean(right)


class CharLM(Task):
    """The character model."""

    def __init__(self, dtype: torch.dtype, factory: Callable[..., Any], seed: int, steps: int) -> None:
        charlm = example_package()
        name = str(dtype).removeprefix("torch.")
        config = charlm.Config(steps=steps, width=64, layers=2, seed=seed, dtype=name)
        text = charlm.build_text(config)
        run = charlm.Run(factory, config, text)
        self.model, self.optimizer, self.schedule, self.val = run.model, run.optimizer, run.schedule, run.eval_sets[1]
        self.batches = text.batches(config)

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy of the next character."""
        scores, labels = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
        return cross_entropy(scores, labels), scores, labels


class Digits(Task):
    """The vision model; the same images are for validation whatever the seed."""

    def __init__(self, dtype: torch.dtype, factory: Callable[..., Any], seed: int, steps: int) -> None:
        images = digits.load("cpu", 0)
        self.model = digits.build("cpu", seed).to(dtype)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        self.optimizer = factory(self.model.parameters(), lr=2e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches, self.val = images.batches(seed), [images.val]

    def loss(self, model: nn.Module, batch: digits.Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean cross-entropy of the digit."""
        images, labels = batch
        scores = model(images.to(next(model.parameters()).dtype))
        return cross_entropy(scores, labels), scores, labels


TASKS: dict[str, type[Any]] = {"charlm": CharLM, "digits": Digits}
