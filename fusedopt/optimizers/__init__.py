"""The optimizers, one file each: signature, docstring, hyperparameters."""
