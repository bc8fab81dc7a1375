"""The documents are true: their code runs; their commands, options, paths and links exist; tables agree."""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fusedopt.variables import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a document. ``attributes`` is what stands behind the language: ``file=...``."""

    document: Path
    line: int
    language: str
    attributes: dict[str, str]
    text: str


def blocks(document: Path, *languages: str) -> list[Block]:
    """The blocks of some languages, or all."""
    source = document.read_text()
    found = []
    for match in FENCE.finditer(source):
        indent, language, rest, text = match.groups()
        text = "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))
        attributes = dict(item.split("=", 1) for item in rest.split())
        found.append(Block(document, source[: match.start()].count("\n") + 2, language, attributes, text))
    return [block for block in found if not languages or block.language in languages]


def _name(value: Any) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=_name)


@each_document
def test_every_block_is_of_a_kind_that_is_looked_at(document: Path) -> None:
    for block in blocks(document):
        known = block.language in ("python", "text") or is_shell(block) or "file" in block.attributes
        assert known, f"{_name(document)}:{block.line}: a block of '{block.language}' that nothing checks"


@each_document
def test_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, in one namespace, as a reader would."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    run = [block for block in blocks(document, "python") if not block.attributes]
    with torch.random.fork_rng():
        for block in run:
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(document), "exec"), namespace)
    if not run:
        pytest.skip("no Python in it")


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "fusedopt").rglob("*.py")
    if "triton_kernels" not in path.parts and path.name != "__main__.py" and ">>> " in path.read_text()
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_run(module: str) -> None:
    found = importlib.import_module(module.removesuffix(".__init__"))
    with torch.random.fork_rng():
        result = doctest.testmod(found)
    assert result.attempted
    assert not result.failed


def is_shell(block: Block) -> bool:
    """Whether it says so, or says nothing and each line is a command of this project."""
    lines = block.text.splitlines()
    own = all(re.match(r"(python|make|pip) ", line) for line in lines)
    return block.language == "sh" or (not block.language and own)


def commands(document: Path) -> Iterator[tuple[Block, list[str]]]:
    """The commands of a document's shell blocks, as words, without settings of variables before them."""
    for block in filter(is_shell, blocks(document)):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                assert words[0].partition("=")[0] in NAMES, f"{words[0]} is no variable of ours"
                words.pop(0)
            if words:
                yield block, words


NAMES = {variable.name for variable in VARIABLES}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
OPTIONAL = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", OPTIONAL, re.MULTILINE))


@each_document
def test_commands_exist(document: Path) -> None:
    for block, words in commands(document):
        where = f"{_name(document)}:{block.line}: {shlex.join(words)}"
        problem = _problem(words)
        assert not problem, f"{where}: {problem}"


def _problem(words: list[str]) -> str:
    """What is wrong with a command; empty: nothing that can be seen without running it."""
    program, *rest = words
    if program == "make":
        unknown = [word for word in rest if "=" not in word and word not in TARGETS]
        return f"the Makefile has no {', '.join(unknown)}" if unknown else ""
    if program.endswith("pip") or rest[:2] == ["-m", "pip"]:
        extras = {extra for word in rest for extra in re.findall(r"\[(.*)\]", word)}
        return f"there are no extras {extras - EXTRAS}" if extras - EXTRAS else ""
    if Path(program).name.startswith("python"):
        if rest[:1] == ["-m"]:
            return _problem_of_module(rest[1], rest[2:])
        return "" if (ROOT / rest[0]).exists() else f"there is no {rest[0]}"
    return "" if shutil.which(program) else f"there is no {program}"


def _problem_of_module(module: str, options: list[str]) -> str:
    if importlib.util.find_spec(module) is None:
        return f"there is no module {module}"
    flags = [word for word in options if word.startswith("--")]
    subcommand = [word for word in options[:1] if not word.startswith("-")]
    if not flags:
        return ""
    page = _help_of(module, *subcommand)
    missing = [flag for flag in flags if flag not in page]
    return f"{module} has no {', '.join(missing)}" if missing else ""


@functools.cache
def _help_of(*words: str) -> str:
    command = [sys.executable, "-m", *words, "--help"]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    prose = FENCE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{_name(document)} links to {path}, which does not exist"
        assert ROOT in file.parents, f"{_name(document)} links out of the repository: {path}"
        if anchor:
            assert anchor in _anchors(file), f"{_name(document)}: {_name(file)} has no heading '{anchor}'"


# What runs leave behind, and places outside the repository.
NOT_IN_THE_REPOSITORY = ("out/", "build/", "gpu-out/", "bench/results/", ".venv/")


@each_document
def test_paths_in_the_text_exist(document: Path) -> None:
    prose = FENCE.sub("", document.read_text())
    for path in re.findall(r"`([\w.-]+/[\w./-]*)`", prose):
        if path.startswith(NOT_IN_THE_REPOSITORY) or path == "fusedopt/_build_info.json":
            continue
        places = (ROOT / path, ROOT / "csrc" / path, document.parent / path)
        assert any(place.exists() for place in places), f"{_name(document)} speaks of {path}, which does not exist"


def test_there_is_one_table_of_environment_variables() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \|(.*)\|$", (ROOT / "docs/backends.md").read_text(), re.MULTILINE)
    written = [(name, *(cell.strip() for cell in cells.split("|"))) for name, cells in rows]
    table = [(each.name, each.read, each.values, each.default, each.meaning) for each in VARIABLES]
    assert written == table


def test_the_readme_has_one_place_for_the_benchmark() -> None:
    readme = (ROOT / "README.md").read_text()
    marks = re.findall(r"<!-- benchmark:(\w+) -->", readme)
    assert marks == ["start", "end"]


def test_the_first_screen_has_the_two_commands_and_the_import() -> None:
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:30])
    for part in ("make bench", "make test", "fusedopt.AdamW(", "fusedopt.fuse("):
        assert part in screen


# The optimizer of docs/add-an-optimizer.md, really added.

OWN = ("csrc/rules/lion.h", "csrc/cuda/kernels/lion.cu", "fusedopt/optimizers/lion.py")
TWINS = ("triton_kernels/rules.py", "fusedopt/reference.py")


def copy_of_the_repository(folder: Path) -> Path:
    """What a clone holds, and what the build has compiled so far."""
    copy = folder / "fusedopt"
    leave = shutil.ignore_patterns(
        ".*",
        "*.so",
        "_build_info.json",
        "__pycache__",
        "out",
        "gpu-out",
        "sanitized",
        "installs",
        "*.egg-info",
    )
    shutil.copytree(ROOT, copy, ignore=leave, symlinks=True)
    return copy


def apply_block(block: Block, root: Path) -> list[str]:
    """Does what a block says; returns the lines that it adds to a file that exists already."""
    if "append" in block.attributes:
        path = root / block.attributes["append"]
        path.write_text(f"{path.read_text().rstrip()}\n\n\n{block.text}")
        return block.text.splitlines()
    path = root / block.attributes["file"]
    if block.language != "diff":
        assert not path.exists(), f"{path} is there already"
        path.write_text(block.text)
        return []
    lines, added = path.read_text().splitlines(), []
    at = -1
    for line in block.text.splitlines():
        if line.startswith("+"):
            at += 1
            lines.insert(at, line[1:])
            added.append(line[1:])
        else:
            at = [known.rstrip() for known in lines].index(line[1:].rstrip())
    path.write_text("\n".join(lines) + "\n")
    return added


def test_the_documented_optimizer_needs_two_lines_outside_its_own(tmp_path: Path) -> None:
    """And its pieces fit where the document says: files that are new, places that exist, names that agree."""
    for name in ("csrc", "triton_kernels", "fusedopt"):
        leave = shutil.ignore_patterns("*.so", "__pycache__", "triton_kernels" if name == "fusedopt" else "")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    pieces = [block for block in blocks(ROOT / "docs/add-an-optimizer.md") if block.attributes]
    added = {}
    for block in pieces:
        path = block.attributes.get("file") or block.attributes["append"]
        added[path] = apply_block(block, tmp_path)
    assert set(added) >= {*OWN, *TWINS}
    assert not any(added[path] for path in OWN)
    plumbing = [line for path, lines in added.items() if path not in TWINS for line in lines]
    assert len(plumbing) <= 2, plumbing


@pytest.mark.slow
def test_the_documented_optimizer_builds_and_gives_the_same_bits_on_every_backend(tmp_path: Path) -> None:
    copy = copy_of_the_repository(tmp_path)
    for block in blocks(ROOT / "docs/add-an-optimizer.md"):
        if block.attributes:
            apply_block(block, copy)
    environment = {**os.environ, "PYTHONPATH": str(copy), "FUSEDOPT_CUDA": "0", "FUSEDOPT_EXTENSION": "1"}

    def run(*arguments: str, **more: str) -> str:
        command = [sys.executable, *arguments]
        result = subprocess.run(command, cwd=copy, env=environment | more, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
        return result.stdout

    run("-m", "build_support")
    test = "from fusedopt import selftest, Lion; print(*selftest.self_test(), Lion.__module__, sep='\\n')"
    for interpret in ("0", "1"):
        page = run("-c", test, TRITON_INTERPRET=interpret)
        assert "passed=False" not in page, page
        assert "backend='emulated'" in page
        assert ("backend='triton'" in page) == (interpret == "1")
