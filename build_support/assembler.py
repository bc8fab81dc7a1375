"""Finds ptxas, which makes cubins of the PTX that NVRTC compiles: as NVRTC it comes as a PyPI wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from .nvrtc import package_folders, toolkit_folders

PROGRAM_VARIABLE = "FUSEDOPT_PTXAS"
"""Names the program to ninja: see nvrtc.py."""
REQUIREMENT = "nvidia-cuda-nvcc-cu12==12.8.*"


def find_assembler(version: str) -> str:
    """Path of a ptxas of this version, such as "12.8.93", the last number aside; "" where there is none.

    An older one does not read the PTX, and the cubins of a newer one want a newer driver.
    """
    wanted = version.split(".")[:2]
    for path in _candidates():
        try:
            told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            continue
        found = re.search(r"V(\d+)\.(\d+)\.", told)
        if found and list(found.groups()) == wanted:
            return path
    return ""


def _candidates() -> list[str]:
    paths = [str(path) for folder in package_folders() for path in sorted(folder.glob("*/bin/ptxas"))]
    paths += [str(folder / "bin" / "ptxas") for folder in toolkit_folders()]
    paths.append(shutil.which("ptxas") or "")
    return list(dict.fromkeys(path for path in paths if path and os.access(path, os.X_OK)))
