"""The house rules that a reader relies on: one formula in one place, includes that run one way."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

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

NAME = re.compile(r"[A-Za-z_][\w.]*")
# Roundings to the compute type, which languages write differently: C(x), x.to(C), _scalar(x, param).
CASTS = (
    (re.compile(r"\b(?:C|float|double)(?=\()"), ""),
    (re.compile(r"\.to\(\w+\)"), ""),
    (re.compile(r"_scalar\(([^,()]*), \w+\)"), r"(\1)"),
)


def statements(path: Path) -> list[str]:
    """The statements of a file, each in one line, without comments, strings and docstrings."""
    text = path.read_text()
    if path.suffix == ".py":
        text = re.sub(r'"""(?:.|\n)*?"""|"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*', "", text)
        text = re.sub(r"(?<=[(\[,{=+\-*/])\s*\n\s*|\n\s*(?=[)\]}])", " ", text)
        return text.splitlines()
    text = re.sub(r"//[^\n]*|/\*(?:.|\n)*?\*/|^#[^\n]*", "", text, flags=re.MULTILINE)
    return [" ".join(statement.split()) for statement in re.split(r"[;{}]", text)]


def skeleton(statement: str) -> str:
    """The form of what is assigned or returned: names are a, b, c in order of appearance; casts are left out.

    Two statements of one skeleton are one formula, whatever their variables are called.
    """
    expression = re.split(r"(?<![=<>!+\-*/])=(?!=)|\breturn\b", statement)[-1]
    for cast, plain in CASTS:
        expression = cast.sub(plain, expression)
    names: dict[str, str] = {}
    renamed = NAME.sub(lambda match: names.setdefault(match[0], chr(ord("a") + len(names) % 26)), expression)
    return re.sub(r"[\s()]", "", renamed).replace("1.0", "1")


def formulas(path: Path) -> Iterable[tuple[str, str]]:
    """(skeleton, statement) of every statement that computes something."""
    for statement in statements(path):
        form = skeleton(statement)
        if len(re.findall(r"(?<=[a-z0-9])[-+*/](?=[a-z0-9])", form)) >= LEAST_OPERATORS:
            yield form, statement.strip()


def repeated(rules: Iterable[Path], files: Iterable[Path]) -> list[str]:
    """The formulas of the rules that stand anywhere a second time."""
    wanted = {form for path in rules for form, _ in formulas(path)}
    found: dict[str, list[str]] = {}
    for path in files:
        for form, statement in formulas(path):
            if form in wanted:
                found.setdefault(form, []).append(f"{path.name}: {statement}")
    return ["\n".join(places) for places in found.values() if len(places) > 1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_formula_of_a_rule_stands_twice(language: str) -> None:
    rules, files = LANGUAGES[language]
    assert set(rules) <= set(files)
    assert not repeated(rules, files)


SECOND_MOMENT = {"C++": "a*b+c*d*d", "Triton": "a*b+c*d*d", "Python": "a*b+1-a*c*c"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_second_moment_of_adam_is_among_the_formulas(language: str) -> None:
    """The line v = β₂·v + (1 − β₂)·g·g: so that the check above looks at something."""
    forms = Counter(form for path in LANGUAGES[language][0] for form, _ in formulas(path))
    assert forms[SECOND_MOMENT[language]] == 1, forms


@pytest.mark.parametrize("language", LANGUAGES)
def test_nothing_but_the_rules_computes_with_moments_or_velocities(language: str) -> None:
    rules, files = LANGUAGES[language]
    for path in set(files) - set(rules):
        for _, statement in formulas(path):
            assert not re.search(r"exp_avg|momentum_buffer|one_minus_", statement), f"{path.name}: {statement}"


def test_a_renamed_copy_is_found(tmp_path: Path) -> None:
    rules = LANGUAGES["Triton"][0]
    copy = tmp_path / "copy.py"
    copy.write_text("def f(w, x, y, z):\n    return w * x + y * (\n        z * z\n    )\n")
    assert len(repeated(rules, [*rules, copy])) == 1


# ---- includes and imports run one way --------------------------------------------------------------------

# What a file or folder of csrc/ may include, apart from itself. What is not listed may not be there.
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "types.h": (),
    "dlpack.h": (),
    "rules": ("types.h",),
    "storage": ("types.h", "rules"),
    "report.h": ("rules",),
    "phase.h": ("types.h", "rules", "report.h"),
    "table.h": ("types.h", "rules", "storage", "phase.h"),
    "variants.h": ("table.h",),
    "sweep.h": ("variants.h", "storage"),
    "norm.h": ("rules", "sweep.h"),
    "host_table": ("table.h", "variants.h", "rules"),
    "cpu": ("sweep.h", "norm.h", "table.h", "types.h", "rules", "storage"),
    "cuda": ("sweep.h", "norm.h", "types.h", "rules", "host_table"),
    "tensor_reader.h": ("dlpack.h", "table.h"),
    "dict_watch.h": ("types.h",),
    "gradient_reader.h": ("types.h",),
    "bindings.cpp": ("host_table", "cpu", "cuda", "tensor_reader.h", "gradient_reader.h", "dict_watch.h"),
}
KNOW_PYTHON = ("bindings.cpp", "tensor_reader.h", "dict_watch.h")
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
def test_only_the_binding_knows_python_and_nothing_knows_torch(source: Path) -> None:
    for header in includes(source)[1]:
        assert not re.match(r"(torch|ATen|c10|cuda|cu\w*\.h)", header), f"{source} includes <{header}>"
        if re.match(r"(Python\.h|pybind11)", header):
            assert str(source) in KNOW_PYTHON, f"{source} includes <{header}>"


def _reached(source: Path, seen: set[Path]) -> set[Path]:
    if source not in seen:
        seen.add(source)
        for header in includes(source)[0]:
            _reached(header, seen)
    return seen


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
