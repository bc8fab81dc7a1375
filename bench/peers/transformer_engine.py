"""NVIDIA TransformerEngine: FusedAdam and FusedSGD, which have come from apex with names and arguments."""

from __future__ import annotations

from functools import partial

from bench.peers import apex
from bench.peers.peer import Peer

make = partial(apex.make, module="transformer_engine.pytorch.optimizers")

PEERS = [Peer("transformer-engine", make, devices=("cuda",), package="transformer_engine")]
