"""The faults of `make mutate` fit the sources as they are, so that none is left out in silence."""

from __future__ import annotations

import pytest

from .faults import FAULTS, Fault
from .test_house import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_the_text_that_a_fault_replaces_stands_once_in_its_file(fault: Fault) -> None:
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.old != fault.new
    for suite in fault.suites:
        assert (ROOT / suite.arguments[0]).exists()


def test_faults_have_names_of_their_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
