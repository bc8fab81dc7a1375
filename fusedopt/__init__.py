"""SGD, Adam and AdamW for PyTorch: the whole update of every parameter in one fused launch per device and step.

Example:
    >>> import torch, fusedopt
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
"""

from ._version import __version__
from .backends import available_backends, launch_count
from .optimizers.adam import Adam, AdamW
from .optimizers.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "__version__", "available_backends", "launch_count"]
