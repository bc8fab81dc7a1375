"""``python -m build_support``: builds the extension into the checkout, without setuptools or an install."""

from __future__ import annotations

import argparse
import sys

from . import backend_requirements, extension
from .settings import ROOT, BuildError


def main() -> int:
    """Build in place, or say what the build needs from PyPI."""
    parser = argparse.ArgumentParser(prog="python -m build_support", description=__doc__)
    parser.add_argument("--requires", action="store_true", help="print the device compiler's package, if one is needed")
    arguments = parser.parse_args()
    try:
        if arguments.requires:
            print(*backend_requirements.device_compiler_requirements())
            return 0
        extension.link_triton_kernels()
        extension.build(ROOT / "fusedopt")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
