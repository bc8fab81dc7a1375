"""What the examples of this folder share: scikit-learn's digits, a small network, the start of a rank."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install 'fusedopt[stacks]'") from None

BATCH = 64
TRAIN = 1501  # images; the other 296 are for the test


@cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1797 images (n, 1, 8, 8) in 0..1 and their labels (n,), in an order of their own."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1)
    return images[order], torch.tensor(found.target)[order]


def batch(step: int, rank: int = 0, ranks: int = 1, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """One rank's part of a step's batch: images and labels."""
    images, labels = digits()
    chosen = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(step))[: BATCH * ranks][rank::ranks]
    return images[chosen].to(device), labels[chosen].to(device)


def network() -> nn.Sequential:
    """A perceptron with two hidden layers; the same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.LayerNorm(50), nn.Linear(50, 10)
    )


@torch.no_grad()
def accuracy(model: nn.Module, device: torch.device | None = None) -> float:
    """The share of the test images whose label has the highest score."""
    images, labels = digits()
    return float((model(images[TRAIN:].to(device)).argmax(1) == labels[TRAIN:].to(device)).float().mean())


def start_rank() -> torch.device:
    """Joins the ranks that torchrun started: over NCCL where there are GPUs, else over gloo. The rank's device."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def end_rank() -> None:
    """Leaves the ranks that :func:`start_rank` joined, and the process: nothing after it runs.

    DTensor's caches keep gloo's threads alive after the group is destroyed. One that drops a tensor while Python shuts
    down aborts the process ("terminate called without an active exception", one run in twenty where ranks outnumber
    cores), so the process ends before Python does.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def say(text: str) -> None:
    """Prints on the first rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)
