"""What is kept beside a 16-bit parameter so that no update is lost to its rounding: csrc/storage/master.h in torch.

Example:
    >>> import torch
    >>> stored, low = split(torch.tensor([1.005859375]), "low_bits", torch.bfloat16)
    >>> stored.item(), low.item()
    (1.0078125, -16384)
    >>> join(stored, "low_bits", low).item()
    1.005859375
"""

from __future__ import annotations

import torch
from torch import Tensor


def join(param: Tensor, key: str, kept: Tensor) -> Tensor:
    """The exact parameter in float32, from the stored one and from what is kept under a key of the state."""
    wide = param.float()
    if key == "low_bits":
        joined = (wide.view(torch.int32) + kept.to(torch.int32)).view(torch.float32)
        return torch.where(joined.isnan(), wide, joined)
    if key == "master":
        return torch.where(kept.to(param.dtype).float() == wide, kept, wide)
    return wide + kept.float()


def split(exact: Tensor, key: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parameter as stored in a dtype, and what is kept of the exact one, in float32 or as low bits in int16."""
    if key == "master":
        return exact.to(dtype), exact
    if key == "low_bits":
        bits = exact.view(torch.int32)
        high = ((bits + 0x8000) & -0x10000).view(torch.float32)
        low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
        nan = exact.isnan()
        return torch.where(nan, exact, high).to(dtype), torch.where(nan, 0, low).to(torch.int16)
    lost = exact - exact.to(dtype).float()
    return exact.to(dtype), torch.where(lost.isfinite(), lost, 0.0)
