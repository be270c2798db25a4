"""The settings of all tests and the fixtures that several packages share.

One thread, because more threads are slower on tiny tensors; no network.

The shared helpers have these homes:
`families` = tiny models with random weights; `architectures` = one of each type of transformers;
`runs` = a run of such a model and its output; `tiny` = the smallest run, for unfinished work;
`workspace` = the files that the documents name; `reference` = the slow truth of the mathematics;
`checkpoint/gptq_files` = GPTQ checkpoints written number by number, without code of the product;
`conformance/written` = checkpoints that our writer makes of random codes;
`disks`, `power_loss`, `rights`, `hub`, `simulated_gpu` = stand-ins for what surrounds the program;
`faults`, `fuzzing` = damaged inputs.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import faulthandler
import gc
import threading
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

MOST_SECONDS = 300  # for one test that could hang


@pytest.fixture(autouse=True)
def python_finds_modules_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what `gptq_cli.__main__.main` tells child processes if it has run in this process."""
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)


@pytest.fixture
def nothing_hangs_or_leaks() -> Iterator[None]:
    """End the process with a traceback if a test hangs; fail a test if a thread outlives it."""
    threads = threading.active_count()
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    gc.freeze()  # so that tests that collect garbage do not search older objects again and again
    yield
    gc.unfreeze()
    faulthandler.cancel_dump_traceback_later()
    assert threading.active_count() == threads
