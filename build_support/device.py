"""The device side of the build: nvcc or NVRTC, the architectures, and the command that makes one image."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from . import assembler, nvrtc
from .settings import QUICK_NOTE, BuildError, Settings, Unavailable

# One of each generation: 8.6 and 8.9 run the cubins of 8.0, which each would take a sixth of the build for its own.
DEFAULT_ARCHS = (75, 80, 90, 100, 120)
# "few": what the tests look at.
FEW_ARCHS = (80, 90, 100)

# The bit contract: no contraction, IEEE division and square root, denormals kept. Both compilers know these.
DEVICE_FLAGS = "-std=c++17 --fmad=false --ftz=false --prec-div=true --prec-sqrt=true".split()
# Kernels include no host header, so nvcc's list of known host compilers does not concern them.
NVCC_FLAGS = "-O3 -allow-unsupported-compiler -Wno-deprecated-gpu-targets".split()
# NVRTC takes a function without __device__ for host code, which it refuses, and lacks a builtin of nvcc's.
NVRTC_FLAGS = ["-default-device", "-D__builtin_memcpy=memcpy"]

# What nvcc tells its assembler; the PTX says the rest.
PTXAS_FLAGS = "--fmad false -O3".split()

# Half the time for half the optimizations, none of which may change a bit.
QUICK_FLAG = "--Ofast-compile=mid"
QUICK_SINCE = (13, 0)

NATIVE_HINT = "name the architecture instead, such as FUSEDOPT_CUDA_ARCHS=90"


@dataclass(frozen=True)
class Target:
    """One image to make: a cubin for ``sm``, or PTX."""

    sm: int
    ptx: bool

    @property
    def arch(self) -> str:
        """As the compilers name it."""
        return f"{'compute' if self.ptx else 'sm'}_{self.sm}"

    def __str__(self) -> str:
        return f"{self.sm}{'+ptx' * self.ptx}"


@dataclass(frozen=True)
class DeviceCompiler:
    """A device compiler that was tried and works.

    Attributes:
        kind: "nvcc" or "nvrtc".
        path: the program, or NVRTC's library.
        version: such as "13.0.88".
        archs: architectures it knows: 90 is sm_90.
        ptxas: the program that assembles its PTX; "": it is itself the one, or there is none.
        quick: whether it is to compile soon rather than well.
    """

    kind: str
    path: str
    version: str
    archs: tuple[int, ...]
    ptxas: str = ""
    quick: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.version}{QUICK_NOTE * self.quick}"

    def made_quick(self) -> DeviceCompiler:
        """The same compiler, to compile soon rather than well; one that is older than the flag stays as it is."""
        return replace(self, quick=_numbers(self.version) >= QUICK_SINCE)

    @property
    def assembles(self) -> bool:
        """Whether cubins can be made of PTX: no kernel depends on the architecture, so one PTX does for all."""
        return self.kind == "nvcc" or bool(self.ptxas)

    def command(self, target: Target, depfile: str, threads: int) -> str:
        """Shell command for ninja, with ``$in`` and ``$out``, run in the repository root; threads: for this file."""
        version = f": {shlex.quote(str(self))} &&"  # does nothing, but ninja sees an upgrade
        if self.kind == "nvcc":
            flags = [*self._nvcc_flags(target), *self._split(threads), "-Icsrc", "-MMD", "-MF", depfile]
            return f"{version} {shlex.quote(self.path)} {shlex.join(flags)} $in -o $out"
        script = f'"${nvrtc.PYTHON_VARIABLE}" -I build_support/nvrtc.py'
        flags = ["--arch", target.arch, "--depfile", depfile, "--include", "csrc"]
        options = shlex.join([*DEVICE_FLAGS, *NVRTC_FLAGS, *self._speed()])
        return f"{version} {script} {shlex.join(flags)} --output $out $in -- {options}"

    def assembly_command(self, target: Target) -> str:
        """The same for a cubin, with PTX for ``$in``."""
        version = f": {shlex.quote(str(self))} &&"
        if self.kind == "nvcc":
            return f"{version} {shlex.quote(self.path)} {shlex.join(self._nvcc_flags(target))} $in -o $out"
        flags = [f"-arch={target.arch}", *PTXAS_FLAGS]
        return f'{version} "${assembler.PROGRAM_VARIABLE}" {shlex.join(flags)} $in -o $out'

    def _nvcc_flags(self, target: Target) -> list[str]:
        kind = "-ptx" if target.ptx else "-cubin"
        return [kind, f"-arch={target.arch}", *DEVICE_FLAGS, *NVCC_FLAGS, *self._speed()]

    def _speed(self) -> list[str]:
        return [QUICK_FLAG] if self.quick else []

    def _split(self, threads: int) -> list[str]:
        """Flags that share the optimizations of one file among threads: nvcc's and its assembler's."""
        knows = _numbers(self.version) >= (13, 0)
        return [f"--split-compile={threads}", "-Xptxas", f"--split-compile={threads}"] if threads > 1 and knows else []


def find_device_compiler() -> DeviceCompiler:
    """Return nvcc, else NVRTC.

    Raises:
        Unavailable: neither is here, or neither works.
    """
    problems = [f"{name}={os.environ[name]} has no bin/nvcc" for name in _toolkits() if not _is_toolkit(name)]
    for path in _nvcc_candidates():
        try:
            return _try_nvcc(path)
        except Unavailable as error:
            problems.append(error.reason)
    found = []
    for library in nvrtc.find_libraries():
        try:
            found.append(_try_nvrtc(library))
        except (OSError, RuntimeError, AttributeError) as error:
            problems.append(f"{library}: {error}")
    if found:
        # The most architectures; of equals the oldest, whose images run with the oldest drivers.
        return min(found, key=lambda each: (-len(set(each.archs) & set(DEFAULT_ARCHS)), _numbers(each.version)))
    reason = "; ".join(problems) or "no nvcc in CUDA_HOME, CUDA_PATH or PATH, and no NVRTC among Python's packages"
    raise Unavailable(reason, f"pip install {shlex.quote(nvrtc.REQUIREMENT)} (or set CUDA_HOME) and build again")


def nvcc_works() -> bool:
    """Whether one of the nvcc programs to be found compiles a kernel."""
    for path in _nvcc_candidates():
        try:
            _try_nvcc(path)
            return True
        except Unavailable:
            continue
    return False


def choose_targets(settings: Settings, compiler: DeviceCompiler) -> list[Target]:
    """The images to make of each kernel file: those asked for, or all known ones and PTX of the oldest.

    That PTX serves every newer GPU, and where the compiler assembles, the cubins are made of it.

    Raises:
        BuildError: an architecture asked for is not one, or is not known to the compiler.
    """
    if not settings.archs:
        known = [sm for sm in DEFAULT_ARCHS if sm in compiler.archs]
        if not known:
            raise BuildError(f"{compiler} knows none of the architectures {DEFAULT_ARCHS}: it knows {compiler.archs}")
        return [Target(sm, False) for sm in known] + [Target(known[0], True)]
    targets: dict[Target, None] = {}
    for word in re.split(r"[;,\s]+", settings.archs):
        for target in _parse_arch(word, settings, compiler):
            targets[target] = None
    if not targets:
        raise BuildError(f"FUSEDOPT_CUDA_ARCHS={settings.archs!r}: {compiler} knows none of {FEW_ARCHS}")
    return sorted(targets, key=lambda target: (target.ptx, target.sm))


def _parse_arch(word: str, settings: Settings, compiler: DeviceCompiler) -> list[Target]:
    name, _, suffix = word.lower().partition("+")
    if name == "few" and not suffix:
        few = [sm for sm in FEW_ARCHS if sm in compiler.archs]
        return [Target(sm, False) for sm in few] + [Target(few[0], True)] if few else []
    if name == "native" and not suffix:
        return [Target(_newest_that_runs(sm, compiler), False) for sm in native_archs()]
    match = re.fullmatch(r"(?:sm_?)?(\d+)\.?(\d)", name)
    if not match or suffix not in ("", "ptx"):
        raise BuildError(
            f"FUSEDOPT_CUDA_ARCHS={settings.archs!r}: {word!r} is not an architecture; "
            "write for example '80;90+ptx', '9.0', 'few' or 'native'"
        )
    sm = int(match[1] + match[2])
    if sm not in compiler.archs:
        raise BuildError(
            f"FUSEDOPT_CUDA_ARCHS={settings.archs!r}: {compiler} does not know sm_{sm}; "
            f"it knows {' '.join(map(str, compiler.archs))}"
        )
    return [Target(sm, False)] + ([Target(sm, True)] if suffix else [])


def _newest_that_runs(sm: int, compiler: DeviceCompiler) -> int:
    """The newest known architecture whose cubins run on ``sm``: the same major number, no later minor one."""
    fitting = [known for known in compiler.archs if known <= sm and known // 10 == sm // 10]
    if not fitting:
        raise BuildError(f"FUSEDOPT_CUDA_ARCHS=native: this machine has sm_{sm}, which {compiler} does not know")
    return max(fitting)


def native_archs() -> list[int]:
    """Architectures of this machine's GPUs, asked of the driver.

    Raises:
        BuildError: there is no driver or no GPU.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError(f"FUSEDOPT_CUDA_ARCHS=native: there is no CUDA driver ({error}); {NATIVE_HINT}") from None
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        raise BuildError(f"FUSEDOPT_CUDA_ARCHS=native: the CUDA driver sees no GPU; {NATIVE_HINT}")
    found = set()
    for ordinal in range(count.value):
        # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR. The handle is the ordinal.
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, ordinal)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, ordinal)
        found.add(10 * major.value + minor.value)
    return sorted(found)


def _toolkits() -> list[str]:
    """The variables that name a CUDA toolkit."""
    return [name for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]


def _nvcc_of(toolkit: str) -> str:
    return os.path.join(os.environ[toolkit], "bin", "nvcc")


def _is_toolkit(name: str) -> bool:
    return os.access(_nvcc_of(name), os.X_OK)


def _nvcc_candidates() -> list[str]:
    paths = [*map(_nvcc_of, _toolkits()), shutil.which("nvcc") or ""]
    return list(dict.fromkeys(path for path in paths if path and os.access(path, os.X_OK)))


def _try_nvcc(path: str) -> DeviceCompiler:
    """Ask for version and architectures, and compile an empty kernel: nvcc alone is no toolkit."""
    remedy = "install the whole CUDA toolkit, 11.7 or newer"
    try:
        version = re.search(r"V(\d+\.\d+\.\d+)", _output([path, "--version"]))
        archs = tuple(sorted({int(sm) for sm in re.findall(r"sm_(\d+)\b", _output([path, "--list-gpu-code"]))}))
        if not version or not archs:
            raise Unavailable(f"{path} does not name its version and architectures", remedy)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text('extern "C" __global__ void probe(const __grid_constant__ int) {}\n')  # as entry.h
            cubin = os.path.join(folder, "probe.cubin")
            _output(
                [
                    path,
                    "-cubin",
                    f"-arch=sm_{archs[-1]}",
                    *DEVICE_FLAGS,
                    *NVCC_FLAGS,
                    str(source),
                    "-o",
                    cubin,
                ]
            )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines() or [f"exit status {error.returncode}"]
        raise Unavailable(f"{path} does not work: {lines[0]}", remedy) from None
    except OSError as error:
        raise Unavailable(f"{path} does not start: {error}", remedy) from None
    return DeviceCompiler("nvcc", path, version[1], archs)


def _try_nvrtc(library: str) -> DeviceCompiler:
    compiler = nvrtc.Nvrtc(library)
    version = nvrtc.full_version(compiler.version())
    return DeviceCompiler("nvrtc", library, version, tuple(compiler.archs()), assembler.find_assembler(version))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
