"""NVIDIA's run-time compiler as a build-time one: finds its library, and as a script compiles one file.

NVRTC comes as a PyPI wheel, needs neither a driver nor nvcc, and makes cubins. ninja calls this file once per
image:

    python nvrtc.py --arch sm_90 --depfile adam.d --output adam.cubin --include csrc adam.cu -- -std=c++17

The library and Python are named by variables, not in the command, because pip's isolated environments have
another path each time, and a changed command would make ninja compile everything again.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import importlib.util
import os
import re
import sys
from pathlib import Path

LIBRARY_VARIABLE = "FUSEDOPT_NVRTC"
PYTHON_VARIABLE = "FUSEDOPT_BUILD_PYTHON"
REQUIREMENT = "nvidia-cuda-nvrtc-cu12==12.8.*"
DISTRIBUTIONS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13")

INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


class Nvrtc:
    """The few entry points used, over ctypes.

    Args:
        library: path of ``libnvrtc.so.N``.

    Raises:
        OSError: the library cannot be loaded.
    """

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    def version(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        return major.value, minor.value

    def archs(self) -> list[int]:
        """Architectures it compiles for: 90 is sm_90."""
        count = ctypes.c_int()
        self._check(self._lib.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        values = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(values))
        return sorted(values)

    def compile(self, source: str, name: str, options: list[str], ptx: bool) -> tuple[bytes, str]:
        """Compile one translation unit.

        Args:
            source: its text.
            name: its path, for messages and relative includes.
            options: compiler options.
            ptx: return PTX text instead of a cubin.

        Returns:
            The image and the compiler's log.

        Raises:
            RuntimeError: the source is wrong; the message is the log.
        """
        program = ctypes.c_void_p()
        create = self._lib.nvrtcCreateProgram
        self._check(create(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._lib.nvrtcCompileProgram(program, len(options), arguments)
            log = self._fetch("ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise RuntimeError(log or self._lib.nvrtcGetErrorString(status).decode())
            image = self._fetch("PTX", program).rstrip(b"\0") if ptx else self._fetch("CUBIN", program)
            return image, log
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _fetch(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"NVRTC: {self._lib.nvrtcGetErrorString(status).decode()}")


def package_folders() -> list[Path]:
    """Where NVIDIA's packages of the running Python are."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []


def toolkit_folders() -> list[Path]:
    """The CUDA toolkits that the environment names."""
    return [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def find_libraries() -> list[str]:
    """Paths of every NVRTC library that the running Python's packages or a CUDA folder hold."""
    found = [path for folder in package_folders() for path in sorted(folder.glob("*/lib/libnvrtc.so.*"))]
    found += [path for folder in toolkit_folders() for path in sorted(folder.glob("lib*/libnvrtc.so.*"))]
    return [str(path) for path in found if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]


def full_version(version: tuple[int, int]) -> str:
    """Version with the patch number where a package tells it: the library itself knows only two numbers."""
    short = f"{version[0]}.{version[1]}"
    for name in DISTRIBUTIONS:
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.startswith(f"{short}."):
            return installed
    return short


def scan_includes(source: Path, include_dirs: list[Path]) -> list[Path]:
    """Files that ``source`` includes by quotes, directly or through others; conditions are not evaluated."""
    found: dict[Path, None] = {}
    waiting = [source]
    while waiting:
        current = waiting.pop()
        for name in INCLUDE.findall(current.read_text()):
            for folder in (current.parent, *include_dirs):
                path = Path(os.path.normpath(folder / name))
                if path.is_file():
                    if path not in found:
                        found[path] = None
                        waiting.append(path)
                    break
    return list(found)


def main() -> int:
    """Compile one file for one architecture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--arch", required=True, help="sm_90 for a cubin, compute_90 for PTX")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--depfile", required=True, type=Path)
    parser.add_argument("--include", type=Path, action="append", default=[])
    parser.add_argument("options", nargs="*", help="options of NVRTC, after --")
    arguments = parser.parse_args()
    headers = scan_includes(arguments.source, arguments.include)
    arguments.depfile.write_text(f"{arguments.output}: {arguments.source} {' '.join(map(str, headers))}\n")
    folders = [arguments.source.parent, *arguments.include]
    options = [f"--gpu-architecture={arguments.arch}", *(f"--include-path={folder}" for folder in folders)]
    try:
        image, log = Nvrtc(os.environ[LIBRARY_VARIABLE]).compile(
            arguments.source.read_text(),
            str(arguments.source),
            options + arguments.options,
            ptx=arguments.arch.startswith("compute"),
        )
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if log:
        print(log)
    arguments.output.write_bytes(image)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
