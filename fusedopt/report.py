"""What a step did to each parameter: norms of gradient, parameter and update, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .sharded import local
from .table import Table, real_view

# What a row says beside its name, in order.
NUMBERS = ("elements", "grad_norm", "param_norm", "update_norm", "update_ratio", "nonfinite", "lost_share")


@dataclass(frozen=True)
class Report:
    """The numbers of one step. A DTensor's are those of its local tensor.

    ``grad_norm`` is that of the unscaled gradient before it is clipped, ``param_norm`` that of the parameter after the
    step, as it is stored, ``update_norm`` that of the update as the rule found it, in the precision it computes in;
    ``update_ratio`` is update_norm / param_norm. ``nonfinite`` counts infinite and NaN gradients. ``lost_share`` is the
    share of elements that are stored as before although their update was not 0.

    Attributes:
        rows: one for each parameter that had a gradient: its ``name``, and the numbers. ``pandas.DataFrame(rows)``
            makes a table of them.
        whole: the numbers of all parameters together.
        skipped: whether the last step that was to be reported changed nothing, for a gradient that was not finite or
            a ``found_inf``: then the numbers are those of the last step before it that was taken, NaN where there was
            none.
        at_fault: names of the parameters whose gradients kept it from being taken, where the launch itself found them.
    """

    rows: list[dict[str, Any]]
    whole: dict[str, Any]
    skipped: bool = False
    at_fault: tuple[str, ...] = ()

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The numbers in a flat dict, as TensorBoard and W&B take them: ``grad_norm``, ``grad_norm/<name>``, ...

        Args:
            prefix: stands before every key.
        """
        found = {f"{prefix}skipped": float(self.skipped)}
        found |= {f"{prefix}{number}": float(self.whole[number]) for number in NUMBERS[1:]}
        for row in self.rows:
            found |= {f"{prefix}{number}/{row['name']}": float(row[number]) for number in NUMBERS[1:]}
        return found

    def __str__(self) -> str:
        """The table as text."""
        lines = [("parameter", *NUMBERS), *(_words(row["name"], row) for row in self.rows), _words("all", self.whole)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), *(word.rjust(w) for word, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        return "\n".join([self._caption(), *text] if self.skipped else text)

    def _caption(self) -> str:
        at_fault = f"; not finite: {', '.join(self.at_fault)}" if self.at_fault else ""
        return f"the last step was skipped{at_fault}; this is the report of the last step that was taken"

    def __rich__(self) -> Any:
        """The table for ``rich.print``."""
        from rich.table import Table as RichTable

        table = RichTable("parameter", title=self._caption() if self.skipped else None)
        for number in NUMBERS:
            table.add_column(number, justify="right")
        for row in self.rows:
            table.add_row(*_words(row["name"], row))
        table.add_section()
        table.add_row(*_words("all", self.whole))
        return table


def read_report(tables: Sequence[Table], names: Mapping[Tensor, str]) -> Report:
    """Joins what the last launches kept.

    Args:
        tables: of one optimizer.
        names: of its parameters.

    Raises:
        RuntimeError: a parameter that they tell of is in no group any more.
    """
    rows, everything, elements = [], [], 0
    skipped, at_fault = False, []
    for table in tables:
        if not table.reported:
            continue
        columns, sums = table.last_taken(), _sums(table)
        skipped |= bool(table.last_was_skipped)
        for row, leaves in table.rows_with_leaves():
            if sums is not None and not sums[leaves].isfinite().all():
                at_fault.append(_name_of(row.param, names))
            if not table.is_told_of(row, columns[:, leaves]):
                columns[:, leaves] = 0.0
                continue
            count = real_view(local(row.param)).numel()
            elements += count
            rows.append({"name": _name_of(row.param, names), **_numbers(columns[:, leaves], count)})
        everything.append(columns)
    return Report(rows, _numbers(torch.cat(everything, dim=1), elements), skipped, tuple(at_fault))


def _name_of(param: Tensor, names: Mapping[Tensor, str]) -> str:
    if param not in names:
        raise RuntimeError(
            "a report tells of the last step, and a parameter of it is in no group any more: read it before the groups "
            "change"
        )
    return names[param]


def _sums(table: Table) -> Tensor | None:
    """What the gradients of every leaf came to, where the last launch found so that it was not to be taken."""
    sums = table.lasting.leaf_sums
    if sums is None or not (table.phase.report and table.finds_faults and table.last_was_skipped):
        return None
    return sums.cpu()


def _numbers(leaves: Tensor, elements: int) -> dict[str, Any]:
    """What leaves in the columns of csrc/report.h come to."""
    grad, param, update, nonfinite, lost = reference.joined_leaves(leaves, largest=False).tolist()
    grad, param, update = (_root(square) for square in (grad, param, update))
    return {
        "elements": elements,
        "grad_norm": grad,
        "param_norm": param,
        "update_norm": update,
        "update_ratio": update / param if param else math.nan,
        "nonfinite": nonfinite if math.isnan(nonfinite) else int(nonfinite),
        "lost_share": lost / elements if elements else 0.0,
    }


def _root(square: float) -> float:
    return square if math.isnan(square) else math.sqrt(square)


def _words(name: str, numbers: Mapping[str, Any]) -> tuple[str, ...]:
    whole = ("elements", "nonfinite")
    return (name, *(str(numbers[key]) if key in whole else f"{numbers[key]:.4g}" for key in NUMBERS))
