"""Behaviours: how tensors lie in memory. Peers corrupt memory here; the list is peers.md's and torch's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .behaviour import behaviour
from .kit import CLASSES, FULL_OPTIONS, Kit, agree, agree_with_truth, demand, identical, train, truth_kit

AREA = "Layouts"
STEPS = 3


def _each_class(kit: Kit, make_params: object, start: list[Tensor], gradients: object) -> None:
    for cls in CLASSES:
        agree_with_truth(kit, cls, start, STEPS, gradients, make_params, **FULL_OPTIONS[cls])  # type: ignore[arg-type]


@behaviour(AREA, "a channels_last parameter with a contiguous gradient")
def _(kit: Kit) -> None:
    start = kit.random(2, 3, 4, 5)

    def params() -> list[Tensor]:
        return [nn.Parameter(start.clone().to(memory_format=torch.channels_last))]

    _each_class(kit, params, [start], lambda step, index: kit.random(2, 3, 4, 5, seed=step + 1))


@behaviour(AREA, "a contiguous parameter with a channels_last gradient")
def _(kit: Kit) -> None:
    start = kit.random(2, 3, 4, 5)

    def gradients(step: int, index: int) -> Tensor:
        return kit.random(2, 3, 4, 5, seed=step + 1).to(memory_format=torch.channels_last)

    _each_class(kit, None, [start], gradients)


@behaviour(AREA, "parameter and gradient both channels_last")
def _(kit: Kit) -> None:
    start = kit.random(2, 3, 4, 5)

    def params() -> list[Tensor]:
        return [nn.Parameter(start.clone().to(memory_format=torch.channels_last))]

    def gradients(step: int, index: int) -> Tensor:
        return kit.random(2, 3, 4, 5, seed=step + 1).to(memory_format=torch.channels_last)

    _each_class(kit, params, [start], gradients)


@behaviour(AREA, "a transposed gradient")
def _(kit: Kit) -> None:
    start = kit.random(7, 5)
    _each_class(kit, None, [start], lambda step, index: kit.random(5, 7, seed=step + 1).t())


@behaviour(AREA, "an expanded gradient")
def _(kit: Kit) -> None:
    start = kit.random(8, 6)

    def gradients(step: int, index: int) -> Tensor:
        # The rest of the base is there for those who would read it.
        return kit.random(64, 6, seed=step + 1)[:1].expand(8, 6)

    _each_class(kit, None, [start], gradients)


@behaviour(AREA, "a gradient that changes its layout from step to step")
def _(kit: Kit) -> None:
    start = kit.random(6, 6)

    def gradients(step: int, index: int) -> Tensor:
        grad = kit.random(6, 6, seed=step + 1)
        return grad.t() if step % 2 else grad

    _each_class(kit, None, [start], gradients)


@behaviour(AREA, "a parameter that is a slice of columns, its neighbours untouched")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        base = kit.random(8, 10)
        before = base.clone()
        agree_with_truth(
            kit,
            cls,
            [base[:, 2:7].clone()],
            STEPS,
            lambda step, index: kit.random(8, 5, seed=step + 1),
            lambda base=base: [nn.Parameter(base[:, 2:7])],  # type: ignore[misc]
            **FULL_OPTIONS[cls],
        )
        rest = torch.ones_like(base, dtype=torch.bool)
        rest[:, 2:7] = False
        demand(torch.equal(base[rest], before[rest]), "columns beside the parameter were overwritten")


@behaviour(AREA, "every second column as one parameter, the others as another, both in one optimizer")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        base = kit.random(6, 8)
        start = [base[:, ::2].clone(), base[:, 1::2].clone()]

        def params(base: Tensor = base) -> list[Tensor]:
            return [nn.Parameter(base[:, ::2]), nn.Parameter(base[:, 1::2])]

        _, trained = agree_with_truth(
            kit, cls, start, STEPS, lambda s, i: kit.random(6, 4, seed=2 * s + i + 1), params, **FULL_OPTIONS[cls]
        )
        demand(torch.equal(base[:, ::2], trained[0]), "the base does not see the update")


@behaviour(AREA, "views into one flat buffer, at every misalignment, the bytes around them untouched")
def _(kit: Kit) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for cls in CLASSES:
            guard = 7
            buffer = kit.random(200, dtype=dtype)
            before = buffer.clone()
            spans = [(guard + 60 * k + k, 37 + k) for k in range(3)]
            start = [buffer[at : at + size].clone() for at, size in spans]

            def params(buffer: Tensor = buffer, spans: list[tuple[int, int]] = spans) -> list[Tensor]:
                return [nn.Parameter(buffer[at : at + size]) for at, size in spans]

            def gradients(step: int, index: int, dtype: torch.dtype = dtype) -> Tensor:
                return kit.random(64, seed=5 * step + index, dtype=dtype)[index + 1 :][: 37 + index]

            agree_with_truth(kit, cls, start, STEPS, gradients, params, **FULL_OPTIONS[cls])
            rest = torch.ones(200, dtype=torch.bool)
            for at, size in spans:
                rest[at : at + size] = False
            rest = rest.to(kit.device)
            identical(buffer[rest], before[rest], "the memory around the parameters")


@behaviour(AREA, "an empty parameter in the middle and at the end of the list")
def _(kit: Kit) -> None:
    shapes = [(5,), (0,), (3, 3), (4, 0)]
    start = [kit.random(*shape) for shape in shapes]
    _each_class(kit, None, start, lambda step, index: kit.random(*shapes[index], seed=step + 1))


@behaviour(AREA, "a parameter of 0 dimensions")
def _(kit: Kit) -> None:
    start = [torch.tensor(0.5, device=kit.device), kit.random(3)]
    _each_class(
        kit, None, start, lambda step, index: torch.tensor(0.1 * step - 0.2) if index == 0 else kit.random(3, seed=step)
    )


@behaviour(AREA, "a parameter of negligible dimensions with odd strides")
def _(kit: Kit) -> None:
    start = kit.random(1, 4, 1)

    def params() -> list[Tensor]:
        return [nn.Parameter(start.clone().as_strided((1, 4, 1), (7, 1, 9)))]

    _each_class(kit, params, [start], lambda step, index: kit.random(1, 4, 1, seed=step + 1))


@behaviour(AREA, "a state that was loaded with other strides than the parameter's")
def _(kit: Kit) -> None:
    for cls in ("SGD", "Adam"):
        values = kit.random(4, 6)
        runs = []
        for layout in (lambda tensor: tensor, lambda tensor: tensor.t().contiguous().t()):
            param = nn.Parameter(values.clone())
            optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
            train(optimizer, [param], 2, lambda s, i: kit.random(4, 6, seed=s + 1))
            saved = optimizer.state_dict()
            saved["state"] = {
                key: {name: layout(value) if value.dim() else value for name, value in state.items()}
                for key, state in saved["state"].items()
            }
            optimizer.load_state_dict(saved)
            train(optimizer, [param], 2, lambda s, i: kit.random(4, 6, seed=s + 5))
            runs.append(param.detach().clone())
        demand(
            bool(torch.isclose(runs[0], runs[1], rtol=1e-5, atol=1e-6).all()),
            "the layout of the state changed the result",
        )


@behaviour(AREA, "two parameters of the same memory, updated one after the other")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            base = kit.random(6)
            params = [nn.Parameter(base), nn.Parameter(base)]
            optimizer = maker(cls, params, **FULL_OPTIONS[cls])
            train(optimizer, params, 3, lambda s, i: kit.random(6, seed=2 * s + i))
            results.append(base)
        demand(bool(torch.isclose(*results, rtol=1e-5, atol=1e-6).all()), "updates of shared memory were lost")


@behaviour(AREA, "two parameters that overlap in part", refused="parameter 0 .* parameter 1 .* share some of their")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        base = kit.random(6)
        params = [nn.Parameter(base[:4]), nn.Parameter(base[3:])]
        train(maker("Adam", params, lr=0.1), params, 3, lambda s, i: kit.random(4 - i, seed=2 * s + i))
        results.append(base)
    demand(bool(torch.isclose(*results, rtol=1e-5, atol=1e-6).all()), "updates of shared memory were lost")


@behaviour(AREA, "a parameter in its group twice (torch warns), updated twice a step")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        param = kit.param([1.0, -2.0, 3.0])
        optimizer = maker("Adam", [param, param], lr=0.1)
        train(optimizer, [param], 3, lambda s, i: kit.random(3, seed=s))
        results.append(param.detach())
    demand(bool(torch.isclose(*results, rtol=1e-5, atol=1e-6).all()), "one of the two updates was lost")


@behaviour(AREA, "a parameter whose own elements share memory", refused="parameter 0 of group 0 .* share memory")
def _(kit: Kit) -> None:
    base = kit.random(4)
    param = nn.Parameter(base[:1].expand(4), requires_grad=False)
    optimizer = kit.make("SGD", [param], lr=0.1)
    param.grad = torch.ones(4, device=kit.device)
    optimizer.step()
    demand(False, "an element was updated four times, or once, or its neighbours were")


@behaviour(
    AREA,
    "a parameter that is a lazy view, from the first step or from a later one on",
    refused="parameter 0 of group 0 is a lazy view, whose memory holds the negative of its values",
)
def _(kit: Kit) -> None:
    for late in (False, True):
        z = kit.random(4, dtype=torch.complex64)
        negative = z.conj().imag
        param = nn.Parameter(z.imag if late else negative)
        optimizer = kit.make("SGD", [param], lr=0.5)
        if late:
            train(optimizer, [param], 2, lambda s, i: torch.zeros(4))
            param.data = negative
        expected = param.detach().clone() - 0.5
        train(optimizer, [param], 1, lambda s, i: torch.ones(4))
        identical(param, expected, "the parameter")


@behaviour(AREA, "a gradient that is the parameter itself")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        param = kit.param([1.0, -2.0, 3.0, 4.0])
        other = kit.param([1.0, -2.0, 3.0, 4.0])
        for one, grad in ((param, param.detach()), (other, other.detach().clone())):
            optimizer = kit.make(cls, [one], **{**FULL_OPTIONS[cls], "weight_decay": 0.0})
            one.grad = grad
            optimizer.step()
        identical(param, other, "the parameter")


@behaviour(
    AREA, "a gradient that is another parameter", refused="gradient of parameter 1 .* parameter 0 .* share memory"
)
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        params = [kit.param([1.0, -2.0, 3.0]), kit.param([1.0, 1.0, 1.0])]
        params[0].grad, params[1].grad = kit.random(3), params[0].detach()
        maker("SGD", params, lr=0.5).step()
        results.append(params[1].detach())
    agree(results[0], results[1], "what was stepped by a parameter", 1)


@behaviour(
    AREA, "a gradient that is its own velocity", refused="gradient of parameter 0 .* momentum_buffer .* share memory"
)
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        param = kit.param([1.0, -2.0, 3.0])
        first, second = (maker("SGD", [param], lr=0.5, momentum=0.5) for _ in range(2))
        train(first, [param], 1, lambda s, i: kit.random(3))
        second.load_state_dict(first.state_dict())
        param.grad = second.state[param]["momentum_buffer"]
        second.step()
        results.append(param.detach())
    agree(results[0], results[1], "the parameter", 2)


@behaviour(AREA, "a gradient that lies in the parameter's memory, in another order")
def _(kit: Kit) -> None:
    param = nn.Parameter(kit.random(4, 4))
    expected = param.detach() - 0.5 * param.detach().t()
    param.grad = param.detach().t()
    kit.make("SGD", [param], lr=0.5).step()
    demand(
        bool(torch.isclose(param.detach(), expected, rtol=1e-6, atol=1e-6).all()),
        "elements were read after they were written",
    )
