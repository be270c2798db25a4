"""Resuming after an earlier run of the same identity: finished blocks, and the hidden states after
the last one.

A block is finished when the journal says so. Its tensors lie in the shards, where they belong in
the output; the journal holds their hashes, those of the hidden states, and the reports of its
layers. A line of it may stand for several blocks: work is saved after every block, unless saving
would take more than a twentieth of the time. What does not match its hash is done again, with
everything after it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gptq_cli.checkpoint.quantization_config import Defect
from gptq_cli.checkpoint.verify import check_manifest
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import ExistsError, GateError, GptqError, InputError
from gptq_cli.events import ExpertsCovered, LayerReport, Report, Resumed, Warned, WorkKept
from gptq_cli.files import UNREADABLE, is_file
from gptq_cli.models.block_calls import Container
from gptq_cli.models.stream import ModelStream
from gptq_cli.quantization.identity import Identity, differences
from gptq_cli.quantization.run_record import Record
from gptq_cli.runtime.hidden_states import HiddenStates
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.storage.durable import COPY_BYTES, OpenFile, sync_directory
from gptq_cli.storage.manifest import Entry, Journal, digest, file_hash, read_manifest
from gptq_cli.storage.replacing import check_replaceable, overwrite_hint
from gptq_cli.storage.work_directory import (
    WorkDirectory,
    drop_failed,
    mark_failed,
    read_run,
    resume_command,
)

# Of one batch: the hidden states of each way through the blocks, and what the blocks carry along beside them.
Batch = tuple[tuple[Tensor, ...], list[Any]]

MOST_SHARE = 1 / 20  # of the time of a run
BYTES_PER_SECOND = 1e9  # of hidden states that are hashed and written; assumed


class FinishedBlocks:
    """What is finished of a run of `n_steps` blocks, the head counted as the last one: the first `first` of them.

    So it is for the processes that write nothing: what they need is dealt out to them, what they have is gathered.
    """

    def __init__(self, team: Ranks, first: int, n_steps: int) -> None:
        self._team, self._n_steps = team, n_steps
        self.first = first

    @property
    def complete(self) -> bool:
        """Whether there is no block left to do."""
        return self.first == self._n_steps

    def restore(self, stream: ModelStream, hidden: Sequence[HiddenStates]) -> int:
        """Bring `hidden`, and what the blocks of `stream` carry along, to where the first block to do needs them."""
        if self.first:
            batches = self._team.scatter(self._saved(), hidden[0].n_all)
            for way, states in zip(
                hidden, zip(*(states for states, _ in batches), strict=True), strict=True
            ):
                way.restore(states)
            for containers, (_, carried) in zip(stream.carried, batches, strict=True):
                _fill(containers, carried, stream.device)
        return self.first

    def finished(self, block: int, stream: ModelStream, hidden: Sequence[HiddenStates]) -> None:
        """Make the blocks up to `block` survive, and the `hidden` states after it, if it is time to save them."""
        last = block + 1 == self._n_steps
        if not (last or self._team.broadcast(self._is_due(hidden))):
            return
        self._keep(block, None if last else self._team.gather(_batches(stream, hidden)))
        self.first = block + 1

    def save_every_block(self) -> None:
        """From now on, however long that takes."""

    def _is_due(self, hidden: Sequence[HiddenStates]) -> bool | None:
        """Whether it is time to save these; None where another process decides."""
        del hidden
        return None

    def _saved(self) -> list[Batch] | None:
        return None

    def _keep(self, block: int, batches: list[Batch] | None) -> None:
        del block, batches


class SavedBlocks(FinishedBlocks):
    """What is finished as the leading process has it on the disk; opened, it has been checked."""

    def __init__(
        self,
        work: WorkDirectory,
        identity: Identity,
        writer: CheckpointWriter,
        record: Record,
        n_steps: int,
        team: Ranks,
        times: SavingTimes,
    ) -> None:
        super().__init__(team, 0, n_steps)
        self._times = times
        self._work, self._writer, self._record = work, writer, record
        self._journal = Journal(work.journal, digest(identity))
        self.first = self._recover()
        self._n_layers, self._n_experts = len(record.layers), len(record.experts)

    def __enter__(self) -> SavedBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def save_every_block(self) -> None:
        self._times.always = True

    def _is_due(self, hidden: Sequence[HiddenStates]) -> bool:
        return self._times.is_due(self._team.size * sum(way.nbytes for way in hidden))

    def _saved(self) -> list[Batch]:
        last = self._work.hidden(len(self._journal.entries) - 1)
        found: list[Batch] = torch.load(last, map_location="cpu", weights_only=True)
        return found

    def _keep(self, block: int, batches: list[Batch] | None) -> None:
        """Its tensors, then the hidden states after it, then the line that says so."""
        tensors = self._writer.sync()
        layers = [asdict(layer) for layer in self._record.layers[self._n_layers :]]
        experts = [asdict(covered) for covered in self._record.experts[self._n_experts :]]
        saved = (
            None
            if batches is None
            else _save(self._work.hidden(len(self._journal.entries)), batches)
        )
        told = {"layers": layers, "experts": experts}
        self._journal.append({"block": block, "tensors": tensors, **told, "hidden": saved})
        self._n_layers, self._n_experts = len(self._record.layers), len(self._record.experts)
        self._times.saved()

    def _recover(self) -> int:
        entries = self._journal.entries
        if self._journal.damaged_bytes:
            self._warn(f"the last {self._journal.damaged_bytes} bytes of the journal are not valid")
        intact = next(
            (i for i, entry in enumerate(entries) if not self._writer.holds(entry["tensors"])),
            len(entries),
        )
        if intact < len(entries):
            self._warn(f"block {_blocks(entries[:intact])} is not as it was written")
        kept = intact
        while 0 < _blocks(entries[:kept]) < self._n_steps and not self._has_hidden(kept - 1):
            kept -= 1
        if kept < intact:
            self._warn(
                f"the hidden states after block {entries[intact - 1]['block']} are not as they were written"
            )
        done, first = entries[:kept], _blocks(entries[:kept])
        for entry in done:
            self._writer.mark_written(entry["tensors"])
        self._journal.cut(kept)
        if first:
            layers = tuple(LayerReport(**layer) for entry in done for layer in entry["layers"])
            experts = tuple(
                ExpertsCovered(**covered) for entry in done for covered in entry["experts"]
            )
            self._record(Resumed(first, self._n_steps, self._work.path, layers, experts))
        return first

    def _has_hidden(self, save: int) -> bool:
        path = self._work.hidden(save)
        return is_file(path) and file_hash(path) == self._journal.entries[save]["hidden"]

    def _warn(self, what: str) -> None:
        self._record(
            Warned(
                "W_RESUME_DAMAGED",
                f"{what} in `{self._work.path}`: what depends on it is done again",
            )
        )


def check_resumable(
    work: WorkDirectory, identity: Identity, policy: str, report: Report, *, model: Path
) -> None:
    """See that what is finished in `work`, if anything, belongs to the run `identity` of the directory `model`.

    `policy` "never" drops it; with "require" it must be there: ExistsError E_RESUME_NOTHING. E_RESUME_MISMATCH lists
    the fields in which the runs differ. What was finished by a failed run is dropped for one that differs, unless
    `policy` is "require".
    """
    if policy == "never":
        work.drop()
    run = read_run(work.path)
    if run is None and work.journal.exists():
        report(
            Warned(
                "W_RESUME_DAMAGED",
                f"`{work.path}/run.json` cannot be read: everything is done again",
            )
        )
        work.drop()
    journal = Journal(work.journal, digest(run["identity"]) if run else "")
    if policy == "require" and not journal.entries:
        raise ExistsError(
            "E_RESUME_NOTHING",
            f"there is no finished block to go on from in `{work.path}`",
            hint="leave out --resume",
        )
    different = differences(run["identity"], identity) if run and journal.entries else []
    if not (run and different):
        return
    if policy == "auto" and drop_failed(work, report):
        return
    finished = f"{_blocks(journal.entries)} finished blocks of a run that differs"
    drop = "drop it: --resume never"
    goes_on = not any(_is_of_this_place(line, run["request"], model) for line in different)
    raise ExistsError(
        "E_RESUME_MISMATCH",
        f"`{work.path}` holds {finished}: {'; '.join(different)}",
        hint=f"go on with that one: {resume_command(work.path)}, or {drop}" if goes_on else drop,
    )


def _is_of_this_place(difference: str, request: dict[str, Any], model: Path) -> bool:
    """Whether two runs differ in what a command cannot choose: versions, the device, a model that has changed."""
    if difference.startswith("source."):
        return request.get("model") == str(model.resolve())
    return difference.startswith(("versions.", "device."))


@contextmanager
def marking_failures(work: WorkDirectory) -> Iterator[None]:
    """Note it in `work` if the body ends for a reason that holds the next time as well: the model, or its numbers."""
    try:
        yield
    except (InputError, GateError) as error:
        with suppress(GptqError, OSError):  # what ended the run is what to tell
            if error.code != UNREADABLE:  # which can be put right
                mark_failed(work.path, error.code)
        raise


def finished_output(
    output: Path, model: Path, identity: Identity, *, overwrite: bool
) -> dict[str, Any] | None:
    """The manifest of `output` if it is a finished checkpoint of `identity`, whole; None if it may be written.

    ExistsError E_OUT_EXISTS if it holds something else and may not be overwritten; else as `check_replaceable` says.
    """
    manifest = read_manifest(output)
    if manifest is None:
        return None
    hint = overwrite_hint(output)
    different = differences(manifest.get("identity", {}), identity)
    if not different:
        defects = check_manifest(output, full=True)[1]
        if not defects:
            return manifest
        different = [_difference(defect) for defect in defects]
        if all(defect.effect == "readers" for defect in defects):
            hint = "move what is not of the checkpoint out of it, or choose another -o"
    if different and not overwrite:
        message = f"`{output}` is not what this run writes: {'; '.join(different)}"
        raise ExistsError("E_OUT_EXISTS", message, hint=hint)
    if different:
        check_replaceable(output, model)
    return None


def _difference(defect: Defect) -> str:
    """What was changed, or added, in a finished checkpoint."""
    added = defect.effect == "readers"
    return f"{defect.place} {defect.message}" if added else f"{defect.place} is damaged"


@contextmanager
def telling_what_is_kept(work: WorkDirectory, report: Report) -> Iterator[None]:
    """Report WorkKept when the body ends early and has finished a block."""
    try:
        yield
    except BaseException:
        if work.journal.exists():
            run = read_run(work.path)
            report(WorkKept(work.path, failed=run is not None and "failed" in run))
        raise


class _HashedFile(io.RawIOBase):
    """Writes to `file` from its start on and hashes what it writes."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._end, self.digest = file, 0, sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write_at(self._end, data)
        self.digest.update(data)
        self._end += len(data)
        return len(data)


def _blocks(entries: Sequence[Entry]) -> int:
    """How many blocks are finished after these lines of the journal."""
    return int(entries[-1]["block"]) + 1 if entries else 0


def _batches(stream: ModelStream, hidden: Sequence[HiddenStates]) -> list[Batch]:
    states = zip(*(way.stored for way in hidden), strict=True)
    carried = ([_copied(container) for container in containers] for containers in stream.carried)
    return list(zip(states, carried, strict=True))


def _copied(container: Container) -> dict[Any, Any] | list[Any]:
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def _fill(containers: Sequence[Container], carried: Sequence[Any], device: torch.device) -> None:
    for container, saved in zip(containers, carried, strict=True):
        saved = tree_map_only(Tensor, lambda tensor: tensor.to(device), saved)
        container.update(saved) if isinstance(container, MutableMapping) else container.extend(
            saved
        )


def _save(path: Path, batches: list[Batch]) -> str:
    """Write what is kept of all batches; the hash of the file."""
    with OpenFile(path, 0) as file:
        raw = _HashedFile(file)
        with io.BufferedWriter(raw, COPY_BYTES) as buffered:
            torch.save(tree_map_only(Tensor, _alone, batches), buffered)
        file.sync()
    sync_directory(path.parent)
    return raw.digest.hexdigest()


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` in memory of its own: a view would be saved with all that it is a view of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


class SavingTimes:
    """Tells whether work has gone on for long enough since something was saved last, or since the start.

    With `always` it has after every block.
    """

    def __init__(self, *, always: bool = False, now: Callable[[], float] = time.monotonic) -> None:
        self.always, self._now, self._last = always, now, now()

    def is_due(self, nbytes: int) -> bool:
        """Whether to save so many bytes now."""
        return self.always or self._now() - self._last >= nbytes / BYTES_PER_SECOND / MOST_SHARE

    def saved(self) -> None:
        """From now on it is counted."""
        self._last = self._now()
