"""The team of processes that the checks of torch.distributed share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .team import Team


@pytest.fixture(scope="session")
def team() -> Iterator[Team]:
    made = Team()
    yield made
    made.stop()
