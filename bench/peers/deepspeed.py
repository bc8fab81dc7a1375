"""DeepSpeed: FusedAdam on a GPU and DeepSpeedCPUAdam on a CPU, both compiled at first use."""

from __future__ import annotations

from bench.peers.peer import Hyper, Optimizer, ParamGroups, Peer


def make_cpu(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """DeepSpeedCPUAdam, which has a flag for decoupled decay."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: Optimizer = DeepSpeedCPUAdam(groups, **hyper.keywords(), adamw_mode=hyper.optimizer == "adamw")
    return optimizer


def make_cuda(groups: ParamGroups, hyper: Hyper) -> Optimizer:
    """DeepSpeed's FusedAdam, which has a flag for decoupled decay."""
    from deepspeed.ops.adam import FusedAdam

    optimizer: Optimizer = FusedAdam(groups, **hyper.keywords(), adam_w_mode=hyper.optimizer == "adamw")
    return optimizer


ADAMS = ("adamw", "adam")
PEERS = [
    Peer("deepspeed-cpu", make_cpu, devices=("cpu",), optimizers=ADAMS, package="deepspeed"),
    Peer("deepspeed", make_cuda, devices=("cuda",), optimizers=ADAMS, package="deepspeed"),
]
