"""torchao's full-precision AdamW: one compiled kernel per parameter.

It carries a leading underscore in torchao, where it stands for comparison with the low-bit optimizers. Each
distinct shape compiles on its own, so on a CPU this peer is left out unless named.
"""

from __future__ import annotations

from functools import partial

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """The AdamW of torchao with state in the parameter's dtype."""
    from torchao.optim import _AdamW

    optimizer: Optimizer = _AdamW(groups, **hyper.keywords())
    return optimizer


def make_lean(groups: ParamGroups, hyper: Hyper, name: str) -> Optimizer:
    """An AdamW of torchao with states of few bits."""
    from torchao import optim

    optimizer: Optimizer = getattr(optim, name)(groups, **hyper.keywords())
    return optimizer


PEERS = [Peer("torchao", make, optimizers=("adamw",), package="torchao", default_devices=("cuda",))]
LEAN = [
    Peer(f"torchao, {states} states", partial(make_lean, name=name), optimizers=("adamw",), package="torchao")
    for states, name in (("8-bit", "AdamW8bit"), ("4-bit", "AdamW4bit"), ("float8", "AdamWFp8"))
]
