"""The small case that tests of unfinished runs share."""

from __future__ import annotations

import pytest

from tests.disks import CountingDisk, using
from tests.families import save_model
from tests.runs import digest
from tests.tiny import SMALL, Case


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("case")
    model = save_model(directory / "model", **SMALL)
    disk = CountingDisk()
    whole = Case(model, {}, [])
    with using(disk):
        whole.run(directory / "out")
    return Case(model, digest(directory / "out"), disk.operations)
