"""NVIDIA apex: FusedAdam and FusedSGD."""

from __future__ import annotations

from importlib import import_module

import torch

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make(groups: ParamGroups, hyper: Hyper, module: str = "apex.optimizers") -> Optimizer:
    """FusedAdam, which has a flag for decoupled decay, or FusedSGD, of a module that has apex's."""
    optimizers = import_module(module)
    made: Optimizer
    if hyper.is_adam:
        made = optimizers.FusedAdam(groups, **hyper.keywords(), adam_w_mode=hyper.optimizer == "adamw")
    else:
        made = optimizers.FusedSGD(groups, **hyper.keywords())
    return made


def make_lean(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """FusedAdam with float32 masters and states beside 16-bit parameters."""
    from apex.optimizers import FusedAdam

    groups = [{**group, "lr": torch.tensor(group["lr"])} for group in groups]  # masters want a rate on the device
    optimizer: Optimizer = FusedAdam(groups, **hyper.keywords(), capturable=True, master_weights=True)
    return optimizer


PEERS = [Peer("apex", make, devices=("cuda",), package="apex")]
LEAN = [Peer("apex, float32 masters", make_lean, devices=("cuda",), optimizers=("adamw",), package="apex")]
