"""All that determines a run, apart from the optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
"""Types a model may be kept in. float16 is absent: without loss scaling its gradients underflow."""

AT_LEAST_ONE = ("steps", "batch", "block", "width", "layers", "heads", "eval_every", "text_size")


def _option(default: Any, text: str) -> Any:
    """A field that carries its own help text for the command line."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """All that determines a run, apart from the optimizer; each field's help text says what it means."""

    steps: int = _option(1000, "training steps")
    batch: int = _option(16, "sequences in a batch")
    block: int = _option(64, "characters in a sequence")
    width: int = _option(128, "width of the model")
    layers: int = _option(4, "transformer layers")
    heads: int = _option(4, "attention heads; must divide the width")
    lr: float = _option(2e-3, "peak learning rate: linear warm-up, then a cosine down to a tenth of it")
    warmup: int = _option(50, "steps of warm-up")
    weight_decay: float = _option(0.1, "decoupled decay of the matrices; vectors are not decayed")
    eval_every: int = _option(100, "steps between two evaluations")
    text_size: int = _option(2_000_000, "characters of the standard library to read, at most")
    seed: int = _option(0, "seed of the initial weights and of the batches")
    device: str = _option("cpu", "cpu, cuda or cuda:N")
    dtype: str = _option("float32", f"type of parameters, gradients and state: {', '.join(DTYPES)}")

    def __post_init__(self) -> None:
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must not be negative, got {self.warmup}")
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got heads={self.heads} and width={self.width}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r} was asked for, but torch finds no CUDA device")
