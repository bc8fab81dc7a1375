"""The Triton backend, twin of csrc/ file by file and bit by bit; `launch.launch` is its one entry."""
