"""What the build tells: its summary, the warning when something could not be built, _build_info.json."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .images import Image, kernel_names
from .settings import ROOT, Unavailable

INFO_NAME = "_build_info.json"
RULER = "=" * 78


@dataclass(frozen=True)
class BuildInfo:
    """What was built, kept as ``fusedopt/_build_info.json`` so that the installed package can tell.

    Attributes:
        extension: whether ``fusedopt._C`` was built.
        host_compiler: first line of the compiler's ``--version``; "" without extension.
        isas: instruction sets of the CPU engine.
        device_compiler: "nvcc 13.0.88", "nvrtc 12.8.93" or "none: <reason>".
        archs: what device code was made for, such as ["80", "90", "90+ptx"].
        reason: what was not built, why, and the command that mends it; "" when all was.
        date: UTC, ISO 8601.
        version: of fusedopt.
    """

    extension: bool
    host_compiler: str
    isas: list[str]
    device_compiler: str
    archs: list[str]
    reason: str
    date: str
    version: str

    def write(self, package: Path) -> None:
        """Write it into the folder of the package."""
        package.mkdir(parents=True, exist_ok=True)
        (package / INFO_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def build_date() -> str:
    """Now, or the time that ``SOURCE_DATE_EPOCH`` gives for reproducible builds."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch else None
    return (now or datetime.datetime.now(datetime.timezone.utc)).isoformat(timespec="seconds")


def read_version(root: Path = ROOT) -> str:
    """The version, read without importing the package."""
    namespace: dict[str, str] = {}
    exec((root / "fusedopt/_version.py").read_text(), namespace)
    return namespace["__version__"]


def warn(what: str, problem: Unavailable) -> None:
    """Print what is not built, why, and what mends it: in a frame, unless it was chosen so."""
    message = f"{what}\n  why:  {problem.reason}\n  mend: {problem.remedy}"
    say(message if problem.chosen else f"\n{RULER}\nWARNING: {message}\n{RULER}\n", loud=not problem.chosen)


def say(text: str, loud: bool = False) -> None:
    """Print to standard error.

    pip hides the output of a build that succeeds; what is ``loud`` goes to the terminal, if any, too.
    """
    print(text, file=sys.stderr, flush=True)
    if loud and not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(text + "\n")


def summary(info: BuildInfo, root: Path, library: Path, images: Sequence[Image], seconds: float) -> str:
    """Table of what was built: kernels, bytes per architecture, size, time."""
    lines = [
        f"fusedopt {info.version}: {library.name}, {_size(library.stat().st_size)}, built in {seconds:.1f} s",
        f"  host    {info.host_compiler}; engine: {', '.join(info.isas) or 'none'}",
        f"  device  {info.device_compiler}" + (f"; {' '.join(info.archs)}" if info.archs else ""),
    ]
    for rule in dict.fromkeys(image.rule for image in images):
        mine = [image for image in images if image.rule == rule]
        names = kernel_names((root / mine[0].path).read_bytes())
        sizes = "  ".join(f"{image.target.arch} {_size((root / image.path).stat().st_size)}" for image in mine)
        lines.append(f"  {rule:<7} {len(names)} kernel{'s' * (len(names) != 1)}: {sizes}")
    if images:
        cubins = sum((root / image.path).stat().st_size for image in images)
        kernels = sum(len(kernel_names((root / image.path).read_bytes())) for image in images)
        lines.append(f"  total   {kernels} kernels in {len(images)} images, {_size(cubins)}")
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
