"""torch's fused optimizers captured in a CUDA graph, which hides their host time."""

from __future__ import annotations

import torch

from bench.peers import torch_optim
from bench.peers.peer import Hyper, ParamGroups, Peer


class GraphedStep:
    """Steps once as usual, which makes the state, then captures a step and replays it."""

    def __init__(self, groups: ParamGroups, hyper: Hyper) -> None:
        flags = {"capturable": True} if hyper.is_adam else {}
        self.optimizer = torch_optim.make(groups, hyper, fused=True, **flags)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0

    @property
    def state(self) -> object:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    def step(self) -> None:
        """One update."""
        self.steps += 1
        if self.steps == 1:
            self.optimizer.step()
            return
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        return graph


PEERS = [Peer("torch-fused-graph", GraphedStep, devices=("cuda",), static_gradients=True)]
