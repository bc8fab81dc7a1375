"""Whatever tensors, layouts and checkpoints come: a step or an exception, never a crash, and no half-done step.

An AddressSanitizer build (`make sanitize`) sees here what lies beside a tensor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import backends

EXAMPLES = 250
MANY = 10_000
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)


def fuzz(examples: int) -> Any:
    """The same examples every time, as many as asked for."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )


REAL = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STRANGE = (torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn)
BACKENDS = ("cpu", "emulated", "reference")
ELEMENTS = 700  # of a buffer that views are taken of


@st.composite
def views(draw: st.DrawFn, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = REAL) -> Tensor:
    """A view of these sizes: any strides, zero and overlapping ones too, anywhere in a buffer of small integers."""
    buffer = (torch.arange(ELEMENTS) % 7 - 3).to(draw(st.sampled_from(dtypes)))
    dense = torch.empty(sizes, device="meta").stride()
    order = draw(st.permutations(range(len(sizes))))
    strides = draw(
        st.one_of(
            st.just(dense),
            st.just(torch.empty([sizes[d] for d in order], device="meta").permute(_inverse(order)).stride()),
            st.tuples(*(st.integers(0, 9) for _ in sizes)),
        )
    )
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if 0 in sizes or reach > ELEMENTS:
        return buffer[: torch.Size(sizes).numel()].reshape(sizes)
    return buffer.as_strided(sizes, strides, draw(st.integers(0, ELEMENTS - reach)))


def _inverse(order: Any) -> list[int]:
    return [list(order).index(d) for d in range(len(order))]


sizes_of_tensors = st.lists(st.integers(0, 5), max_size=4).map(tuple)

# What no state, option or checkpoint should hold.
junk: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.just([]),
    st.just({}),
    st.builds(object),
    st.just(torch.float32),
    sizes_of_tensors.flatmap(lambda sizes: views(sizes, (*REAL, *STRANGE))),
    st.just(torch.zeros(3, device="meta")),
    st.just(torch.eye(3).to_sparse()),
    st.just(torch.tensor(float("nan"))),
)


@dataclass
class Given:
    """A parameter with what it is stepped with; tensors are views into buffers of their own."""

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]


@st.composite
def parameters(draw: st.DrawFn, states: tuple[str, ...]) -> Given:
    """A parameter, mostly with a gradient and a state that fit."""
    sizes = draw(sizes_of_tensors)
    param = draw(views(sizes))
    grad = draw(st.one_of(st.none(), views(sizes, (param.dtype,)), st.just(param)))
    state: dict[str, Any] = {}
    kind = draw(st.sampled_from(("none", "right", "odd")))
    if kind != "none":
        for name in states:
            fitting = st.just(torch.tensor(3.0)) if name == "step" else views(sizes)
            state[name] = draw(st.one_of(fitting, junk) if kind == "odd" else fitting)
    return Given(param, grad, state)


def contents(things: list[Given]) -> list[Tensor]:
    """Copies of the parameters."""
    return [thing.param.clone() for thing in things]


def all_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(mine.nan_to_num(), theirs.nan_to_num()) for mine, theirs in zip(one, other, strict=True))


OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "SGD": ({"lr": 0.5, "momentum": 0.5}, ("momentum_buffer",)),
    "Adam": ({"lr": 0.5, "amsgrad": True}, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
}


def check_step(name: str, things: list[Given], backend: str) -> None:
    """Steps once; where that is refused, nothing has changed."""
    options, _ = OPTIMIZERS[name]
    params = [Parameter(thing.param, requires_grad=True) for thing in things]
    optimizer = getattr(fusedopt, name)(params, **options, backend=backend)
    for param, thing in zip(params, things, strict=True):
        param.grad = thing.grad
        if thing.state:
            optimizer.state[param] = dict(thing.state)
    before = contents(things)
    try:
        optimizer.step()
    except Exception:
        assert all_equal(contents(things), before), "refused, but something was written"
    else:
        for thing, old in zip(things, before, strict=True):
            assert thing.grad is not None or torch.equal(thing.param, old)


def step_strategy(name: str) -> Any:
    return given(
        things=st.lists(parameters(OPTIMIZERS[name][1]), min_size=1, max_size=3), backend=st.sampled_from(BACKENDS)
    )


each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
needs_extension = pytest.mark.skipif(backends.compiled is None, reason="the extension is not built")


@needs_extension
@each_optimizer
def test_a_step_over_any_tensors_is_done_or_refused(name: str) -> None:
    fuzz(EXAMPLES)(step_strategy(name)(lambda things, backend: check_step(name, things, backend)))()


@needs_extension
@pytest.mark.slow
@each_optimizer
def test_many_steps_over_any_tensors_are_done_or_refused(name: str) -> None:
    fuzz(MANY)(step_strategy(name)(lambda things, backend: check_step(name, things, backend)))()


# ---- tensors that are views of one memory ------------------------------------------------------------------

SHARED_ELEMENTS = 400  # so many that most tensors are apart


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the memory that all share."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int

    def of(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.sizes, self.strides, self.start)


@st.composite
def places_of(draw: st.DrawFn, sizes: tuple[int, ...]) -> Place:
    """Dense, in either order, or every so many elements; anywhere."""
    dense = torch.empty(sizes, device="meta").stride()
    backwards = torch.empty(sizes[::-1], device="meta").stride()[::-1]
    strides = draw(st.sampled_from((dense, backwards, tuple(2 * stride for stride in dense))))
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return Place(sizes, strides, draw(st.integers(0, SHARED_ELEMENTS - reach)))


@st.composite
def rows_of_one_memory(draw: st.DrawFn) -> list[tuple[Place, ...]]:
    """Places of each parameter, its gradient and its velocity: of a parameter again, or of anything."""
    rows: list[tuple[Place, ...]] = []
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.sampled_from(((), (1,), (3,), (2, 3), (4, 2))))
        known = [place for row in rows for place in row if place.sizes == sizes]
        again = [known and draw(st.integers(0, 5)) == 0 for _ in range(3)]
        rows.append(tuple(draw(st.sampled_from(known) if is_known else places_of(sizes)) for is_known in again))
    return rows


def step_in(memory: Tensor, rows: list[tuple[Place, ...]], package: Any, **options: Any) -> None:
    """A step of SGD in small integers and halves of them: every order of operations has the same bits."""
    params = [Parameter(row[0].of(memory)) for row in rows]
    optimizer = package.SGD(params, lr=0.5, momentum=0.5, **options)
    for param, (_, grad, velocity) in zip(params, rows, strict=True):
        param.grad = grad.of(memory)
        optimizer.state[param]["momentum_buffer"] = velocity.of(memory)
    optimizer.step()


def check_one_memory(rows: list[tuple[Place, ...]], backend: str) -> None:
    """What torch's for-loop does, tensor after tensor; or an exception, and nothing was written."""
    before = torch.arange(SHARED_ELEMENTS, dtype=torch.float32) % 13 - 6
    ours, theirs = before.clone(), before.clone()
    refusal = ""
    try:
        step_in(ours, rows, fusedopt, backend=backend)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "share memory" in refusal or "share some of their elements" in refusal
        assert torch.equal(ours, before)
    else:
        step_in(theirs, rows, torch.optim, foreach=False)
        assert torch.equal(ours, theirs)


one_memory = given(rows=rows_of_one_memory(), backend=st.sampled_from(BACKENDS))


@needs_extension
def test_tensors_of_one_memory_are_stepped_as_torch_does_or_refused() -> None:
    fuzz(EXAMPLES)(one_memory(check_one_memory))()


@needs_extension
@pytest.mark.slow
def test_many_tensors_of_one_memory_are_stepped_as_torch_does_or_refused() -> None:
    fuzz(MANY)(one_memory(check_one_memory))()


# ---- checkpoints -----------------------------------------------------------------------------------------


def trained(name: str) -> tuple[list[Parameter], Any]:
    """An optimizer of two groups that has taken two steps."""
    params = [Parameter(torch.linspace(-1, 1, n)) for n in (7, 1, 12)]
    options, _ = OPTIMIZERS[name]
    optimizer = getattr(fusedopt, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.25}], **options)
    for _ in range(2):
        step(params, optimizer)
    return params, optimizer


def step(params: list[Parameter], optimizer: Any) -> None:
    for param in params:
        param.grad = torch.cos(param.detach())
    optimizer.step()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything in nested dicts and lists."""
    found = [path] if path else []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += places(value[key], (*path, key))
    return found


@st.composite
def spoilt(draw: st.DrawFn, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in which a few things were replaced, removed, added or exchanged."""
    result = copy.deepcopy(state_dict)
    for _ in range(draw(st.integers(1, 3))):
        paths = places(result)
        if not paths:
            break
        *parents, key = draw(st.sampled_from(paths))
        container = result
        for parent in parents:
            container = container[parent]
        kind = draw(st.sampled_from(("replace", "remove", "add", "exchange")))
        if kind == "remove":
            del container[key]
        elif kind == "replace":
            container[key] = draw(junk)
        elif kind == "exchange":
            other = draw(st.sampled_from(list(container.keys()) if isinstance(container, dict) else [0, -1]))
            container[key], container[other] = container[other], container[key]
        elif isinstance(container, dict):
            container[draw(st.one_of(st.text(max_size=3), st.integers(-1, 9)))] = draw(junk)
        else:
            container.append(draw(junk))
    return result


def check_load(name: str, data: st.DataObject) -> None:
    """Loads a spoilt checkpoint; where it is refused, the optimizer goes on as if nothing had been."""
    params, optimizer = trained(name)
    twins, twin = trained(name)
    state_dict = data.draw(spoilt(optimizer.state_dict()))
    try:
        optimizer.load_state_dict(state_dict)
    except (AttributeError, LookupError):
        raise  # a refusal that says nothing of the checkpoint
    except Exception:
        step(params, optimizer)
        step(twins, twin)
        assert all_equal([p.detach() for p in params], [p.detach() for p in twins])
        return
    before = [param.detach().clone() for param in params]
    try:
        step(params, optimizer)
    except Exception:
        assert all_equal([param.detach() for param in params], before), "refused, but something was written"


@each_optimizer
def test_any_checkpoint_is_loaded_or_refused(name: str) -> None:
    fuzz(EXAMPLES)(given(data=st.data())(lambda data: check_load(name, data)))()


@pytest.mark.slow
@each_optimizer
def test_many_checkpoints_are_loaded_or_refused(name: str) -> None:
    fuzz(MANY)(given(data=st.data())(lambda data: check_load(name, data)))()
