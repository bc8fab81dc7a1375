"""bitsandbytes with 32-bit state, the kind that computes the same update as the others."""

from __future__ import annotations

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """Bitsandbytes' optimizer with 32-bit state."""
    from bitsandbytes import optim

    classes = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}
    optimizer: Optimizer = classes[hyper.optimizer](groups, **hyper.keywords(), optim_bits=32)
    return optimizer


def make_lean(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """AdamW with states in 8 bits."""
    from bitsandbytes import optim

    optimizer: Optimizer = optim.AdamW8bit(groups, **hyper.keywords())
    return optimizer


PEERS = [Peer("bitsandbytes", make, package="bitsandbytes")]
LEAN = [Peer("bitsandbytes, 8-bit states", make_lean, optimizers=("adamw",), package="bitsandbytes")]
