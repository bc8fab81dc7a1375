"""The ways in which tensors are read: torch's own functions, DLPack's C exchange table (torch >= 2.10), attributes."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusedopt
from fusedopt import backends

ROOT = Path(__file__).resolve().parent.parent

# A process of its own: whether torch has the table is asked once, when fusedopt is imported.
STEPS = """
import hashlib, sys
import torch
if "without" in sys.argv and hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
import fusedopt
from fusedopt.core import compiled

def numbers(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))

digest = hashlib.sha256()
for name in ("SGD", "Adam", "AdamW"):
    more = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    values = [
        numbers(5, 0), numbers(2049, 1).bfloat16(), numbers(64, 2)[::2], numbers(12, 3).view(3, 4).t(),
        numbers(0, 4), numbers(1, 5)[0], numbers(7, 6).double(), torch.view_as_complex(numbers(6, 7).view(3, 2)),
    ]
    params = [torch.nn.Parameter(value) for value in values]
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": torch.tensor(0.125)}]
    optimizer = getattr(fusedopt, name)(groups, lr=0.5, backend="cpu", **more)
    for step in range(6):
        for k, param in enumerate(params):
            fresh = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
            grad = numbers(fresh.numel(), 10 * step + k).view(fresh.shape).to(fresh.dtype)
            param.grad = torch.view_as_complex(grad) if param.is_complex() else grad
        params[step].grad = None
        optimizer.step()
    for tensor in [*params, *(value for param in params for value in optimizer.state[param].values())]:
        tensor = tensor.detach().contiguous()
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
print(compiled.uses_exchange(), compiled.reads_gradients_directly(), digest.hexdigest())
"""


def bits(*arguments: str) -> list[str]:
    """Whether the exchange table was used, whether torch's own functions were found, and a digest of all results."""
    command = [sys.executable, "-c", STEPS, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.skipif(backends.compiled is None, reason="no compiled extension")
@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch has no exchange table")
def test_without_the_exchange_table_a_step_has_the_same_bits() -> None:
    with_table, without = bits(), bits("without")
    assert [with_table[0], without[0]] == ["True", "False"]
    assert len(with_table[-1]) == hashlib.sha256().digest_size * 2
    assert with_table[-1] == without[-1]


@pytest.mark.skipif(backends.compiled is None, reason="no compiled extension")
@pytest.mark.skipif(not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="torch has no exchange table")
def test_gradients_are_read_without_python_by_functions_that_torch_exports() -> None:
    assert backends.compiled is not None
    assert backends.compiled.reads_gradients_directly()


def _half(grad: Tensor) -> Tensor:
    return grad.to(torch.bfloat16)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "new memory": torch.clone,
    "columns first": lambda grad: grad.t().contiguous().t(),
    "every second element": lambda grad: torch.stack((grad, grad), -1)[..., 0],
    "a lazy negative": lambda grad: torch._neg_view(-grad),
    "bfloat16": _half,
    "sparse": lambda grad: grad.to_sparse(),
    "a subclass": lambda grad: grad.as_subclass(nn.Parameter),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_gradient_that_is_no_longer_what_it_was_is_read_as_what_it_is(change: str) -> None:
    param, expected = nn.Parameter(torch.zeros(3, 4)), torch.zeros(3, 4)
    if hasattr(param, "grad_dtype"):
        param.grad_dtype = None
    elif change == "bfloat16":
        pytest.skip("this torch wants gradients of the parameter's dtype")
    optimizer = fusedopt.SGD([param], lr=1.0)
    for step in range(6):
        grad = torch.arange(12.0).view(3, 4) + step
        param.grad = CHANGES[change](grad) if step in (2, 4, 5) else grad
        expected -= grad
        optimizer.step()
        assert torch.equal(param.detach(), expected), step


def test_a_parameter_that_changes_places_with_one_of_the_same_memory_has_that_ones_gradient() -> None:
    memory = torch.zeros(4)
    param, other = torch.nn.Parameter(memory), torch.nn.Parameter(memory)
    param.grad, other.grad = torch.ones(4), torch.full((4,), 10.0)
    optimizer = fusedopt.SGD([param], lr=1.0)
    optimizer.step()
    optimizer.step()
    gc.collect()  # the table gives back what it holds: swap_tensors wants to find no other reference
    torch.utils.swap_tensors(param, other)
    optimizer.step()
    assert memory.tolist() == [-12.0] * 4
