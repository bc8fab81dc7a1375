"""A table that begins plainly goes on as one whose tensors were each looked at: same bits, same errors."""

from __future__ import annotations

import copy
import decimal
import fractions
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fusedopt
from fusedopt import backends, core, table

STEPS = 3

pytestmark = pytest.mark.skipif(
    core.compiled is None or not core.compiled.reads_gradients_directly(),
    reason="no table begins plainly without the extension, or with torch before 2.10",
)


def _params(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _state(optimizer: Any, place: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = optimizer.state[_params(optimizer)[place]]
    return found


def _moment(optimizer: Any) -> str:
    return next(name for name in _state(optimizer) if name != "step")


def _replace_state(optimizer: Any) -> None:
    name = _moment(optimizer)
    _state(optimizer)[name] = torch.full_like(_state(optimizer)[name], 0.25)


def _move_state(optimizer: Any) -> None:
    tensor = _state(optimizer, 1)[_moment(optimizer)]
    tensor.data = tensor.data.clone() + 0.5


def _offload_state(optimizer: Any) -> None:
    tensor = _state(optimizer, 1)[_moment(optimizer)]
    kept = tensor.bfloat16().clone()
    tensor.data = torch.empty(0)
    tensor.data = kept.clone()


def _halve_state(optimizer: Any) -> None:
    tensor = _state(optimizer, 1)[_moment(optimizer)]
    shape = tensor.shape
    tensor.data = torch.empty(0)
    tensor.data = torch.zeros(shape[0] // 2, *shape[1:])


def _free_state(optimizer: Any) -> None:
    tensor = _state(optimizer, 1)[_moment(optimizer)]
    tensor.data = torch.empty(0)


def _drop_state(optimizer: Any) -> None:
    del optimizer.state[_params(optimizer)[0]]


def _move_param(optimizer: Any) -> None:
    param = _params(optimizer)[0]
    param.data = param.data.clone()


def _move_onto_another(optimizer: Any) -> None:
    one, *_, other = _params(optimizer)
    other.data = one.data
    other.grad = torch.ones_like(other)


def _move_into_another(optimizer: Any) -> None:
    one, other, *_ = _params(optimizer)
    other.data = one.data.view(-1)[1 : 1 + other.numel()].view_as(other)


def _forget_gradient(optimizer: Any) -> None:
    _params(optimizer)[0].grad = None


def _thaw(optimizer: Any) -> None:
    frozen = _params(optimizer)[-1]
    frozen.grad = torch.ones_like(frozen)


def _twist_gradient(optimizer: Any) -> None:
    param = _params(optimizer)[1]
    param.grad = torch.full((3, 7), 0.125).t()


def _set(**values: Any) -> Callable[[Any], None]:
    def event(optimizer: Any) -> None:
        optimizer.param_groups[-1].update(values)

    return event


def _replace_param(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"][0] = nn.Parameter(torch.full((40,), 2.0))
    group["params"][0].grad = torch.ones(40)


def _add_group(optimizer: Any) -> None:
    new = nn.Parameter(torch.ones(5))
    new.grad = torch.ones(5)
    optimizer.add_param_group({"params": [new]})


def _reload(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


EVENTS: dict[str, Callable[[Any], None]] = {
    "nothing": lambda optimizer: None,
    "a state is replaced": _replace_state,
    "a state is moved": _move_state,
    "a state is freed": _free_state,
    "a state was away and comes back in bfloat16": _offload_state,
    "a state was away and comes back smaller": _halve_state,
    "a state is dropped": _drop_state,
    "a parameter is moved": _move_param,
    "a parameter is moved onto another": _move_onto_another,
    "a parameter is moved into another": _move_into_another,
    "a parameter is replaced": _replace_param,
    "a gradient is forgotten": _forget_gradient,
    "a frozen parameter is thawed": _thaw,
    "a gradient lies otherwise": _twist_gradient,
    "a learning rate changes": _set(lr=0.5),
    "weight decay begins": _set(weight_decay=0.25),
    "a mode is asked for": _set(state_dtype=torch.int8),
    "a state is asked for in another dtype": _set(state_dtype=torch.bfloat16),
    "a mode is misspelt": _set(state_dtype="int8"),
    "a hyperparameter is text": _set(weight_decay="much"),
    "it becomes differentiable": _set(differentiable=True),
    "a group is added": _add_group,
    "it is loaded": _reload,
    "it is refreshed": lambda optimizer: optimizer.refresh(),
}

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": fusedopt.AdamW,
    "AdamW amsgrad": lambda groups, **more: fusedopt.AdamW(groups, amsgrad=True, **more),
    "SGD": lambda groups, **more: fusedopt.SGD(groups, momentum=0.9, dampening=0.5, **more),
    "SGD with momentum in a group": lambda groups, **more: fusedopt.SGD(
        [{**groups[0], "momentum": 0.9}, *groups[1:]], **more
    ),
}


def _make(optimizer: str, **options: Any) -> Any:
    """Two groups: 40 and 7 × 3 elements; 5 of bfloat16, 40 that are frozen."""
    params = [torch.linspace(-1, 1, 40), torch.linspace(0, 2, 21).view(7, 3), torch.ones(5).bfloat16(), torch.ones(40)]
    made = [nn.Parameter(param) for param in params]
    for param in made[:-1]:
        param.grad = torch.linspace(1, 2, param.numel()).to(param.dtype).view_as(param)
    return OPTIMIZERS[optimizer]([{"params": made[:2]}, {"params": made[2:], "lr": 0.25}], lr=0.125, **options)


def _outcome(optimizer: Any, event: Callable[[Any], None]) -> tuple[Any, ...]:
    """What parameters and states come to, and what error ended it."""
    error = ""
    optimizer.step()
    event(optimizer)
    try:
        for _ in range(STEPS):
            optimizer.step()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    params = _params(optimizer)
    states = [{name: found.tolist() for name, found in optimizer.state.get(param, {}).items()} for param in params]
    return error, [param.tolist() for param in params], states, len(optimizer._hidden_steps.known)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_plain_beginning_goes_on_as_any_other(optimizer: str, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = _outcome(_make(optimizer), EVENTS[event])
    monkeypatch.setattr(table, "make_plain_core", lambda *_: None)
    assert plainly == _outcome(_make(optimizer), EVENTS[event])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5}, {"skip_nonfinite": True}, {"report": True}],
    ids=["nothing else", "clipped", "skipped", "reported"],
)
def test_rows_of_a_plain_beginning_are_made_when_somebody_asks(optimizer: str, options: dict[str, Any]) -> None:
    made = _make(optimizer, **options)
    for _ in range(STEPS):
        made.step()
    ((built, _),) = made._tables
    assert built._rows is None
    assert [row.name for row in built.rows] == [f"parameter {k} of group {g}" for g in (0, 1) for k in (0, 1)]
    assert [row.leaves for row in built.rows] == [1, 1, 1, 0]
    assert all(state is made.state[row.param][name] for row in built.rows for name, state in row.states.items())


def test_a_velocity_that_begins_after_other_steps_is_not_dampened_at_first() -> None:
    """Steps without a velocity are not counted: as in torch, its first one is a whole gradient."""
    found = []
    for make in (fusedopt.SGD, torch.optim.SGD):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = make([param], lr=0.25, dampening=0.5)
        for momentum in (0.0, 0.0, 0.5, 0.5):
            optimizer.param_groups[0]["momentum"] = momentum
            optimizer.step()
        found.append(param.tolist())
    assert found[0] == found[1]


ODD_VALUES: dict[str, tuple[type, dict[str, Any]]] = {
    "a number that is true and 0.0": (fusedopt.SGD, {"momentum": decimal.Decimal("1e-400")}),
    "a fraction": (fusedopt.SGD, {"momentum": fractions.Fraction(0)}),
    "a tensor for a flag": (fusedopt.AdamW, {"amsgrad": torch.tensor(False)}),
    "a number for a flag": (fusedopt.AdamW, {"amsgrad": 1}),
}


@pytest.mark.parametrize("value", ODD_VALUES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_asks_for_a_state_is_the_same_in_a_first_step_and_in_later_ones(value: str, backend: str) -> None:
    cls, options = ODD_VALUES[value]
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = cls([param], lr=0.5, backend=backend)
    optimizer.param_groups[0].update(options)
    optimizer.step()
    states = list(optimizer.state.get(param, {}))
    optimizer.refresh()
    optimizer.step()
    assert list(optimizer.state.get(param, {})) == states


LOOKED_AT: dict[str, Callable[[Any], None]] = {
    "a strided gradient": _twist_gradient,
    "shared memory": _move_onto_another,
    "a mode": _set(state_dtype=torch.bfloat16),
    "a state that is there": lambda optimizer: optimizer.state[_params(optimizer)[0]].update(),
}


@pytest.mark.parametrize("event", LOOKED_AT)
def test_what_needs_a_closer_look_gets_one(event: str) -> None:
    optimizer = _make("AdamW")
    LOOKED_AT[event](optimizer)
    optimizer.step()
    assert all(built._rows is not None for built, _ in optimizer._tables)


def test_memory_that_a_state_was_given_up_for_is_used_for_nothing_else() -> None:
    param = nn.Parameter(torch.zeros(20000))
    param.grad = torch.ones(20000)
    optimizer = fusedopt.SGD([param], lr=0.5, momentum=0.5)
    optimizer.step()
    velocity = optimizer.state[param]["momentum_buffer"]
    before = velocity.data_ptr()
    velocity.data = torch.empty(0)
    others = [torch.empty(size) for size in (20000, 10000, 5000, 20000)]
    assert all(other.data_ptr() != before for other in others)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 of group 0 has shape \(0,\)"):
        optimizer.step()


def _resized(optimizer: Any) -> Any:
    """What a report tells of a step after which a parameter got another size."""
    optimizer.step()
    _params(optimizer)[0].data = torch.zeros(10000)
    return optimizer.report().rows


def test_a_report_is_of_the_leaves_that_the_step_had(monkeypatch: pytest.MonkeyPatch) -> None:
    plainly = _resized(_make("SGD", report=True))
    monkeypatch.setattr(table, "make_plain_core", lambda *_: None)
    assert plainly == _resized(_make("SGD", report=True))
    assert plainly[1]["grad_norm"] > 0.0


def test_an_interrupt_while_rows_are_made_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = _make("AdamW", report=True)
    optimizer.step()
    made, row = [], table.Row

    def interrupted(*arguments: Any) -> table.Row:
        made.append(row(*arguments))
        if len(made) == 2:
            raise KeyboardInterrupt
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(table, "Row", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.report()
    assert len(optimizer.report().rows) == 3
    ((built, _),) = optimizer._tables
    assert len(built.rows) == 4


def test_an_interrupt_while_groups_are_read_is_not_lost() -> None:
    read = []

    class Interrupted:
        def __float__(self) -> float:
            read.append(self)
            if len(read) == 1:
                raise KeyboardInterrupt
            return 1.0

    optimizer = _make("AdamW")
    optimizer.param_groups[0]["eps"] = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()


def test_a_group_that_is_differentiable_before_the_first_step_is_refused() -> None:
    optimizer = _make("AdamW")
    EVENTS["it becomes differentiable"](optimizer)
    with pytest.raises(RuntimeError, match="differentiable"):
        optimizer.step()
    assert not optimizer.state


def test_states_that_a_scaler_has_made_in_inference_mode_can_be_stepped_outside() -> None:
    optimizer = _make("AdamW")
    with torch.inference_mode():
        assert optimizer.finds_inf()
    assert not any(state.is_inference() for param in _params(optimizer) for state in optimizer.state[param].values())
    optimizer.step()


def _make_large(optimizer: str, **options: Any) -> Any:
    """States that a first launch on the CPU may have to clear, one that is cleared before, and one of bfloat16."""
    sizes = [(70_001,), (5,), (300, 250), (90_000,)]
    generator = torch.Generator().manual_seed(1)
    made = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    made[-1] = nn.Parameter(made[-1].detach().bfloat16())
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    return OPTIMIZERS[optimizer]([{"params": made[:2]}, {"params": made[2:], "lr": 0.25}], lr=0.125, **options)


@pytest.fixture
def new_states(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The states that are made, of memory that holds no zero."""
    made: list[torch.Tensor] = []

    def with_garbage(param: torch.Tensor) -> torch.Tensor:
        made.append(torch.full(param.shape, torch.nan, dtype=param.dtype))
        return made[-1]

    monkeypatch.setattr(torch, "empty_like", with_garbage)
    return made


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


LARGE: dict[str, dict[str, Any]] = {
    "nothing else": {},
    "clipped": {"max_grad_norm": 0.5},
    "skipped": {"skip_nonfinite": True},
    "reported": {"report": True},
    "by the reference": {"backend": "reference"},
    "emulated": {"backend": "emulated"},
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("options", LARGE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_large_new_states_count_as_zeros_whatever_their_memory_held(
    optimizer: str, options: str, threads: int, new_states: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options == "emulated" and not core.compiled.emulates():  # type: ignore[union-attr]
        pytest.skip("this build has no emulated kernels")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plainly = _outcome(_make_large(optimizer, **LARGE[options]), lambda _: None)
    finally:
        torch.set_num_threads(before)
    assert new_states
    monkeypatch.undo()
    monkeypatch.setattr(table, "make_plain_core", lambda *_: None)
    assert plainly == _outcome(_make_large(optimizer, **LARGE[options]), lambda _: None)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_zeros_after_a_first_launch_that_was_interrupted(
    optimizer: str, new_states: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _make_large(optimizer)
    monkeypatch.setattr(backends.Cpu, "launch", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert new_states
    assert not any(state.any() for state in new_states)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_are_zeros_where_one_of_them_could_not_be_made(
    optimizer: str, new_states: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = _make_large(optimizer)
    make, count = torch.empty_like, len(made._rule.states_of(made.param_groups[0]))  # those of one row are made
    monkeypatch.setattr(torch, "empty_like", lambda param: _interrupt() if len(new_states) == count else make(param))
    with pytest.raises(KeyboardInterrupt):
        made.step()
    kept = [found for state in made.state.values() for name, found in state.items() if name != "step"]
    assert kept
    assert not any(state.any() for state in kept)


def _with_bad_scale(optimizer: Any) -> None:
    optimizer.grad_scale = torch.ones(2)
    with pytest.raises(ValueError, match="grad_scale"):
        optimizer.step()


def _with_infinity(optimizer: Any) -> None:
    optimizer.found_inf = torch.ones(())
    optimizer.step()


NO_STEPS: dict[str, Callable[[Any], Any]] = {
    "the scale is of two elements": _with_bad_scale,
    "an infinity was found": _with_infinity,
    "hyperparameters are given to graphs": lambda optimizer: optimizer.sync_hyperparameters(),
    "a scaler asks": lambda optimizer: optimizer.finds_inf(),
}


@pytest.mark.parametrize("event", NO_STEPS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_that_no_step_has_written_are_zeros(optimizer: str, event: str, new_states: list[torch.Tensor]) -> None:
    NO_STEPS[event](_make_large(optimizer))
    assert new_states
    assert not any(state.any() for state in new_states)


@pytest.mark.parametrize("options", LARGE)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_that_a_signals_handler_saves_in_a_first_step_holds_no_garbage(
    optimizer: str, options: str, new_states: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    if options == "emulated" and not core.compiled.emulates():  # type: ignore[union-attr]
        pytest.skip("this build has no emulated kernels")
    made = _make_large(optimizer, **LARGE[options])
    saved: list[dict[str, Any]] = []
    live_params = table.Table.live_params

    def handle(built: table.Table) -> list[torch.Tensor]:
        saved.extend([copy.deepcopy(made.state_dict()), copy.deepcopy(made).state_dict()])
        return live_params(built)

    monkeypatch.setattr(table.Table, "live_params", handle)  # called between states and launch
    made.step()
    assert new_states
    kept = [state for each in saved for states in each["state"].values() for state in states.values()]
    assert not any(state.any() for state in kept)


def test_tables_that_are_forgotten_before_their_launch_leave_no_garbage(new_states: list[torch.Tensor]) -> None:
    made = _make_large("AdamW")

    class Forgets(torch.Tensor):
        def to(self, *_: Any, **__: Any) -> Any:
            made.refresh()
            raise KeyboardInterrupt

    made.grad_scale = torch.ones(()).as_subclass(Forgets)
    with pytest.raises(KeyboardInterrupt):
        made.step()
    assert new_states
    assert not any(state.any() for state in new_states)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_counts_of_steps_do_not_pile_up(momentum: float) -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    made: Any = fusedopt.SGD([param], momentum=momentum)
    for _ in range(5):
        made.step()
        made.state.clear()
        made.refresh()
    assert len(made._hidden_steps._begun) <= 1


def test_counts_that_are_first_looked_at_in_inference_mode_can_be_stepped_outside() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    made: Any = fusedopt.SGD([param], momentum=0.9, backend="reference")
    assert made.finds_inf()
    with torch.inference_mode():
        made.state_dict()
    made.step()
    assert float(made._hidden_steps.known[param]) == 1.0
