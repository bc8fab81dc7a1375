"""The step as one operator of torch's dispatcher, for ``torch.compile(fullgraph=True)``; else a step breaks the graph.

The operator is told by a number which optimizer it serves. To a graph it is a function that rewrites parameters
from gradients; state and hyperparameters stay outside, so that torch compiles nothing anew when they change. What the
graph itself does to them would come too late, or too soon: what it writes to a dict is written behind all of it.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence  # at run time: torch reads the operator's schema from its annotations
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lasting import is_capturing

if TYPE_CHECKING:
    from .base import FusedOptimizer

_numbers = itertools.count()
# As a WeakValueDictionary, which takes a tenth of the time that torch takes to make an optimizer.
_optimizers: dict[int, weakref.ref[FusedOptimizer]] = {}


def register(optimizer: FusedOptimizer, number: int | None = None) -> int:
    """The number by which :func:`step` finds an optimizer for as long as that lives.

    Args:
        optimizer: to be found.
        number: what it was found by so far, or what it is a copy of was.
    """
    if number is None or _find(number) is not optimizer:
        number = next(_numbers)
        _optimizers[number] = weakref.ref(optimizer, partial(_optimizers.pop, number))
    return number


def _find(number: int) -> FusedOptimizer | None:
    found = _optimizers.get(number)
    return None if found is None else found()


def forget(number: int) -> None:
    """Lets go of an optimizer that is none of this package any more, by what :func:`register` returned."""
    _optimizers.pop(number, None)


def params_of(optimizer: FusedOptimizer) -> list[Tensor]:
    """All parameters, in order: what a trace looks at, so that it need not look at the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def belongs_in_graph() -> bool:
    """Whether the graph that is being traced is to have a step in it: where it must be one, and leaves the rest alone.

    Asked while a graph is traced; of all optimizers, as a number in it may be one that dynamo leaves open. Where this
    torch does not tell, the graph is broken.
    """
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        tracer: Any = InstructionTranslator.current_tx()
        tracers = (tracer, tracer.output.root_tx)
        must_be_one = any(
            getattr(each, name, False) for each in tracers for name in ("one_graph", "error_on_graph_break")
        )
        known = [optimizer for ref in _optimizers.values() if (optimizer := ref()) is not None]
        return must_be_one and not any(_is_touched(tracer.output, optimizer) for optimizer in known)
    except (ImportError, AttributeError, KeyError, NotImplementedError):
        return False


def _is_touched(graph: Any, optimizer: FusedOptimizer) -> bool:
    """Whether a graph has so far written to the groups or states of an optimizer, or taken in memory of theirs."""
    groups: list[Any] = optimizer.param_groups
    states = [state for _, state in optimizer._own_states()]
    lists_and_dicts = [groups, *groups, *(group["params"] for group in groups), optimizer.state, *states]
    effects = graph.side_effects
    if any(each in effects and effects.is_modified(effects[each]) for each in lists_and_dicts):
        return True
    values = [value for held in (*groups, *states) for key, value in held.items() if key != "params"]
    values += [optimizer._phase.ema_decay, optimizer._phase.max_grad_norm]
    values += [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
    theirs = {_memory(item) for value in values for item in (value if isinstance(value, (tuple, list)) else [value])}
    taken = {_memory(argument.example) for argument in graph.graphargs if argument.is_tensor}
    return not theirs.isdisjoint(taken - {None})


def _memory(value: object) -> int | None:
    """By what tensors that share memory are known."""
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


# Inductor's CUDA graphs, as of mode="reduce-overhead", leave the step out: they would go on with the numbers and the
# addresses of their recording. torch has this tag since 2.8.
_NOT_RECORDED: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


@torch.library.custom_op("fusedopt::step", mutates_args=("params",), **_NOT_RECORDED)
def step(params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int], number: int) -> None:
    """One step of an optimizer.

    Args:
        params: parameters that have a gradient. A graph may pass copies, and takes the result from them.
        grads: their gradients.
        places: where each of them stands among all parameters of the optimizer.
        number: what :func:`register` returned.

    Raises:
        RuntimeError: the optimizer no longer exists; a CUDA graph captures, of which torch can not leave the step out.
    """
    optimizer = _find(number)
    if optimizer is None:
        raise RuntimeError("the optimizer that this graph was traced with no longer exists")
    if not _NOT_RECORDED and is_capturing(params[0].device):
        raise RuntimeError(
            "a CUDA graph, as of torch.compile's mode='reduce-overhead', would go on with this step's hyperparameters: "
            "with a torch before 2.8 compile without that mode, or capture optimizer.step itself"
        )
    own = [optimizer._traced_params[place] for place in places]
    # The graph may have taken a gradient away, which is written behind it.
    own_ids = {id(param) for param in own}
    left = [param for param in optimizer._traced_params if param.grad is not None and id(param) not in own_ids]
    held = [(param, param.grad) for param in (*own, *left)]
    copies = [pair for pair in zip(own, params, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
    try:
        for param in left:
            param.grad = None
        for param, grad in zip(own, grads, strict=True):
            if param.grad is not grad:  # which may be a view of the same memory, lying otherwise
                param.grad = grad
        for param, copy in copies:
            param.data.copy_(copy)
        optimizer._launch()
        for param, copy in copies:
            copy.copy_(param.data)
    finally:
        for param, before in held:
            param.grad = before


@step.register_fake
def _(params: Sequence[Tensor], grads: Sequence[Tensor], places: Sequence[int], number: int) -> None:
    return None
