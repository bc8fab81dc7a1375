"""Norms that no single launch can find: of tensors that lie over ranks, or over several tables of one optimizer.

Each table's first launch leaves what its leaves come to, by norm and by how tensors lie over the ranks. What is joined
here, on the device, is what the second launch reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .sharded import Spread


def join(found: Sequence[Tensor], spreads: Sequence[Spread], *, largest: bool) -> Tensor:
    """Joins what the parts of tables have come to: over tables, over ranks, over the ways to lie over them.

    Every rank gets the same bits: what the ranks have is gathered, and joined in their order.

    Args:
        found: for each table one number for each norm and spread, the spreads of a norm following one another:
            float64, sums of squares or largest magnitudes.
        spreads: ways in which tensors lie over ranks; those of all ranks in the same order.
        largest: whether it is the largest magnitude that counts.

    Returns:
        One number for each norm, on the first table's device.
    """
    combine = torch.maximum if largest else torch.add
    columns = list(reduce(combine, (one.to(found[0].device) for one in found)).view(-1, len(spreads)).unbind(1))
    for mesh in dict.fromkeys(spread[0] for spread in spreads if spread is not None):
        for dimension in range(mesh.ndim):
            cut = [k for k, spread in enumerate(spreads) if spread and spread[0] == mesh and dimension in spread[1]]
            if cut:
                joined = _over_ranks(torch.stack([columns[k] for k in cut]), mesh.get_group(dimension), largest)
                for k, column in zip(cut, joined.unbind(), strict=True):
                    columns[k] = column
    return reduce(combine, columns)


def _over_ranks(values: Tensor, group: Any, largest: bool) -> Tensor:
    import torch.distributed as dist

    gathered = values.new_empty((dist.get_world_size(group), *values.shape))
    dist.all_gather_into_tensor(gathered.view(-1), values.view(-1), group=group)
    return gathered.amax(0) if largest else gathered.sum(0)
