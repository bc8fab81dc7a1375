"""Behaviours: state, checkpoints, and what happens to them between steps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .behaviour import behaviour
from .kit import (
    CLASSES,
    FULL_OPTIONS,
    STATES,
    Kit,
    agree,
    demand,
    identical,
    states_of,
    torch_kits,
    train,
    truth_kit,
)

AREA = "State and checkpoints"
SHAPES = ((3, 4), (5,), ())


def _gradient(kit: Kit) -> Callable[[int, int], Tensor]:
    return lambda step, index: kit.random(*SHAPES[index], seed=10 * step + index + 1)


def _params(kit: Kit) -> list[nn.Parameter]:
    return [nn.Parameter(kit.random(*shape, seed=100 + k)) for k, shape in enumerate(SHAPES)]


def _started(kit: Kit, cls: str, steps: int = 3) -> tuple[Optimizer, list[nn.Parameter]]:
    params = _params(kit)
    optimizer = kit.make(cls, params, **FULL_OPTIONS[cls])
    train(optimizer, params, steps, _gradient(kit))
    return optimizer, params


def _through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded as a checkpoint is, by the loader that runs no code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _resumed(
    kit: Kit, cls: str, state_dict: dict[str, Any], params: list[nn.Parameter]
) -> tuple[Optimizer, list[nn.Parameter]]:
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = kit.make(cls, copies, lr=0.5)  # other hyperparameters than were saved
    optimizer.load_state_dict(state_dict)
    return optimizer, copies


@behaviour(AREA, "the state's keys, their order, shapes and dtypes are the for-loop's")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        (ours, params), (theirs, plain) = _started(kit, cls), _started(truth_kit(kit.device), cls)
        for param, expected in zip(params, plain, strict=True):
            mine, its = ours.state[param], theirs.state[expected]
            demand(list(mine) == list(its), f"{cls} keeps {list(mine)}, the for-loop {list(its)}")
            for name, value in its.items():
                demand(mine[name].shape == value.shape, f"{name} has shape {tuple(mine[name].shape)}")
                demand(mine[name].dtype == value.dtype, f"{name} has dtype {mine[name].dtype}")


@behaviour(AREA, "the groups of a state_dict carry torch's keys and no others")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        ours = kit.make(cls, _params(kit)).state_dict()
        theirs = truth_kit(kit.device).make(cls, _params(kit)).state_dict()
        demand(list(ours["param_groups"][0]) == list(theirs["param_groups"][0]), str(list(ours["param_groups"][0])))


@behaviour(AREA, "state appears with a parameter's first gradient, and SGD without momentum keeps none")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        params = _params(kit)
        optimizer = kit.make(cls, params, **FULL_OPTIONS[cls])
        demand(not optimizer.state, "there is state before the first step")
        train(optimizer, params, 1, lambda step, index: None if index == 1 else _gradient(kit)(step, index))
        demand(not optimizer.state.get(params[1]), "there is state for a parameter that had no gradient")
        demand(bool(optimizer.state.get(params[0])), "there is no state for a parameter that had one")
    params = _params(kit)
    optimizer = kit.make("SGD", params, lr=0.1)
    train(optimizer, params, 2, _gradient(kit))
    demand(len(optimizer.state_dict()["state"]) == 0, "SGD without momentum keeps state")


@behaviour(AREA, "each parameter counts its own steps")
def _(kit: Kit) -> None:
    params = _params(kit)
    optimizer = kit.make("Adam", params, lr=0.1)
    train(optimizer, params, 6, lambda step, index: _gradient(kit)(step, index) if step % (index + 1) == 0 else None)
    counts = [float(optimizer.state[param]["step"]) for param in params]
    demand(counts == [6.0, 3.0, 2.0], f"the steps are {counts}, not 6, 3 and 2")
    kinds = {(type(optimizer.state[param]["step"]), optimizer.state[param]["step"].dim()) for param in params}
    demand(kinds == {(Tensor, 0)}, "a step is not a 0-dim tensor")


@behaviour(AREA, "training resumes from its own checkpoint bit for bit")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        optimizer, params = _started(kit, cls)
        again, copies = _resumed(kit, cls, _through_file(optimizer.state_dict()), params)
        for one, those in ((optimizer, params), (again, copies)):
            train(one, those, 3, _gradient(kit), first=3)
        for param, other in zip(params, copies, strict=True):
            identical(other, param, f"a parameter of {cls}")
            for name in STATES[cls]:
                identical(again.state[other][name], optimizer.state[param][name], name)


def _torch_kits(kit: Kit, cls: str) -> list[Kit]:
    """Torch's implementations of a class, the capturable one included where there is one."""
    capturable = Kit("capturable", kit.device, torch.optim, (("fused", True), ("capturable", True)))
    return [*torch_kits(kit.device), *([] if cls == "SGD" else [capturable])]


@behaviour(AREA, "checkpoints of torch's for-loop, foreach, fused and capturable load, and training goes on as theirs")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for source in _torch_kits(kit, cls):
            optimizer, params = _started(source, cls)
            mine, copies = _resumed(kit, cls, _through_file(optimizer.state_dict()), params)
            truth, plain = _started(truth_kit(kit.device), cls)
            for one, those in ((mine, copies), (truth, plain)):
                train(one, those, 3, _gradient(kit), first=3)
            for param, expected in zip(copies, plain, strict=True):
                agree(param, expected, f"a parameter of {cls} from {source.name}", 6)


@behaviour(AREA, "its checkpoints load into torch's for-loop, foreach, fused and capturable, and come back")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for target in _torch_kits(kit, cls):
            optimizer, params = _started(kit, cls)
            there, copies = _resumed(target, cls, _through_file(optimizer.state_dict()), params)
            train(there, copies, 2, _gradient(kit), first=3)
            back, final = _resumed(kit, cls, _through_file(there.state_dict()), copies)
            train(back, final, 2, _gradient(kit), first=5)
            _, plain = _started(truth_kit(kit.device), cls, steps=7)
            for param, expected in zip(final, plain, strict=True):
                agree(param, expected, f"a parameter of {cls} by way of {target.name}", 7)


def _other_memory(state: Tensor) -> None:
    state.data = state.data.clone()


def _set(state: Tensor) -> None:
    state.set_(state.clone())  # type: ignore[call-overload]


def _swapped(state: Tensor) -> None:
    torch.utils.swap_tensors(state, state.clone())


MOVES: tuple[Callable[[Tensor], Any], ...] = (_other_memory, _set, _swapped, Tensor.share_memory_)


@behaviour(AREA, "a state that gets other memory, or is moved to shared memory, is stepped where it then lies")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for move in MOVES:
            optimizer, params = _started(kit, cls)
            move(optimizer.state[params[1]][STATES[cls][-1]])
            train(optimizer, params, 4, _gradient(kit), first=3)
            truth, plain = _started(truth_kit(kit.device), cls, steps=7)
            for param, expected in zip(params, plain, strict=True):
                agree(param, expected, f"a parameter of {cls}", 7)
                for name in STATES[cls]:
                    agree(optimizer.state[param][name], truth.state[expected][name], name, 7)


@behaviour(AREA, "the options of a loaded checkpoint take the place of those given, flags included")
def _(kit: Kit) -> None:
    for cls, options in (
        ("Adam", {"lr": 0.25, "amsgrad": True, "maximize": True, "betas": (0.8, 0.9)}),
        ("SGD", {"lr": 0.25, "momentum": 0.5, "nesterov": True}),
    ):
        source = truth_kit(kit.device).make(cls, [kit.param([1.0])], **options)
        optimizer = kit.make(cls, [kit.param([1.0])], lr=1.0)
        optimizer.load_state_dict(source.state_dict())
        for name, value in options.items():
            demand(optimizer.param_groups[0][name] == value, f"{name} is {optimizer.param_groups[0][name]}")


@behaviour(AREA, "AdamW's decay stays decoupled whatever is loaded; Adam keeps what was saved")
def _(kit: Kit) -> None:
    adam = kit.make("Adam", [kit.param([1.0])])
    adamw = kit.make("AdamW", [kit.param([1.0])])
    saved_adam, saved_adamw = copy.deepcopy(adam.state_dict()), copy.deepcopy(adamw.state_dict())
    adam.load_state_dict(saved_adamw)
    adamw.load_state_dict(saved_adam)
    demand(adam.param_groups[0]["decoupled_weight_decay"] is True, "Adam forgot the saved decay")
    demand(adamw.param_groups[0]["decoupled_weight_decay"] is True, "AdamW became Adam")


@behaviour(AREA, "float32 state of a bfloat16 parameter is still float32 after a load")
def _(kit: Kit) -> None:
    _state_keeps_dtype(kit, torch.bfloat16, torch.float32)


@behaviour(AREA, "bfloat16 state of a float32 parameter is still bfloat16 after a load, and is stepped")
def _(kit: Kit) -> None:
    _state_keeps_dtype(kit, torch.float32, torch.bfloat16)


def _state_keeps_dtype(kit: Kit, param_dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, 2.0, 3.0], dtype=param_dtype)
        optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
        train(optimizer, [param], 1, lambda step, index: kit.random(3, dtype=param_dtype))
        saved = copy.deepcopy(optimizer.state_dict())
        for name in STATES[cls]:
            saved["state"][0][name] = kit.random(3, seed=7).abs().to(state_dtype)
        optimizer.load_state_dict(saved)
        for name in STATES[cls]:
            identical(optimizer.state[param][name], saved["state"][0][name], f"{name} of {cls}")
        before = param.detach().clone()
        train(optimizer, [param], 1, lambda step, index: kit.random(3, seed=3, dtype=param_dtype))
        demand(not torch.equal(before, param.detach()), "nothing was updated")
        for name in STATES[cls]:
            demand(
                optimizer.state[param][name].dtype == state_dtype, f"{name} became {optimizer.state[param][name].dtype}"
            )


@behaviour(AREA, "a copy by deepcopy goes on by itself, bit for bit")
def _(kit: Kit) -> None:
    _copied(kit, copy.deepcopy)


@behaviour(AREA, "a copy by pickle goes on by itself, bit for bit")
def _(kit: Kit) -> None:
    _copied(kit, lambda both: pickle.loads(pickle.dumps(both)))


def _copied(kit: Kit, copier: Callable[[Any], Any]) -> None:
    for cls in CLASSES:
        optimizer, params = _started(kit, cls)
        again, copies = copier((optimizer, params))
        demand(again.param_groups[0]["params"][0] is copies[0], "the copy is of other parameters")
        for one, those in ((again, copies), (optimizer, params)):
            train(one, those, 2, _gradient(kit), first=3)
        for param, other in zip(params, copies, strict=True):
            identical(other, param, f"a parameter of {cls}")
        train(again, copies, 1, _gradient(kit), first=9)
        demand(not torch.equal(copies[0], params[0]), "the copy drives the original")


@behaviour(AREA, "a copy is still trusted with the gradient scaler's scale")
def _(kit: Kit) -> None:
    if not getattr(kit.make("Adam", [kit.param([1.0])]), "_step_supports_amp_scaling", False):
        return  # it never was
    again = copy.deepcopy(kit.make("Adam", [kit.param([1.0])]))
    demand(getattr(again, "_step_supports_amp_scaling", False), "_step_supports_amp_scaling was lost")


@behaviour(AREA, "an old checkpoint, with a float step and without newer options, loads and goes on")
def _(kit: Kit) -> None:
    for cls in ("Adam", "AdamW", "SGD"):
        optimizer, params = _started(truth_kit(kit.device), cls)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = float(state["step"])
        for group in saved["param_groups"]:
            for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
                group.pop(key, None)
        mine, copies = _resumed(kit, cls, saved, params)
        if cls != "SGD":
            demand(isinstance(mine.state[copies[0]]["step"], Tensor), "the step is still a float")
        for one, those in ((optimizer, params), (mine, copies)):
            train(one, those, 2, _gradient(kit), first=3)
        for param, expected in zip(copies, params, strict=True):
            agree(param, expected, f"a parameter of {cls}", 5)


@behaviour(AREA, "entries of the state that are not the optimizer's own survive a save and a load")
def _(kit: Kit) -> None:
    optimizer, params = _started(kit, "Adam")
    optimizer.state["note"] = {"epoch": 3}
    optimizer.state[params[0]]["mine"] = torch.arange(3)
    optimizer.state[params[0]]["tag"] = "a"
    again, copies = _resumed(kit, "Adam", copy.deepcopy(optimizer.state_dict()), params)
    demand(again.state["note"] == {"epoch": 3}, "an entry beside the parameters is gone")
    demand(torch.equal(again.state[copies[0]]["mine"].cpu(), torch.arange(3)), "a tensor beside the moments is gone")
    train(again, copies, 1, _gradient(kit), first=3)


@behaviour(AREA, "a load that fails - another model's shapes - is refused there, and changes nothing")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        optimizer, params = _started(kit, cls)
        before = copy.deepcopy(optimizer.state_dict())
        saved = copy.deepcopy(before)
        saved["param_groups"][0]["lr"] = 123.0
        for name in STATES[cls]:
            saved["state"][1][name] = torch.zeros(7, 7)
        try:
            optimizer.load_state_dict(saved)
        except ValueError:
            pass
        else:
            demand(False, f"state of shape (7, 7) was loaded for a parameter of shape {SHAPES[1]}")
        after = optimizer.state_dict()
        demand(after["param_groups"] == before["param_groups"], "hyperparameters changed")
        for key, state in before["state"].items():
            for name, value in state.items():
                identical(after["state"][key][name], value, name)
        train(optimizer, params, 1, _gradient(kit), first=3)


@behaviour(AREA, "a state_dict of another optimizer is refused at the load")
def _(kit: Kit) -> None:
    for cls, other in (("SGD", "Adam"), ("Adam", "SGD")):
        optimizer = kit.make(cls, [kit.param([1.0])], lr=0.1)
        saved = truth_kit(kit.device).make(other, [kit.param([1.0])], lr=0.1).state_dict()
        try:
            optimizer.load_state_dict(saved)
        except ValueError:
            continue
        demand(False, f"{cls} loaded a state_dict of {other} and will fail, or not, in a later step")


@behaviour(AREA, "one step count that a checkpoint shares between parameters is counted for each")
def _(kit: Kit) -> None:
    optimizer, params = _started(kit, "Adam")
    saved = copy.deepcopy(optimizer.state_dict())
    shared = torch.tensor(3.0, device=saved["state"][0]["step"].device)
    for state in saved["state"].values():
        state["step"] = shared
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2, _gradient(kit), first=3)
    counts = [float(optimizer.state[param]["step"]) for param in params]
    demand(counts == [5.0, 5.0, 5.0], f"after 5 steps the counts are {counts}")


@behaviour(AREA, "tensors of a state_dict are the optimizer's own, not copies")
def _(kit: Kit) -> None:
    optimizer, params = _started(kit, "Adam")
    held = optimizer.state_dict()["state"][0]["exp_avg"]
    train(optimizer, params, 1, _gradient(kit), first=3)
    demand(torch.equal(held, optimizer.state[params[0]]["exp_avg"]), "the saved tensor stayed behind")


@behaviour(AREA, "a model cast to another dtype between steps is trained on, with the moments it had")
def _(kit: Kit) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Linear(3, 2).to(kit.device)
        optimizer = kit.make("Adam", model.parameters(), lr=0.01)
        params = list(model.parameters())
        train(optimizer, params, 2, lambda s, i: kit.random(*params[i].shape, seed=2 * s + i))
        moments = optimizer.state[params[0]]["exp_avg"].clone()
        model.to(dtype)
        before = [param.detach().clone() for param in params]
        train(optimizer, params, 1, lambda s, i: kit.random(*params[i].shape, seed=9 + i, dtype=dtype))
        demand(all(param.dtype == dtype for param in params), "the parameters changed their dtype")
        demand(not any(torch.equal(*pair) for pair in zip(params, before, strict=True)), "nothing was updated")
        grown = 0.9 * moments + 0.1 * kit.random(*params[0].shape, seed=9, dtype=dtype).to(moments.dtype)
        apart = (optimizer.state[params[0]]["exp_avg"] - grown).abs().max().item()
        demand(apart < 1e-6, f"the first moment is {apart:.2g} from what it should be")


@behaviour(AREA, "moments that a script replaces, deletes or sets before the first step are honoured at once")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        (mine, params), (truth, plain) = _started(kit, cls), _started(truth_kit(kit.device), cls)
        gradient = _gradient(kit)

        def both(first: int, mine: Any = mine, truth: Any = truth, params: Any = params, plain: Any = plain) -> None:
            train(mine, params, 1, gradient, first=first)
            train(truth, plain, 1, gradient, first=first)

        for optimizer, those in ((mine, params), (truth, plain)):
            for name in STATES[cls]:  # replaced by new tensors
                optimizer.state[those[0]][name] = torch.full_like(those[0], 0.25).detach()
            optimizer.state[those[1]] = {}  # replaced by nothing
        both(3)
        for optimizer, those in ((mine, params), (truth, plain)):
            del optimizer.state[those[2]]
            for name in STATES[cls]:
                optimizer.state[those[0]][name].mul_(0.5)  # changed in place
        both(4)
        for optimizer in (mine, truth):
            optimizer.state.clear()
        both(5)
        for param, expected in zip(params, plain, strict=True):
            agree(param, expected, f"a parameter of {cls}", 6)
            for name, value in states_of(truth, expected).items():
                agree(mine.state[param][name], value, name, 6)


@behaviour(AREA, "state tensors given other memory through .data are found by refresh(), and never written as freed")
def _(kit: Kit) -> None:
    optimizer, params = _started(kit, "Adam")
    for state in optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()
    if hasattr(optimizer, "refresh"):
        optimizer.refresh()
    train(optimizer, params, 2, _gradient(kit), first=3)
    truth, plain = _started(truth_kit(kit.device), "Adam", steps=5)
    del truth
    for param, expected in zip(params, plain, strict=True):
        agree(param, expected, "a parameter", 5)
    demand(float(optimizer.state[params[0]]["step"]) == 5.0, "the steps went to the old memory")


@behaviour(AREA, "a parameter put in another's place in its group, with its state, as in Gaussian splatting")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        old, kept = kit.param([1.0, 2.0, 3.0]), kit.param([5.0])
        optimizer = maker("Adam", [old, kept], lr=0.1)
        train(optimizer, [old, kept], 3, lambda s, i: kit.random(3 - 2 * i, seed=2 * s + i))
        state = optimizer.state.pop(old)
        grown = nn.Parameter(torch.cat([old.detach(), old.detach()[:2]]))
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.cat([state[name], torch.zeros_like(state[name][:2])])
        optimizer.param_groups[0]["params"][0] = grown
        optimizer.state[grown] = state
        train(optimizer, [grown, kept], 3, lambda s, i: kit.random(5 - 4 * i, seed=2 * s + i + 50))
        demand(torch.equal(old.detach()[:2], grown.detach()[3:]) is False, "the new parameter was not updated")
        results.append(grown.detach())
    agree(results[0], results[1], "the parameter", 6)


@behaviour(AREA, "names of parameters are kept in groups and checkpoints, and the checkpoint's win")
def _(kit: Kit) -> None:
    model = nn.Linear(2, 2).to(kit.device)
    optimizer = kit.make("AdamW", model.named_parameters(), lr=0.1)
    demand(optimizer.param_groups[0]["param_names"] == ["weight", "bias"], "the names are not in the group")
    saved = optimizer.state_dict()
    demand(saved["param_groups"][0]["param_names"] == ["weight", "bias"], "the names are not in the checkpoint")
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["param_names"] = ["w", "b"]
    optimizer.load_state_dict(saved)
    demand(optimizer.param_groups[0]["param_names"] == ["w", "b"], "the loaded names did not win")
    del saved["param_groups"][0]["param_names"]
    optimizer.load_state_dict(saved)
    demand(optimizer.param_groups[0]["param_names"] == ["w", "b"], "the names went with a checkpoint that has none")


@behaviour(AREA, "the first step of momentum that the gradient scaler skipped is still the first, after a save too")
def _(kit: Kit) -> None:
    param, plain = kit.param([1.0, 2.0]), kit.param([1.0, 2.0])
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = kit.make("SGD", [param], **options)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return  # the scaler does not call its step then
    param.grad = torch.full_like(param, float("inf"))
    optimizer.found_inf = torch.ones((), device=kit.device)  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]
    again = kit.make("SGD", [param], **options)
    again.load_state_dict(_through_file(optimizer.state_dict()))
    truth = truth_kit(kit.device).make("SGD", [plain], **options)
    train(again, [param], 2, lambda s, i: kit.random(2, seed=s))
    train(truth, [plain], 2, lambda s, i: kit.random(2, seed=s))
    agree(param, plain, "the parameter", 2)
