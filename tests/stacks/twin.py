"""A small model, its batches, and its twin: the same training in one process, for which bits can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import fusedopt

from .team import device

# Constructors: every state there is, and none.
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda params: fusedopt.AdamW(params, lr=0.01),
    "Adam amsgrad": lambda params: fusedopt.Adam(params, lr=0.01, amsgrad=True, weight_decay=0.1),
    "SGD": lambda params: fusedopt.SGD(params, lr=0.1),
    "SGD momentum": lambda params: fusedopt.SGD(params, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
}
FEATURES, WIDTH, CLASSES = 6, 5, 3


class Net(nn.Module):
    """Rows of 5 and 3: over 2 ranks uneven shards, over 4 also empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.norm(torch.relu(self.first(inputs))))
        return outputs


def make_model(seed: int = 1) -> Net:
    """The same weights wherever it is called."""
    torch.manual_seed(seed)
    return Net().to(device())


def batch(step: int, rank: int | None = None, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (size, 6) and classes (size) of one rank, this one unless said, at one step."""
    generator = torch.Generator().manual_seed(1000 * step + (dist.get_rank() if rank is None else rank))
    inputs = torch.randn(size, FEATURES, generator=generator)
    return inputs.to(device()), torch.randint(CLASSES, (size,), generator=generator).to(device())


def backward(model: nn.Module, step: int, rank: int | None = None, scale: float = 1.0) -> None:
    """Adds a batch's gradients."""
    inputs, classes = batch(step, rank)
    (cross_entropy(model(inputs).float(), classes) * scale).backward()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its elements, in memory of its own."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


class Twin:
    """The parameters of a model in one piece, updated by one more optimizer from the same gradients."""

    def __init__(self, params: Iterable[Tensor], make: Callable[..., Optimizer]) -> None:
        self._theirs = list(params)
        self._own = [nn.Parameter(whole(param)) for param in self._theirs]
        self.optimizer = make(self._own)

    def step(self, scale: float = 1.0) -> None:
        """One step with the gradients that the model has now, times a power of 2."""
        for own, other in zip(self._own, self._theirs, strict=True):
            own.grad = None if other.grad is None else whole(other.grad) * scale
        self.optimizer.step()

    def check(self, optimizer: Optimizer) -> None:
        """The model's parameters and states are these, bit for bit."""
        self.check_params()
        for index, (own, other) in enumerate(zip(self._own, self._theirs, strict=True)):
            mine, theirs = self.optimizer.state.get(own, {}), optimizer.state.get(other, {})
            assert list(mine) == list(theirs)
            for name in mine:
                assert torch.equal(whole(theirs[name]), mine[name]), f"{name} of parameter {index}"

    def check_params(self) -> None:
        """The model's parameters are these, bit for bit."""
        for index, (own, other) in enumerate(zip(self._own, self._theirs, strict=True)):
            assert torch.equal(whole(other), own), f"parameter {index}: {whole(other)} is not {own}"


def train_beside_twin(
    model: nn.Module,
    make: Callable[..., Optimizer],
    steps: int = 3,
    before_step: Callable[[int], None] = lambda step: None,
    rank: int | None = None,
) -> Optimizer:
    """Trains on the batches of a rank, and compares with the twin after every step. Returns the model's optimizer."""
    optimizer = make(model.parameters())
    twin = Twin(model.parameters(), make)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, rank)
        before_step(step)
        twin.step()
        launches = fusedopt.launch_count()
        optimizer.step()
        assert fusedopt.launch_count() == launches + 1
        twin.check(optimizer)
    return optimizer


def train_two_ranks_beside_one_process(model: nn.Module, make: Callable[..., Optimizer], steps: int = 5) -> None:
    """Trains on two ranks, beside one process that takes both batches; compares the parameters bit for bit.

    With two ranks an average is exact but for one rounding, the same in whatever order.
    """
    alone = make_model()
    optimizers = [make(one.parameters()) for one in (model, alone)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        backward(model, step)
        for rank in range(2):
            backward(alone, step, rank, scale=0.5)
        for optimizer in optimizers:
            optimizer.step()
    for param, expected in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(whole(param), expected)
