"""What the build wrote down about itself, and from it why an extension is missing."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent


def read_build_record(package: Path = PACKAGE) -> dict[str, Any]:
    """``_build_info.json`` of the package; empty where nothing was built.

    Args:
        package: the folder of ``fusedopt``.

    Returns:
        ``extension`` (bool), ``host_compiler``, ``isas``, ``device_compiler``, ``archs``, ``reason`` (what is
        not built, why, and the command that mends it), ``date``, ``version``.
    """
    path = package / "_build_info.json"
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def why_no_extension(error: ImportError, package: Path = PACKAGE) -> str:
    """Why ``fusedopt._C`` does not load, and the command that mends it.

    Args:
        error: what its import raised.
        package: the folder of ``fusedopt``.
    """
    record = read_build_record(package)
    if record and not record["extension"]:
        return str(record["reason"])
    libraries = sorted(path.name for path in package.glob("_C*.so"))
    if not libraries:
        return "it was not built here; to mend: pip install . (in a checkout: make build)"
    if isinstance(error, ModuleNotFoundError):
        return (
            f"{', '.join(libraries)} is not for Python {platform.python_version()}; "
            "to mend: pip install . with this Python (in a checkout: make build)"
        )
    return f"{', '.join(libraries)} does not load: {error}; to mend: pip install . again"
