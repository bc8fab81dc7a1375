"""The checks of hyperparameters, in torch's words where torch has them."""

from __future__ import annotations

from torch import Tensor


def check_lr(lr: float | Tensor, *, foreach: bool | None, capturable: bool) -> None:
    """Refuses a learning rate below 0, and a tensor of it where torch refuses that."""
    if isinstance(lr, Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, but it has {lr.numel()} elements")
        if lr.device.type not in ("cpu", "meta"):
            return  # to look at its value would wait for the device
    check_at_least_0("learning rate", lr)


def check_at_least_0(name: str, value: float | Tensor) -> None:
    """Refuses a value below 0, and NaN."""
    if not value >= 0.0:
        raise ValueError(f"Invalid {name} value: {value}" if name != "learning rate" else f"Invalid {name}: {value}")


def check_betas(
    betas: tuple[float | Tensor, float | Tensor], *, foreach: bool | None, capturable: bool
) -> None:
    """Refuses decay rates outside [0, 1), and tensors of them where torch refuses that."""
    if not 0.0 <= betas[0] < 1.0:
        raise ValueError(f"Invalid beta parameter at index 0: {betas[0]}")
    if not 0.0 <= betas[1] < 1.0:
        raise ValueError(f"Invalid beta parameter at index 1: {betas[1]}")
    kinds = [isinstance(beta, Tensor) for beta in betas]
    if not (all(kinds) or all(isinstance(beta, float) for beta in betas)):
        raise ValueError("betas must be either both floats or both Tensors")
    for index, beta in enumerate(betas):
        if not isinstance(beta, Tensor):
            continue
        if not capturable and foreach:
            raise ValueError(f"betas[{index}] as a Tensor is not supported for capturable=False and foreach=True")
        if beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element, but it has {beta.numel()} elements")


def check_flags(*, foreach: bool | None, fused: bool | None, differentiable: bool) -> None:
    """Refuses what a fused optimizer of torch refuses."""
    if differentiable:
        raise RuntimeError("`fused` does not support `differentiable`: a fused update has no derivative")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
