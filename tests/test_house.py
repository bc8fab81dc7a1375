"""The house rules that a reader relies on: one formula in one place, includes that run one way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from .formulas import formulas, statements

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"

# ---- one formula, one place in each language -------------------------------------------------------------

# Where the rules of a language stand, and all of its files.
LANGUAGES = {
    "C++": (sorted(CSRC.glob("rules/*.h")), [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp"), *CSRC.rglob("*.cu")]),
    "Triton": ([ROOT / "triton_kernels/rules.py"], list((ROOT / "triton_kernels").rglob("*.py"))),
    "Python": (
        [ROOT / "fusedopt/reference.py"],
        [path for path in (ROOT / "fusedopt").rglob("*.py") if "triton_kernels" not in path.parts],
    ),
}
# An expression with fewer operators than this is arithmetic that anything may hold, such as a + b * c.
LEAST_OPERATORS = 3


def repeated(rules: Iterable[Path], files: Iterable[Path]) -> list[str]:
    """The formulas of the rules that stand anywhere a second time, by other names or in another order too."""
    wanted = {form for path in rules for form, _ in formulas(path, LEAST_OPERATORS)}
    found: dict[str, list[str]] = {}
    for path in files:
        for form, statement in formulas(path, LEAST_OPERATORS):
            if form in wanted:
                found.setdefault(form, []).append(f"{path.name}: {statement}")
    return ["\n".join(places) for places in found.values() if len(places) > 1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_formula_of_a_rule_stands_twice(language: str) -> None:
    rules, files = LANGUAGES[language]
    assert set(rules) <= set(files)
    assert not repeated(rules, files)


SECOND_MOMENT = {
    "C++": "+(*(a b b) *(c d))",
    "Triton": "+(*(a b b) *(c d))",
    "Python": "+(*(+(-(a) 1) b b) *(a c))",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_second_moment_of_adam_is_among_the_formulas(language: str) -> None:
    """The line v = β₂·v + (1 − β₂)·g·g: so that the check above looks at something."""
    forms = Counter(form for path in LANGUAGES[language][0] for form, _ in formulas(path, LEAST_OPERATORS))
    assert forms[SECOND_MOMENT[language]] == 1, forms


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_but_the_rules_computes_with_moments_or_velocities(language: str) -> None:
    rules, files = LANGUAGES[language]
    for path in set(files) - set(rules):
        for _, statement in formulas(path, LEAST_OPERATORS):
            assert not re.search(r"exp_avg|momentum_buffer|one_minus_", statement), f"{path.name}: {statement}"


# Copies of Adam's second moment, by other names.
COPIES = {
    "renamed": "return w * x + y * (\n        z * z\n    )",
    "in another order": "return z * y * z + x * w",
    "within more": "return v - (y * z * z + x * w) * v",
    "as an argument": "store(at, x * w + y * z * z)",
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(kind: str, tmp_path: Path) -> None:
    rules = LANGUAGES["Triton"][0]
    copy = tmp_path / "copy.py"
    copy.write_text(f"def f(v, w, x, y, z):\n    {COPIES[kind]}\n")
    assert len(repeated(rules, [*rules, copy])) == 1


def test_arithmetic_of_another_form_is_no_copy(tmp_path: Path) -> None:
    rules = LANGUAGES["Triton"][0]
    other = tmp_path / "other.py"
    other.write_text(
        "def f(w, x, y, z):\n    return w * x + y * z * w - (x + y) / z, w * x * y * z, (w + x) * (y + z)\n"
    )
    assert not repeated(rules, [*rules, other])


# ---- includes and imports run one way --------------------------------------------------------------------

# What a file or folder of csrc/ may include, apart from itself. What is not listed may not be there.
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "types.h": (),
    "rules": ("types.h",),
    "storage": ("types.h", "rules"),
    "report.h": ("rules",),
    "phase.h": ("types.h", "rules", "report.h"),
    "table.h": ("types.h", "rules", "storage", "phase.h"),
    "variants.h": ("table.h",),
    "sweep.h": ("variants.h", "storage"),
    "norm.h": ("rules", "sweep.h"),
    "host_table": ("table.h", "variants.h", "rules"),
    "cpu": ("variants.h", "sweep.h", "norm.h", "table.h", "types.h", "rules", "storage"),
    "cuda": ("sweep.h", "norm.h", "types.h", "rules", "host_table"),
    "host_pages.h": ("types.h",),
    "python": ("types.h", "table.h", "host_table", "host_pages.h", "cpu", "cuda"),
    "bindings.cpp": ("host_table", "cpu", "cuda", "python"),
}
KNOW_PYTHON = ("bindings.cpp", "python")  # but for:
KNOW_NO_PYTHON = ("python/dlpack.h", "python/gradient_reader.h")
SOURCES = sorted(path.relative_to(CSRC) for path in CSRC.rglob("*.*") if path.suffix in (".h", ".cpp", ".cu"))

each_source = pytest.mark.parametrize("source", SOURCES, ids=str)


def part_of(source: Path) -> str:
    """The row of MAY_INCLUDE that a file belongs to."""
    if len(source.parts) > 1:
        return source.parts[0]
    return source.name if source.name in MAY_INCLUDE else source.stem


def includes(source: Path) -> tuple[list[Path], list[str]]:
    """The project's own headers that a file includes, and the others."""
    text = (CSRC / source).read_text()
    own = [Path(name) for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)]
    return own, re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE)


@each_source
def test_includes_run_one_way(source: Path) -> None:
    part = part_of(source)
    for header in includes(source)[0]:
        assert (CSRC / header).exists(), f"{source} includes {header}, which does not exist"
        assert part_of(header) in (part, *MAY_INCLUDE[part]), f"{source} must not include {header}"


@each_source
def test_only_the_bindings_know_python_and_nothing_knows_torch(source: Path) -> None:
    for header in includes(source)[1]:
        assert not re.match(r"(torch|ATen|c10|cuda|cu\w*\.h)", header), f"{source} includes <{header}>"
        if re.match(r"(Python\.h|pybind11)", header):
            assert part_of(source) in KNOW_PYTHON, f"{source} includes <{header}>"
            assert str(source) not in KNOW_NO_PYTHON, f"{source} includes <{header}>"


def _reached(source: Path, seen: set[Path]) -> set[Path]:
    if source not in seen:
        seen.add(source)
        for header in includes(source)[0]:
            _reached(header, seen)
    return seen


def test_no_python_object_is_destroyed_at_the_end_of_the_process() -> None:
    """A static one would be, after the interpreter is gone: from Python 3.12 on that ends in a crash."""
    sources = [CSRC / source for source in SOURCES]
    assert any("lasting_name" in path.read_text() for path in sources)  # how they are made
    for path in sources:
        made = r"^\s*(static|inline) (const )?py::\w+ \w+\s*(=|;|\{|\([\"\w]+\);)"
        assert not re.search(made, path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("kernel", [path for path in SOURCES if path.suffix == ".cu"], ids=str)
def test_device_code_includes_no_system_header(kernel: Path) -> None:
    reached = _reached(kernel, set()) - {Path("cuda/emulator.h")}  # the host's twin of the hardware
    assert len(reached) > 5
    for header in reached:
        assert not includes(header)[1], f"{kernel} reaches {header}, which includes {includes(header)[1]}"


def test_rules_see_no_pointer_no_dtype_and_no_hardware() -> None:
    for path in CSRC.glob("rules/*.h"):
        code = "\n".join(statements(path))
        assert not re.search(r"[\w>]\s*\*\s*(const\s+)?\w+\s*[,)=]\s*(nullptr|\d+\))", code), path
        assert not re.search(r"\b(threadIdx|blockIdx|__shared__|kFloat16|kBFloat16|address)\b", code), path
