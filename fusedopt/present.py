"""The page of ``python -m fusedopt``: fusedopt.info() as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .variables import VARIABLES

WIDTH = 100
# What is worth to know of a backend that can serve a device.
CAN_SERVE = {
    "reference": "can serve it, slowly: one tensor after the other",
    "emulated": "can serve it, for tests of the CUDA kernels; never chosen by itself",
}


def text(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: what ``fusedopt.info`` returned.

    Returns:
        Lines of at most 100 columns, except for single words that are longer.
    """
    parts = [
        f"fusedopt {report['versions']['fusedopt']}",
        _rows([*_versions(report["versions"]), *_machine(report["machine"])]),
        "\nBuilt",
        _rows(_build(report["build"])),
        *(_device(device, report["build"]["missing"]) for device in report["devices"]),
        *_self_test(report["self_test"]),
        "\nEnvironment",
        _rows(_environment(report["environment"])),
        "\nTo do",
        "\n".join(_wrapped(f"- {line}", "  ", "    ") for line in report["advice"]) or "  nothing",
    ]
    return "\n".join(parts)


def _versions(versions: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    platforms = [f"{name.upper()} {versions[name]}" for name in ("cuda", "rocm") if versions[name]]
    yield "python", versions["python"]
    yield "torch", f"{versions['torch']}, built for {', '.join(platforms) or 'the CPU alone'}"
    yield "triton", versions["triton"] or "not installed"


def _machine(machine: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "system", machine["system"]
    yield (
        "processor",
        f"{machine['processor']}; {machine['processors']} cores to run on, {machine['threads']} threads of torch",
    )


def _build(build: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if not build["extension"]:
        yield "extension", f"none: {build['missing']}"
        return
    yield "extension", f"by {build['host_compiler']}" + (f", {build['date']}" if build["date"] else "")
    usable = build["usable_instruction_sets"]
    others = [name for name in build["instruction_sets"] if name not in usable]
    beyond = f"; not for this processor: {', '.join(others)}" if others else ""
    yield "CPU engine", f"with {', '.join(usable)} instructions{beyond}"
    archs = " ".join(f"sm_{arch}" for arch in build["archs"])
    size = sum(image["bytes"] for image in build["images"]) / 1e6
    made = f" for {archs}: {size:.2f} MB in {len(build['images'])} images" if build["images"] else ""
    yield "CUDA code", f"{build['device_compiler']}{made}"


def _device(device: Mapping[str, Any], missing: str) -> str:
    """One device. What the build lacks was told above, and is not told again for every backend."""
    uses = f"'{device['uses']}'" if device["uses"] else "no backend"
    rows = [("uses", f"{uses}: {device['because']}")]
    rows += [
        (f"'{name}'", reason or CAN_SERVE.get(name, "can serve it")) for name, reason in device["backends"].items()
    ]
    if missing:
        rows = [(name, line.replace(missing, "see above")) for name, line in rows]
    return f"\nDevice {device['device']}: {device['name']}\n{_rows(rows)}"


def _self_test(outcomes: Sequence[Mapping[str, Any]] | None) -> Iterable[str]:
    yield "\nSelf-test: some steps of every optimizer on each backend; all bits must be those of the reference"
    if outcomes is None:
        yield "  not run"
        return
    for outcome in outcomes:
        verdict = "ok    " if outcome["passed"] else "FAILED"
        yield (
            f"  {verdict}  '{outcome['backend']}' on {outcome['device']}: "
            f"{outcome['checks']} checks in {outcome['seconds']:.2f} s"
        )
        for failure in outcome["failures"]:
            yield _wrapped(failure, "          ", "            ")
    if not outcomes:
        yield "  nothing to test: the reference is the only backend here"


def _environment(values: Mapping[str, str | None]) -> Iterable[tuple[str, str]]:
    for variable in VARIABLES:
        value = values[variable.name]
        now = "not set" if value is None else f"= {value}"
        choice = f"{variable.values}; default: {variable.default}"
        yield variable.name, f"{now}. At {variable.read}: {variable.meaning}. Values: {choice}"


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the second one wrapped."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(_wrapped(value, f"  {name:<{width}}", " " * (width + 2)) for name, value in rows)


def _wrapped(line: str, first: str, rest: str) -> str:
    return textwrap.fill(
        line,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
