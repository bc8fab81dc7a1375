"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from .. import reference
from ..base import FusedOptimizer, ParamsT
from ..check import check_at_least_0, check_betas, check_flags, check_lr
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
    update = reference.adam(
        param,
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        state.get("max_exp_avg_sq"),
        step=step,
        lr=float(group["lr"]),
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        decoupled=bool(group["decoupled_weight_decay"]),
        maximize=bool(group["maximize"]),
        grad_scale=grad_scale,
    )
    return update._asdict()


RULE = Rule(
    stem="adam",
    hypers=(("lr", -1), ("betas", 0), ("betas", 1), ("eps", -1), ("weight_decay", -1)),
    flags=(("maximize", MAXIMIZE), ("differentiable", DIFFERENTIABLE), ("amsgrad", 2), ("decoupled_weight_decay", 4)),
    states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    keeps_step=True,
    takes_sparse=False,
    update=_update,
    squares=("exp_avg_sq", "max_exp_avg_sq"),
    asked_by={"max_exp_avg_sq": "amsgrad"},
)


class Adam(FusedOptimizer):
    """Adam, AMSGrad and AdamW in one fused launch per device and step; takes the place of ``torch.optim.Adam``.

    Args:
        params: parameters, named parameters, or parameter groups.
        lr: learning rate: a float, or a tensor of one element, read anew at every step.
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: L2 penalty, or the decoupled decay of AdamW; at least 0.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        foreach: accepted and not needed: every step is one launch.
        maximize: climb instead of descend.
        capturable: whether ``step`` may be captured in a CUDA graph. It always may; kept in the groups for torch.
        differentiable: must be False: a fused update has no derivative.
        fused: accepted and not needed; False leaves it to a ``GradScaler`` to unscale gradients before the step.
            With ``foreach`` it is refused, as by torch.
        decoupled_weight_decay: AdamW's decay (Loshchilov & Hutter 2019).
        state_dtype: dtype of the moments, one or by name: float32, bfloat16, float16 for ``exp_avg``, or int8 or
            float8_e4m3fn: codes with a scale for each block; None: the parameter's.
        state_block: elements that share a scale: 32, 64, 128 or 256; None: 128.
        master: what is kept beside a 16-bit parameter so that no update is lost to rounding: "fp32", a copy; "split",
            the low 16 bits that make a bfloat16 its float32; "kahan", a compensation; None: nothing.
        rounding: "stochastic" rounds 16-bit parameters up or down at random, so that the mean is kept;
            None: to nearest.
        backend: "cpu", "cuda", "triton" or "reference"; None: the best of each device.
        phase: what else a step does in the same pass, by keyword: :class:`fusedopt.phase.Phase`.

    Raises:
        ValueError: a hyperparameter is out of its range.
        RuntimeError: options that exclude each other.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fusedopt.Adam([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> [round(x, 4) for x in weight.tolist()]
        [0.9, 0.9, 0.9]
    """

    _rule = RULE
    _group_defaults: ClassVar[dict[str, Any]] = {
        "amsgrad": False,
        "maximize": False,
        "foreach": None,
        "capturable": False,
        "differentiable": False,
        "fused": None,
        "decoupled_weight_decay": False,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_dtype: StateDtype = None,
        state_block: int | None = None,
        master: str | None = None,
        rounding: str | None = None,
        backend: str | None = None,
        **phase: Unpack[PhaseOptions],
    ) -> None:
        """See the class."""
        check_lr(lr, foreach=foreach, capturable=capturable)
        check_at_least_0("epsilon", eps)
        betas = check_betas(betas, foreach=foreach, capturable=capturable)
        check_at_least_0("weight_decay", weight_decay)
        check_flags(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            **modes(state_dtype, state_block, master, rounding),
        }
        super().__init__(params, defaults, backend, Phase.of(phase))


class AdamW(Adam):
    """AdamW in one fused launch per device and step; takes the place of ``torch.optim.AdamW``.

    Adam with the decoupled weight decay of Loshchilov & Hutter 2019, 0.01 by default. See :class:`Adam` for the rest.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fusedopt.AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> [round(x, 4) for x in weight.tolist()]
        [0.85, 0.85, 0.85]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
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
        """See :class:`Adam`."""
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_dtype=state_dtype,
            state_block=state_block,
            master=master,
            rounding=rounding,
            backend=backend,
            **phase,
        )

    def _fill_groups(self, groups: list[dict[str, Any]]) -> None:
        super()._fill_groups(groups)
        for group in groups:
            group["decoupled_weight_decay"] = True  # whatever was saved
