"""SGD: plain, with momentum, with Nesterov's momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import reference
from ..base import FusedOptimizer, ParamsT
from ..check import check_at_least_0, check_flags, check_lr, check_number, check_truth
from ..phase import Phase, PhaseOptions
from ..precision import StateDtype, modes
from ..rules import DIFFERENTIABLE, MAXIMIZE, Group, Rule

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _update(
    param: Tensor,
    grad: Tensor,
    state: Mapping[str, Tensor],
    step: int,
    group: Group,
    grad_scale: float | None,
) -> dict[str, Tensor | None]:
    update = reference.sgd(
        param,
        grad,
        state.get("momentum_buffer"),
        step=step,
        lr=float(group["lr"]),
        momentum=float(group["momentum"]),
        dampening=float(group["dampening"]),
        weight_decay=float(group["weight_decay"]),
        nesterov=bool(group["nesterov"]),
        maximize=bool(group["maximize"]),
        grad_scale=grad_scale,
    )
    return update._asdict()


RULE = Rule(
    stem="sgd",
    hypers=(("lr", -1), ("momentum", -1), ("dampening", -1), ("weight_decay", -1)),
    flags=(("maximize", MAXIMIZE), ("differentiable", DIFFERENTIABLE), ("nesterov", 2)),
    states=("momentum_buffer",),
    keeps_step=False,
    takes_sparse=True,
    update=_update,
    asked_by={"momentum_buffer": "momentum"},
)


class SGD(FusedOptimizer):
    """Stochastic gradient descent in one fused launch per device and step; takes the place of ``torch.optim.SGD``.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate: a float, or a tensor of one element, read anew at every step.
        momentum: factor of the old velocity, at least 0; 0 keeps no velocity.
        dampening: share of the gradient that is kept out of the velocity after the first step.
        weight_decay: L2 penalty, at least 0.
        nesterov: look ahead along the velocity; needs momentum and no dampening.
        maximize: climb instead of descend.
        foreach: accepted and not needed: every step is one launch.
        capturable: accepted and not needed: every step may be captured in a CUDA graph. The groups do not carry
            it, as those of ``torch.optim.SGD`` do not.
        differentiable: must be False: a fused update has no derivative.
        fused: accepted and not needed; False leaves it to a ``GradScaler`` to unscale gradients before the step.
            With ``foreach`` it is refused, as by torch.
        state_dtype: dtype of the velocity: float32, bfloat16, float16, or int8 or float8_e4m3fn: codes with a scale
            for each block; None: the gradient's.
        state_block: elements that share a scale: 32, 64, 128 or 256; None: 128.
        master: what is kept beside a 16-bit parameter so that no update is lost to rounding: "fp32", a copy; "split",
            the low 16 bits that make a bfloat16 its float32; "kahan", a compensation; None: nothing.
        rounding: "stochastic" rounds 16-bit parameters up or down at random, so that the mean is kept; the state has a
            ``step`` then; None: to nearest.
        backend: "cpu", "cuda", "triton" or "reference"; None: the best of each device.
        phase: what else a step does in the same pass, by keyword: :class:`fusedopt.phase.Phase`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: options that exclude each other.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fusedopt.SGD([weight], lr=0.25, momentum=0.9)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.tolist()
        [0.75, 0.75, 0.75]
    """

    _rule = RULE
    _group_defaults: ClassVar[dict[str, Any]] = {
        "nesterov": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
        "fused": None,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: StateDtype = None,
        state_block: int | None = None,
        master: str | None = None,
        rounding: str | None = None,
        backend: str | None = None,
        **phase: Unpack[PhaseOptions],
    ) -> None:
        """See the class."""
        check_lr(lr, foreach=foreach, capturable=True)
        check_at_least_0("momentum", momentum)
        check_number("dampening", dampening)
        check_at_least_0("weight_decay", weight_decay)
        check_truth("nesterov", nesterov)
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        check_flags(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            **modes(state_dtype, state_block, master, rounding),
        }
        super().__init__(params, defaults, backend, Phase.of(phase))
