"""Finds ptxas, which makes cubins of the PTX that NVRTC compiles: as NVRTC it comes as a PyPI wheel."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

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
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    paths = [str(path) for folder in folders for path in sorted(folder.glob("*/bin/ptxas"))]
    toolkits = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    paths += [os.path.join(toolkit, "bin", "ptxas") for toolkit in toolkits]
    paths.append(shutil.which("ptxas") or "")
    return list(dict.fromkeys(path for path in paths if path and os.access(path, os.X_OK)))
