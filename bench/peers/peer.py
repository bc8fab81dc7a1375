"""What a peer is: a name, where it runs, and one function that makes its optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

ParamGroups = list[dict[str, Any]]


class Optimizer(Protocol):
    """All the benchmark asks of an optimizer."""

    def step(self) -> Any:
        """Updates the parameters from their gradients."""


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters, the same for every peer."""

    optimizer: str
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    @property
    def is_adam(self) -> bool:
        """Whether this is one of Adam's family."""
        return self.optimizer != "sgd"

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments under `torch.optim`'s names, which nearly every peer has taken over."""
        if self.is_adam:
            return {"lr": self.lr, "betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return {"lr": self.lr, "momentum": self.momentum, "weight_decay": self.weight_decay}


HYPER = {
    "adamw": Hyper("adamw", weight_decay=1e-2),
    "adam": Hyper("adam"),
    "sgd": Hyper("sgd", momentum=0.9),
}
"""The optimizers that are benchmarked. `sgd` is SGD with momentum."""

STATES = {"adamw": 2, "adam": 2, "sgd": 1}
"""State tensors per parameter."""


@dataclass(frozen=True)
class Peer:
    """One way to update parameters.

    Attributes:
        name: Unique, as given to `--peer`.
        make: Makes the optimizer from parameter groups (each with `params` and `lr`) and hyperparameters.
        devices: Device types it runs on.
        optimizers: Names from `HYPER` it has.
        package: Module that has to be installed; None for torch itself.
        distribution: Name it is installed by, where that is not the module's; its version goes into the records.
        unavailable: Given the device type, says why it cannot run here, or None.
        default_devices: Device types on which it takes part without being asked for; those left out need long
            to compile there.
        static_gradients: Whether gradients must keep their addresses from step to step.
        most_elements: Parameters, beyond which a CPU step of it takes seconds; None for any number.
        launches: Counts the launches of this process so far, where the peer can say.
    """

    name: str
    make: Callable[[ParamGroups, Hyper], Optimizer]
    devices: tuple[str, ...] = ("cpu", "cuda")
    optimizers: tuple[str, ...] = tuple(HYPER)
    package: str | None = None
    distribution: str | None = None
    unavailable: Callable[[str], str | None] = lambda device: None
    default_devices: tuple[str, ...] = ("cpu", "cuda")
    static_gradients: bool = False
    most_elements: int | None = None
    launches: Callable[[], int] | None = None

    def missing(self, device: str) -> str | None:
        """Why this peer is not to be had on a device type of this machine, or None."""
        if device not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return self.unavailable(device)

    def unfit(self, optimizer: str, gradients: str, device: str, elements: int) -> str | None:
        """Why this peer cannot run one kind of case, or None."""
        if device == "cpu" and self.most_elements is not None and elements > self.most_elements:
            return f"takes seconds a step on a CPU for more than {self.most_elements:,} elements"
        if optimizer not in self.optimizers:
            return f"has no {optimizer}"
        if self.static_gradients and gradients != "kept":
            return f"needs gradients at fixed addresses, not {gradients} ones"
        return None
