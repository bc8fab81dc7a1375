"""The list that behaviours put themselves on, and what comes of trying one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .kit import Kit, Wrong

Check = Callable[[Kit], None]

ALL: list[Behaviour] = []


@dataclass(frozen=True)
class Behaviour:
    """Something that a training script relies on.

    Attributes:
        area: heading on the page.
        sentence: what is promised.
        check: tries it; raises :class:`Wrong` where it does not hold, anything else where it is refused.
        refused: pattern of the error by which fusedopt refuses it; empty: fusedopt keeps the promise.
        devices: where it is tried.
    """

    area: str
    sentence: str
    check: Check
    refused: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def id(self) -> str:
        """The sentence as a test id."""
        return self.sentence.replace(" ", "-").replace(":", "").replace("/", "-")


@dataclass(frozen=True)
class Outcome:
    """What came of trying a behaviour: "same", "refused" or "wrong", and the words that came with it."""

    verdict: str
    words: str = ""


def behaviour(
    area: str, sentence: str, refused: str = "", devices: tuple[str, ...] = ("cpu", "cuda")
) -> Callable[[Check], Check]:
    """Puts a check on the list."""

    def add(check: Check) -> Check:
        ALL.append(Behaviour(area, sentence, check, refused, devices))
        return check

    return add


def attempt(one: Behaviour, kit: Kit) -> Outcome:
    """Tries a behaviour on an implementation."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one.check(kit)
        except Wrong as error:
            return Outcome("wrong", str(error))
        except Exception as error:  # whatever it raises, it said so
            return Outcome("refused", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return Outcome("same")
