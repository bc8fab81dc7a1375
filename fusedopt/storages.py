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

# What is kept beside a 16-bit parameter may also be the low bits of its float32.
LOW_BITS = 4
# States may be codes of 8 bits: signed ones of means, unsigned ones of the roots of means of squares, float8 of either.
CODE_STORAGES: dict[torch.dtype, int] = {torch.int8: 5, torch.uint8: 6, torch.float8_e4m3fn: 7}
FLOAT8_SQUARE = 8  # float8 of a mean of squares

KEPT_STORAGES: dict[torch.dtype, int] = {**STORAGES, torch.int16: LOW_BITS, **CODE_STORAGES}
