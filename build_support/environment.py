"""Makes the environment of ``make test`` and ``make bench``: a torch, the tools, fusedopt editable.

Run by the machine's own Python, so it uses the standard library alone:

    python3 build_support/environment.py .venv "torch==2.13.0"

Where that Python already imports torch, the environment sees it and no other is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import site
import subprocess
import sys
import venv
from pathlib import Path

BUILD_PACKAGES = ["setuptools>=77", "ninja>=1.11", "pybind11>=2.13"]  # as [build-system] in pyproject.toml


def main() -> int:
    """Create what is missing; running it again is harmless."""
    parser = argparse.ArgumentParser(description="Makes a virtual environment with torch, the tools and fusedopt.")
    parser.add_argument("folder", type=Path, help="of the environment, such as .venv")
    parser.add_argument("torch", type=shlex.split, help="what pip installs where this Python has no torch")
    arguments = parser.parse_args()
    folder, torch = arguments.folder, arguments.torch
    if sys.version_info < (3, 10):
        print(
            f"error: Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]}",
            file=sys.stderr,
        )
        print("  mend: make test PYTHON=python3.12 (any newer one that is installed)", file=sys.stderr)
        return 1
    python = folder / "bin" / "python"
    has_torch = importlib.util.find_spec("torch") is not None
    if not python.exists() and not _create(folder, share_packages=has_torch):
        return 1
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        if not _imports(python, "torch"):
            _run([*pip, *torch])
        _run([*pip, *BUILD_PACKAGES])
        needed = subprocess.run([str(python), "-m", "build_support", "--requires"], stdout=subprocess.PIPE, check=True)
        if needed.stdout.strip():
            _run([*pip, *needed.stdout.decode().split()])
        _run([str(python), "-m", "build_support"])
        _run([*pip, "--no-build-isolation", "--editable", ".[dev]"])
    except subprocess.CalledProcessError as error:
        print(f"error: {shlex.join(error.cmd)} failed with status {error.returncode}", file=sys.stderr)
        return 1
    return 0


def _create(folder: Path, share_packages: bool) -> bool:
    print(f"creating {folder} with {sys.executable}{' and its torch' * share_packages}", flush=True)
    try:
        venv.create(folder, system_site_packages=share_packages, with_pip=True)
    except subprocess.CalledProcessError:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(f"error: {sys.executable} cannot make a virtual environment: it lacks ensurepip", file=sys.stderr)
        print(f"  mend: sudo apt-get install python{version}-venv, then rm -rf {folder}", file=sys.stderr)
        return False
    if share_packages and sys.prefix != sys.base_prefix:
        # This Python is itself a virtual environment; a new one would see the packages of its base alone.
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        (folder / "lib" / version / "site-packages" / "_outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return True


def _imports(python: Path, module: str) -> bool:
    return subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    raise SystemExit(main())
