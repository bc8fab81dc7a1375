"""fuse and unfuse: turn an optimizer of torch.optim that exists into the fused one, and back, in place."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import traced
from .backends import choose_backend
from .base import FusedOptimizer
from .check import check_flags
from .checkpoint import widened_state
from .optimizers.adam import Adam, AdamW
from .optimizers.sgd import SGD
from .precision import ROUNDING_KEY
from .rules import MODE_KEYS
from .sharded import local

TWINS: dict[type[Optimizer], type[FusedOptimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}

# What the LR schedulers of torch leave on the `step` that they wrap.
_SCHEDULER_MARK = "_wrapped_by_lr_sched"


def fuse(optimizer: Optimizer, backend: str | None = None) -> FusedOptimizer:
    """Turns an optimizer of ``torch.optim`` into the fused one, in place, and returns it.

    The object stays the same object, so whatever holds it goes on working: learning rate schedulers, a
    ``GradScaler``, a trainer. Parameters, groups, state, hooks, ``param_names`` and defaults stay as they
    are, and nothing is copied; training goes on bit for bit as if the fused optimizer had loaded its
    ``state_dict``.

    Args:
        optimizer: ``torch.optim.SGD``, ``Adam`` or ``AdamW`` of any implementation (``foreach``, ``fused``,
            ``capturable`` or none), before its first step or after any other. One that is fused already is
            returned as it is.
        backend: "cpu", "cuda", "triton" or "reference"; None: the best of each device.

    Returns:
        The same object.

    Raises:
        TypeError: it is of another class, a subclass of these three included: its step may do otherwise.
        RuntimeError: a group is ``differentiable``, the ``step`` was replaced, or the backend can not serve a
            device.
        ValueError: no backend has that name, or the optimizer is fused already with another one.

    Example:
        >>> import torch, fusedopt
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
        >>> fusedopt.fuse(optimizer) is optimizer
        True
        >>> type(optimizer).__module__
        'fusedopt.optimizers.adam'
    """
    if isinstance(optimizer, FusedOptimizer):
        if backend not in (None, optimizer._requested_backend):
            raise ValueError(
                f"the optimizer is fused already, with backend {optimizer._requested_backend!r}; "
                f"{backend!r} was asked for now: unfuse it first"
            )
        return optimizer
    fused = TWINS.get(type(optimizer))
    if fused is None:
        raise TypeError(_why_no_twin(optimizer))
    for index, group in enumerate(optimizer.param_groups):
        _check_group(index, group, backend)
    _become(optimizer, fused, {"_requested_backend": backend})
    for key, value in fused([torch.zeros(1)]).defaults.items():  # type: ignore[call-arg]
        optimizer.defaults.setdefault(key, value)  # what an older torch does not know yet
    assert isinstance(optimizer, FusedOptimizer)  # _become made it one
    return optimizer


def unfuse(optimizer: Optimizer) -> Optimizer:
    """Turns a fused optimizer back into that of ``torch.optim``, in place, and returns it.

    Everything stays as for :func:`fuse`. Step counts go where torch keeps them: on the CPU, unless a group is
    ``capturable`` or ``fused``. One that is an optimizer of ``torch.optim`` already is returned as it is.

    Args:
        optimizer: a ``fusedopt.SGD``, ``Adam`` or ``AdamW``.

    Returns:
        The same object.

    Raises:
        TypeError: its class has no twin in ``torch.optim``.
        RuntimeError: its ``step`` was replaced by something that is not a scheduler.
        ValueError: a group's ``state_block`` is no longer that of its states' codes; nothing was changed.

    Example:
        >>> import torch, fusedopt
        >>> optimizer = fusedopt.AdamW([torch.nn.Parameter(torch.ones(3))])
        >>> type(fusedopt.unfuse(optimizer)) is torch.optim.AdamW
        True
    """
    if type(optimizer) in TWINS:
        return optimizer
    twin = next((plain for plain, fused in TWINS.items() if type(optimizer) is fused), None)
    if twin is None or not isinstance(optimizer, FusedOptimizer):
        names = ", ".join(f"fusedopt.{fused.__name__}" for fused in TWINS.values())
        raise TypeError(f"unfuse takes {names}; {_full_name(type(optimizer))} has no twin in torch.optim")
    unstarted = optimizer._unstepped()
    _leave_modes(optimizer)
    _drop_velocities(optimizer, unstarted)
    attributes, keys = _additions(type(optimizer), twin)
    _become(optimizer, twin, {})
    traced.forget(optimizer._number)
    for name in attributes & vars(optimizer).keys():
        delattr(optimizer, name)
    for group in (optimizer.defaults, *optimizer.param_groups):
        for key in keys & group.keys():
            del group[key]
    for group in optimizer.param_groups:
        _return_steps(optimizer, group)
    if optimizer.defaults.get("fused"):
        for name, value in vars(twin([torch.zeros(1)], fused=True)).items():  # type: ignore[call-arg]
            vars(optimizer).setdefault(name, value)  # what torch's constructor marks a fused one with
    return optimizer


def _why_no_twin(optimizer: Optimizer) -> str:
    names = ", ".join(f"torch.optim.{plain.__name__}" for plain in TWINS)
    given = type(optimizer)
    if not isinstance(optimizer, Optimizer):
        return f"fuse takes an optimizer ({names}), but it was given {optimizer!r}"
    if isinstance(optimizer, tuple(TWINS)):
        return f"fuse takes {names} themselves; {_full_name(given)} is a subclass, whose step may do otherwise"
    return f"fuse takes {names}; {_full_name(given)} has no fused twin"


def _full_name(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _check_group(index: int, group: dict[str, Any], backend: str | None) -> None:
    """Refuses a group that could not be stepped, before anything is changed."""
    try:
        check_flags(
            foreach=group.get("foreach"),
            fused=group.get("fused"),
            differentiable=group.get("differentiable", False),
        )
        for device in {local(param).device for param in group["params"]}:
            choose_backend(backend, device)
    except RuntimeError as error:
        raise RuntimeError(f"group {index} can not be fused: {error}") from error


def _become(optimizer: Optimizer, cls: type[Optimizer], state: dict[str, Any]) -> None:
    """Gives the object another class, as FSDP2's ``fully_shard`` gives modules theirs, and a step to match.

    Whoever holds the object, a scheduler for one, then has the new optimizer; a second object would leave
    them the old one. ``__setstate__`` is what makes an object of a class out of another one's attributes.
    """
    step = vars(optimizer).get("step")
    if step is not None and not hasattr(step, _SCHEDULER_MARK):
        raise RuntimeError(
            f"the optimizer's step was replaced by {step!r}, which would go on calling the old one; "
            "fuse before that, or take it off first"
        )
    optimizer.__class__ = cls
    optimizer.__setstate__(state)
    if step is not None:
        optimizer.step = _scheduled_step(optimizer)  # type: ignore[method-assign]


def _scheduled_step(optimizer: Optimizer) -> Callable[..., Any]:
    """What torch's ``LRScheduler`` puts in the place of ``step``, around the step that the class has now."""
    reference = weakref.ref(optimizer)
    function = type(optimizer).step

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        alive = reference()
        alive._opt_called = True  # type: ignore[union-attr]
        return function.__get__(alive, type(alive))(*args, **kwargs)

    setattr(step, _SCHEDULER_MARK, True)
    return step


def _additions(fused: type[FusedOptimizer], twin: type[Optimizer]) -> tuple[set[str], set[str]]:
    """What a fused optimizer has and its twin lacks: attributes, and keys of its groups (older torch)."""
    ours, theirs = (make([torch.zeros(1)]) for make in (fused, twin))  # type: ignore[call-arg]
    return vars(ours).keys() - vars(theirs).keys(), ours.defaults.keys() - theirs.defaults.keys()


def _drop_velocities(optimizer: FusedOptimizer, params: list[Tensor]) -> None:
    """Forgets the velocities of parameters whose first step has not been taken.

    A step that the gradient scaler skipped makes the buffer and leaves it 0. For torch a buffer that is there
    has been stepped, and would have the first gradient dampened.
    """
    for param in params:
        optimizer.state[param].pop("momentum_buffer", None)


def _leave_modes(optimizer: FusedOptimizer) -> None:
    """Makes of what torch does not know what it does: states in the parameter's dtype, nothing beside them."""
    random = {ROUNDING_KEY} if optimizer._rule.keeps_step else {ROUNDING_KEY, "step"}
    left: dict[Tensor, Any] = {}  # all of them before any is written: codes may not fit
    for g, group in enumerate(optimizer.param_groups):
        for k, param in enumerate(group["params"] if any(key in group for key in MODE_KEYS) else ()):
            if param in optimizer.state:
                state = widened_state(optimizer._rule, optimizer._name_of(g, k), optimizer.state[param], group)
                kept = {name: state[name].to(param.dtype) for name in optimizer._rule.states if name in state}
                left[param] = {key: kept.get(key, value) for key, value in state.items() if key not in random}
    optimizer.state.update(left)
    for group in (optimizer.defaults, *optimizer.param_groups):
        for key in MODE_KEYS:
            group.pop(key, None)


def _return_steps(optimizer: Optimizer, group: dict[str, Any]) -> None:
    if group.get("capturable") or group.get("fused"):
        return
    for param in group["params"]:
        step = optimizer.state[param].get("step") if param in optimizer.state else None
        if isinstance(step, Tensor):
            optimizer.state[param]["step"] = step.cpu()
