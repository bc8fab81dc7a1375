"""The training loop, with whatever optimizer it is given, and what it measures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import DTYPES, Config
from .data import Text, build_text, fixed_batches
from .model import build_model

OptimizerFactory = Callable[..., Optimizer]
"""Called as `factory(parameter_groups, lr=config.lr)`; an optimizer class is one."""


@dataclass(frozen=True)
class Evaluation:
    """Losses over fixed windows after `step` updates, in nats a character."""

    step: int
    train: float
    val: float


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        losses: Loss of each step's batch before its update, in nats a character.
        evaluations: Losses before the first step, every `eval_every` steps and at the end.
        forward_ms, backward_ms, optimizer_ms: Each step's three phases; the last is `optimizer.step()` alone.
        parameters: Number of trained elements.
        tensors: Number of tensors they are in.
    """

    losses: list[float]
    evaluations: list[Evaluation]
    forward_ms: list[float]
    backward_ms: list[float]
    optimizer_ms: list[float]
    parameters: int
    tensors: int

    @property
    def step_ms(self) -> list[float]:
        """Time of each whole step."""
        phases = zip(self.forward_ms, self.backward_ms, self.optimizer_ms, strict=True)
        return [sum(step) for step in phases]

    def median_ms(self) -> dict[str, float]:
        """Median time of each phase and of the whole step."""
        phases = {"forward": self.forward_ms, "backward": self.backward_ms, "optimizer": self.optimizer_ms}
        return {name: statistics.median(ms) for name, ms in {**phases, "step": self.step_ms}.items()}

    def seconds_to(self, val_loss: float) -> float | None:
        """Training time until an evaluation first saw a validation loss at or under `val_loss`.

        Evaluations themselves are left out of it. None if it never got there.
        """
        for evaluation in self.evaluations:
            if evaluation.val <= val_loss:
                return sum(self.step_ms[: evaluation.step]) / 1e3
        return None


class Run:
    """One model with one optimizer, and what was measured while it trained."""

    def __init__(self, factory: OptimizerFactory, config: Config, text: Text) -> None:
        self.model = build_model(len(text.characters), config)
        self.optimizer = factory(parameter_groups(self.model, config.weight_decay), lr=config.lr)
        self.schedule = LambdaLR(self.optimizer, lambda step: share_of_lr(step, config))
        self.eval_sets = [fixed_batches(part, config) for part in (text.train, text.val)]
        self.clock = Clock(config.device)
        # One tensor for all of them: read at the end, so that no step waits for a GPU.
        self.losses = torch.zeros(config.steps, device=config.device, dtype=DTYPES[config.dtype])
        self.steps = 0
        self.evaluations: list[Evaluation] = []

    def loss(self, batch: Tensor) -> Tensor:
        """Mean cross-entropy of the next character, over a batch of (batch, block + 1) characters."""
        return cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def step(self, batch: Tensor) -> None:
        """One update, timed; there are at most `config.steps` of them."""
        self.optimizer.zero_grad()
        self.clock.mark("start")
        loss = self.loss(batch)
        self.clock.mark("forward")
        loss.backward()
        self.clock.mark("backward")
        self.optimizer.step()
        self.clock.mark("optimizer")
        self.schedule.step()
        self.losses[self.steps] = loss.detach()
        self.steps += 1

    @torch.no_grad()
    def evaluate(self) -> None:
        """Notes the losses over the fixed windows, outside the measured time."""
        means = [torch.stack([self.loss(batch) for batch in part]).double().mean() for part in self.eval_sets]
        train, val = (float(mean) for mean in means)
        self.evaluations.append(Evaluation(self.steps, train, val))

    def result(self) -> Result:
        """All that was noted so far."""
        sizes = [p.numel() for group in self.optimizer.param_groups for p in group["params"]]
        return Result(
            losses=self.losses[: self.steps].tolist(),
            evaluations=list(self.evaluations),
            forward_ms=self.clock.milliseconds("start", "forward"),
            backward_ms=self.clock.milliseconds("forward", "backward"),
            optimizer_ms=self.clock.milliseconds("backward", "optimizer"),
            parameters=sum(sizes),
            tensors=len(sizes),
        )


class Clock:
    """Marks moments of each step: time itself on the CPU; events on a GPU, so that nothing waits for it."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.marks: dict[str, list[Any]] = {}

    def mark(self, name: str) -> None:
        """Notes now as this step's moment `name`."""
        if self.cuda:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.setdefault(name, []).append(moment)

    def milliseconds(self, begin: str, end: str) -> list[float]:
        """Time between two moments, for each step."""
        pairs = zip(self.marks[begin], self.marks[end], strict=True)
        if not self.cuda:
            return [(b - a) * 1e3 for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings, decayed; biases and norms, not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def share_of_lr(step: int, config: Config) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine from 1 to 0.1."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.55 + 0.45 * math.cos(math.pi * done)


def train_together(
    factories: Mapping[str, OptimizerFactory],
    config: Config,
    text: Text | None = None,
    on_step: Callable[[dict[str, Run]], None] | None = None,
) -> dict[str, Result]:
    """Trains one model per optimizer, all from the same weights on the same batches, step by step in turns.

    In turns, and in the opposite order every other step, because a machine's speed drifts: so a drift meets
    all of them alike, and the times of one step may be compared in pairs.

    Args:
        factories: Name of each optimizer and what builds it.
        config: All else.
        text: What `build_text(config)` gave; read here when not given.
        on_step: Called with the runs after each step, for a progress bar.
    """
    text = text or build_text(config)
    runs = {name: Run(factory, config, text) for name, factory in factories.items()}
    for step, batch in zip(range(config.steps), text.batches(config), strict=False):
        for run in list(runs.values())[:: 1 if step % 2 == 0 else -1]:
            if step % config.eval_every == 0:
                run.evaluate()
            run.step(batch)
        if on_step:
            on_step(runs)
    for run in runs.values():
        run.evaluate()
    return {name: run.result() for name, run in runs.items()}


def train(factory: OptimizerFactory, config: Config) -> Result:
    """Trains one model with the optimizer that `factory(parameter_groups, lr=config.lr)` makes."""
    return train_together({"run": factory}, config)["run"]
