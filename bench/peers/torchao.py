"""torchao's full-precision AdamW: one compiled kernel per parameter.

It carries a leading underscore in torchao, where it stands for comparison with the low-bit optimizers. Each
distinct shape compiles on its own, so on a CPU this peer is left out unless named.
"""

from __future__ import annotations

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """The AdamW of torchao with state in the parameter's dtype."""
    from torchao.optim import _AdamW

    optimizer: Optimizer = _AdamW(groups, **hyper.keywords())
    return optimizer


PEERS = [Peer("torchao", make, optimizers=("adamw",), package="torchao", default_devices=("cuda",))]
