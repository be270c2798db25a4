"""What `gptq convert` and `gptq dequantize` share: one checkpoint is read, another is published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.decoded import packed_linears
from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.layout import PackedModule, TensorSpec, plan_layout
from gptq_cli.checkpoint.locate import locate_model, model_directory
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import refuse_wrong_numbers
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ExistsError, GptqError, InputError, __version__, to_json
from gptq_cli.events import Report
from gptq_cli.files import ByteCount, expanded
from gptq_cli.storage.manifest import write_manifest
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, drop_failed, resume_command, working_on


@dataclass(frozen=True, slots=True)
class Rewritten:
    """The result: the output, the number of packed linears, bytes of tensors before and after.

    `corrected` are the defects of the source that some engines would not have accepted.
    """

    output: Path
    layers: int
    bytes_before: int
    bytes_after: int
    corrected: tuple[Defect, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values, without the corrected defects."""
        values = to_json(self)
        del values["corrected"]
        return values


Opened = tuple[Checkpoint, tuple[PackedModule, ...], tuple[Defect, ...]]


def open_source(model: str, output: Path, report: Report, *, overwrite: bool) -> Opened:
    """Open a checkpoint whose weights can be decoded, and check the output.

    Return the checkpoint, its packed linears, and the defects that do not prevent decoding.
    """
    try:
        check_output(output, model_directory(model) or expanded(model), overwrite=overwrite)
    except ExistsError:
        _remove_leftover(output, report)
        raise
    source = open_checkpoint(locate_model(model).directory)
    check_output(output, source.directory, overwrite=overwrite)
    defects = refuse_wrong_numbers(source)
    if source.quantization is None:
        hint = "give a checkpoint that gptq or another GPTQ tool has written"
        raise InputError("E_CKPT_QUANTIZED", f"`{model}` is not quantized", hint=hint)
    return source, packed_linears(source), defects


def _remove_leftover(output: Path, report: Report) -> None:
    """Remove the work directory of an earlier call that was killed after it renamed its output."""
    if WorkDirectory(output).path.exists():
        with suppress(GptqError), fresh(output, report):
            pass


def publish(
    work: WorkDirectory,
    source: Checkpoint,
    kept: Mapping[str, Any],
    report: Report,
    *,
    overwrite: bool,
    **identity: str,
) -> None:
    """Check the written checkpoint, write its manifest, and rename it to the output.

    `kept` are entries of the manifest about the origin of the checkpoint.
    """
    open_checkpoint(work.stage)
    versions = {"gptq_cli": __version__}
    identified = {"versions": versions, **identity}
    write_manifest(work.stage, {"identity": identified, **kept}, report)
    source.check_unchanged()
    work.publish(source.directory, overwrite=overwrite)


@contextmanager
def fresh(output: Path, report: Report) -> Iterator[WorkDirectory]:
    """Hold the work directory of `output`.

    Raises ExistsError E_RESUME_MISMATCH if it holds finished blocks of a quantization.
    """
    with working_on(output, report) as work:
        if work.journal.exists() and not drop_failed(work, report):
            raise ExistsError(
                "E_RESUME_MISMATCH",
                f"`{work.path}` holds finished blocks of a quantization to the same output",
                hint=f"finish it: {resume_command(work.path)}, or choose another -o",
            )
        yield work


def write_tensors(
    directory: Path,
    units: list[tuple[TensorSpec, ...]],
    write: Callable[[CheckpointWriter, ByteCount], None],
    report: Report,
) -> int:
    """Write the tensors of a checkpoint; return their size in bytes, without headers.

    `write` tells the bytes that it writes to the count.
    """
    max_shard_size = QuantizeConfig.model_fields["max_shard_size"].default
    layout = plan_layout(units, size_in_bytes(max_shard_size))
    total = sum(spec.nbytes for spec in layout.specs.values())
    with CheckpointWriter(directory, layout) as writer:
        write(writer, ByteCount(report, total))
        writer.finish(report)
    return total
