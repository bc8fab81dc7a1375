"""The matrix of cases: rules x options x dtypes x layouts x sizes x values, as data.

A new optimizer, dtype, layout or option is a row here, not a test. ``matrix()`` holds every pair of values of any two
axes (pairwise) and, at one size, every combination of dtypes of parameter, gradient and states.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fusedopt.optimizers import adam, sgd
from fusedopt.rules import Rule

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


@dataclass(frozen=True, eq=False)
class Option:
    """Hyperparameters of a group.

    Attributes:
        name: what test ids call it.
        values: hyperparameters that differ from the optimizer's defaults.
        tensors: dtypes of hyperparameters that are given as tensors on the parameter's device.
    """

    name: str
    values: Mapping[str, Any]
    tensors: Mapping[str, str] = field(default_factory=dict)

    def group(self, device: str = "cpu") -> dict[str, Any]:
        """The hyperparameters as a parameter group wants them."""
        group = dict(self.values)
        for name, dtype in self.tensors.items():
            group[name] = _as_tensors(group[name], DTYPES[dtype], device)
        return group


def _as_tensors(value: Any, dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_as_tensors(item, dtype, device) for item in value)
    return torch.tensor(value, dtype=dtype, device=device)


@dataclass(frozen=True, eq=False)
class RuleCase:
    """An optimizer.

    Attributes:
        name: of the class, in fusedopt and in torch.optim.
        rule: what fusedopt's host knows of it.
        defaults: hyperparameters of a group that no option changes.
        options: the rows of its options.
    """

    name: str
    rule: Rule
    defaults: Mapping[str, Any]
    options: tuple[Option, ...]

    def group(self, option: Option, device: str = "cpu") -> dict[str, Any]:
        """Every hyperparameter of a group."""
        return {**self.defaults, **option.group(device)}

    def states(self, option: Option) -> tuple[str, ...]:
        """Names of the states that an option's tensors have."""
        return self.rule.states_of({**self.defaults, **option.values})


SGD = RuleCase(
    "SGD",
    sgd.RULE,
    {"lr": 0.1, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False},
    (
        Option("plain", {}),
        Option("decay", {"weight_decay": 0.03}),
        Option("momentum", {"momentum": 0.9}),
        Option("dampening", {"momentum": 0.9, "dampening": 0.3}),
        Option("nesterov", {"momentum": 0.9, "nesterov": True}),
        Option("maximize", {"maximize": True, "momentum": 0.5}),
        Option("all", {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
        Option("all_dampened", {"momentum": 0.7, "dampening": 1.0, "weight_decay": 0.2, "maximize": True}),
        Option("lr_zero", {"lr": 0.0, "momentum": 0.9, "weight_decay": 0.1}),
        Option("lr_f32_tensor", {"lr": 0.1, "momentum": 0.9}, {"lr": "f32"}),
        Option("lr_f64_tensor", {"lr": 0.3, "weight_decay": 0.01}, {"lr": "f64"}),
        Option("lr_bf16_tensor", {"lr": 0.3}, {"lr": "bf16"}),
        Option("momentum_tensor", {"momentum": 0.9, "lr": 0.3}, {"momentum": "f32"}),
    ),
)

ADAM = RuleCase(
    "Adam",
    adam.RULE,
    {
        "lr": 0.01,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": False,
    },
    (
        Option("plain", {}),
        Option("l2", {"weight_decay": 0.05}),
        Option("decoupled", {"weight_decay": 0.05, "decoupled_weight_decay": True}),
        Option("amsgrad", {"amsgrad": True}),
        Option("maximize", {"maximize": True}),
        Option("amsgrad_l2_maximize", {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
        Option(
            "amsgrad_decoupled_maximize",
            {"amsgrad": True, "weight_decay": 0.1, "maximize": True, "decoupled_weight_decay": True},
        ),
        # A weight of the mean above 1/2 takes the other half of the interpolation.
        Option("betas_low", {"betas": (0.1, 0.3)}),
        Option("betas_half", {"betas": (0.5, 0.5), "weight_decay": 0.1}),
        Option("betas_zero", {"betas": (0.0, 0.0)}),
        Option("betas_high", {"betas": (0.999, 0.99999), "eps": 1e-3}),
        Option("eps_zero", {"eps": 0.0, "amsgrad": True}),
        Option("lr_zero", {"lr": 0.0, "weight_decay": 0.1, "decoupled_weight_decay": True}),
        Option("lr_f32_tensor", {"lr": 0.3, "decoupled_weight_decay": True, "weight_decay": 0.1}, {"lr": "f32"}),
        Option("lr_f16_tensor", {"lr": 0.003}, {"lr": "f16"}),
        Option("betas_f64_tensor", {"betas": (0.8, 0.95)}, {"betas": "f64"}),
        Option("decay_tensor", {"weight_decay": 0.1, "amsgrad": True}, {"weight_decay": "f32"}),
    ),
)

RULES = (SGD, ADAM)

Combination = tuple[str, str, str, str]  # dtypes of parameter, gradient, first state, further states

COMBINATIONS: tuple[Combination, ...] = (
    ("f32", "f32", "f32", "f32"),
    ("bf16", "bf16", "bf16", "bf16"),
    ("bf16", "bf16", "f32", "f32"),
    ("f16", "f16", "f16", "f16"),
    ("f64", "f64", "f64", "f64"),
    ("f16", "f16", "f32", "f32"),
    ("bf16", "f32", "f32", "f32"),
    ("f32", "bf16", "bf16", "f32"),
    ("f32", "f16", "f32", "bf16"),
    ("f32", "f32", "f64", "f32"),
    ("f64", "f32", "f32", "f64"),
)


@dataclass(frozen=True)
class Layout:
    """How a tensor's slots lie in memory: the placements of tests/tensors.py."""

    name: str
    param: str = "contiguous"
    grad: str = "contiguous"
    state: str = "contiguous"


LAYOUTS = (
    Layout("contiguous"),
    Layout("channels_last", "channels_last", "channels_last", "channels_last"),
    Layout("transposed", "transposed", "transposed", "transposed"),
    Layout("strided", "strided", "strided", "strided"),
    Layout("sliced", "sliced", "sliced", "sliced"),
    Layout("transposed_grad", grad="transposed"),
    Layout("channels_last_param", param="channels_last"),
    Layout("expanded_grad", grad="expanded"),
    Layout("misaligned", "misaligned", "misaligned", "misaligned"),
    Layout("misaligned_param", param="misaligned"),
    Layout("misaligned_grad", grad="misaligned"),
    Layout("misaligned_states", state="misaligned"),
    Layout("transposed_states", state="transposed"),
    Layout("all_different", "channels_last", "strided", "transposed"),
    Layout("scalar", "scalar", "scalar", "scalar"),
)

# The vector widths of the kernels (4, 8), the host's blocks (16, 64) and a leaf (2048), each with its neighbours.
SIZES = (0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 2047, 2048, 2049, 4097)

VALUES = ("ordinary", "extreme", "special")  # see tests/tensors.py

STARTS = ("fresh", "loaded")  # state made by the optimizer, or there before the first step


@dataclass(frozen=True)
class Case:
    """One tensor of the matrix."""

    rule: RuleCase
    option: Option
    dtypes: Combination
    layout: Layout
    size: int
    values: str
    start: str

    @cached_property
    def id(self) -> str:
        """The case in words."""
        dtypes = "/".join(self.dtypes)
        return (
            f"{self.rule.name}.{self.option.name} {dtypes} {self.layout.name} n={self.size} {self.values} {self.start}"
        )

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states that the tensor has."""
        return self.rule.states(self.option)

    def state_dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the states; those that the optimizer makes itself follow the parameter or the gradient."""
        names = self.states
        if self.start == "fresh":
            source = self.dtypes[0] if self.rule.rule.keeps_step else self.dtypes[1]
            return dict.fromkeys(names, DTYPES[source])
        dtypes = (self.dtypes[2], *(self.dtypes[3] for _ in names[1:]))
        return {name: DTYPES[dtype] for name, dtype in zip(names, dtypes, strict=False)}

    @property
    def variant(self) -> str:
        """The smallest variant of csrc/variants.h that covers the tensor."""
        param, grad = DTYPES[self.dtypes[0]], DTYPES[self.dtypes[1]]
        states = set(self.state_dtypes().values())
        if torch.float64 in {param, grad, *states}:
            return "full"
        if not self.is_dense:
            return "strided"
        if param == grad and len(states) <= 1:
            state = states.pop() if states else param
            fixed = {
                (torch.float32, torch.float32): "f32",
                (torch.bfloat16, torch.bfloat16): "bf16",
                (torch.bfloat16, torch.float32): "bf16_f32",
            }
            return fixed.get((param, state), "any")
        return "any"

    @property
    def is_dense(self) -> bool:
        """Whether all slots are dense and in the same order whatever the size; a guess for the batching only."""
        placements = {self.layout.param, self.layout.grad}
        if self.states and self.start == "loaded":
            placements.add(self.layout.state)
        same = len({"contiguous" if name == "misaligned" else name for name in placements}) == 1
        return same and not placements & {"strided", "sliced", "expanded"}


def pairwise(axes: Mapping[str, Sequence[Any]], feasible: Any = lambda one, other: True) -> list[dict[str, Any]]:
    """Rows that hold every pair of values of any two axes, by greedy choice; the same rows every time.

    Args:
        axes: the values of each axis.
        feasible: whether two (axis, value) may stand in one row.
    """
    names = list(axes)
    items = {name: [(name, k) for k in range(len(axes[name]))] for name in names}

    pairs = [p for a, b in itertools.combinations(names, 2) for p in itertools.product(items[a], items[b])]
    fits = {frozenset(((a, j), (b, k))): bool(feasible((a, axes[a][j]), (b, axes[b][k]))) for (a, j), (b, k) in pairs}
    missing = dict.fromkeys(pair for pair, good in fits.items() if good)
    rows = []
    while missing:
        row = dict(sorted(next(iter(missing)), key=lambda item: names.index(item[0])))
        for name in names:
            if name in row:
                continue
            chosen = list(row.items())
            candidates = [item for item in items[name] if all(fits[frozenset((item, c))] for c in chosen)]
            # Equally good ones take turns, so that no value is used everywhere.
            shift = len(rows) % len(candidates)
            candidates = candidates[shift:] + candidates[:shift]
            best = max(candidates, key=lambda item: sum(frozenset((item, c)) in missing for c in chosen))
            row[name] = best[1]
        for pair in itertools.combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
        rows.append({name: axes[name][row[name]] for name in names})
    return rows


def _feasible(one: tuple[str, Any], other: tuple[str, Any]) -> bool:
    """A 0-dim tensor has one element."""
    values = dict((one, other))
    if "layout" in values and "size" in values:
        return bool(values["layout"].name != "scalar" or values["size"] == 1)
    return True


def _pairwise_cases(rule: RuleCase) -> list[Case]:
    axes = {
        "size": SIZES,
        "option": rule.options,
        "layout": LAYOUTS,
        "dtypes": COMBINATIONS,
        "values": VALUES,
        "start": STARTS,
    }
    return [Case(rule=rule, **row) for row in pairwise(axes, _feasible)]


DTYPE_SIZE = 83  # vectors of 4, 8 and 16 and a rest of 3


def _dtype_cases(rule: RuleCase, option_name: str) -> list[Case]:
    """Every combination of dtypes of parameter, gradient and states."""
    option = next(option for option in rule.options if option.name == option_name)
    slots = 2 + min(len(rule.states(option)), 2)
    return [
        Case(rule, option, (*dtypes, *dtypes[-1:] * (4 - slots)), LAYOUTS[0], DTYPE_SIZE, "extreme", "loaded")  # type: ignore[arg-type]
        for dtypes in itertools.product(DTYPES, repeat=slots)
    ]


@functools.cache
def matrix() -> dict[str, list[Case]]:
    """All cases: "pairwise", and "all dtypes" of every slot at one size."""
    return {
        "pairwise": [case for rule in RULES for case in _pairwise_cases(rule)],
        "all dtypes": [*_dtype_cases(SGD, "momentum"), *_dtype_cases(ADAM, "l2")],
    }


def can_have_gradient_of_another_dtype() -> bool:
    """Whether this torch has ``Tensor.grad_dtype`` (2.10)."""
    return hasattr(torch.Tensor, "grad_dtype")


@functools.cache
def batches() -> dict[str, list[Case]]:
    """The cases that one optimizer takes together: those of a rule that need the same variant."""
    found: dict[str, list[Case]] = {}
    for case in itertools.chain(*matrix().values()):
        if case.dtypes[0] == case.dtypes[1] or can_have_gradient_of_another_dtype():
            found.setdefault(f"{case.rule.name}-{case.variant}", []).append(case)
    return dict(sorted(found.items()))
