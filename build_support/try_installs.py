"""``make test-install``: installs fusedopt in every way it should install, and checks what came out.

Each row of CASES is one installation in a fresh virtual environment, from a copy of the checkout, with some
programs hidden. torch is not installed: the check loads the extension alone, so a row takes no gigabytes. Rows named
after a version of torch do install it, and compare the bits of some steps with those of the torch at hand: they run
only where they are asked for.

    python -m build_support.try_installs
    python -m build_support.try_installs "no nvcc" "torch 2.6.0"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from .settings import ROOT

WORK = ROOT / "build/installs"
TREE = WORK / "tree"
COMPILERS = ("g++", "c++", "clang++")
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MANAGED = (".pyenv/versions/{}.*/bin", ".local/share/uv/python/cpython-{}.*/bin")  # in the home folder
TORCH = "torch "  # how the name of a row begins that installs torch

# Runs in the new environment: what was installed, and whether the extension loads, without the package.
CHECK = """
import importlib.metadata, importlib.util, json, pathlib, sys
package = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
if package is None:
    package = pathlib.Path(importlib.metadata.distribution("fusedopt").locate_file("fusedopt"))
report = json.loads((package / "_build_info.json").read_text())
libraries = list(package.glob("_C*.so"))
if libraries:
    spec = importlib.util.spec_from_file_location("fusedopt._C", libraries[0])
    importlib.util.module_from_spec(spec)
report["libraries"] = len(libraries)
report["typed"] = (package / "py.typed").exists()
report["triton_kernels"] = (package / "triton_kernels").is_dir()
report["bare_name"] = importlib.util.find_spec("triton_kernels") is not None
print(json.dumps(report))
"""


# Runs where torch is installed: some steps of every rule and storage, of exact numbers; their bits, as a digest.
STEPS = """
import hashlib, torch, fusedopt
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for name, options in (("SGD", {"momentum": 0.9, "nesterov": True}), ("Adam", {"amsgrad": True}), ("AdamW", {})):
        params = [torch.nn.Parameter((torch.arange(n) % 97 - 48).to(dtype) / 64) for n in (1, 17, 5000)]
        optimizer = getattr(fusedopt, name)(params, lr=0.01, backend="cpu", **options)
        for step in range(3):
            for param in params:
                param.grad = ((torch.arange(param.numel()) * (step + 3)) % 89 - 44).to(dtype) / 32
            optimizer.step()
        for param in params:
            digest.update(param.detach().double().numpy().tobytes())
print(digest.hexdigest())
"""


@dataclass(frozen=True)
class Case:
    """One installation.

    Attributes:
        name: of the row.
        how: "pip", "editable", "offline" (no isolation, no index), "sdist" (then a wheel from it), or "torch" (beside
            the version that the name tells).
        hide: programs that are not to be found.
        env: variables set.
        headers: whether Python.h is there.
        expect: keys of the report and the text each must contain.
        fails: the installation must fail with this text.
    """

    name: str
    how: str = "pip"
    hide: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    headers: bool = True
    expect: dict[str, str] = field(default_factory=dict)
    fails: str = ""


BUILT = {"extension": "True", "libraries": "1"}
BARE = {"extension": "False", "libraries": "0"}
CASES = (
    Case("as found", expect=BUILT),
    Case("no nvcc", hide=("nvcc",), expect={**BUILT, "device_compiler": "nvrtc 12.8"}),
    Case(
        "FUSEDOPT_CUDA=0",
        env={"FUSEDOPT_CUDA": "0"},
        expect={**BUILT, "device_compiler": "none: FUSEDOPT_CUDA=0"},
    ),
    Case(
        "one architecture",
        env={"FUSEDOPT_CUDA_ARCHS": "9.0+ptx"},
        expect={**BUILT, "archs": "['90', '90+ptx']"},
    ),
    Case("wrong architecture", env={"FUSEDOPT_CUDA_ARCHS": "42"}, fails="does not know sm_42"),
    Case("no g++", hide=COMPILERS, expect={**BARE, "reason": "apt-get install g++"}),
    Case("no g++, asked for", hide=COMPILERS, env={"FUSEDOPT_EXTENSION": "1"}, fails="there is no C++ compiler"),
    Case("wrong CXX", env={"CXX": "g+-", "FUSEDOPT_EXTENSION": "1"}, fails="CXX='g+-' names no program"),
    Case("no Python.h", headers=False, expect={**BARE, "reason": "-dev"}),
    Case("sdist, then wheel", how="sdist", expect=BUILT),
    Case("offline, no nvcc", how="offline", hide=("nvcc",), expect={**BUILT, "reason": "pip install"}),
    Case("editable", how="editable", expect=BUILT),
)


class Failure(Exception):
    """A row that did not come out as it should."""


def main() -> int:
    """Run the rows named on the command line, or all, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m build_support.try_installs",
        description="Installs fusedopt in fresh environments in every way it should install, and checks what came out.",
        epilog=f"rows: {', '.join(case.name for case in CASES)}, Python 3.x, torch X.Y.Z (gigabytes; only where named)",
    )
    parser.add_argument("names", nargs="*", metavar="row", help="rows to run; default: all but those of torch")
    names = parser.parse_args().names
    here = {f"Python {name}": path for name in PYTHONS if (path := _python(name))}
    print("not at hand:", ", ".join(name for name in PYTHONS if f"Python {name}" not in here) or "none")
    rows = [(case, sys.executable) for case in CASES]
    rows += [(Case(name, expect=BUILT), path) for name, path in here.items()]
    rows += [
        (Case(name, how="torch", env={"FUSEDOPT_CUDA": "0"}), sys.executable)
        for name in names
        if name.startswith(TORCH)
    ]
    unknown = set(names) - {case.name for case, _ in rows}
    if unknown:
        parser.error(f"there is no row {', '.join(sorted(unknown))}; see --help")
    failures = 0
    for case, python in [row for row in rows if not names or row[0].name in names]:
        _copy_tree()
        started = time.perf_counter()
        try:
            outcome = _try(case, python)
        except Failure as error:
            failures += 1
            outcome = f"FAILED: {error}"
        print(f"{case.name:<22} {time.perf_counter() - started:6.1f} s  {outcome}", flush=True)
    return 1 if failures else 0


def _try(case: Case, python: str) -> str:
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        if not case.headers:
            python = _python_without_headers(folder / "python")
        _run([python, "-m", "venv", str(folder / "venv")], {})
        environment_python = str(folder / "venv/bin/python")
        variables = {**case.env, "PATH": _path_without(case.hide, folder / "path")}
        result = _install(case, environment_python, variables, folder)
        if case.how == "torch" and not result.returncode:
            return _compare_bits(environment_python, folder)
        if case.fails:
            if result.returncode == 0 or case.fails not in result.stdout:
                raise Failure(f"should have failed with {case.fails!r}:\n{_tail(result)}")
            return f"fails as it should: {case.fails}"
        if result.returncode:
            raise Failure(_tail(result))
        where = [str(TREE / "fusedopt")] if case.how == "editable" else []
        check = _run([environment_python, "-c", CHECK, *where], {}, cwd=folder)
        if check.returncode:
            raise Failure(_tail(check))
        report = json.loads(check.stdout.splitlines()[-1])
        _compare(report, {"typed": "True", "triton_kernels": "True", "bare_name": "False", **case.expect})
        told = report["reason"] or f"{report['device_compiler']}: {' '.join(report['archs'])}"
        return f"{told}{_rebuild(environment_python, variables) if case.how == 'editable' else ''}"


def _install(case: Case, python: str, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    pip = [python, "-m", "pip", "install", "--no-deps"]
    build_packages = [python, "-m", "pip", "install", "setuptools>=77", "ninja", "pybind11", "build"]
    if case.how == "pip":
        return _run([*pip, str(TREE)], env)
    if case.how == "torch":
        result = _run([python, "-m", "pip", "install", "numpy", case.name.replace(TORCH, "torch==")], env)
        return _run([*pip, str(TREE)], env) if result.returncode == 0 else result
    _run(build_packages, env)
    if case.how == "editable":
        return _run([*pip, "--no-build-isolation", "--editable", str(TREE)], env)
    if case.how == "offline":
        return _run([*pip, "--no-build-isolation", "--no-index", str(TREE)], env)
    result = _run([python, "-m", "build", "--outdir", str(folder / "dist"), str(TREE)], env)
    wheels = [str(path) for path in (folder / "dist").glob("*.whl")]
    return _run([*pip, "--no-index", *wheels], env) if result.returncode == 0 else result


def _rebuild(python: str, env: dict[str, str]) -> str:
    """Change a kernel file, then the header of its rule, and time the build of what follows from each."""
    env = {**env, "FUSEDOPT_CUDA_ARCHS": "90", "FUSEDOPT_QUICK": "1"}  # as docs/building.md says of work on a kernel
    _run([python, "-m", "build_support"], env, cwd=TREE)
    kernel = min((TREE / "csrc/cuda/kernels").glob("*.cu"))
    told = ""
    for edited in (kernel, TREE / f"csrc/rules/{kernel.stem}.h"):
        edited.write_text(edited.read_text() + "\n")
        started = time.perf_counter()
        result = _run([python, "-m", "build_support"], env, cwd=TREE)
        if result.returncode:
            raise Failure(_tail(result))
        told += f"; {time.perf_counter() - started:.1f} s to rebuild after a change of {edited.name}"
    return told


def _compare_bits(python: str, folder: Path) -> str:
    """Whether steps have the bits that they have here, with this Python's torch."""
    there = _run([python, "-c", STEPS], {}, cwd=folder)
    here = _run([sys.executable, "-c", STEPS], {"PYTHONPATH": str(ROOT)}, cwd=folder)
    for result in (there, here):
        if result.returncode:
            raise Failure(_tail(result))
    if there.stdout.splitlines()[-1] != here.stdout.splitlines()[-1]:
        raise Failure(f"other bits than with the torch of {sys.executable}")
    return f"same bits as with the torch of {sys.executable}"


def _compare(report: dict[str, object], expect: dict[str, str]) -> None:
    for key, text in expect.items():
        if text not in str(report[key]):
            raise Failure(f"{key} is {report[key]!r}, which does not contain {text!r}")


def _copy_tree() -> None:
    """A fresh clone, as it were: without what builds left, except compiled objects, which save time."""
    WORK.mkdir(parents=True, exist_ok=True)
    for path in TREE.iterdir() if TREE.exists() else []:
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    leave = shutil.ignore_patterns(
        "build", "dist", ".git", ".venv", "*.so", "_build_info.json", "__pycache__", "*.egg-info", ".*_cache"
    )
    shutil.copytree(ROOT, TREE, ignore=leave, symlinks=True, dirs_exist_ok=True)
    (TREE / "fusedopt/triton_kernels").unlink(missing_ok=True)


def _path_without(hide: tuple[str, ...], folder: Path) -> str:
    """A PATH of one folder that links every program but some; a compiler's longer names count too."""
    if not hide:
        return os.environ["PATH"]
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in sorted(place.iterdir()) if place.is_dir() else []:
            link = folder / program.name
            if not any(name in program.name for name in hide) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def _python(version: str) -> str:
    """Path of an interpreter that runs: the first in PATH may be a version manager's stand-in."""
    managed = [path for pattern in MANAGED for path in Path.home().glob(pattern.format(version))]
    for place in [*os.environ["PATH"].split(os.pathsep), *map(str, managed)]:
        program = shutil.which(f"python{version}", path=place)
        result = _run([program, "-c", "import sys; print(sys.executable)"], {}) if program else None
        if result and result.returncode == 0:
            return result.stdout.strip()
    return ""


def _python_without_headers(prefix: Path) -> str:
    """A Python that finds its library but no headers: its prefix is where its program stands."""
    (prefix / "bin").mkdir(parents=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy2(Path(sys.base_prefix) / "bin" / version, prefix / "bin" / version)
    (prefix / "lib").symlink_to(Path(sys.base_prefix) / "lib")
    return str(prefix / "bin" / version)


def _tail(result: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(["", *result.stdout.splitlines()[-15:]])


def _run(command: list[str], env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_HOME", "CUDA_PATH", "PYTHONPATH")}
    return subprocess.run(
        command, env={**clean, **env}, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


if __name__ == "__main__":
    raise SystemExit(main())
