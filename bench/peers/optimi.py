"""optimi (torch-optimi), without Kahan summation so that it computes the same update as the others."""

from __future__ import annotations

from functools import partial

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """The optimizer of optimi, which picks Triton, foreach or a loop by itself."""
    import optimi

    classes = {"adamw": optimi.AdamW, "adam": optimi.Adam, "sgd": optimi.SGD}
    optimizer: Optimizer = classes[hyper.optimizer](groups, **hyper.keywords(), kahan_sum=False)
    return optimizer


def make_lean(groups: ParamGroups, hyper: Hyper, kahan: bool) -> Optimizer:
    """AdamW with or without what Kahan summation keeps."""
    import optimi

    optimizer: Optimizer = optimi.AdamW(groups, **hyper.keywords(), kahan_sum=kahan)
    return optimizer


PEERS = [Peer("optimi", make, package="optimi", distribution="torch-optimi")]
LEAN = [
    Peer(name, partial(make_lean, kahan=kahan), optimizers=("adamw",), package="optimi")
    for name, kahan in (("optimi", False), ("optimi, kahan", True))
]
