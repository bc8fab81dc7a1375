"""A small character-level GPT on the source of Python's standard library, trained by any optimizer.

The optimizer comes from outside, so that the same run can be repeated with another one:

    from charlm import Config, train

    theirs = train(torch.optim.AdamW, Config(steps=100))
    ours = train(fusedopt.AdamW, Config(steps=100))  # same weights, same batches

`train_charlm.py`, one folder up, is the command line around it.
"""

from .config import Config
from .data import Text, build_text
from .model import GPT, build_model
from .training import Evaluation, OptimizerFactory, Result, Run, train, train_together

__all__ = [
    "GPT",
    "Config",
    "Evaluation",
    "OptimizerFactory",
    "Result",
    "Run",
    "Text",
    "build_model",
    "build_text",
    "train",
    "train_together",
]
