"""Builds ``fusedopt._C`` from end to end: compilers, images, ninja, and what is told at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import assembler, device, host, images, nvrtc, report, units
from .ninja_file import NinjaFile
from .settings import ROOT, BuildError, Settings, Unavailable

TRITON_LINK = Path("fusedopt/triton_kernels")


@dataclass(frozen=True)
class DeviceBuild:
    """The device half of a build: the compiler, the images to make, and what to say where there is none."""

    compiler: device.DeviceCompiler | None
    targets: tuple[device.Target, ...]
    description: str
    reason: str

    @property
    def archs(self) -> list[str]:
        """The targets as text."""
        return [str(target) for target in self.targets]


def library_name() -> str:
    """File name of the extension for the running Python."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def build_folder(settings: Settings, root: Path = ROOT) -> Path:
    """Where objects and images stay between builds: a folder per platform and kind, shared by all Pythons."""
    sanitized = f"-{settings.sanitize.replace(',', '-')}" if settings.sanitize else ""
    return root / "build" / f"{sysconfig.get_platform()}{sanitized}{'-quick' * settings.quick}"


def build(package: Path, root: Path = ROOT, *, emulates: bool = True) -> bool:
    """Build what can be built and put it into the folder of the package.

    Args:
        package: folder of ``fusedopt`` to receive the extension and ``_build_info.json``.
        root: repository root.
        emulates: whether the CUDA kernels are compiled for the host too, which is for tests in a checkout.

    Returns:
        Whether the extension was built.

    Raises:
        BuildError: something that was asked for cannot be built, or the sources do not compile.
    """
    settings = Settings.from_environment()
    started = time.perf_counter()
    try:
        if settings.extension == "0":
            raise Unavailable("FUSEDOPT_EXTENSION=0 was set", "unset it and install again", chosen=True)
        compiler = host.find_host_compiler()
        if settings.quick:
            compiler = compiler.made_quick()
        headers = host.require_python_headers()
    except Unavailable as problem:
        if settings.extension == "1":
            raise BuildError(f"FUSEDOPT_EXTENSION=1, but {problem.reason}\n  mend: {problem.remedy}") from None
        _finish_without_extension(package, problem, root)
        return False
    device_build = _plan_device(settings)
    library, made = _compile(settings, root, compiler, headers, device_build, emulates)
    _install(library, package)
    info = report.BuildInfo(
        extension=True,
        host_compiler=compiler.description,
        isas=list(compiler.isas),
        device_compiler=device_build.description,
        archs=device_build.archs,
        reason=device_build.reason,
        date=report.build_date(),
        version=report.read_version(root),
    )
    info.write(package)
    report.say(report.summary(info, root, library, made, time.perf_counter() - started))
    return True


def link_triton_kernels(root: Path = ROOT) -> None:
    """In a checkout, link the folder where it stands once installed: ``fusedopt.triton_kernels``."""
    link = root / TRITON_LINK
    if (root / "triton_kernels").is_dir() and not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)


def _finish_without_extension(package: Path, problem: Unavailable, root: Path) -> None:
    """Leave no stale library behind, and say what is missing."""
    (package / library_name()).unlink(missing_ok=True)
    info = report.BuildInfo(
        extension=False,
        host_compiler="",
        isas=[],
        device_compiler="none: the extension was not built",
        archs=[],
        reason=str(problem),
        date=report.build_date(),
        version=report.read_version(root),
    )
    info.write(package)
    report.warn(
        "fusedopt is installed WITHOUT its compiled extension.\n"
        "  It runs on the Triton backend or on the slow reference; the cpu and cuda backends are absent.",
        problem,
    )


def _plan_device(settings: Settings) -> DeviceBuild:
    try:
        if settings.cuda == "0":
            raise Unavailable("FUSEDOPT_CUDA=0 was set", "unset it and install again", chosen=True)
        compiler = device.find_device_compiler()
    except Unavailable as problem:
        if settings.cuda == "1":
            raise BuildError(f"FUSEDOPT_CUDA=1, but {problem.reason}\n  mend: {problem.remedy}") from None
        report.warn("fusedopt is built WITHOUT CUDA device code: the cuda backend is absent.", problem)
        return DeviceBuild(None, (), f"none: {problem.reason}", f"no device code: {problem}")
    if settings.quick:
        compiler = compiler.made_quick()
    return DeviceBuild(compiler, tuple(device.choose_targets(settings, compiler)), str(compiler), "")


def _compile(
    settings: Settings,
    root: Path,
    compiler: host.HostCompiler,
    headers: list[str],
    device_build: DeviceBuild,
    emulates: bool,
) -> tuple[Path, list[images.Image]]:
    """Write the generated files, run ninja, and return the linked library and the device images in it."""
    folder = build_folder(settings, root)
    folder.mkdir(parents=True, exist_ok=True)
    made = images.plan_images(
        images.kernel_sources(root),
        device_build.targets,
        folder.relative_to(root) / "device",
        assembles=device_build.compiler is not None and device_build.compiler.assembles,
    )
    library = folder / library_name()
    ninja = NinjaFile(root, folder, compiler, [*host.compile_flags(settings), "-Icsrc"], host.link_flags(settings))
    if device_build.compiler:
        # Where there is one architecture, somebody works on a kernel and waits for its image alone.
        threads = settings.jobs if len(device_build.targets) == 1 else 1
        for image in made:
            ninja.add_image(image, device_build.compiler, threads)
    _add_sources(ninja, root, compiler, headers, host.cold_flags(settings), emulates)
    embedding = folder / "images.cpp"
    ninja.add_object(embedding, needs=[image.path for image in made])
    with only_build(folder) as lock:
        _write_if_changed(
            embedding,
            images.embedding(made, device_build.description, compiler.description, " ".join(device_build.archs)),
        )
        ninja_file = folder / f"{sys.implementation.cache_tag}.ninja"
        _write_if_changed(ninja_file, ninja.text(library))
        _run_ninja(ninja_file.relative_to(root), root, settings.jobs, device_build.compiler, lock)
    return library, made


def _add_sources(
    ninja: NinjaFile,
    root: Path,
    compiler: host.HostCompiler,
    headers: list[str],
    cold_flags: list[str],
    emulates: bool,
) -> None:
    python_flags = [flag for path in [*headers, _pybind11_include()] for flag in ("-isystem", path)]
    for unit in units.plain_units(root):
        # The binding stands at the top of csrc/; the .cpp files below it are the same for every Python.
        if unit.source.parent.name == "csrc":
            ninja.add_object(unit.source, python_flags, tag=str(sys.implementation.cache_tag))
        else:
            ninja.add_object(unit.source)
    for unit in [*units.emulated_units(root, emulates=emulates), *units.engine_units(root, compiler.isas)]:
        ninja.add_object(unit.source, [*unit.flags, *([] if unit.is_hot else cold_flags)], unit.tag)


@contextlib.contextmanager
def only_build(folder: Path) -> Iterator[int]:
    """Wait for another build in the same folder: ninja has no lock of its own. Yields the descriptor of the lock."""
    import fcntl  # not at the top: this module must load where there is none, to say what it builds for

    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build in {folder}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield lock.fileno()
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # whatever ninja left running, such as a compiler's cache


def _run_ninja(ninja_file: Path, root: Path, jobs: int, compiler: device.DeviceCompiler | None, lock: int) -> None:
    environment = dict(os.environ)
    if compiler and compiler.kind == "nvrtc":
        environment |= {nvrtc.LIBRARY_VARIABLE: compiler.path, nvrtc.PYTHON_VARIABLE: sys.executable}
        environment |= {assembler.PROGRAM_VARIABLE: compiler.ptxas}
    sys.stdout.flush()
    command = [_ninja_program(), "-f", str(ninja_file), "-j", str(jobs)]
    # Ninja holds the lock too: where this process is killed, it goes on, and two at a time lose what depends on what.
    if subprocess.run(command, cwd=root, env=environment, pass_fds=[lock]).returncode:
        raise BuildError(
            "the extension did not compile; the messages above say why (FUSEDOPT_EXTENSION=0 goes without)"
        )


def _write_if_changed(path: Path, text: str) -> None:
    """An unchanged file keeps its time, so that ninja does nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _install(library: Path, package: Path) -> None:
    """Copy the library in one step: a process that has the old one loaded keeps it."""
    package.mkdir(parents=True, exist_ok=True)
    fresh = package / f"{library.name}.new"
    shutil.copy2(library, fresh)
    os.replace(fresh, package / library.name)


def _pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError(_missing_build_package("pybind11")) from None
    return str(pybind11.get_include())


def _ninja_program() -> str:
    try:
        import ninja
    except ImportError:
        path = shutil.which("ninja")
        if not path:
            raise BuildError(_missing_build_package("ninja")) from None
        return path
    return os.path.join(ninja.BIN_DIR, "ninja")


def _missing_build_package(name: str) -> str:
    return (
        f"{name} is needed to build and is not installed for {sys.executable}\n"
        "  mend: pip install setuptools ninja pybind11, or install without --no-build-isolation"
    )
