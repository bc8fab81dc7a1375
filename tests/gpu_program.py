"""``python -m tests.gpu_program``: steps on a GPU for compute-sanitizer to watch: rules, variants, edges, graphs.

A program of its own, small, because each step takes a sanitizer a thousand times as long.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch.nn import Parameter

import fusedopt

SIZES = (0, 1, 3, 8, 31, 64, 2047, 2049, 5000)
DTYPES = {
    "f32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "mixed": (torch.float32, torch.bfloat16, torch.float16),
    "double": (torch.float64, torch.float32),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "amsgrad": True},
}
# Beside the update: barriers of block and grid, shuffles, trees in shared memory.
PHASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "plain": (tuple(DTYPES), {}),
    "clipped and reported": (("f32", "bf16", "double"), {"max_grad_norm": 1.0, "skip_nonfinite": True, "report": True}),
    "clipped by the largest": (("mixed",), {"max_grad_norm": 1.0, "norm_type": float("inf")}),
    "clipped by group": (("f32",), {"max_grad_norm": 1.0, "norm_by_group": True}),
    "averaged": (("f32", "mixed"), {"ema_decay": 0.9, "ema_warmup": True, "zero_grads": True}),
    "copied": (("f32", "mixed"), {"copies": torch.bfloat16, "report": True}),
    "in 8 bits": (("bf16", "mixed"), {"state_dtype": torch.int8, "max_grad_norm": 1.0}),
    "in float8": (("f32", "bf16"), {"state_dtype": torch.float8_e4m3fn, "state_block": 32, "report": True}),
    "in 8 bits at random": (("bf16",), {"state_dtype": torch.int8, "rounding": "stochastic", "ema_decay": 0.9}),
    "rounded at random": (("bf16",), {"rounding": "stochastic"}),
    "exact": (("bf16",), {"state_dtype": torch.float32, "master": "split"}),
    "exact and reported": (("bf16",), {"master": "fp32", "report": True}),
    "exact in 8 bits": (("bf16",), {"state_dtype": torch.int8, "master": "split", "max_grad_norm": 1.0}),
    "compensated": (("bf16",), {"master": "kahan"}),
}


def make(
    name: str,
    dtypes: tuple[torch.dtype, ...],
    strided: bool,
    device: str,
    copies: torch.dtype | None = None,
    **options: Any,
) -> tuple[list[Parameter], Any]:
    """An optimizer over tensors of all edge sizes, some of them misaligned, some strided; every second has a copy."""
    params = []
    for k, (size, dtype) in enumerate(itertools.product(SIZES, dtypes)):
        offset, stride = k % 2, 2 if strided and k % 3 == 0 else 1
        buffer = torch.randn(stride * size + offset, device=device).to(dtype)
        params.append(Parameter(buffer[offset::stride][:size]))
    if copies is not None:
        options["copy_to"] = {param: torch.empty_like(param, dtype=copies) for param in params[::2]}
    groups = [{"params": params[k : k + 4]} for k in range(0, len(params), 4)]
    return params, getattr(fusedopt, name)(groups, **OPTIMIZERS[name], **options)


def set_grads(params: list[Parameter]) -> None:
    """New gradients for all but every fifth."""
    for k, param in enumerate(params):
        param.grad = None if k % 5 == 4 else torch.randn_like(param)


def step_all(backend: str, device: str) -> None:
    """Every rule over every family of dtypes, dense and strided, with every phase that it can have; two steps each."""
    for (families, options), name, strided in itertools.product(PHASES.values(), OPTIMIZERS, (False, True)):
        for family in families:
            params, optimizer = make(name, DTYPES[family], strided, device, backend=backend, **options)
            for _ in range(2):
                set_grads(params)
                optimizer.step()


def replay(backend: str, device: str) -> None:
    """A captured step, replayed, and replayed again after other hyperparameters were given to it."""
    for name, options in itertools.product(OPTIMIZERS, ({}, {"max_grad_norm": 1.0, "report": True})):
        params, optimizer = make(name, (torch.float32, torch.bfloat16), True, device, backend=backend, **options)
        set_grads(params)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            optimizer.step()
        for _ in range(3):
            graph.replay()
        for group in optimizer.param_groups:
            group["lr"] *= 0.5
        optimizer.sync_hyperparameters()
        graph.replay()


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_program", description=__doc__)
    parser.add_argument("part", choices=("steps", "graph"))
    parser.add_argument("--backend", default="cuda", help="default: cuda")
    parser.add_argument("--device", default="cuda", help="cpu: to see that the program itself is right (default: cuda)")
    arguments = parser.parse_args()
    {"steps": step_all, "graph": replay}[arguments.part](arguments.backend, arguments.device)
    if arguments.device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
