"""What is installed and built, what each device here will use and why, whether it works, what to mend."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .backends import best_backend, cpu, find_backend, why_not
from .build_record import read_build_record
from .core import compiled, why_not_compiled
from .selftest import devices, self_test
from .variables import values_now


class Info(dict[str, Any]):
    """The answer of :func:`info`: a dict that prints as the page of ``python -m fusedopt``."""

    def __str__(self) -> str:
        from .present import text

        return text(self)


def info(*, test: bool = True) -> Info:
    """Looks at this installation and this machine.

    Args:
        test: run the self-test too, about a second; a GPU's kernels are compiled then, which can take longer.

    Returns:
        A dict that ``print`` shows as a page:

        - ``versions``: of fusedopt, Python, torch, the CUDA or ROCm that torch is built for, and Triton; None
          for what is absent.
        - ``machine``: system, processor, threads.
        - ``build``: ``extension`` (whether there is one), compilers, architectures, instruction sets,
          ``images`` (rule, architecture, whether PTX, bytes), ``missing`` (what was not built, why, and what
          mends it).
        - ``devices``: for each, ``uses`` (a backend or None), ``because``, and ``backends``: for each one
          why it can not serve this device; empty: it can.
        - ``environment``: values of the variables that fusedopt reads, None where not set.
        - ``self_test``: outcomes (``fusedopt.selftest.Outcome`` as dicts); None: not run.
        - ``advice``: what to do about what is missing, one line each.

    Example:
        >>> import fusedopt
        >>> fusedopt.info(test=False)["devices"][0]["device"]
        'cpu'
    """
    report = Info(
        versions=_versions(),
        machine=_machine(),
        build=_build(),
        devices=[_device(device) for device in devices()],
        environment=values_now(),
        self_test=[asdict(outcome) for outcome in self_test()] if test else None,
    )
    report["advice"] = _advice(report)
    return report


def _versions() -> dict[str, str | None]:
    return {
        "fusedopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "triton": _installed("triton"),
    }


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> dict[str, str | int]:
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    """Its name as Linux tells it; Python knows no more than the architecture there."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _build() -> dict[str, Any]:
    record = read_build_record()
    made = compiled.build_info() if compiled else {}
    return {
        "extension": compiled is not None,
        "date": record.get("date"),
        "host_compiler": made.get("host_compiler"),
        "instruction_sets": record.get("isas", []) if compiled else [],
        "usable_instruction_sets": compiled.instruction_sets() if compiled else [],
        "device_compiler": made.get("device_compiler"),
        "archs": made.get("archs", "").split(),
        "images": [
            {"rule": rule, "sm": sm, "ptx": ptx, "bytes": size} for rule, sm, ptx, size in made.get("images", [])
        ],
        "missing": why_not_compiled or record.get("reason", ""),
    }


def _device(device: torch.device) -> dict[str, Any]:
    uses, because = _choice(device)
    return {
        "device": str(device),
        "name": _device_name(device),
        "uses": uses,
        "because": because,
        "backends": why_not(device),
    }


def _choice(device: torch.device) -> tuple[str | None, str]:
    """The backend that an optimizer which names none will use, and why."""
    try:
        named = find_backend(None)
        if named is None:
            best, reasons = best_backend(device)
    except ValueError as error:
        return None, str(error)
    if named is not None:
        reason = named.why_not(device)
        if reason:
            return None, f"FUSEDOPT_BACKEND={named.name}, but {reason}"
        return named.name, f"FUSEDOPT_BACKEND={named.name}"
    if best is cpu:
        assert compiled is not None  # what the backend is made of
        return best.name, f"it is built; with {cpu.isa or 'up to ' + compiled.instruction_sets()[0]} instructions"
    return best.name, "; ".join(reasons) or "it is built and there is a driver"


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return _processor()
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"


def _advice(report: Info) -> list[str]:
    """What to do about what is missing, and about a self-test that failed."""
    advice = []
    has_gpu = len(report["devices"]) > 1
    for_gpu = "" if has_gpu else "only for a GPU: "
    if report["build"]["missing"]:
        needed = for_gpu if report["build"]["extension"] else ""
        advice.append(f"{needed}{report['build']['missing']}")
    if not has_gpu:
        advice.append(f"{for_gpu}{_why_no_gpu()}")
    if report["versions"]["triton"] is None:
        advice.append(f"{for_gpu}triton is not installed; to mend: pip install 'fusedopt[triton]'")
    for device in report["devices"]:
        if device["uses"] is None:
            advice.append(f"{device['device']}: no optimizer can step there: {device['because']}; {_other(device)}")
        elif device["uses"] == "reference":
            advice.append(f"{device['device']} uses the reference, which is slow")
    for outcome in report["self_test"] or []:
        if not outcome["passed"]:
            advice.append(
                f"{outcome['backend']} on {outcome['device']} fails the self-test: "
                "set FUSEDOPT_BACKEND to another backend, and report this page"
            )
    return advice


def _other(device: dict[str, Any]) -> str:
    """What mends an environment variable that leaves a device without a backend."""
    serving = ", ".join(name for name, reason in device["backends"].items() if not reason)
    return f"to mend: unset the variable; FUSEDOPT_BACKEND may be {serving} here"


def _why_no_gpu() -> str:
    driver = compiled.cuda_unavailable() if compiled else ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is built without CUDA and ROCm; to mend: install torch as "
            "https://pytorch.org/get-started/locally says"
        )
    return f"torch sees none{f' ({driver})' if driver else ''}"
