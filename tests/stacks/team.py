"""A team of processes that stays for the whole run: checks run on the first 2 or 4 of them as ranks of a group.

To start Python and torch four times takes longer than all checks; so the ranks are started once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest
import torch

SIZE = 4
TIMEOUT = 120.0  # seconds for one check on all ranks
_device = "cpu"  # in a rank: of the check that runs


def on_ranks(*sizes: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a check a test that runs in every process of a group, for each of these sizes.

    Over gloo on the CPU, and over NCCL where there is a GPU for each rank. The check's own arguments are those
    of the test: fixtures and parameters, which must be picklable.
    """
    places = [pytest.param((size, "cpu"), id=f"{size}-gloo") for size in sizes]
    places += [pytest.param((size, "cuda"), id=f"{size}-nccl", marks=pytest.mark.gpu) for size in sizes]

    def wrap(check: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(check)
        def test(team: Team, place: tuple[int, str], **arguments: Any) -> None:
            size, device = place
            if device == "cuda" and torch.cuda.device_count() < size:
                pytest.skip(f"{size} ranks over NCCL need {size} GPUs; there are {torch.cuda.device_count()}")
            team.run(check, size, device, arguments)

        own = inspect.signature(check).parameters.values()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        first = [inspect.Parameter(name, kind) for name in ("team", "place")]
        test.__signature__ = inspect.Signature([*first, *own])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("place", places)(test)

    return wrap


def device() -> torch.device:
    """In a rank: where this check's tensors are."""
    return torch.device(_device, torch.cuda.current_device()) if _device == "cuda" else torch.device(_device)


class Team:
    """Processes that wait for checks."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def run(self, check: Callable[..., None], size: int, device: str, arguments: dict[str, Any]) -> None:
        """Runs a check on `size` ranks; fails with every rank's traceback where one fails."""
        if not all(process.is_alive() for process in self._processes) or not self._processes:
            self.stop()
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{folder}/meeting"
            for rank in range(size):
                where = (check.__module__, check.__qualname__)
                self._pipes[rank].send((where, rank, size, device, meeting, arguments))
            answers = self._answers(size)
        faults = [f"rank {rank}:\n{fault}" for rank, fault in sorted(answers.items()) if fault]
        if faults:
            self.stop()  # the others may wait for the one that failed
            pytest.fail("\n".join(faults), pytrace=False)

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _start(self) -> None:
        for _ in range(SIZE):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(there,), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _answers(self, size: int) -> dict[int, str]:
        """Each rank's fault, or an empty text. Where one failed, the others get little time: they may wait for it."""
        answers: dict[int, str] = {}
        end = time.monotonic() + TIMEOUT
        while len(answers) < size:
            waiting = {self._pipes[rank]: rank for rank in range(size) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                return answers | dict.fromkeys(waiting.values(), "no answer in time")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    answers[rank] = "its process ended"
                if answers[rank]:
                    end = min(end, time.monotonic() + 5)
        return answers


def _serve(pipe: Connection) -> None:
    """What a process of the team does: one check after the other."""
    torch.set_num_threads(1)
    while True:
        try:
            where, *rest = pipe.recv()
        except EOFError:
            return
        try:
            _check(where, *rest)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())


def _check(where: tuple[str, str], rank: int, size: int, device: str, meeting: str, arguments: dict[str, Any]) -> None:
    global _device
    _device = device
    if device == "cuda":
        torch.cuda.set_device(rank)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))  # as torchrun does
    torch.manual_seed(0)
    module, name = where
    found = getattr(importlib.import_module(module), name)
    check = getattr(found, "__wrapped__", found)  # what on_ranks made a test of, or a function by itself
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        check(**arguments)
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
