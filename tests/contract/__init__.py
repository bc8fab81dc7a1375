"""What torch.optim promises, and where it and others go wrong in silence, run on every backend."""
