"""References to parameters that torch's C++ side counts, and the garbage collector.

While C++ holds a tensor, torch need not touch its Python object whenever it borrows it: to read a thousand
parameters and bump their versions takes half the time. But the collector does not see such a reference: an
optimizer that its own parameter refers to would never be found. So all are given back before it looks at the
oldest objects, and taken again by the next step.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import torch

from .core import Core, compiled

# Collections of this generation or an older one look at long-lived objects: since Python 3.14 bit by bit.
_OLD = 1 if sys.version_info >= (3, 14) else 2


def limit(core: Core) -> None:
    """Has a table hold nothing where somebody wants to find no other reference.

    That is ``torch.utils.swap_tensors``, which ``torch.__future__.set_swap_module_params_on_conversion`` makes
    ``Module.to`` use.
    """
    if torch.__future__.get_swap_module_params_on_conversion():
        core.hold_nothing()


def _release(phase: str, info: dict[str, Any]) -> None:
    if phase == "start" and info["generation"] >= _OLD and compiled is not None:
        compiled.release_params()


gc.callbacks.append(_release)
