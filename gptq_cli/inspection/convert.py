"""A quantized checkpoint in another form: the other GPTQ format, or plain floats again; one linear at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.codec import pack, unpack
from gptq_cli.checkpoint.decoded import declared_dtype, is_stored_transposed
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import TensorSpec, plan_layout
from gptq_cli.checkpoint.locate import locate_model, model_directory
from gptq_cli.checkpoint.packed import PARTS, PackedModule, packed_modules
from gptq_cli.checkpoint.quantization_config import (
    STORED_OFFSET,
    Defect,
    as_all_take_it,
    format_of,
    with_quantization,
    without_quantization,
)
from gptq_cli.checkpoint.reader import (
    SAFETENSORS_DTYPE,
    DequantizingReader,
    TensorReader,
    columns_in_order,
)
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint, read_json
from gptq_cli.checkpoint.verify import check_written, refuse_wrong_numbers
from gptq_cli.checkpoint.writer import CheckpointWriter, copy_side_files
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.resolve import resolve, to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ExistsError, GptqError, InputError, __version__
from gptq_cli.events import LayerStarted, PhaseStarted, Report, ignore
from gptq_cli.files import expanded, is_file
from gptq_cli.planning.run_plan import HEAD
from gptq_cli.runtime.open_model import DTYPES, STORED_DTYPES, warn_of
from gptq_cli.storage.durable import write_file, write_json
from gptq_cli.storage.manifest import (
    CONFIG_FILE,
    MANIFEST,
    QUANTIZE_CONFIG,
    RUN_FILES,
    write_manifest,
)
from gptq_cli.storage.replacing import check_output
from gptq_cli.storage.work_directory import WorkDirectory, drop_failed, resume_command, working_on

FLOATS = set(STORED_DTYPES)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What was written: number of packed linears, bytes of tensors before and after.

    `corrected` tells what not every reader would have taken of the source.
    """

    output: Path
    layers: int
    bytes_before: int
    bytes_after: int
    corrected: tuple[Defect, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values, without what was corrected."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "corrected"}
        return told | {"output": str(self.output)}


def convert_checkpoint(
    model: str, output: Path, to: str, *, overwrite: bool = False, report: Report = ignore
) -> Rewritten:
    """The GPTQ checkpoint MODEL in format `to`, as all readers take it: all other bytes are copied.

    Zero points and settings change, and what only some readers take as it is. ConfigError E_CFG_NOTHING_TO_DO if it is
    so already; InputError E_CKPT_QUANTIZED if it is no GPTQ checkpoint, E_CKPT_ZEROS if a zero point of 0 would have to
    be stored as -1, which readers disagree about, the code of a defect that this does not correct.
    """
    source, modules, defects = _open(model, output, report, overwrite=overwrite)
    _refuse_lasting(source, defects)
    warn_of(source, report)
    said = source.quantization or {}
    format = format_of(source)
    if format == to and not defects:
        raise ConfigError(
            "E_CFG_NOTHING_TO_DO", f"`{model}` is of format {to} already", hint="use it as it is"
        )
    of_module = {module.name: module for module in modules}
    without_g_idx = {name for name in of_module if f"{name}.g_idx" not in source.tensors}
    reader = TensorReader(source)

    def write(writer: CheckpointWriter) -> None:
        for name, tensor in source.tensors.items():
            module = of_module.get(name.removesuffix(".qzeros"))
            if module is None:
                writer.copy(tensor)
                continue
            report(LayerStarted(module.name))
            writer.write(name, _moved_zeros(reader.read(name), module, format, to))
            if module.name in without_g_idx:
                writer.write(f"{module.name}.g_idx", columns_in_order(module))

    settings = as_all_take_it(said, to, lm_head=HEAD in of_module)
    units = _units(
        source, of_module, lambda tensor: TensorSpec(tensor.name, tensor.dtype, tensor.shape)
    )
    units = [_with_g_idx(unit, of_module, without_g_idx) for unit in units]
    with _fresh(output, report) as work:
        report(PhaseStarted("convert", f"{len(modules)} layers from {format} to {to}"))
        written = _write_tensors(work.stage, units, write)
        copy_side_files(source, work.stage, without={CONFIG_FILE, MANIFEST})
        write_json(work.stage / "config.json", with_quantization(source.config, settings))
        write_json(work.stage / QUANTIZE_CONFIG, settings | _meta(source))
        if is_file(source.directory / CONFIG_FILE):
            config = resolve({}, {}, source.directory / CONFIG_FILE).config.model_copy(
                update={"format": to, "target": None}
            )
            write_file(work.stage / CONFIG_FILE, to_yaml(config).encode())
        check_written(work.stage)
        _publish(work, source, overwrite=overwrite, command="convert", format=to)
    return Rewritten(output, len(modules), source.nbytes, written, defects)


def dequantize_checkpoint(
    model: str,
    output: Path,
    dtype: str = "auto",
    *,
    overwrite: bool = False,
    report: Report = ignore,
) -> Rewritten:
    """The GPTQ checkpoint MODEL as plain weights, which any reader of its architecture loads without a quantizer.

    With `dtype` auto, weights get the dtype that config.json names, or else that of the tensors beside them, and those
    are copied byte for byte; any other is given to all floats. Raises InputError E_CKPT_QUANTIZED if it is no GPTQ
    checkpoint, E_CKPT_NONFINITE if a weight does not fit the dtype.
    """
    source, modules, _ = _open(model, output, report, overwrite=overwrite)
    warn_of(source, report)
    wanted = STORED_DTYPES[declared_dtype(source)] if dtype == "auto" else DTYPES[dtype]
    plain = _PlainWeights(
        source, {module.name: module for module in modules}, wanted, cast=dtype != "auto"
    )
    with _fresh(output, report) as work:
        report(
            PhaseStarted(
                "dequantize", f"{len(modules)} layers to {str(wanted).removeprefix('torch.')}"
            )
        )
        written = _write_tensors(
            work.stage, _units(source, {}, plain.spec), lambda writer: plain.write(writer, report)
        )
        copy_side_files(source, work.stage, without=RUN_FILES)
        config = without_quantization(source.config)
        if dtype != "auto":
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        write_json(work.stage / "config.json", config)
        _publish(work, source, overwrite=overwrite, command="dequantize", dtype=dtype)
    return Rewritten(output, len(modules), source.nbytes, written)


class _PlainWeights:
    """The tensors of a GPTQ checkpoint as floats; with `cast` those that are not quantized get `dtype` as well."""

    def __init__(
        self,
        source: Checkpoint,
        modules: dict[str, PackedModule],
        dtype: torch.dtype,
        *,
        cast: bool,
    ) -> None:
        self._source, self._modules, self._dtype, self._cast = source, modules, dtype, cast
        self._reader = DequantizingReader(source, CPU, "torch")

    def spec(self, tensor: TensorInfo) -> TensorSpec | None:
        """What becomes of a stored tensor; None for the parts of a linear beside its qweight."""
        name, _, part = tensor.name.rpartition(".")
        code = SAFETENSORS_DTYPE[self._dtype]
        if name in self._modules and part in PARTS:
            shape = (self._modules[name].out_features, self._modules[name].in_features)
            turned = is_stored_transposed(self._source.config, name)
            whole = TensorSpec(f"{name}.weight", code, shape[::-1] if turned else shape)
            return whole if part == "qweight" else None
        return TensorSpec(
            tensor.name,
            code if self._cast and tensor.dtype in FLOATS else tensor.dtype,
            tensor.shape,
        )

    def write(self, writer: CheckpointWriter, report: Report) -> None:
        """Every tensor, one after the other; bytes are copied where the dtype stays."""
        for name, tensor in self._source.tensors.items():
            planned = self.spec(tensor)
            if planned is None:
                continue
            if (planned.name, planned.dtype) == (name, tensor.dtype):
                writer.copy(tensor)
                continue
            report(LayerStarted(planned.name))
            weight = self._reader.read(planned.name).to(self._dtype)
            if not bool(weight.isfinite().all()):
                dtype = str(self._dtype).removeprefix("torch.")
                raise InputError(
                    "E_CKPT_NONFINITE", f"`{planned.name}` has values that are not finite as {dtype}",
                    hint="choose --dtype bfloat16 or float32; if that fails too, the checkpoint is damaged",
                )  # fmt: skip
            module = planned.name.removesuffix(".weight")
            turned = planned.name != name and is_stored_transposed(self._source.config, module)
            writer.write(planned.name, weight.T if turned else weight)


Opened = tuple[Checkpoint, tuple[PackedModule, ...], tuple[Defect, ...]]


def _open(model: str, output: Path, report: Report, *, overwrite: bool) -> Opened:
    """A checkpoint whose weights can be decoded, its packed linears, and the defects that it has all the same."""
    try:
        check_output(output, model_directory(model) or expanded(model), overwrite=overwrite)
    except ExistsError:
        _clear_up(output, report)
        raise
    source = open_checkpoint(locate_model(model).directory)
    check_output(output, source.directory, overwrite=overwrite)
    defects = refuse_wrong_numbers(source)
    if source.quantization is None:
        hint = "give a checkpoint that gptq or another GPTQ tool has written"
        raise InputError("E_CKPT_QUANTIZED", f"`{model}` is not quantized", hint=hint)
    format_of(source)  # refuses methods that are not read here
    return source, packed_modules(source.tensors), defects


def _refuse_lasting(source: Checkpoint, defects: Iterable[Defect]) -> None:
    """InputError with the code of the first defect that would be in the output, too."""
    for defect in defects:
        if defect.effect == "readers":
            everything = f"all of it: gptq verify {quote(str(source.directory))}"
            hint = f"{defect.hint}; {everything}" if defect.hint else everything
            raise InputError(
                defect.code, f"`{source.directory}`, {defect.place}: {defect.message}", hint=hint
            )


def _clear_up(output: Path, report: Report) -> None:
    """Remove a work directory that a call like this one has left, if it was killed when its output had its name."""
    if WorkDirectory(output).path.exists():
        with suppress(GptqError), _fresh(output, report):
            pass


def _publish(work: WorkDirectory, source: Checkpoint, *, overwrite: bool, **identity: str) -> None:
    """Give what is written its name, when it is a checkpoint; its manifest tells later runs whose it is."""
    open_checkpoint(work.stage)
    write_manifest(work.stage, {"identity": {"versions": {"gptq_cli": __version__}, **identity}})
    source.check_unchanged()
    work.publish(source.directory, overwrite=overwrite)


@contextmanager
def _fresh(output: Path, report: Report) -> Iterator[WorkDirectory]:
    """The work directory of `output`; ExistsError E_RESUME_MISMATCH if a quantization has left work there."""
    with working_on(output, report) as work:
        if work.journal.exists() and not drop_failed(work, report):
            raise ExistsError(
                "E_RESUME_MISMATCH", f"`{work.path}` holds finished blocks of a quantization to the same output",
                hint=f"finish it: {resume_command(work.path)}, or choose another -o",
            )  # fmt: skip
        yield work


def _moved_zeros(stored: Tensor, module: PackedModule, origin: str, to: str) -> Tensor:
    """Zero points [G, O * bits / 32] of one format as the other stores them."""
    zeros = (unpack(stored.T, module.bits).int() + STORED_OFFSET[origin]) & (2**module.bits - 1)
    if STORED_OFFSET[to] and not bool((zeros >= 1).all()):
        raise InputError(
            "E_CKPT_ZEROS", f"layer `{module.name}` has zero points of 0, which format {to} cannot store",
            hint="stay with gptq_v2: readers disagree about what such a zero point is in format gptq",
        )  # fmt: skip
    return pack(zeros - STORED_OFFSET[to], module.bits).T.contiguous()


def _with_g_idx(
    unit: tuple[TensorSpec, ...], of_module: dict[str, PackedModule], without: Collection[str]
) -> tuple[TensorSpec, ...]:
    """The tensors of one linear with the g_idx that the source has not."""
    module = unit[0].name.rpartition(".")[0]
    if module not in without or not unit[0].name.endswith(PARTS):
        return unit
    return (*unit, TensorSpec(f"{module}.g_idx", "I32", (of_module[module].in_features,)))


def _units(
    source: Checkpoint,
    together: dict[str, PackedModule],
    spec: Callable[[TensorInfo], TensorSpec | None],
) -> list[tuple[TensorSpec, ...]]:
    """What to write, in file order; the parts of a linear in `together` are one unit."""
    units: dict[str, tuple[TensorSpec, ...]] = {}
    for tensor in source.tensors.values():
        planned = spec(tensor)
        module = tensor.name.rpartition(".")[0]
        key = module if module in together and tensor.name.endswith(PARTS) else tensor.name
        if planned is not None:
            units[key] = (*units.get(key, ()), planned)
    return list(units.values())


def _write_tensors(
    directory: Path, units: list[tuple[TensorSpec, ...]], write: Callable[[CheckpointWriter], None]
) -> int:
    """Write the tensors of a checkpoint; how many bytes they are, without headers."""
    layout = plan_layout(
        units, size_in_bytes(QuantizeConfig.model_fields["max_shard_size"].default)
    )
    with CheckpointWriter(directory, layout) as writer:
        write(writer)
        writer.finish()
    return sum(spec.nbytes for spec in layout.specs.values())


def _meta(source: Checkpoint) -> dict[str, Any]:
    """What tools have written about themselves; readers of config.json do not take it there."""
    file = source.directory / QUANTIZE_CONFIG
    try:
        content = read_json(file) if is_file(file) else None
    except InputError:  # it was a defect, and a new one is written
        content = None
    for told in (content, source.quantization):
        if isinstance(told, dict) and isinstance(told.get("meta"), dict):
            return {"meta": told["meta"]}
    return {}
