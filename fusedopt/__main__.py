"""``python -m fusedopt``: shows what is installed, built and used here, and tests it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from .info import info

DESCRIPTION = """\
Shows versions, what was built, what each device here will use and why, and the environment variables;
runs a self-test of about a second; says what to do about what is missing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page.

    Args:
        arguments: of the command line.

    Returns:
        The exit status: 1 where the self-test failed, else 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt",
        description=DESCRIPTION,
        epilog="Exit status: 0, or 1 when a backend fails the self-test.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON: what fusedopt.info() returns")
    parser.add_argument("--no-test", action="store_true", help="leave the self-test out")
    options = parser.parse_args(arguments)
    report = info(test=not options.no_test)
    print(json.dumps(report, indent=2) if options.json else report)
    return 0 if all(outcome["passed"] for outcome in report["self_test"] or []) else 1


if __name__ == "__main__":
    raise SystemExit(main())
