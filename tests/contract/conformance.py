"""All behaviours: importing this fills ``behaviour.ALL``."""

from . import gradients, hyperparameters, layouts, plumbing, precision, states  # noqa: F401
from .behaviour import ALL

__all__ = ["ALL"]
