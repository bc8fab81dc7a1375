"""torch.compile over torch's foreach optimizers; compiles for minutes on a CPU, where it has to be named."""

from __future__ import annotations

from typing import Any

import torch

from bench.peers import torch_optim
from bench.peers.peer import Hyper, ParamGroups, Peer


class CompiledStep:
    """A compiled foreach step, compiled at the first call."""

    def __init__(self, groups: ParamGroups, hyper: Hyper) -> None:
        torch._dynamo.reset()  # every case has other tensors, and the number of recompilations is limited
        self.optimizer = torch_optim.make(groups, hyper, foreach=True)
        self._step: Any = torch.compile(self.optimizer.step, fullgraph=False)

    @property
    def state(self) -> object:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    def step(self) -> None:
        """One update."""
        self._step()


PEERS = [Peer("torch-compiled", CompiledStep, default_devices=("cuda",))]
