"""PEP 517 backend: setuptools', which also asks for the wheels of NVRTC and ptxas where no nvcc is found."""

from __future__ import annotations

from typing import Any

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  the hooks that need no change

from .backend_requirements import device_compiler_requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What ``pip install .`` installs before it builds."""
    return [*_setuptools.get_requires_for_build_wheel(config_settings), *device_compiler_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """What ``pip install -e .`` installs before it builds."""
    return [*_setuptools.get_requires_for_build_editable(config_settings), *device_compiler_requirements()]
