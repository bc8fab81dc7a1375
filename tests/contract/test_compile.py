"""torch.compile: a step is one operator of a full graph, gives the same numbers, and is compiled once."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import fusedopt

from .kit import CLASSES, FULL_OPTIONS, fused_kit

KIT = fused_kit("cpu")
INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="no g++: inductor can not compile for the CPU"),
)
TRACERS = ["eager", "aot_eager"]  # what inductor adds, a compiler, takes ten seconds a graph
COMPILERS = [*TRACERS, INDUCTOR]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _pair(cls: str, **options: Any) -> tuple[list[nn.Module], list[Any]]:
    """Two equal models, each with its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    models = [model, copy.deepcopy(model)]
    return models, [getattr(fusedopt, cls)(each.parameters(), **{**FULL_OPTIONS[cls], **options}) for each in models]


def _backward(model: nn.Module, step: int) -> None:
    for param in model.parameters():
        param.grad = None
    model(KIT.random(5, 4, seed=step)).pow(2).sum().backward()


def _equal(models: list[nn.Module]) -> bool:
    return all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_step_is_in_a_full_graph_and_gives_the_same_bits(cls: str, compiler: str) -> None:
    models, (compiled, eager) = _pair(cls)
    step = torch.compile(lambda: compiled.step(), backend=compiler, fullgraph=True)
    for k in range(4):
        for model in models:
            _backward(model, k)
        step()
        eager.step()
        assert _equal(models)


@pytest.mark.parametrize("cls", CLASSES)
def test_nothing_is_compiled_again_when_hyperparameters_change(cls: str) -> None:
    counter = CompileCounter()
    models, (compiled, eager) = _pair(cls)
    step = torch.compile(lambda: compiled.step(), backend=counter, fullgraph=True)
    for k in range(5):
        for model, optimizer in zip(models, (compiled, eager), strict=True):
            _backward(model, k)
            group = optimizer.param_groups[0]
            group.update(lr=0.1 / (k + 1), weight_decay=0.01 * k, maximize=k % 2 == 1)
            group.update({"momentum": 0.5 + 0.1 * k} if cls == "SGD" else {"betas": (0.5 + 0.1 * k, 0.9)})
        step()
        eager.step()
        assert _equal(models)
    assert counter.frame_count == 1


def test_a_scheduler_does_not_make_it_compile_again() -> None:
    counter = CompileCounter()
    models, optimizers = _pair("AdamW")
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(each, max_lr=0.1, total_steps=9) for each in optimizers]
    step = torch.compile(lambda: optimizers[0].step(), backend=counter)
    for k in range(5):
        for model in models:
            _backward(model, k)
        step()
        optimizers[1].step()
        for scheduler in schedulers:
            scheduler.step()
        assert _equal(models)
    frames = counter.frame_count
    for k in range(3):
        _backward(models[0], k)
        step()
        schedulers[0].step()
    assert counter.frame_count == frames


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_whole_training_step_compiles(compiler: str) -> None:
    models, optimizers = _pair("AdamW")

    def train(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).pow(2).sum()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(train, backend=compiler)
    for k in range(3):
        x = KIT.random(5, 4, seed=k)
        losses = [compiled(models[0], optimizers[0], x), train(models[1], optimizers[1], x)]
        torch.testing.assert_close(losses[0], losses[1])
    for mine, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_parameters_that_the_graph_itself_changes_and_gradients_that_it_makes(compiler: str) -> None:
    models, optimizers = _pair("Adam")

    def run(model: nn.Module, optimizer: Any, x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(2.0)
                param.grad = torch.ones_like(param) * x
        optimizer.step()
        with torch.no_grad():
            return [param * 2.0 for param in model.parameters()]

    compiled = torch.compile(run, backend=compiler, fullgraph=True)
    for k in range(3):
        x = torch.tensor(float(k + 1))
        mine, other = compiled(models[0], optimizers[0], x), run(models[1], optimizers[1], x)
        assert _equal(models)
        assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_graph_sees_the_copies_and_the_cleared_gradients_of_its_steps(compiler: str) -> None:
    """Such a step breaks the graph: it writes tensors that the graph may hold."""

    def train(param: nn.Parameter, copied: Tensor, optimizer: Any, x: Tensor) -> list[Tensor]:
        seen = []
        for _ in range(2):
            param.grad.add_(x)
            optimizer.step()
            seen += [copied + param.grad, param * 2.0]
        return seen

    found = []
    for compiles in (True, False):
        param, copied = nn.Parameter(torch.ones(4)), torch.zeros(4)
        param.grad = torch.zeros(4)
        optimizer = fusedopt.SGD([param], lr=0.5, zero_grads=True, copy_to=[copied])
        run = torch.compile(train, backend=compiler) if compiles else train
        found.append([*run(param, copied, optimizer, torch.ones(4)), param.detach(), copied, param.grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


# What a graph does to groups and states before a step, by name: fn(optimizer, number).
TOUCHES: dict[str, Callable[[Any, float], Any]] = {
    "a number is written into a group": lambda optimizer, x: optimizer.param_groups[0].update(lr=x),
    "a tensor is put into a group": lambda optimizer, x: optimizer.param_groups[0].update(lr=torch.tensor(0.1) * x),
    "a tensor of a group is written to": lambda optimizer, x: optimizer.param_groups[1]["lr"].fill_(x),
    "a state is written to": lambda optimizer, x: [
        state["momentum_buffer"].fill_(x) for state in optimizer.state.values()
    ],
    "a group is replaced": lambda optimizer, x: optimizer.param_groups.__setitem__(
        0, {**optimizer.param_groups[0], "lr": x}
    ),
    "a list of parameters is shortened": lambda optimizer, x: optimizer.param_groups[0]["params"].clear(),
    "a view of a tensor of a group is written to": lambda optimizer, x: (
        optimizer.param_groups[1]["lr"].detach().fill_(x)
    ),
    "a state is replaced": lambda optimizer, x: [
        state.update(momentum_buffer=torch.ones(3) * x) for state in optimizer.state.values()
    ],
}


def _touched(touch: Callable[[Any, float], Any], **compiling: Any) -> list[Any]:
    """What two parameters and their states are after some steps, of two in a graph each, before which it does that."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": torch.tensor(0.1)}]
    optimizer = fusedopt.SGD(groups, lr=0.1, momentum=0.5)  # type: ignore[arg-type]
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()

    def train(x: float) -> list[Tensor]:
        seen = []
        for k in (1, 2):
            touch(optimizer, k * x)
            optimizer.step()
            seen += [state["momentum_buffer"] * 2.0 for state in optimizer.state.values()]
        return seen

    run = torch.compile(train, **compiling) if compiling else train
    found = [[each.tolist() for each in run(x)] for x in (0.1, 0.2, 0.3)]
    return [*found, *(param.tolist() for param in params)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("touch", TOUCHES)
def test_a_step_sees_what_was_done_to_groups_and_states_before_it(touch: str, compiler: str) -> None:
    assert _touched(TOUCHES[touch], backend=compiler) == _touched(TOUCHES[touch])


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_full_graph_that_touches_groups_or_states_before_a_step_is_refused(touch: str) -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        _touched(TOUCHES[touch], backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("compiler", TRACERS)
def test_a_full_graph_serves_several_optimizers_in_turn(compiler: str, dynamic: bool | None) -> None:
    step = torch.compile(lambda optimizer: optimizer.step(), backend=compiler, fullgraph=True, dynamic=dynamic)
    for _ in range(3):
        param = nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        step(fusedopt.SGD([param], lr=0.5))
        assert param.tolist() == [0.5] * 3


@pytest.mark.parametrize("compiler", TRACERS)
def test_a_gradient_that_a_full_graph_takes_away_is_not_stepped(compiler: str) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fusedopt.SGD(params, lr=0.5)

    def train() -> None:
        params[0].grad = None
        optimizer.step()

    for param in params:
        param.grad = torch.ones(3)
    torch.compile(train, backend=compiler, fullgraph=True)()
    assert [param.tolist() for param in params] == [[1.0] * 3, [0.5] * 3]
    assert params[0].grad is None


@pytest.mark.parametrize("writes", ["gradients", "copies"])
def test_a_full_graph_with_a_step_that_writes_other_tensors_is_refused(writes: str) -> None:
    param = nn.Parameter(torch.ones(3))
    options: dict[str, Any] = {"zero_grads": True} if writes == "gradients" else {"copy_to": [torch.zeros(3)]}
    optimizer = fusedopt.SGD([param], lr=0.1, **options)
    param.grad = torch.ones(3)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True)()


def test_a_hook_that_sets_hyperparameters_is_seen_by_a_compiled_step() -> None:
    found = []
    for compiles in (True, False):
        param = nn.Parameter(torch.ones(3))
        optimizer = fusedopt.SGD([param], lr=1.0)
        rates = iter([0.1, 0.2, 0.3])
        optimizer.register_step_pre_hook(
            lambda optimizer, args, kwargs, rates=rates: optimizer.param_groups[0].update(lr=next(rates))
        )
        step = torch.compile(optimizer.step, backend="aot_eager", disable=not compiles)
        for _ in range(3):
            param.grad = torch.ones(3)
            step()
        found.append(param.tolist())
    assert found[0] == found[1]


def test_gradients_that_come_and_go() -> None:
    models, optimizers = _pair("SGD")
    step = torch.compile(lambda: optimizers[0].step(), backend="eager", fullgraph=True)
    for k in range(6):
        for model in models:
            _backward(model, k)
            if k % 2:
                next(model.parameters()).grad = None
        step()
        optimizers[1].step()
        assert _equal(models)


@pytest.mark.parametrize("compiler", TRACERS)
def test_a_group_that_is_added_or_changed_by_hand_after_compiling(compiler: str) -> None:
    models, optimizers = _pair("AdamW")
    step = torch.compile(lambda: optimizers[0].step(), backend=compiler, fullgraph=True)
    extra = [nn.Parameter(torch.ones(3)) for _ in models]
    for k in range(4):
        for model, optimizer, param in zip(models, optimizers, extra, strict=True):
            _backward(model, k)
            param.grad = torch.ones(3)
            if k == 1:
                optimizer.add_param_group({"params": [param]})
            if k == 2:
                optimizer.param_groups[0]["params"].reverse()
        step()
        optimizers[1].step()
        assert _equal(models)
        assert torch.equal(*extra)


@pytest.mark.parametrize("compiler", TRACERS)
@pytest.mark.parametrize("edit", ["pop", "reverse", "append", "replace"])
def test_no_step_is_lost_where_a_group_was_edited(edit: str, compiler: str) -> None:
    results = []
    for compiles in (True, False):
        p, q, r = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        optimizer = fusedopt.SGD([p, q], lr=1.0)
        step = torch.compile(lambda optimizer=optimizer: optimizer.step(), backend=compiler, disable=not compiles)
        for k in range(4):
            p.grad, r.grad = torch.ones(1), torch.ones(1)
            listed = optimizer.param_groups[0]["params"]
            if k == 2:
                if edit == "replace":
                    listed[0] = r
                else:
                    getattr(listed, edit)(*[r] * (edit == "append"))
            step()
        results.append([float(param) for param in (p, q, r)])
    assert results[0] == results[1]


@pytest.mark.parametrize("compiler", TRACERS)
def test_a_gradient_that_the_graph_replaces_by_a_view_is_read_as_that(compiler: str) -> None:
    views = {
        "transposed": lambda grad: grad.t(),
        "strided": lambda grad: grad.as_strided((2, 2), (1, 2)),
        "expanded": lambda grad: grad[:1].expand(2, 2),
    }
    for view in views.values():
        results = []
        for compiles in (True, False):
            param = nn.Parameter(torch.zeros(2, 2))
            optimizer = fusedopt.SGD([param], lr=1.0)

            def run(param: Any = param, optimizer: Any = optimizer, view: Any = view) -> None:
                param.grad = view(param.grad)
                optimizer.step()

            param.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            torch.compile(run, backend=compiler, disable=not compiles)()
            results.append(param.detach())
        assert torch.equal(*results)
        torch._dynamo.reset()


@pytest.mark.parametrize("compiler", TRACERS)
def test_sparse_gradients_are_stepped_in_a_compiled_step(compiler: str) -> None:
    results = []
    for compiles in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(6, 3, sparse=True)
        optimizer = fusedopt.SGD(table.parameters(), lr=0.1)
        table(torch.tensor([1, 2])).sum().backward()
        torch.compile(lambda optimizer=optimizer: optimizer.step(), backend=compiler, disable=not compiles)()
        results.append(table.weight.detach())
    assert torch.equal(*results)


def test_a_step_without_gradients_is_none_and_parameters_that_were_all_replaced_are_updated() -> None:
    old, new = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = fusedopt.SGD([old], lr=0.5)
    torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)()
    optimizer.param_groups[0]["params"] = [new]
    new.grad = torch.ones(3)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert (old.tolist(), new.tolist()) == ([1.0] * 3, [0.5] * 3)


def test_hooks_and_loads_around_a_compiled_step() -> None:
    models, optimizers = _pair("Adam")
    calls: list[int] = []
    optimizers[0].register_step_post_hook(lambda *args: calls.append(1))
    step = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for k in range(4):
        for model in models:
            _backward(model, k)
        step()
        optimizers[1].step()
        if k == 1:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert _equal(models)
    assert len(calls) == 4


def test_the_operator_is_declared_right() -> None:
    """Torch's own checks of an operator: its schema, its fake implementation, its dispatch under AOTAutograd."""
    param = nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = fusedopt.SGD([param], lr=0.25)
    param.grad = torch.ones(3)
    arguments = ([param], [param.grad], [0], optimizer._number)
    torch.library.opcheck(torch.ops.fusedopt.step.default, arguments)


def test_an_optimizer_that_is_gone_is_said_to_be_gone() -> None:
    with pytest.raises(RuntimeError, match="no longer exists"):
        torch.ops.fusedopt.step([torch.ones(1)], [torch.ones(1)], [0], 10**9)
