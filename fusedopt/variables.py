"""Every environment variable that fusedopt or its build reads, in its one table."""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable.

    Attributes:
        name: of the variable.
        read: "run", when the process starts or an optimizer first steps; "build", by pip and make.
        values: what it may be.
        default: what holds where it is not set.
        meaning: one line.
    """

    name: str
    read: str
    values: str
    default: str
    meaning: str


VARIABLES = (
    Variable(
        "FUSEDOPT_BACKEND",
        "run",
        "cpu, cuda, triton, reference, emulated",
        "the best of each device",
        "the backend of every optimizer that names none itself",
    ),
    Variable(
        "FUSEDOPT_CPU_ISA",
        "run",
        "avx512, avx2, baseline, neon",
        "the best of this processor for each launch",
        "instruction set of the CPU engine; the result is the same bits with each",
    ),
    Variable(
        "OMP_NUM_THREADS",
        "run",
        "a number",
        "torch's choice",
        "threads of torch, and of the CPU engine, unless torch.set_num_threads says otherwise",
    ),
    Variable(
        "TRITON_INTERPRET",
        "run",
        "1",
        "off",
        "Triton kernels run in Triton's interpreter, on any device and slowly",
    ),
    Variable(
        "FUSEDOPT_EXTENSION",
        "build",
        "auto, 0, 1",
        "auto",
        "the compiled extension: where there is a C++ compiler, never, or else fail",
    ),
    Variable(
        "FUSEDOPT_CUDA",
        "build",
        "auto, 0, 1",
        "auto",
        "CUDA device code: where nvcc or NVRTC is found, never, or else fail",
    ),
    Variable(
        "FUSEDOPT_CUDA_ARCHS",
        "build",
        "such as 80;90+ptx, or few (80 90 100 and PTX of 80), or native",
        "75 80 90 100 120 and PTX of the first, those the compiler knows",
        "GPU architectures to compile for",
    ),
    Variable(
        "FUSEDOPT_QUICK",
        "build",
        "0, 1",
        "0",
        "compile soon rather than well, host and device: to try a change, not to measure it",
    ),
    Variable(
        "FUSEDOPT_SANITIZE",
        "build",
        "such as address,undefined",
        "none",
        "sanitizers to build the extension with, for its tests",
    ),
    Variable("CUDA_HOME", "build", "a folder", "nvcc in PATH", "CUDA toolkit to compile with"),
    Variable("CXX", "build", "a command", "g++, c++ or clang++", "C++ compiler"),
    Variable("MAX_JOBS", "build", "a number", "the processors there are", "compilers run at once"),
)


def values_now() -> dict[str, str | None]:
    """What each variable is set to in this process, None where it is not."""
    return {variable.name: os.environ.get(variable.name) for variable in VARIABLES}
