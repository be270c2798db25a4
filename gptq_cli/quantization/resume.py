"""The identity of a run, and resuming what a run of the same identity has saved.

The identity is everything that the bytes of the output depend on, as plain JSON. A block is
finished if the journal lists it. Its tensors lie in the shards, at their places in the output. The
journal holds the hashes of these tensors and of the hidden states after the block, and the reports
of its layers. The run saves its work after every block, unless saving would take more than a
twentieth of the time: then a line of the journal stands for several blocks. If a tensor or hidden
states do not match their hash, the run repeats their block and every block after it.
"""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import WeightScan, header_identity, scan_weights
from gptq_cli.checkpoint.model_files import MODELOPT_CONFIG, index_file
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import check_manifest, refuse_damaged
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import (
    ExistsError,
    GateError,
    GptqError,
    InputError,
    __version__,
    counted,
    cut,
    size,
)
from gptq_cli.events import (
    ExpertsCovered,
    LayerReport,
    PhaseStarted,
    Report,
    Resumed,
    Warned,
    WorkKept,
    ignore,
)
from gptq_cli.files import UNREADABLE, ByteCount, file_errors, is_file
from gptq_cli.hub_errors import OF_THE_HUB
from gptq_cli.quantization.run_state import BatchState, Record, SavingTimes
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.storage.durable import COPY_BYTES, OpenFile, sync_directory
from gptq_cli.storage.manifest import Entry, Journal, digest, file_hash, file_hashes, read_manifest
from gptq_cli.storage.replacing import check_replaceable, overwrite_hint
from gptq_cli.storage.work_directory import (
    WorkDirectory,
    drop_failed,
    mark_failed,
    read_run,
    resume_command,
)

# A release that writes other bytes, or saves its work in another form, counts this up.
REVISION = 9
SHOWN, LONGEST = 4, 100  # differences in a message, and letters of each

Identity = dict[str, Any]


def identify(
    source: Checkpoint,
    commit: str | None,
    config: QuantizeConfig,
    device: torch.device,
    calibration_sha256: str,
    *,
    hashed: bool = True,
    scan: WeightScan | None = None,
    report: Report = ignore,
) -> Identity:
    """Return the identity of a run; the paths of model and output are not part of it.

    The weights of a commit of the Hub are known by its hash; those of a directory are read and
    hashed, which `scan` may have begun. If not `hashed`, another process on this machine does this,
    and the identity has no "source". `report` gets the bytes read. Raises InputError
    E_CKPT_NONFINITE for weights of the model or of an adapter that are not finite,
    E_SOURCE_CHANGED for files that have changed.
    """
    known: dict[str, Any] = {
        "versions": {
            "gptq_cli": __version__,
            "revision": REVISION,
            "torch": str(torch.__version__),  # which is a class of its own
            "transformers": transformers.__version__,
        },
        "device": _device(device),
        "config": _settings(config),
        "calibration_sha256": calibration_sha256,
    }
    if source.adapters:
        known["adapters"] = [adapter.identity() for adapter in source.adapters]
    if not hashed:
        return known
    files = _files(source, commit, scan, report)
    for adapter in source.adapters:
        scan_weights(adapter.tensors.values(), hashed=False)
    source.check_unchanged()
    return known | {"source": {"commit": commit, "files": files}}


def check_agreement(team: Ranks, identity: Identity) -> None:
    """Raise InputError E_RANK_MISMATCH if a process would not do the same as the first one."""
    first, *others = team.all_gather([identity])
    for rank, other in enumerate(others, 1):
        different = differences({key: first[key] for key in other}, other)
        if different:
            raise InputError(
                "E_RANK_MISMATCH",
                f"process {rank} differs from process 0: {'; '.join(different)}",
                hint="run on equal devices and versions, with equal copies of the model",
            )


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the fields in which `wanted` differs from `known`, one line for each.

    Settings come first, because a user can change them; hashes, device and versions follow.
    """
    old, new = dict(_flat(known)), dict(_flat(wanted))
    names = sorted(old.keys() | new.keys())
    names.sort(key=lambda name: not name.startswith("config."))
    lines = []
    for name in names:
        if old.get(name) != new.get(name):
            lines.append(f"{name} was {_word(old, name)}, is {_word(new, name)}")
    return lines


def in_words(different: Sequence[str]) -> str:
    """Return `differences` for a user: with options and in words, each once, and not too many.

    >>> in_words(["config.bits was 4, is 3", 'source.files.a.json was "5ea1", is "c0de"'])
    '--bits was 4, is 3; `a.json` of the model is not the same'
    """
    found = list(dict.fromkeys(map(_in_words, different)))
    if len(found) > SHOWN:
        found[SHOWN:] = [f"{len(found) - SHOWN} more"]
    return "; ".join(found)


def _in_words(line: str) -> str:
    """Return a line of `differences` in words; values that are hashes say nothing to a user."""
    name, _, values = line.partition(" was ")
    field = name.removeprefix("config.")
    if name == "calibration_sha256" or (field == "dataset" and "sha256" in values):
        return "the calibration text is another one"
    if field == "chat_template":
        return "the chat template is another one"
    if name.startswith("source.files."):
        return f"`{name.removeprefix('source.files.')}` of the model is not the same"
    if field == name:
        return cut(line, LONGEST)
    if field.startswith("dynamic"):
        return "the rules of --dynamic differ"
    return cut(f"--{field.replace('_', '-')} was {values}", LONGEST)


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, cuda = torch.cuda.get_device_name(device), torch.version.cuda
        precision = torch.get_float32_matmul_precision()
        return {
            "type": "cuda",
            "name": name,
            "capability": f"{major}.{minor}",
            "cuda": cuda,
            "matmul": precision,
        }
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    # Sums over rows are split among threads, so their number changes the last bits.
    return {"type": device.type, "name": kind, "threads": torch.get_num_threads()}


def _settings(config: QuantizeConfig) -> dict[str, Any]:
    """Return the settings that change the bytes of a finished layer."""
    without_effect = {"max_ram", "max_vram", "target", "on_numeric_fault", "max_fallbacks"}
    without_effect |= {"device", "lora"}  # which are fields of the identity itself
    return config.model_dump(mode="json", exclude=without_effect)


def _files(
    source: Checkpoint, commit: str | None, scan: WeightScan | None, report: Report
) -> dict[str, Any]:
    """Return the hash of each file that is read; of a commit's shards, the hash of the header.

    Every weight is read here, unless it is downloaded later. Raises InputError E_CKPT_NONFINITE if
    one is not finite, GateError E_CKPT_HASH if a file differs from the manifest of the source.
    """
    beside = [source.directory / "config.json", source.directory / MODELOPT_CONFIG]
    beside.append(index_file(source.directory))
    beside += [source.directory / file for file in source.other_files()]
    hashed = [path for path in beside if is_file(path)]
    hashes = dict(zip(hashed, file_hashes(hashed), strict=True))
    if source.download is None:
        hashes |= _weights(source, commit, scan, ByteCount(report, source.nbytes))
    known = {}
    for path, found in hashes.items():
        known[path.relative_to(source.directory).as_posix()] = found
    if source.download is not None:
        return known | source.download.identities
    refuse_damaged(source.directory, known)
    if commit:
        return known | _headers(source)
    return known


def _weights(
    source: Checkpoint, commit: str | None, scan: WeightScan | None, count: ByteCount
) -> dict[Path, str]:
    if scan is not None:
        return scan.result(count)
    return scan_weights(source.tensors.values(), hashed=commit is None, count=count)


def _headers(source: Checkpoint) -> dict[str, str]:
    """Return what each file of weights is known by."""
    header_bytes: dict[Path, int] = {}
    for tensor in source.tensors.values():
        header_bytes[tensor.file] = min(tensor.start, header_bytes.get(tensor.file, tensor.start))
    return {path.name: _header(path, n_bytes) for path, n_bytes in header_bytes.items()}


def _header(path: Path, n_bytes: int) -> str:
    with file_errors(path, writing=False), path.open("rb") as stream:
        return header_identity(path.stat().st_size, stream.read(n_bytes))


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _word(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "missing"
    return json.dumps(values[name], ensure_ascii=False)


class BlockStore:
    """The finished blocks on the disk, in the work directory of a run; opening checks them."""

    def __init__(
        self,
        work: WorkDirectory,
        identity: Identity,
        writer: CheckpointWriter,
        record: Record,
        n_steps: int,
        times: SavingTimes,
    ) -> None:
        self.times = times
        self._work, self._writer, self._record, self._n_steps = work, writer, record, n_steps
        self._journal = Journal(work.journal, digest(identity))
        self.n_finished = self._recover()
        self._n_layers, self._n_experts = len(record.layers), len(record.experts)

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()

    def read(self) -> list[BatchState]:
        """Return the state of every batch after the last finished block, on the host."""
        last = self._work.hidden(len(self._journal.entries) - 1)
        found: list[BatchState] = torch.load(last, map_location="cpu", weights_only=True)
        return found

    def read_back(self) -> None:
        """Begin to read back what was written of finished blocks, while the caller continues."""
        self._writer.read_back_beside()

    def save(self, block: int, batches: list[BatchState] | None) -> None:
        """Make the blocks up to `block` durable: tensors, states of `batches`, then the journal.

        `batches` is None after the last block.
        """
        tensors = self._writer.sync()
        layers = [asdict(layer) for layer in self._record.layers[self._n_layers :]]
        experts = [asdict(covered) for covered in self._record.experts[self._n_experts :]]
        saved = None
        if batches is not None:
            saved = save_tensors(self._work.hidden(len(self._journal.entries)), batches)
        entry = {"block": block, "tensors": tensors, "layers": layers, "experts": experts}
        self._journal.append({**entry, "hidden": saved})
        self._n_layers, self._n_experts = len(self._record.layers), len(self._record.experts)
        self.times.saved()

    def _recover(self) -> int:
        """Keep the entries of the journal that can be resumed from; return how many blocks."""
        entries = self._journal.entries
        if self._journal.damaged_bytes:
            self._warn(f"the last {self._journal.damaged_bytes} bytes of the journal are not valid")
        intact = self._n_intact(entries)
        if intact < len(entries):
            self._warn(f"block {_n_blocks(entries[:intact]) + 1} is not as it was written")
        kept = intact
        # After the last step no hidden states are needed.
        while 0 < _n_blocks(entries[:kept]) < self._n_steps and not self._has_hidden(kept - 1):
            kept -= 1
        if kept < intact:
            saved = _n_blocks(entries[:intact])
            self._warn(f"the hidden states after block {saved} are not as they were written")
        for entry in entries[:kept]:
            self._writer.mark_written(entry["tensors"])
        self._journal.cut(kept)
        first = _n_blocks(entries[:kept])
        if first:
            layers, experts = _reports(entries[:kept])
            self._record(Resumed(first, self._n_steps, self._work.path, layers, experts))
        return first

    def _n_intact(self, entries: Sequence[Entry]) -> int:
        """Return how many entries, from the first on, have their tensors in the shards."""
        if not entries:
            return 0
        total = sum(self._writer.nbytes(entry["tensors"]) for entry in entries)
        self._record(PhaseStarted("resume", f"reading {size(total)} of finished blocks"))
        count = ByteCount(self._record, total)
        for number, entry in enumerate(entries):
            if not self._writer.holds(entry["tensors"], count):
                return number
        return len(entries)

    def _has_hidden(self, save: int) -> bool:
        path = self._work.hidden(save)
        return is_file(path) and file_hash(path) == self._journal.entries[save]["hidden"]

    def _warn(self, what: str) -> None:
        """Warn of damage; like the progress, it counts blocks from 1."""
        text = f"{what} in `{self._work.path}`: the run repeats what depends on it"
        self._record(Warned("W_RESUME_DAMAGED", text))


def check_resumable(
    work: WorkDirectory,
    identity: Identity,
    policy: str,
    report: Report,
    *,
    model: Path,
    request: Mapping[str, Any],
) -> None:
    """Check that the finished blocks in `work`, if any, are of the run `identity` of `model`.

    `request` is the call of this run, in which a dataset has its name, not its content.
    `policy` "never" removes the blocks. Raises ExistsError E_RESUME_NOTHING if `policy` is
    "require" and there is no block, E_RESUME_MISMATCH with the fields in which the runs differ. If
    the other run failed and `policy` is "auto", its blocks are removed instead.
    """
    if policy == "never":
        work.drop()
    run = _read_run(work, report)
    n_blocks = 0
    if run is not None:
        n_blocks = _n_blocks(Journal(work.journal, digest(run["identity"])).entries)
    if run is None or not n_blocks:
        if policy == "require":
            text = f"there is no finished block to resume from in `{work.path}`"
            raise ExistsError("E_RESUME_NOTHING", text, hint="leave out --resume")
        return
    different = differences(run["identity"], identity)
    if not different:
        return
    if policy == "auto" and drop_failed(work, report):
        return
    hint = _way_out(different, run["request"], request, work, model)
    finished = f"{counted(n_blocks, 'finished block')} of a run with other settings"
    raise ExistsError(
        "E_RESUME_MISMATCH", f"`{work.path}` holds {finished}: {in_words(different)}", hint=hint
    )


def _read_run(work: WorkDirectory, report: Report) -> dict[str, Any] | None:
    """Return the run file of `work`; if it is damaged, remove the blocks that it describes."""
    run = read_run(work.path)
    if run is None and work.journal.exists():
        text = f"`{work.path}/run.json` cannot be read: the run starts over"
        report(Warned("W_RESUME_DAMAGED", text))
        work.drop()
    return run


def _way_out(
    different: Sequence[str],
    known: dict[str, Any],
    request: Mapping[str, Any],
    work: WorkDirectory,
    model: Path,
) -> str:
    """Return the hint for a run that differs from the one in `work`, whose call was `known`."""
    discard = "discard it: --resume never"
    if _is_other_text(different, known, request):
        return f"restore the text as it was, with its images, or {discard}"
    if _no_command_helps(different, known, model):
        return discard
    return f"resume that run: {resume_command(work.path)}, or {discard}"


def _is_other_text(
    different: Sequence[str], known: Mapping[str, Any], request: Mapping[str, Any]
) -> bool:
    """Return whether equal calls differ in what datasets and template hold."""
    of_text = ("calibration_sha256", "config.dataset", "config.chat_template")
    if not all(line.startswith(of_text) for line in different):
        return False
    return all(known.get(name) == request[name] for name in ("config", "directory"))


def _no_command_helps(different: Sequence[str], request: dict[str, Any], model: Path) -> bool:
    """Return whether runs differ in what no command can choose: versions, device, changed model."""
    for line in different:
        if line.startswith(("versions.", "device.")):
            return True
        if line.startswith("source.") and request.get("model") == str(model.resolve()):
            return True
    return False


@contextmanager
def marking_failures(work: WorkDirectory) -> Iterator[None]:
    """Note in `work` that the run failed, if the body fails for a reason that will not go away.

    Such reasons are a fault of the model or its numbers, but not a file that cannot be read, or a
    Hub that cannot be reached.
    """
    try:
        yield
    except (InputError, GateError) as error:
        if error.code not in (UNREADABLE, *OF_THE_HUB):
            with suppress(GptqError, OSError):  # the user hears of `error`, not of the note
                mark_failed(work.path, error.code)
        raise


def finished_output(
    output: Path, model: Path, identity: Identity, report: Report = ignore, *, overwrite: bool
) -> dict[str, Any] | None:
    """Return the manifest of `output` if it is a finished, undamaged checkpoint of `identity`.

    Return None if the run may write `output`. Raises ExistsError E_OUT_EXISTS if `output` holds
    something else and may not be overwritten, and the errors of `check_replaceable`.
    """
    manifest = read_manifest(output)
    if manifest is None:
        return None
    hint = overwrite_hint(output)
    different = differences(manifest.get("identity", {}), identity)
    why = in_words(different)
    if not different:
        defects = check_manifest(output, full=True, report=report)[1]
        if not defects:
            return manifest
        why = "; ".join(map(_difference, defects))
        if all(defect.effect == "readers" for defect in defects):
            hint = "move the files that are not of the checkpoint away, or choose another -o"
    if not overwrite:
        message = f"`{output}` is not what this run writes: {why}"
        raise ExistsError("E_OUT_EXISTS", message, hint=hint)
    check_replaceable(output, model)
    return None


def _difference(defect: Defect) -> str:
    """Describe a file that was changed in, or added to, a finished checkpoint."""
    if defect.effect == "readers":
        return f"{defect.place} {defect.message}"
    return f"{defect.place} is damaged"


@contextmanager
def reporting_kept_work(work: WorkDirectory, report: Report) -> Iterator[None]:
    """Report WorkKept if the body ends early and a later run can use something."""
    try:
        yield
    except BaseException:
        if work.holds_work():
            run = read_run(work.path)
            failed = run is not None and "failed" in run
            report(WorkKept(work.path, failed=failed, blocks=work.journal.exists()))
        raise


class _HashedFile(io.RawIOBase):
    """Writes to `file` from its start and hashes what it writes."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._end, self.digest = file, 0, sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write_at(self._end, data)
        self.digest.update(data)
        self._end += len(data)
        return len(data)


def _reports(
    entries: Sequence[Entry],
) -> tuple[tuple[LayerReport, ...], tuple[ExpertsCovered, ...]]:
    layers: list[LayerReport] = []
    experts: list[ExpertsCovered] = []
    for entry in entries:
        layers += [LayerReport(**layer) for layer in entry["layers"]]
        experts += [ExpertsCovered(**covered) for covered in entry["experts"]]
    return tuple(layers), tuple(experts)


def _n_blocks(entries: Sequence[Entry]) -> int:
    """Return how many blocks are finished after these entries of the journal."""
    if not entries:
        return 0
    return int(entries[-1]["block"]) + 1


def save_tensors(path: Path, batches: Any) -> str:
    """Write tensors in lists, tuples and dicts durably; return the hash of the file."""
    with OpenFile(path, 0) as file:
        raw = _HashedFile(file)
        with io.BufferedWriter(raw, COPY_BYTES) as buffered:
            torch.save(tree_map_only(Tensor, _without_base, batches), buffered)
        file.sync()
    sync_directory(path.parent)
    return raw.digest.hexdigest()


def _without_base(tensor: Tensor) -> Tensor:
    """Return `tensor` in memory of its own: torch.save would write all that a view is a view of."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()
