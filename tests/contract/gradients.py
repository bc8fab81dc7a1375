"""Behaviours: what gradients may be, and when they come and go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .behaviour import behaviour
from .kit import CLASSES, FULL_OPTIONS, STATES, Kit, agree, agree_with_truth, demand, identical, train, truth_kit

AREA = "Gradients"
STEPS = 4
NAN, INF = float("nan"), float("inf")


@behaviour(AREA, "no gradient anywhere: a step does nothing")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        params = [kit.param([1.0, 2.0]), kit.param([3.0])]
        optimizer = kit.make(cls, params, **FULL_OPTIONS[cls])
        optimizer.step()
        demand(params[0].tolist() == [1.0, 2.0] and params[1].tolist() == [3.0], "a parameter changed")
        demand(len(optimizer.state_dict()["state"]) == 0, "state appeared")


@behaviour(AREA, "a first gradient that comes late, after others have taken steps")
def _(kit: Kit) -> None:
    start = [kit.random(9), kit.random(4, 3)]
    for cls in CLASSES:
        agree_with_truth(
            kit,
            cls,
            start,
            STEPS,
            lambda step, index: None if index and step < 2 else kit.random(*start[index].shape, seed=step),
            **FULL_OPTIONS[cls],
        )


@behaviour(AREA, "gradients that appear and vanish from step to step, in two groups")
def _(kit: Kit) -> None:
    start = [kit.random(9), kit.random(4, 3), kit.random(5)]
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            params = [nn.Parameter(value.clone()) for value in start]
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}]
            optimizer = maker(cls, groups, **FULL_OPTIONS[cls])
            train(
                optimizer,
                params,
                8,
                lambda step, index: kit.random(*start[index].shape, seed=step) if (step >> index) % 2 else None,
            )
            results.append(params)
        for param, expected in zip(*results, strict=True):
            agree(param, expected, f"a parameter of {cls}", 8)


@behaviour(AREA, "gradients kept and accumulated in place, as by zero_grad(set_to_none=False)")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            param = kit.param([1.0, -1.0, 2.0])
            optimizer = maker(cls, [param], **FULL_OPTIONS[cls])
            for step in range(3):
                optimizer.zero_grad(set_to_none=False)
                (param * kit.random(3, seed=step)).sum().backward()
                (param * kit.random(3, seed=step + 9)).sum().backward()
                optimizer.step()
            results.append(param)
        agree(results[0], results[1], "the parameter", 3)


@behaviour(AREA, "the gradient itself is left as it was")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for options in (FULL_OPTIONS[cls], {**FULL_OPTIONS[cls], "maximize": True}):
            param = kit.param([1.0, -1.0, 2.0])
            optimizer = kit.make(cls, [param], **options)
            for step in range(2):
                param.grad = kit.random(3, seed=step)
                before = param.grad.clone()
                optimizer.step()
                identical(param.grad, before, "the gradient")


@behaviour(AREA, "a gradient of another dtype than its parameter's (Tensor.grad_dtype)")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        for dtype, grad_dtype in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float32, torch.float16),
        ):
            param = kit.param([1.0, -2.0, 3.0, 0.5], dtype=dtype)
            if not hasattr(param, "grad_dtype"):
                return  # this torch has no such gradients
            param.grad_dtype = grad_dtype
            optimizer = kit.make(cls, [param], **FULL_OPTIONS[cls])
            plain = nn.Parameter(param.detach().double())
            truth = truth_kit(kit.device).make(cls, [plain], **FULL_OPTIONS[cls])
            for step in range(2):
                param.grad = kit.random(4, seed=step, dtype=grad_dtype)
                plain.grad = param.grad.double()
                optimizer.step()
                truth.step()
            coarse = max(torch.finfo(dtype).eps, torch.finfo(grad_dtype).eps)
            apart = (param.detach().double() - plain.detach()).abs().max().item()
            demand(apart <= 4 * coarse, f"{cls}: {dtype} with {grad_dtype} gradients is {apart:.2g} off")


@behaviour(AREA, "sparse gradients of an embedding under SGD")
def _(kit: Kit) -> None:
    for options in ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, {"lr": 0.1, "maximize": True}):
        results = []
        for maker in (kit.make, truth_kit(kit.device).make):
            table = nn.Embedding(6, 3, sparse=True).to(kit.device)
            table.weight.data.copy_(kit.random(6, 3))
            dense = kit.param([1.0, 2.0])
            optimizer = maker("SGD", [table.weight, dense], **options)
            for step in range(3):
                optimizer.zero_grad()
                picked = table(torch.tensor([1, 4, 1, step], device=kit.device))
                (picked.pow(2).sum() + dense.pow(2).sum()).backward()
                optimizer.step()
            results.append((table.weight, dense))
        for param, expected in zip(*results, strict=True):
            agree(param, expected, f"a parameter with {options}", 3)


@behaviour(AREA, "sparse gradients under Adam", refused="does not support sparse gradients")
def _(kit: Kit) -> None:
    table = nn.Embedding(6, 3, sparse=True).to(kit.device)
    optimizer = kit.make("Adam", table.parameters())
    table(torch.tensor([1, 4], device=kit.device)).sum().backward()
    optimizer.step()
    demand(False, "sparse gradients were taken")


@behaviour(AREA, "complex parameters, as their real and imaginary parts")
def _(kit: Kit) -> None:
    for dtype in (torch.complex64, torch.complex128):
        for cls in CLASSES:
            start = kit.random(3, 2, dtype=dtype)
            agree_with_truth(
                kit,
                cls,
                [start],
                STEPS,
                lambda s, i, dtype=dtype: kit.random(3, 2, seed=s, dtype=dtype),
                **FULL_OPTIONS[cls],  # type: ignore[misc]
            )


@behaviour(AREA, "complex gradients that are lazy conjugates, from one step to the next")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        results = []
        for maker, lazy in ((kit.make, True), (truth_kit(kit.device).make, False)):
            param = nn.Parameter(kit.random(4, dtype=torch.complex64))
            optimizer = maker(cls, [param], **FULL_OPTIONS[cls])
            for step in range(4):
                grad = kit.random(4, seed=step, dtype=torch.complex64)
                grad = grad.conj() if step % 2 else grad
                param.grad = grad if lazy else grad.resolve_conj().clone()
                optimizer.step()
            results.append(param)
        agree(results[0], results[1], f"the parameter of {cls}", 4)


@behaviour(AREA, "real gradients that are lazy negatives, as z.conj().imag is, from one step to the next")
def _(kit: Kit) -> None:
    for cls in CLASSES:

        def gradients(step: int, index: int) -> Tensor:
            z = kit.random(4, seed=step, dtype=torch.complex64)
            return z.conj().imag if step % 2 else z.imag

        agree_with_truth(kit, cls, [kit.random(4)], STEPS, gradients, **FULL_OPTIONS[cls])


@behaviour(AREA, "NaN and Inf in a gradient reach parameter and state as in the for-loop, elsewhere nothing")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        start = kit.random(40)

        def gradients(step: int, index: int) -> Tensor:
            grad = kit.random(40, seed=step)
            if step == 1:
                grad[3], grad[17], grad[39] = NAN, INF, -INF
            return grad

        agree_with_truth(kit, cls, [start], STEPS, gradients, **FULL_OPTIONS[cls])


@behaviour(AREA, "parameters of +Inf and -Inf become what they become in the for-loop, decayed or not")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        start = kit.random(40)
        start[3], start[39] = INF, -INF
        for options in ({**FULL_OPTIONS[cls], "weight_decay": 0.0}, {"weight_decay": 0.1}):
            agree_with_truth(kit, cls, [start], STEPS, lambda step, index: kit.random(40, seed=step), **options)


@behaviour(AREA, "AMSGrad's maximum keeps a NaN, as torch.maximum does")
def _(kit: Kit) -> None:
    param = kit.param([1.0, 2.0])
    optimizer = kit.make("Adam", [param], amsgrad=True)
    train(optimizer, [param], 3, lambda s, i: torch.tensor([NAN if s == 1 else 0.5, 0.5]))
    largest = optimizer.state[param]["max_exp_avg_sq"]
    demand(bool(largest[0].isnan()) and not bool(largest[1].isnan()), f"the maxima are {largest.tolist()}")


@behaviour(AREA, "signed zeros, denormals and the largest numbers go through")
def _(kit: Kit) -> None:
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-45, 3e38, -3e38, 1e-30])
    for cls in CLASSES:
        start = [torch.ones(7, device=kit.device)]
        agree_with_truth(kit, cls, start, 1, lambda s, i: values.to(kit.device), **{**FULL_OPTIONS[cls], "lr": 1e-3})


@behaviour(AREA, "frozen parameters of any dtype, on any device, are passed over")
def _(kit: Kit) -> None:
    for cls in CLASSES:
        trained = kit.param([1.0, 2.0])
        frozen = [
            nn.Parameter(torch.zeros(3, dtype=torch.uint8, device=kit.device), requires_grad=False),
            nn.Parameter(torch.zeros(3, device="meta"), requires_grad=False),
            nn.Parameter(torch.zeros(4, dtype=torch.bool), requires_grad=False),
            nn.Parameter(torch.zeros(1).expand(3), requires_grad=False),
        ]
        optimizer = kit.make(cls, [frozen[0], trained, *frozen[1:]], **FULL_OPTIONS[cls])
        for step in range(3):
            trained.grad = kit.random(2, seed=step)
            optimizer.step()
        demand(set(optimizer.state) == {trained}, "a frozen parameter has state")
        demand(trained.tolist() != [1.0, 2.0], "the other parameter was not updated")


@behaviour(AREA, "parameters of four dtypes in one group")
def _(kit: Kit) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for cls in CLASSES:
        start = [kit.random(33, seed=k, dtype=dtype) for k, dtype in enumerate(dtypes)]
        optimizer, params = agree_with_truth(
            kit, cls, start, 1, lambda s, i: kit.random(33, seed=s + i, dtype=dtypes[i]), **FULL_OPTIONS[cls]
        )
        for param in params:
            for name in STATES[cls]:
                demand(
                    optimizer.state[param][name].dtype == param.dtype, f"{name} is {optimizer.state[param][name].dtype}"
                )


@behaviour(AREA, "half-precision SGD with momentum updates every element, whatever their number")
def _(kit: Kit) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for numel in (7, 16, 64, 257):
            start = kit.random(numel, dtype=dtype)
            agree_with_truth(
                kit,
                "SGD",
                [start],
                2,
                lambda s, i: kit.random(numel, seed=s + 1, dtype=dtype),
                lr=0.5,
                momentum=0.5,
            )


@behaviour(AREA, "gradients that require gradients themselves (create_graph=True)")
def _(kit: Kit) -> None:
    results = []
    for maker in (kit.make, truth_kit(kit.device).make):
        param = kit.param([1.0, 2.0])
        optimizer = maker("Adam", [param], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            param.pow(3).sum().backward(create_graph=True)
            optimizer.step()
        results.append(param)
        param.grad = None  # or the graph keeps it alive
    agree(results[0], results[1], "the parameter", 2)
