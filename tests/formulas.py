"""The formulas of a source file as forms that neither names nor the order of summands and factors change.

One small parser for C++, Triton and Python: of their statements only arithmetic is looked at, and whatever else stands
between two pieces of arithmetic parts them. A formula that is spread over several statements is not seen.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

# A name or number; or what is computed: ("+" | "*" | "-" | "/" | "f", parts). A difference is a sum with ("-", x) in
# it, a quotient a product with ("/", x); "f" is a function, whatever of.
Node: TypeAlias = "str | tuple[str, tuple[Node, ...]]"

TOKEN = re.compile(
    r"[A-Za-z_]\w*(?:(?:\.|::|->)[A-Za-z_]\w*)*|\d+\.?\d*(?:e-?\d+)?f?|->|[<>=!&|+*/%-]=|&&|\|\||\*\*|\S"
)
# Roundings to another type, which languages write differently: C(x), float(x), _scalar(x, like), x.to(C).
CASTS = ("C", "X", "float", "double", "_scalar")


def statements(path: Path) -> list[str]:
    """The statements of a file, each in one line, without comments, strings and docstrings."""
    text = path.read_text()
    if path.suffix == ".py":
        text = re.sub(r'"""(?:.|\n)*?"""|"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*', "", text)
        text = re.sub(r"(?<=[(\[,{=+\-*/])\s*\n\s*|\n\s*(?=[)\]}])", " ", text)
        return text.splitlines()
    text = re.sub(r"//[^\n]*|/\*(?:.|\n)*?\*/|^#[^\n]*", "", text, flags=re.MULTILINE)
    return [" ".join(statement.split()) for statement in re.split(r"[;{}]", text)]


def formulas(path: Path, least: int) -> Iterator[tuple[str, str]]:
    """(form, statement) of every expression of at least so many operations, those within others among them."""
    for statement in statements(path):
        for node in Parser(statement).expressions():
            for part in _parts(node):
                if part[0] in "+*" and _operations(part) >= least:
                    yield form(part), statement.strip()


def form(node: Node) -> str:
    """An expression with its names replaced by letters; equal for two that compute the same from other names."""
    colours = dict.fromkeys(_names(node), "x")
    for _ in range(3):  # a name is told apart by where it stands, and by what it stands beside
        places = Counter((name, place) for name, place in _places(node, colours, ""))
        found = {
            name: sorted(f"{place}{n}" for (other, place), n in places.items() if other == name) for name in colours
        }
        order = {text: f"x{k}" for k, text in enumerate(sorted({str(each) for each in found.values()}))}
        colours = {name: order[str(each)] for name, each in found.items()}
    letters: dict[str, str] = {}
    return _spelled(node, colours, letters)


class Parser:
    """Finds the arithmetic of one statement."""

    def __init__(self, statement: str) -> None:
        """Takes the statement."""
        self._tokens = TOKEN.findall(statement)
        self._at = 0
        self._found: list[Node] = []

    def expressions(self) -> list[Node]:
        """All expressions that are parts of no other."""
        while self._at < len(self._tokens):
            self._collect()
        return self._found

    def _collect(self) -> None:
        """One expression, or a token that is no part of any."""
        before, node = self._at, self._parse_sum()
        if node is not None:
            self._found.append(node)
        self._at += self._at == before

    def _next(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _parse_sum(self) -> Node | None:
        return self._parse_chain("+", "-", self._parse_product)

    def _parse_product(self) -> Node | None:
        return self._parse_chain("*", "/", self._parse_factor)

    def _parse_chain(self, operator: str, inverse: str, parse_part: Callable[[], Node | None]) -> Node | None:
        """Parts joined by an operator; one behind the inverse operator counts as the inverse of itself."""
        parts = []
        sign = ""
        while True:
            part = parse_part()
            if part is None:
                break
            parts += _spread(operator, (inverse, (part,)) if sign == inverse else part)
            sign = self._next() or ""
            if sign not in (operator, inverse):
                break
            self._at += 1
        return _joined(operator, parts)

    def _parse_factor(self) -> Node | None:
        token = self._next()
        if token == "-":
            self._at += 1
            part = self._parse_factor()
            return None if part is None else ("-", (part,))
        if token == "(":
            inner = self._inside(")")
            return self._after(inner[0] if len(inner) == 1 else _opaque(inner))
        if token is None or not re.match(r"[A-Za-z_\d]", token):
            return None
        self._at += 1
        node: Node = re.sub(r"\.0*$|f$", "", token) if token[0].isdigit() else token
        if self._next() == "(":
            inner = self._inside(")")
            node = inner[0] if inner and token in CASTS else ("f", tuple(inner))
        return self._after(node)

    def _after(self, node: Node) -> Node:
        """What follows a factor without making it another: subscripts, and methods such as .to(C)."""
        while self._next() in ("[", "."):
            if self._next() == "[":
                self._found += self._inside("]")
            else:
                self._at += 2
                if self._next() == "(":
                    self._found += self._inside(")")
        return node

    def _inside(self, end: str) -> list[Node]:
        """The expressions between brackets."""
        outer, self._found = self._found, []
        self._at += 1
        while self._next() not in (end, None):
            self._collect()
        self._at += 1
        inner, self._found = self._found, outer
        return inner


def _opaque(inner: list[Node]) -> Node:
    """Brackets around more than arithmetic, such as a condition and its two cases."""
    return ("f", tuple(inner))


def _spread(operation: str, node: Node) -> list[Node]:
    """The summands of a summand that is a sum itself, or the factors of a factor that is a product."""
    return list(node[1]) if isinstance(node, tuple) and node[0] == operation else [node]


def _joined(operation: str, parts: list[Node]) -> Node | None:
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else (operation, tuple(parts))


def _operations(node: Node) -> int:
    if isinstance(node, str):
        return 0
    if node[0] == "f":
        return 0
    own = len(node[1]) - 1 if node[0] in "+*" else 0
    return own + sum(map(_operations, node[1]))


def _parts(node: Node) -> Iterator[Node]:
    yield node
    if isinstance(node, tuple):
        for part in node[1]:
            yield from _parts(part)


def _names(node: Node) -> list[str]:
    if isinstance(node, str):
        return [] if node[0].isdigit() else [node]
    if node[0] == "f":
        return []
    return [name for part in node[1] for name in _names(part)]


def _spelled(node: Node, colours: dict[str, str], letters: dict[str, str] | None = None) -> str:
    """A node as text, its parts in order; with letters in the place of colours where these are given."""
    if isinstance(node, str):
        if node[0].isdigit():
            return node
        return colours[node] if letters is None else letters.setdefault(node, chr(ord("a") + len(letters) % 26))
    if node[0] == "f":
        return "f"
    parts = list(node[1])
    if node[0] in "+*":
        parts.sort(key=lambda part: _spelled(part, colours))
    return f"{node[0]}({' '.join(_spelled(part, colours, letters) for part in parts)})"


def _places(node: Node, colours: dict[str, str], place: str) -> Iterator[tuple[str, str]]:
    """Where each name stands: the operations around it, and what they are done with."""
    if isinstance(node, str):
        if not node[0].isdigit():
            yield node, place
        return
    for part in node[1] if node[0] != "f" else ():
        yield from _places(part, colours, f"{place}{node[0]}[{_spelled(node, colours)}]")
