"""SGD, Adam and AdamW for PyTorch: the whole update of every parameter in one fused launch per device.

Example:
    >>> import torch, fusedopt
    >>> model = torch.nn.Linear(4, 2)
    >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> optimizer.step()
"""

# What stands here as itself is public (PEP 484): one line for each optimizer.
from . import amp as amp
from ._version import __version__ as __version__
from .backends import available_backends as available_backends
from .backends import launch_count as launch_count
from .fuse import fuse as fuse
from .fuse import unfuse as unfuse
from .info import info as info
from .optimizers.adam import Adam as Adam
from .optimizers.adam import AdamW as AdamW
from .optimizers.sgd import SGD as SGD
from .plan import ModePlan as ModePlan
from .plan import plan_memory as plan_memory
