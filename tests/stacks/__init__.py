"""The training stacks people use, with fusedopt in them: torch.distributed, and the frameworks on top."""
