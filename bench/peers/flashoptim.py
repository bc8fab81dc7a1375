"""FlashOptim with its compression off, so that it computes the same update as the others."""

from __future__ import annotations

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """FlashOptim's optimizer with uncompressed state and no extra weight bits."""
    import flashoptim

    classes = {"adamw": flashoptim.FlashAdamW, "adam": flashoptim.FlashAdam, "sgd": flashoptim.FlashSGD}
    optimizer: Optimizer = classes[hyper.optimizer](
        groups, **hyper.keywords(), quantize=False, master_weight_bits=None, compress_state_dict=False
    )
    return optimizer


def make_lean(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """FlashAdamW as it comes: 8-bit states, 8 more bits of each weight."""
    import flashoptim

    optimizer: Optimizer = flashoptim.FlashAdamW(groups, **hyper.keywords())
    return optimizer


PEERS = [Peer("flashoptim", make, devices=("cuda",), package="flashoptim")]
LEAN = [Peer("flashoptim", make_lean, devices=("cuda",), optimizers=("adamw",), package="flashoptim")]
