"""The options of the phase around an update: what else a step does in the pass that reads the gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import Tensor

from .check import check_at_least_0, check_number, real_dtype, shown
from .layout import may_share_memory, neighbours, overlaps_itself
from .memory import check_own_memory
from .rules import MODE_KEYS
from .sharded import local
from .storages import STORAGES

EMA = "ema"  # the key of the average in a parameter's state
LEAF = 2048  # elements: csrc/table.h
LEAVES_OF_GROUP = 2048  # that are joined first: csrc/rules/reduce.h
MOST_LEAVES = 2048 * LEAVES_OF_GROUP  # that are joined to one norm

AVERAGES, WARMS_UP, COPIES, CLEARS_GRADS, CLIPS, LARGEST_NORM, SKIPS_NONFINITE, REPORTS, NORMS_BY_GROUP = (
    1 << bit for bit in range(9)
)  # enum PhaseFlag in csrc/phase.h
WHOLE_STEP, MEASURES, UPDATES = range(3)  # enum Stage in csrc/phase.h


class PhaseOptions(TypedDict, total=False):
    """Keyword arguments that all optimizers take; see :class:`Phase`."""

    ema_decay: float | Tensor | None
    ema_warmup: bool
    copy_to: Mapping[Tensor, Tensor] | Sequence[Tensor | None] | None
    zero_grads: bool
    max_grad_norm: float | None
    norm_type: float
    norm_by_group: bool
    skip_nonfinite: bool
    report: bool | int


@dataclass(frozen=True, eq=False)
class Phase:
    """What a step does beside the update. By default nothing.

    Attributes:
        ema_decay: keeps an average of every parameter in its state under "ema", moved at each of its steps by
            ``ema = decay * ema + (1 - decay) * parameter``; the first is the parameter itself. A float, or a tensor of
            one element, read anew at every step, in float32. The average is in float32 where the parameter has 16 bits.
        ema_warmup: the decay is at most ``(1 + t) / (10 + t)`` at the parameter's step t.
        copy_to: tensors that the parameter is written to as it is updated, each rounded to its own dtype: one for
            each parameter, in order, or by parameter. The list or dict is read once, when the optimizer is made: beside
            a list no group can be added, beside a dict one whose parameters have no copy.
        zero_grads: sets every gradient to zero once it was read; its memory stays. Also in a step that is skipped.
        max_grad_norm: scales all gradients of the optimizer as ``torch.nn.utils.clip_grad_norm_`` does, so that their
            norm is at most this; the gradients themselves stay as they are.
        norm_type: 2, or infinity: the largest magnitude, which complex parameters can not have.
        norm_by_group: every group is clipped by its own norm, as where ``clip_grad_norm_`` is called for each. A group
            may then have a ``max_grad_norm`` of its own, read at every step; None: it is not clipped.
        skip_nonfinite: a step with an infinite or NaN gradient changes no parameter, state or count.
        report: keeps norms and what went wrong of every step, for the optimizer's ``report()``; a number: of every
            so many steps, the first of them included, which leaves the others as fast as without.

    Example:
        >>> Phase(ema_decay=0.999).flags == AVERAGES
        True
    """

    ema_decay: float | Tensor | None = None
    ema_warmup: bool = False
    copy_to: Mapping[Tensor, Tensor] | Sequence[Tensor | None] | None = None
    zero_grads: bool = False
    max_grad_norm: float | None = None
    norm_type: float = 2.0
    norm_by_group: bool = False
    skip_nonfinite: bool = False
    report: bool | int = False

    def __post_init__(self) -> None:
        """Refuses what no step could use."""
        self.check_scalars()
        check_number("norm_type", self.norm_type)
        for name in ("ema_warmup", "zero_grads", "norm_by_group", "skip_nonfinite"):
            if not isinstance(getattr(self, name), bool):  # they become bits of `flags`
                raise TypeError(f"{name} must be True or False, but it is {getattr(self, name)!r}")
        if self.copy_to is not None and not isinstance(self.copy_to, (Mapping, Sequence)):
            raise TypeError(f"copy_to must be a sequence of tensors or a dict by parameter, but it is {self.copy_to!r}")
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup needs ema_decay: it is how that starts")
        if self.norm_by_group and self.max_grad_norm is None:
            raise ValueError("norm_by_group needs max_grad_norm: it is what each group is clipped to")
        if float(self.norm_type) not in (2.0, math.inf):
            raise ValueError(f"norm_type must be 2 or infinity, but it is {self.norm_type}")
        if not isinstance(self.report, int) or self.report < 0:
            raise ValueError(f"report must be True, False or a number of steps, but it is {self.report!r}")

    def check_scalars(self) -> None:
        """Refuses values that no step could use. A tensor may change between steps; on a GPU it is not looked at."""
        decay = self.ema_decay
        if decay is not None:
            check_number("ema_decay", decay)
        on_device = isinstance(decay, Tensor) and decay.device.type != "cpu"  # to look at it would wait for the device
        if decay is not None and not on_device and not 0.0 <= float(decay) <= 1.0:
            raise ValueError(f"Invalid ema_decay: {decay}")
        if self.max_grad_norm is not None:
            check_at_least_0("max_grad_norm", self.max_grad_norm)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Phase:
        """Reads keyword arguments.

        Raises:
            TypeError: one of them is not an option.
        """
        if not options:
            return NOTHING
        for name in options:
            if name not in OPTIONS:
                raise TypeError(
                    f"got an unexpected keyword argument '{name}'; beside torch's there are {', '.join(OPTIONS)}"
                )
        if isinstance(options.get("copy_to"), (Mapping, Sequence)):
            options = {**options, "copy_to": copy.copy(options["copy_to"])}  # the caller's may change
        return Phase(**options)

    @cached_property
    def flags(self) -> int:
        """Bits of ``enum PhaseFlag``."""
        averages = AVERAGES * (self.ema_decay is not None) + WARMS_UP * self.ema_warmup
        sides = averages + COPIES * (self.copy_to is not None) + CLEARS_GRADS * self.zero_grads
        norm = CLIPS * (self.max_grad_norm is not None) + SKIPS_NONFINITE * self.skip_nonfinite
        return sides + norm + LARGEST_NORM * (norm != 0 and self.is_largest) + self._others

    @property
    def _others(self) -> int:
        return REPORTS * bool(self.report) + NORMS_BY_GROUP * self.norm_by_group

    @property
    def is_largest(self) -> bool:
        """Whether the norm is the largest magnitude."""
        return math.isinf(self.norm_type)

    @property
    def measures_largest(self) -> bool:
        """Whether a step finds the largest magnitude."""
        return self.reads_twice and self.is_largest

    @cached_property
    def reads_twice(self) -> bool:
        """Whether a step reads all gradients before it updates anything."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def writes_tensors_of_others(self) -> bool:
        """Whether a step writes tensors beside parameters that a graph may hold as well."""
        return self.zero_grads or self.copy_to is not None

    @cached_property
    def finding_inf(self) -> Phase:
        """The same, and a step with an infinite or NaN gradient changes nothing."""
        return replace(self, skip_nonfinite=True)

    @cached_property
    def unreported(self) -> Phase:
        """The same without a report."""
        return replace(self, report=False)

    @cached_property
    def leaves_rows_plain(self) -> bool:
        """Whether it neither adds to what a step reads and writes of a parameter, nor wants its gradient looked at."""
        return not (self.states or self.zero_grads or self.copy_to is not None or self.measures_largest)

    def check_norm(self, name: str, param: Tensor) -> None:
        """Refuses a parameter whose norm the kernels can not find: they see the two parts of a complex number."""
        if self.measures_largest and param.is_complex():
            raise TypeError(
                f"{name} has dtype {param.dtype}, whose largest magnitude can not be found: norm_type={self.norm_type} "
                "is for real parameters"
            )

    def max_norm_of(self, group: Mapping[str, Any]) -> float:
        """What the gradients of a group are clipped to; below 0: they are not."""
        own = group.get("max_grad_norm", self.max_grad_norm) if self.norm_by_group else self.max_grad_norm
        return -1.0 if own is None else float(own)

    @cached_property
    def watched_keys(self) -> tuple[str, ...]:
        """Keys of a group whose change has the tables built anew, and the group checked.

        A ``max_grad_norm`` that may change at every step is looked at by itself.
        """
        options = OPTIONS if not self.norm_by_group else tuple(name for name in OPTIONS if name != "max_grad_norm")
        return (*MODE_KEYS, *options)

    def check_group(self, index: int, group: Mapping[str, Any]) -> None:
        """Refuses options that are those of the whole optimizer, and a max_grad_norm that no step could use."""
        for name in OPTIONS:
            if name in group and name != "max_grad_norm":
                raise ValueError(
                    f"group {index} has {name}={shown(group[name])}, which is an option of the whole optimizer: give "
                    "it to the constructor"
                )
        self.check_max_norm(index, group)

    def check_max_norm(self, index: int, group: Mapping[str, Any]) -> None:
        """Refuses a group's own max_grad_norm that no step could use. On a GPU it is not looked at."""
        if "max_grad_norm" not in group:
            return
        own = group["max_grad_norm"]
        if not self.norm_by_group:
            raise ValueError(
                f"group {index} has max_grad_norm={shown(own)}, but the norm is that of all groups: construct the "
                "optimizer with norm_by_group=True"
            )
        if own is not None:
            check_at_least_0(f"max_grad_norm of group {index}", own)

    def refuses(self, norm: float) -> bool:
        """Whether a step with gradients of a norm changes nothing."""
        return self.skip_nonfinite and not math.isfinite(norm)

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states that it adds to every parameter's."""
        return () if self.ema_decay is None else (EMA,)

    def copies(self, params: Sequence[Tensor]) -> dict[Tensor, Tensor]:
        """The copy of each parameter that has one.

        Args:
            params: all parameters of the optimizer, in order.

        Raises:
            ValueError: there is not one for each.
        """
        if self.copy_to is None:
            return {}
        if isinstance(self.copy_to, Mapping):
            known = set(params)
            for key in self.copy_to:
                if not isinstance(key, Tensor) or key not in known:
                    what = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
                    raise ValueError(f"copy_to has a copy for {what}, which is no parameter of the optimizer")
            return dict(self.copy_to)
        if len(self.copy_to) != len(params):
            raise ValueError(
                f"copy_to has {len(self.copy_to)} tensors, where the optimizer has {len(params)} parameters"
            )
        pairs = zip(params, self.copy_to, strict=True)
        return {param: each for param, each in pairs if each is not None}


OPTIONS = tuple(option.name for option in fields(Phase))
NOTHING = Phase()


def average_dtype(param: Tensor) -> torch.dtype:
    """What the average of a parameter is kept in: its own dtype, at least float32."""
    return torch.promote_types(param.dtype, torch.float32)


def check_copy(name: str, param: Tensor, copy: Tensor) -> None:
    """Refuses a copy that does not fit its parameter, by name and with both values."""
    what = f"copy_to of {name}"
    if not isinstance(copy, Tensor):
        raise TypeError(f"{what} must be a tensor, but it is {copy!r}")
    if copy.is_nested or copy.shape != param.shape:
        shape = "nested" if copy.is_nested else tuple(copy.shape)
        raise ValueError(f"{what} has shape {shape}, the parameter {tuple(param.shape)}")
    if copy.device != param.device:
        raise ValueError(f"{what} is on {copy.device}, the parameter on {param.device}")
    if real_dtype(copy) not in STORAGES or copy.is_complex() != param.is_complex():
        raise TypeError(f"{what} has dtype {copy.dtype}, the parameter {param.dtype}")
    check_own_memory(what, copy)


def check_cleared(grads: Sequence[tuple[str, Tensor]]) -> None:
    """Refuses to clear gradients, by the names of their parameters, that have no memory of their own."""
    named = []
    for name, grad in grads:
        what = f"zero_grads: gradient of {name}"
        if grad.is_sparse or grad.is_conj() or grad.is_neg():
            raise ValueError(f"{what} is sparse or a lazy view, which can not be cleared in place")
        if grad.is_inference():
            raise ValueError(f"{what} is an inference tensor, which can not be written outside inference_mode")
        if overlaps_itself(local(grad)):
            raise ValueError(f"{what} has elements that share memory, as an expanded tensor has")
        named.append((what, grad))
    check_distinct(named, among=len(named))


def check_distinct(named: Sequence[tuple[str, Tensor]], among: int) -> None:
    """Refuses tensors of which two share memory, at least one of them among the first ``among``."""
    tensors = [local(tensor) for _, tensor in named]
    for one, other in neighbours(tensors):
        if one < among and may_share_memory(tensors[one], tensors[other]):
            raise ValueError(f"{named[one][0]} and {named[other][0]} share memory")
