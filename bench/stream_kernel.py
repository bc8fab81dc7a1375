"""A Triton kernel with an optimizer's memory streams and none of its math: the roof of any such kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def stream_kernel(param, grad, state0, state1, numel, two_states: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds the gradient to the parameter and to one or two states, each read once and written once."""
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < numel
    g = tl.load(grad + offsets, mask=inside)
    tl.store(param + offsets, tl.load(param + offsets, mask=inside) + g, mask=inside)
    tl.store(state0 + offsets, tl.load(state0 + offsets, mask=inside) + g, mask=inside)
    if two_states:
        tl.store(state1 + offsets, tl.load(state1 + offsets, mask=inside) + g, mask=inside)


def launch(states: int, buffers: list[Tensor]) -> None:
    """One pass over parameter, gradient and `states` state buffers, equal in size.

    Raises:
        ValueError: there are not 2 + `states` buffers, or not one or two states.
    """
    if states not in (1, 2) or len(buffers) < 2 + states:
        raise ValueError(f"needs 1 or 2 states and 2 buffers more; got states={states}, {len(buffers)} buffers")
    param, grad, state0 = buffers[:3]
    state1 = buffers[1 + states]  # with one state it is not touched
    numel = param.numel()
    grid = (triton.cdiv(numel, BLOCK),)
    stream_kernel[grid](param, grad, state0, state1, numel, states == 2, BLOCK, num_warps=WARPS)
