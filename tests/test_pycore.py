"""The pure-Python table is the compiled one's twin: the same answers and bytes; and fusedopt runs on it."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import core, table
from fusedopt.pycore import PyTable

pytestmark = pytest.mark.skipif(core.compiled is None, reason=f"nothing to compare with: {core.why_not_compiled}")

WORKERS = (1, 2, 64, 1024)


class Both:
    """A table that is the compiled one and its twin at once, and compares all they say."""

    def __init__(self, *arguments: Any) -> None:
        self.compiled: Any = make_core(*arguments)
        self.twin = PyTable(*arguments)
        self._revisions = (-1, -1)

    def __getattr__(self, name: str) -> Any:
        """What both have is asked of both; launches are the compiled table's alone."""
        if callable(getattr(PyTable, name, None)):
            return functools.partial(self._call, name)
        return getattr(self.compiled, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        theirs = getattr(self.compiled, name)(*arguments)
        ours = getattr(self.twin, name)(*arguments)
        assert ours == theirs, name
        return theirs

    def plain_rows(self, rows: list[int]) -> tuple[list[int], bool]:
        """The shorter way is the compiled table's alone: both go the long one here."""
        return [], False

    def live_params(self) -> list[Tensor]:
        ours, theirs = self.twin.live_params(), self.compiled.live_params()
        # The compiled table hands out aliases that share the version counters.
        assert [tensor.data_ptr() for tensor in ours] == [tensor.data_ptr() for tensor in theirs]
        return ours

    def bump_versions(self, of_gradients: bool) -> list[Tensor]:
        """The twin leaves all to the caller, the compiled table what it can not do."""
        left: list[Tensor] = self.compiled.bump_versions(of_gradients)
        assert {*left} <= {*self.twin.bump_versions(of_gradients)}
        return left

    def compare_columns(self) -> None:
        """Every column, byte for byte, and that neither claims to be unchanged alone."""
        self._call("gradients_apart")
        assert self.twin.variant == self.compiled.variant
        for workers in WORKERS:
            for only_step in (True, False):
                ours, theirs = (each.columns(workers, only_step) for each in (self.twin, self.compiled))
                assert ours.keys() == theirs.keys()
                for name, column in theirs.items():
                    assert ours[name] == column, name
            assert self.twin.chunk_count == self.compiled.chunk_count
        revisions = (self.twin.revision, self.compiled.revision)
        changed = [now != before for now, before in zip(revisions, self._revisions, strict=True)]
        assert changed[0] == changed[1]
        self._revisions = revisions


make_core, make_plain_core = core.make_core, core.make_plain_core


@pytest.fixture(autouse=True)
def _compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "make_core", Both)
    monkeypatch.setattr(table, "make_plain_core", lambda *_: None)  # only the compiled table begins so


Params = list[nn.Parameter]


def _parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Params:
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def _strided() -> Params:
    base = torch.randn(8, 6)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return [nn.Parameter(base[:, :3]), nn.Parameter(base[:, 3:].t()), nn.Parameter(image)]


SCENES: dict[str, Callable[[], tuple[type[fusedopt.Adam | fusedopt.SGD], list[dict[str, Any]]]]] = {
    "float32": lambda: (fusedopt.AdamW, [{"params": _parameters((5,), (2048,), (70000,), (3, 3))}]),
    "sgd without state": lambda: (fusedopt.SGD, [{"params": _parameters((5,), (7,))}]),
    "bfloat16": lambda: (fusedopt.Adam, [{"params": _parameters((5,), (7, 7), dtype=torch.bfloat16)}]),
    "half and bfloat16": lambda: (
        fusedopt.Adam,
        [
            {"params": _parameters((5,), dtype=torch.float16)},
            {"params": _parameters((5,), dtype=torch.bfloat16), "amsgrad": True},
        ],
    ),
    "double": lambda: (fusedopt.Adam, [{"params": _parameters((5,), (9,), dtype=torch.float64)}]),
    "complex": lambda: (
        fusedopt.SGD,
        [{"params": _parameters((4,), dtype=torch.complex64), "momentum": 0.5}],
    ),
    "empty and 0-dim": lambda: (fusedopt.AdamW, [{"params": _parameters((0,), ()), "maximize": True}]),
    "strided": lambda: (fusedopt.SGD, [{"params": _strided(), "momentum": 0.9, "nesterov": True}]),
    "tensor hyperparameters": lambda: (
        fusedopt.AdamW,
        [
            {"params": _parameters((5,)), "lr": torch.tensor(0.1)},
            {"params": _parameters((5,)), "lr": torch.tensor(0.1, dtype=torch.float64)},
            {"params": _parameters((5,)), "lr": torch.tensor(1)},
        ],
    ),
}


@pytest.fixture(params=SCENES)
def optimizer(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    cls, groups = SCENES[request.param]()
    return cls(groups, lr=0.1)


def _params(optimizer: Any) -> Params:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _step(optimizer: Any, skip: int | None = None) -> None:
    for index, param in enumerate(_params(optimizer)):
        param.grad = None if index == skip else torch.randn_like(param)
    optimizer.step()
    for built, _ in optimizer._tables:
        built.core.compare_columns()


def test_columns_are_the_same_bytes_step_after_step(optimizer: Any) -> None:
    for _ in range(3):
        _step(optimizer)


def test_gradients_come_and_go(optimizer: Any) -> None:
    for skip in (0, 1, None, 0):
        _step(optimizer, skip)


def test_hyperparameters_change(optimizer: Any) -> None:
    _step(optimizer)
    for change in (
        {"lr": 0.5},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"lr": 0},
        {"lr": torch.tensor(0.2)},
    ):
        optimizer.param_groups[-1].update(change)
        _step(optimizer)


def test_a_group_is_added(optimizer: Any) -> None:
    _step(optimizer)
    optimizer.add_param_group({"params": _parameters((4, 4)), "lr": 0.3})
    _step(optimizer)


def test_a_parameter_and_a_gradient_move(optimizer: Any) -> None:
    _step(optimizer)
    param = _params(optimizer)[0]
    param.data = param.data.clone()
    _step(optimizer)
    param = _params(optimizer)[-1]
    if param.dim() == 2:
        param.grad = torch.randn_like(param.detach().t()).t()
        optimizer.step()
    _step(optimizer)


def test_states_and_parameters_are_replaced(optimizer: Any) -> None:
    _step(optimizer)
    param = _params(optimizer)[0]
    for name, tensor in list(optimizer.state.get(param, {}).items()):
        optimizer.state[param][name] = tensor.clone()
        _step(optimizer)
    optimizer.state[param] = dict(optimizer.state.get(param, {}))
    _step(optimizer)
    optimizer.state.pop(param)
    _step(optimizer)
    other = nn.Parameter(param.detach().clone())
    optimizer.param_groups[0]["params"][0] = other
    _step(optimizer)


@pytest.mark.parametrize("name", ["float32", "sgd without state", "bfloat16", "double"])
def test_rows_described_in_one_call_are_those_described_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = []
    cls, groups = SCENES[name]()
    for make, make_plain in ((make_core, make_plain_core), (make_core, lambda *_: None), (Both, lambda *_: None)):
        monkeypatch.setattr(table, "make_core", make)
        monkeypatch.setattr(table, "make_plain_core", make_plain)
        optimizer: Any = cls(groups, lr=0.1)
        for param in _params(optimizer):
            param.grad = torch.ones_like(param)
        optimizer.step()
        ((built, _),) = optimizer._tables
        columns.append(built.core.columns(1, False))
        state = {key: tuple(kept) for key, kept in optimizer.state_dict()["state"].items()}
        columns[-1] |= {"state": state, "hidden": len(optimizer._hidden_steps.known)}
    first, *others = columns
    for column in ("numel", "group", "storage", "layout", "layouts", "chunks", "state", "hidden"):
        assert all(first[column] == other[column] for other in others), column
    first, *others = (torch.frombuffer(bytearray(each["address"]), dtype=torch.int64) for each in columns)
    assert all(torch.equal(first != 0, other != 0) for other in others)


def test_gradients_that_no_kernel_can_read() -> None:
    sparse, plain = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
    twisted = nn.Parameter(torch.zeros(4, dtype=torch.complex64))
    optimizer: Any = fusedopt.SGD([sparse, plain, twisted], lr=0.1, momentum=0.9)
    for step in range(3):
        sparse.grad = torch.sparse_coo_tensor([[step]], [1.0], (6,), check_invariants=True)
        plain.grad = torch.ones(6)
        twisted.grad = torch.full((4,), 1 + 2j)
        if step:
            twisted.grad = twisted.grad.conj()
        optimizer.step()
        for built, _ in optimizer._tables:
            built.core.compare_columns()


@pytest.mark.parametrize(
    "change",
    [{"lr": "fast"}, {"lr": None}, {"lr": torch.ones(2, dtype=torch.int64)}],
    ids=["text", "none", "two numbers"],
)
def test_a_value_that_is_no_number_is_refused_alike(change: dict[str, Any]) -> None:
    rule = fusedopt.SGD._rule
    group = {
        "params": [],
        "momentum": 0,
        "dampening": 0,
        "weight_decay": 0,
        "maximize": 0,
        "nesterov": 0,
    } | change
    raised = []
    for make in (make_core, PyTable):
        each = make(rule, torch.device("cpu"), [], [0], {}, [0], ())
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            each.read_groups([group])
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


WITHOUT_EXTENSION = """
import hashlib, sys, warnings
if sys.argv[1] == "hidden":
    sys.modules["fusedopt._C"] = None  # import fails, as where nothing was compiled
import torch, fusedopt
warnings.simplefilter("ignore")
torch.manual_seed(0)
digest = hashlib.sha256()
for cls, options in ((fusedopt.SGD, {"momentum": 0.9}), (fusedopt.AdamW, {"amsgrad": True})):
    dtypes = (torch.float32, torch.bfloat16)
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in (5, 33) for dtype in dtypes]
    optimizer = cls(params, lr=torch.tensor(0.1), backend=sys.argv[2], **options)
    for step in range(3):
        for k, param in enumerate(params):
            param.grad = None if k == step else torch.randn(param.shape).to(param.dtype)
        optimizer.step()
    assert type(optimizer._tables[0][0].core).__name__ == ("PyTable" if sys.argv[1] == "hidden" else "Table")
    for tensor in (*params, *(optimizer.state[p][k] for p in params for k in sorted(optimizer.state[p]))):
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@functools.cache
def _run(mode: str, backend: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", WITHOUT_EXTENSION, mode, backend]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_without_the_extension_the_other_backends_give_the_same_bits(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="the Triton backend needs triton")
    assert _run("hidden", backend) == _run("compiled", "cpu")
