"""The storage codes of dtypes, as csrc/storage/storage.h numbers them."""

from __future__ import annotations

import torch

# enum Storage
STORAGES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
}
