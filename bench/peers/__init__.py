"""Peers: every optimizer the benchmark knows, found where installed and never required; a file each."""

from __future__ import annotations

from bench.peers import (
    apex,
    bitsandbytes,
    deepspeed,
    flashoptim,
    fused,
    optimi,
    torch_compiled,
    torch_graph,
    torch_optim,
    torchao,
    transformer_engine,
)
from bench.peers.peer import HYPER, STATES, Hyper, Optimizer, ParamGroups, Peer

__all__ = [
    "BASELINE",
    "HYPER",
    "LEAN",
    "PEERS",
    "REFERENCE",
    "STATES",
    "Hyper",
    "Optimizer",
    "ParamGroups",
    "Peer",
    "is_ours",
]

PEERS: dict[str, Peer] = {
    peer.name: peer
    for module in (
        torch_optim,
        torch_graph,
        torch_compiled,
        apex,
        deepspeed,
        transformer_engine,
        bitsandbytes,
        torchao,
        optimi,
        flashoptim,
        fused,
    )
    for peer in module.PEERS
}
"""All peers by name, torch's first and fusedopt's last."""

LEAN: dict[str, Peer] = {
    peer.name: peer for module in (optimi, torchao, bitsandbytes, flashoptim, apex) for peer in module.LEAN
}
"""Those that keep less, or more beside 16-bit parameters: their update is another, so that only bytes are compared."""

BASELINE = "torch-fused"
"""The peer every ratio is taken against."""


REFERENCE = "fusedopt-reference"
"""The textbook backend, there to check the others: it is measured, and left out of pictures and models."""


def is_ours(name: str) -> bool:
    """Whether a peer is a backend of fusedopt."""
    return name.startswith("fusedopt-")
