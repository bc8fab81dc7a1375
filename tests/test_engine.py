"""The CPU engine in the life of a process: data loaders that fork, threads that come and go, Ctrl-C at any moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

from .tensors import same_bits

ROOT = Path(__file__).resolve().parent.parent
SIZES = (70_001, 3, 0, 150_000, 2049)  # enough elements for several threads
RULES: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 0.01, "amsgrad": True},
}


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(rule: str, seed: int = 0) -> tuple[list[Parameter], Any]:
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(size, generator=generator)) for size in SIZES]
    return params, getattr(fusedopt, rule)(params, **RULES[rule], backend="cpu")


def set_grads(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def assert_same(one: list[Parameter], other: list[Parameter]) -> None:
    for index, (mine, expected) in enumerate(zip(one, other, strict=True)):
        assert same_bits(mine.detach(), expected.detach()).all(), f"parameter {index}"


@pytest.mark.parametrize("rule", RULES)
def test_the_number_of_threads_may_change_between_steps(rule: str) -> None:
    results = []
    for counts in ([1] * 12, [1, 2, 4, 1, 3, 2, 8, 1, 1, 5, 2, 3]):
        params, optimizer = make(rule)
        for step, count in enumerate(counts):
            torch.set_num_threads(count)
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    assert_same(*results)


def test_threads_step_optimizers_of_different_rules_while_the_number_of_threads_changes() -> None:
    """Whoever finds the team in use works alone: whatever happens, the bits are those of one thread."""

    def train(rule: str, seed: int) -> list[Parameter]:
        params, optimizer = make(rule, seed)
        for step in range(10):
            torch.set_num_threads(1 + (seed + step) % 4)
            set_grads(params, step)
            optimizer.step()
        return params

    jobs = [(rule, seed) for seed in range(3) for rule in RULES]
    results: dict[tuple[str, int], list[Parameter]] = {}
    workers = [threading.Thread(target=lambda job=job: results.update({job: train(*job)})) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for job in jobs:
        torch.set_num_threads(1)
        assert_same(results[job], train(*job))


@pytest.mark.skipif(sys.platform != "linux", reason="data loaders fork on Linux only")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("persistent", [False, True], ids=["new_each_epoch", "persistent"])
def test_data_loaders_may_fork_while_training(persistent: bool) -> None:
    """The team has started before the first fork; forked workers must neither wait for it nor disturb it."""
    inputs = torch.randn(48, 400, generator=torch.Generator().manual_seed(3))
    dataset = TensorDataset(inputs, inputs.sum(1))

    def train(loader: Any) -> list[Tensor]:
        torch.set_num_threads(2)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(400, 300), torch.nn.Tanh(), torch.nn.Linear(300, 1))
        optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, backend="cpu")
        for _ in range(3):
            for batch, target in loader:
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(batch).squeeze(1), target).backward()
                optimizer.step()
        return list(model.parameters())

    expected = train(DataLoader(dataset, batch_size=8))
    loader = DataLoader(
        dataset, batch_size=8, num_workers=2, persistent_workers=persistent, multiprocessing_context="fork", timeout=60
    )
    for mine, other in zip(train(loader), expected, strict=True):
        assert same_bits(mine.detach(), other.detach()).all()


INTERRUPTED = '''
"""Steps optimizers under a rain of SIGINT: each ends with the bits of one that was left in peace."""
import os, random, signal, sys, threading, time
import torch
import fusedopt

WANTED, MOST, STEPS, SIZES = 30, 4000, 12, (70_001, 3, 0, 20_000, 2049)
chance = random.Random(int(sys.argv[1]))
armed = False
done = threading.Event()

def interrupt(number, frame):
    if armed:
        raise KeyboardInterrupt

def make():
    params = [torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in SIZES]
    for param in params:
        param.grad = torch.full_like(param, 0.25)
    return params, fusedopt.AdamW(params, lr=0.01, weight_decay=0.1, backend="cpu")

def rain():
    while not done.is_set():
        time.sleep(usual * 2 ** chance.uniform(-4, 3))  # on every scale: a machine may be busy
        os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, interrupt)
torch.set_num_threads(2)
for _ in range(3):
    started = time.perf_counter()
    expected, optimizer = make()
    for _ in range(STEPS):
        optimizer.step()
    usual = time.perf_counter() - started

threading.Thread(target=rain, daemon=True).start()
interrupts, before_first, inside = 0, 0, 0
while min(before_first, inside) < WANTED and interrupts < MOST:
    params, optimizer = make()
    try:
        armed = True
        for _ in range(STEPS):
            optimizer.step()
        armed = False
    except KeyboardInterrupt:
        armed = False
        interrupts += 1
    counts = {float(optimizer.state[param]["step"]) for param in params if optimizer.state.get(param)} or {0.0}
    assert len(counts) == 1, f"some parameters took another number of steps than others: {counts}"
    (taken,) = counts
    before_first += taken == 0
    inside += 0 < taken < STEPS
    for _ in range(STEPS - int(taken)):
        optimizer.step()
    for index, (param, wanted) in enumerate(zip(params, expected)):
        assert torch.equal(param, wanted), f"parameter {index} differs, interrupted after {taken} steps"
done.set()
print(f"{interrupts} interruptions, {before_first} in the first step, {inside} later")
assert min(before_first, inside) >= WANTED
'''


def test_ctrl_c_at_any_moment_leaves_a_usable_optimizer(tmp_path: Path, record_property: Any) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    command = [sys.executable, str(script), "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    record_property("figure", f"Ctrl-C: {result.stdout.strip()}")
