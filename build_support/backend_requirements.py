"""Which device compiler the build must ask PyPI for, if any."""

from __future__ import annotations

import platform
import sys

from . import assembler, device, host, nvrtc
from .settings import Settings, Unavailable


def device_compiler_requirements() -> list[str]:
    """The wheels of NVRTC and its assembler, where device code can be built, no nvcc works and there are wheels."""
    settings = Settings.from_environment()
    if settings.cuda == "0" or settings.extension == "0" or not _wheel_exists():
        return []
    try:
        host.find_host_compiler()
        host.require_python_headers()
    except Unavailable:
        return []
    return [] if device.nvcc_works() else [nvrtc.REQUIREMENT, assembler.REQUIREMENT]


def _wheel_exists() -> bool:
    """NVIDIA publishes Linux wheels for glibc on two machines."""
    supported = platform.machine() in ("x86_64", "aarch64") and platform.libc_ver()[0] == "glibc"
    return sys.platform == "linux" and supported
