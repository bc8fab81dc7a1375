"""torch.optim's three ways: a loop over tensors, foreach, and fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.peers.peer import Hyper, ParamGroups, Peer

CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def make(groups: ParamGroups, hyper: Hyper, **flags: Any) -> torch.optim.Optimizer:
    """One of torch's optimizers with the given implementation flags."""
    return CLASSES[hyper.optimizer](groups, **hyper.keywords(), **flags)


PEERS = [
    Peer("torch-loop", lambda groups, hyper: make(groups, hyper, foreach=False, fused=False)),
    Peer("torch-foreach", lambda groups, hyper: make(groups, hyper, foreach=True)),
    Peer("torch-fused", lambda groups, hyper: make(groups, hyper, fused=True)),
]
