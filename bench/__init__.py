"""The benchmark: fusedopt against torch.optim and others installed beside it; see docs/benchmark.md."""
