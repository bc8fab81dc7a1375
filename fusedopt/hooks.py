"""What torch.optim wraps around ``step``: the hooks, and the name under which a profiler shows it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch.autograd import _profiler_enabled as _is_profiled  # type: ignore[attr-defined]
from torch.optim import optimizer as torch_optimizer

# The same annotation for observers other than the profiler, at a tenth of the cost; torch's own compiled code uses it.
_observed: Any = getattr(torch._C._profiler, "_RecordFunctionFast", torch.autograd.profiler.record_function)


def profile_hook_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a ``step`` as ``torch.optim.Optimizer.profile_hook_step`` does.

    ``record_function`` is entered only while a profiler runs: after a backward pass it takes a quarter of the time
    of a step over a thousand small tensors.

    Args:
        step: the method to wrap.

    Returns:
        The method that runs the hooks around it.

    Example:
        >>> wrapped = profile_hook_step(torch.optim.SGD.step)
    """

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        self = args[0]
        with _annotation(f"Optimizer.step#{type(self).__name__}.step"):
            before_all, before_own = torch_optimizer._global_optimizer_pre_hooks, self._optimizer_step_pre_hooks
            for pre_hook in chain(before_all.values(), before_own.values()) if before_all or before_own else ():
                result = pre_hook(self, args, kwargs)
                if isinstance(result, tuple) and len(result) == 2:
                    args, kwargs = result
                elif result is not None:
                    raise RuntimeError(
                        f"{step} must return None or a tuple of (new_args, new_kwargs), but got {result}."
                    )
            out = step(*args, **kwargs)
            self._optimizer_step_code()
            after_all, after_own = torch_optimizer._global_optimizer_post_hooks, self._optimizer_step_post_hooks
            for post_hook in chain(after_own.values(), after_all.values()) if after_all or after_own else ():
                post_hook(self, args, kwargs)
            return out

    return wrapper


def are_around(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks see a step before it is taken, and may give it other gradients, or after it, and may raise."""
    return bool(
        torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
    )


def _annotation(name: str) -> AbstractContextManager[Any]:
    if torch.compiler.is_compiling():
        return nullcontext()
    observe = torch.autograd.profiler.record_function if _is_profiled() else _observed
    annotation: AbstractContextManager[Any] = observe(name)
    return annotation
