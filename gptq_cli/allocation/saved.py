"""A measurement on the disk: its state after finished blocks, and its result.

The state lies in the work directory beside the output. A line of the journal has the number of the
finished block and the hash of the file with the hidden states. The first line has neither: it tells
that the model has no gradients. The
result is a file of JSON with the identity of the measurement: everything that its figures depend
on. A run with a goal adds what it chose from, for its report. Only the leader of several processes
reads and writes.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import torch

from gptq_cli.allocation.harms import Measurement
from gptq_cli.events import PhaseStarted, Report, Warned, ignore
from gptq_cli.quantization.resume import Identity, save_tensors
from gptq_cli.quantization.run_state import SavingTimes
from gptq_cli.storage.durable import remove, write_json
from gptq_cli.storage.manifest import Journal, digest, file_hash, read_sealed, sealed
from gptq_cli.storage.work_directory import WorkDirectory

LEAST_KL, MOST_KL = -1e-3, 1e38  # float32 leaves a KL of 0 a little below 0, and ends at 3.4e38


class MeasuredBlocks:
    """The finished blocks of a measurement in a work directory; opening checks them."""

    def __init__(
        self, work: WorkDirectory, identity: Identity, times: SavingTimes, report: Report
    ) -> None:
        self.times, self._work = times, work
        self._journal = Journal(work.allocation_journal, digest(identity))
        n_lines = len(self._journal.entries)
        kept = n_lines
        while kept and not self._is_intact(kept - 1):
            kept -= 1
        if kept < n_lines or self._journal.damaged_bytes:
            text = f"finished blocks of the measurement in `{work.path}` are not as they were saved"
            report(Warned("W_RESUME_DAMAGED", f"{text}: the run repeats what depends on them"))
        self._journal.cut(kept)

    def __enter__(self) -> MeasuredBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    @property
    def n_finished(self) -> int:
        """How many blocks are finished."""
        if not self._journal.entries:
            return 0
        return int(self._journal.entries[-1]["block"]) + 1

    def read(self) -> tuple[int, list[Any] | None, dict[str, Any] | None]:
        """Return the number of finished blocks and, on the host, the state after the last one.

        The state is that of the calibration batches, and that of the probe.
        """
        if not self.n_finished:
            return 0, None, None
        file = self._work.allocation_state(len(self._journal.entries) - 1)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return self.n_finished, state["batches"], state["probe"]

    def save(self, block: int, state: Mapping[str, Any]) -> None:
        """Make the blocks up to `block` durable."""
        file = self._work.allocation_state(len(self._journal.entries))
        self._journal.append({"block": block, "state": save_tensors(file, state)})
        self.times.saved()

    def _is_intact(self, number: int) -> bool:
        file, saved = self._work.allocation_state(number), self._journal.entries[number]["state"]
        return saved is None or (file.is_file() and file_hash(file) == saved)


def begin_copies(work: WorkDirectory, identity: Identity) -> None:
    """Note that the model has no gradients, so that no later call tries them again."""
    remove(work.allocation_journal)
    journal = Journal(work.allocation_journal, digest(identity))
    journal.append({"block": -1, "state": None})
    journal.close()


def has_begun_copies(work: WorkDirectory, identity: Identity) -> bool:
    """Return whether an earlier call has found that the model has no gradients."""
    return bool(Journal(work.allocation_journal, digest(identity)).entries)


def read_measurement(
    files: Sequence[Path], identity: Identity, units: Collection[str], report: Report = ignore
) -> Measurement | None:
    """Return the measurement of `identity` that one of `files` holds; None if none does.

    One without usable figures for all `units` is reported as damaged.
    """
    for file in files:
        content = read_sealed(file)
        if content is None or content.get("identity") != identity:
            continue
        measured = content.get("measured")
        if _is_usable(measured, units):
            report(PhaseStarted("resume", f"using the measurement of an earlier call, `{file}`"))
            return Measurement(**measured)
        text = f"`{file}` has no usable figures: the run measures again"
        report(Warned("W_RESUME_DAMAGED", text))
    return None


def _is_usable(measured: Any, units: Collection[str]) -> TypeGuard[dict[str, Any]]:
    """Return whether JSON that was read is a `Measurement` of these units."""
    if not isinstance(measured, dict) or measured.keys() != {"kl", "uniform", "tokens"}:
        return False
    if type(measured["tokens"]) is not int:
        return False
    kl = measured["kl"]
    if not isinstance(kl, dict) or kl.keys() != set(units):
        return False
    return all(map(_is_kl, (*kl.values(), measured["uniform"])))


def _is_kl(value: Any) -> bool:
    return type(value) in (int, float) and LEAST_KL <= value <= MOST_KL


def may_write_measurement(file: Path) -> bool:
    """Return whether there is no `file`, or it is a measurement that gptq wrote."""
    if not os.path.lexists(file):
        return True
    content = read_sealed(file)
    return content is not None and content.keys() >= {"identity", "measured"}


def write_measurement(file: Path, identity: Identity, measured: Measurement) -> None:
    """Write a finished measurement."""
    write_json(file, sealed({"identity": identity, "measured": asdict(measured)}))


def note_choice(file: Path, choice: Mapping[str, Any]) -> None:
    """Add a choice and its frontier to the measurement that `file` holds."""
    content = read_sealed(file)
    assert content is not None  # this run wrote it
    write_json(file, sealed(content | {"choice": choice}))


def remove_state(work: WorkDirectory) -> None:
    """Remove what a finished measurement needs no more; the journal goes first."""
    states = (work.allocation_state(0), work.allocation_state(1))
    for path in (work.allocation_journal, *states, work.harms):
        remove(path)
