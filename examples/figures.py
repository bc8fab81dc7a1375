"""How the examples draw: one look, one way to save, no display needed."""

from __future__ import annotations

from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

if missing := [name for name in ("matplotlib", "rich", "scipy", "sklearn") if find_spec(name) is None]:
    raise SystemExit(f"the examples need {', '.join(missing)}: pip install 'fusedopt[examples]'")

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": "small",
}
mpl.rcParams.update(STYLE)


def panels(count: int, height: float = 3.4, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure with `count` axes side by side, each `width` by `height` inches."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def save(figure: Figure, path: Path) -> Path:
    """Writes the figure as a PNG of 256 colours, a third of the bytes, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    full = BytesIO()
    figure.savefig(full, dpi=110)
    picture = Image.open(full).convert("RGB")
    # Maximum coverage: the colours of thin lines are kept, however few pixels they have.
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
