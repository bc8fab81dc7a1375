"""What the environment asks of the build, checked once: an error names the variable and its value."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHOICES = ("auto", "0", "1")
QUICK_NOTE = ", quick: not for measuring"  # what a compiler's description ends with under FUSEDOPT_QUICK=1


class BuildError(Exception):
    """The build cannot do what was asked; the message says what is missing and how to mend it."""


class Unavailable(Exception):
    """A part of the build cannot be had here; the build may go on without it.

    Args:
        reason: what is missing, one line.
        remedy: the command or setting that mends it.
        chosen: the user said so, and needs no warning.
    """

    def __init__(self, reason: str, remedy: str, chosen: bool = False) -> None:
        super().__init__(f"{reason}; to mend: {remedy}")
        self.reason = reason
        self.remedy = remedy
        self.chosen = chosen


@dataclass(frozen=True)
class Settings:
    """The environment variables the build reads.

    Attributes:
        extension: ``FUSEDOPT_EXTENSION``: "auto" builds it where a C++ compiler is, "1" makes its absence an
            error, "0" installs Python alone.
        cuda: ``FUSEDOPT_CUDA``: the same choice for device code.
        archs: ``FUSEDOPT_CUDA_ARCHS``, such as "80;90+ptx" or "native"; empty for the default list.
        quick: ``FUSEDOPT_QUICK``: whether all is compiled soon rather than well.
        sanitize: ``FUSEDOPT_SANITIZE``, such as "address,undefined"; empty for none.
        jobs: ``MAX_JOBS``: compilers run at once; default, the CPUs this process may use.
    """

    extension: str
    cuda: str
    archs: str
    quick: bool
    sanitize: str
    jobs: int

    @staticmethod
    def from_environment(env: Mapping[str, str] = os.environ) -> Settings:
        """Read and check the variables."""
        return Settings(
            extension=_choice(env, "FUSEDOPT_EXTENSION"),
            cuda=_choice(env, "FUSEDOPT_CUDA"),
            archs=env.get("FUSEDOPT_CUDA_ARCHS", "").strip(),
            quick=_choice(env, "FUSEDOPT_QUICK", ("0", "1")) == "1",
            sanitize=env.get("FUSEDOPT_SANITIZE", "").strip(),
            jobs=_jobs(env.get("MAX_JOBS", "")),
        )


def _choice(env: Mapping[str, str], name: str, choices: tuple[str, ...] = CHOICES) -> str:
    value = env.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise BuildError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return value


def _jobs(text: str) -> int:
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"MAX_JOBS={text!r} is not a positive number")
    return int(text)
