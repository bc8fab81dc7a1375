"""Mixed precision: a GradScaler that leaves it to the optimizer's launch to look for infinities and to unscale."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from .base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """Takes the place of ``torch.amp.GradScaler``: the same arguments, methods and checkpoints.

    torch's own reads every gradient to look for infinities before it calls a fused optimizer's ``step``. Here the
    launch does that, with what it reads anyway for ``max_grad_norm`` and ``skip_nonfinite``; the host does not wait.
    An optimizer that is not fusedopt's, one whose gradients were unscaled by ``unscale_``, one with hooks around its
    ``step``, one that lies on several devices or in DTensors, and one constructed with ``fused=False`` go torch's way.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.SGD([weight], lr=1.0)
        >>> scaler = fusedopt.amp.GradScaler("cpu", init_scale=4.0)
        >>> scaler.scale((weight * torch.tensor([0.5, float("inf")])).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> weight.tolist(), scaler.get_scale()
        ([1.0, 1.0], 2.0)
    """

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """``optimizer.step(*args, **kwargs)`` by unscaled gradients, unless one of them is infinite or NaN.

        Args:
            optimizer: that applies the gradients.
            args: for its ``step``.
            kwargs: for its ``step``; no closure.

        Returns:
            What ``optimizer.step`` returned.
        """
        if not self._enabled or "closure" in kwargs or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        is_ready = state["stage"] is OptState.READY and optimizer._step_supports_amp_scaling
        if not is_ready or self._scale is None or not optimizer.finds_inf():
            return super().step(optimizer, *args, **kwargs)
        scale = self._get_scale_async()
        assert scale is not None  # it is there once `scale` was called
        returned, found = optimizer.step_finding_inf(scale, *args, **kwargs)
        state["found_inf_per_device"] = {found.device: found}
        state["stage"] = OptState.STEPPED
        return returned
