"""References to parameters that torch's C++ side counts, and the garbage collector.

While C++ holds a tensor, torch need not touch its Python object whenever it borrows it: to read a thousand
parameters and bump their versions takes half the time. But the collector does not see such a reference: an
optimizer that its own parameter refers to would never be found. So all are given back before it looks at the
oldest objects, and taken again by the next step.
"""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import torch

from .core import Core

_cores: weakref.WeakSet[Core] = weakref.WeakSet()

# Collections of this generation or an older one look at long-lived objects: since Python 3.14 bit by bit.
_OLD = 1 if sys.version_info >= (3, 14) else 2


def register(core: Core) -> None:
    """Lets a table hold its parameters between collections.

    ``torch.utils.swap_tensors``, which ``torch.__future__.set_swap_module_params_on_conversion`` makes
    ``Module.to`` use, wants to find no other reference: with that set, nothing is held.
    """
    core.hold_params(not torch.__future__.get_swap_module_params_on_conversion())
    _cores.add(core)


def _release(phase: str, info: dict[str, Any]) -> None:
    if phase == "start" and info["generation"] >= _OLD:
        for core in list(_cores):
            core.release_params()


gc.callbacks.append(_release)
