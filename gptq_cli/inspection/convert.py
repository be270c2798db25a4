"""Rewrite a quantized checkpoint in the other GPTQ format or as floats, one linear at a time."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor

from gptq_cli.checkpoint.decoded import declared_dtype, is_stored_transposed
from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import PARTS, PackedModule, TensorSpec, packed_modules, plan_layout
from gptq_cli.checkpoint.locate import locate_model, model_directory
from gptq_cli.checkpoint.model_files import read_json
from gptq_cli.checkpoint.quantization_config import (
    STORED_OFFSET,
    format_of,
    portable_settings,
    with_quantization,
    without_quantization,
)
from gptq_cli.checkpoint.reader import (
    SAFETENSORS_DTYPE,
    DequantizingReader,
    TensorReader,
    columns_in_order,
    pack,
    unpack,
)
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import check_written, refuse_wrong_numbers
from gptq_cli.checkpoint.writer import CheckpointWriter, copy_side_files
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.resolve import resolve, to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ExistsError, GptqError, InputError, __version__
from gptq_cli.events import LayerStarted, PhaseStarted, Report, ignore
from gptq_cli.files import expanded, is_file
from gptq_cli.json_values import to_json
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


def convert_checkpoint(
    model: str, output: Path, to: str, *, overwrite: bool = False, report: Report = ignore
) -> Rewritten:
    """Write the GPTQ checkpoint MODEL in format `to`, as all engines accept it.

    Zero points and settings change, and details that only some engines accept; all other bytes are
    copied. Raises ConfigError E_CFG_NOTHING_TO_DO if nothing would change; InputError
    E_CKPT_QUANTIZED if it is no GPTQ checkpoint, E_CKPT_ZEROS if a zero point of 0 would have to be
    stored as -1, about which engines disagree, and the code of a defect that is not corrected here.
    """
    source, modules, defects = _open(model, output, report, overwrite=overwrite)
    _refuse_lasting(source, defects)
    warn_of(source, report)
    format = format_of(source)
    if format == to and not defects:
        message = f"`{model}` is of format {to} already"
        raise ConfigError("E_CFG_NOTHING_TO_DO", message, hint="use it unchanged")
    conversion = _Conversion(source, modules, format, to)
    with _fresh(output, report) as work:
        report(PhaseStarted("convert", f"{len(modules)} layers from {format} to {to}"))
        written = _write_tensors(
            work.stage, conversion.units(), lambda writer: conversion.write(writer, report)
        )
        copy_side_files(source, work.stage, without={CONFIG_FILE, MANIFEST})
        _write_settings(work.stage, source, modules, to)
        check_written(work.stage)
        _publish(work, source, overwrite=overwrite, command="convert", format=to)
    return Rewritten(output, len(modules), source.nbytes, written, defects)


class _Conversion:
    """The tensors of a GPTQ checkpoint in the other format, each linear with a g_idx."""

    def __init__(
        self, source: Checkpoint, modules: Iterable[PackedModule], format: str, to: str
    ) -> None:
        self._source, self._format, self._to = source, format, to
        self._modules = {module.name: module for module in modules}
        self._reader = TensorReader(source)

    def units(self) -> list[tuple[TensorSpec, ...]]:
        """Return the tensors to write; those of one linear are one unit."""
        units = _units(self._source, self._modules, _unchanged)
        return [self._with_g_idx(unit) for unit in units]

    def _with_g_idx(self, unit: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        name = unit[0].name.rpartition(".")[0]
        if not unit[0].name.endswith(PARTS) or not self._lacks_g_idx(name):
            return unit
        return (*unit, TensorSpec(f"{name}.g_idx", "I32", (self._modules[name].in_features,)))

    def _lacks_g_idx(self, name: str) -> bool:
        return name in self._modules and f"{name}.g_idx" not in self._source.tensors

    def write(self, writer: CheckpointWriter, report: Report) -> None:
        """Write all tensors in file order; only zero points change."""
        for name, tensor in self._source.tensors.items():
            module = self._modules.get(name.removesuffix(".qzeros"))
            if module is None:
                writer.copy(tensor)
                continue
            report(LayerStarted(module.name))
            zeros = _moved_zeros(self._reader.read(name), module, self._format, self._to)
            writer.write(name, zeros)
            if self._lacks_g_idx(module.name):
                writer.write(f"{module.name}.g_idx", columns_in_order(module))


def _unchanged(tensor: TensorInfo) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape)


def _write_settings(
    directory: Path, source: Checkpoint, modules: Iterable[PackedModule], to: str
) -> None:
    """Write the configuration of a converted checkpoint, with the settings of format `to`."""
    has_head = HEAD in {module.name for module in modules}
    settings = portable_settings(source.quantization or {}, to, lm_head=has_head)
    write_json(directory / "config.json", with_quantization(source.config, settings))
    write_json(directory / QUANTIZE_CONFIG, settings | _meta(source))
    if is_file(source.directory / CONFIG_FILE):
        config = resolve({}, {}, source.directory / CONFIG_FILE).config
        config = config.model_copy(update={"format": to, "target": None})
        write_file(directory / CONFIG_FILE, to_yaml(config).encode())


def dequantize_checkpoint(
    model: str,
    output: Path,
    dtype: str = "auto",
    *,
    overwrite: bool = False,
    report: Report = ignore,
) -> Rewritten:
    """Write the GPTQ checkpoint MODEL as plain weights, which load without a quantizer.

    With `dtype` auto, weights get the dtype in config.json, or else that of the tensors beside
    them, and the other tensors are copied byte for byte. Any other `dtype` is given to all floats.
    Raises InputError E_CKPT_QUANTIZED if it is no GPTQ checkpoint, E_CKPT_NONFINITE if a weight
    does not fit the dtype.
    """
    source, modules, _ = _open(model, output, report, overwrite=overwrite)
    warn_of(source, report)
    wanted = STORED_DTYPES[declared_dtype(source)] if dtype == "auto" else DTYPES[dtype]
    plain = _PlainWeights(source, modules, wanted, cast=dtype != "auto")
    with _fresh(output, report) as work:
        report(PhaseStarted("dequantize", f"{len(modules)} layers to {_name_of(wanted)}"))
        written = _write_tensors(
            work.stage, _units(source, {}, plain.spec), lambda writer: plain.write(writer, report)
        )
        copy_side_files(source, work.stage, without=RUN_FILES)
        config = without_quantization(source.config)
        if dtype != "auto" and "torch_dtype" in config:
            config["torch_dtype"] = dtype
        elif dtype != "auto":
            config["dtype"] = dtype
        write_json(work.stage / "config.json", config)
        _publish(work, source, overwrite=overwrite, command="dequantize", dtype=dtype)
    return Rewritten(output, len(modules), source.nbytes, written)


class _PlainWeights:
    """The tensors of a GPTQ checkpoint as floats.

    With `cast` the tensors that are not quantized get `dtype` as well.
    """

    def __init__(
        self,
        source: Checkpoint,
        modules: Iterable[PackedModule],
        dtype: torch.dtype,
        *,
        cast: bool,
    ) -> None:
        self._source, self._dtype, self._cast = source, dtype, cast
        self._modules = {module.name: module for module in modules}
        self._reader = DequantizingReader(source, CPU, "torch")

    def spec(self, tensor: TensorInfo) -> TensorSpec | None:
        """Return the tensor to write for a stored one.

        The weight of a packed linear takes the place of its qweight; the other parts give None.
        """
        name, _, part = tensor.name.rpartition(".")
        if name in self._modules and part in PARTS:
            if part != "qweight":
                return None
            return self._weight_spec(self._modules[name])
        dtype = tensor.dtype
        if self._cast and dtype in FLOATS:
            dtype = SAFETENSORS_DTYPE[self._dtype]
        return TensorSpec(tensor.name, dtype, tensor.shape)

    def _weight_spec(self, module: PackedModule) -> TensorSpec:
        shape = (module.out_features, module.in_features)
        if is_stored_transposed(self._source.config, module.name):
            shape = shape[::-1]
        return TensorSpec(f"{module.name}.weight", SAFETENSORS_DTYPE[self._dtype], shape)

    def write(self, writer: CheckpointWriter, report: Report) -> None:
        """Write all tensors in file order; tensors that keep their dtype are copied."""
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
                raise _not_finite(planned.name, self._dtype)
            was_packed = planned.name != name
            module = planned.name.removesuffix(".weight")
            if was_packed and is_stored_transposed(self._source.config, module):
                weight = weight.T
            writer.write(planned.name, weight)


def _not_finite(name: str, dtype: torch.dtype) -> InputError:
    message = f"`{name}` has values that are not finite as {_name_of(dtype)}"
    hint = "choose --dtype bfloat16 or float32; if that fails too, the checkpoint is damaged"
    return InputError("E_CKPT_NONFINITE", message, hint=hint)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Opened = tuple[Checkpoint, tuple[PackedModule, ...], tuple[Defect, ...]]


def _open(model: str, output: Path, report: Report, *, overwrite: bool) -> Opened:
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
    format_of(source)  # refuses methods that cannot be decoded here
    return source, packed_modules(source.tensors), defects


def _refuse_lasting(source: Checkpoint, defects: Iterable[Defect]) -> None:
    """Raise InputError with the code of the first defect that the output would have as well."""
    for defect in defects:
        if defect.effect == "readers":
            hint = f"see all defects: gptq verify {quote(str(source.directory))}"
            if defect.hint:
                hint = f"{defect.hint}; {hint}"
            message = f"`{source.directory}`, {defect.place}: {defect.message}"
            raise InputError(defect.code, message, hint=hint)


def _remove_leftover(output: Path, report: Report) -> None:
    """Remove the work directory of an earlier call that was killed after it renamed its output."""
    if WorkDirectory(output).path.exists():
        with suppress(GptqError), _fresh(output, report):
            pass


def _publish(work: WorkDirectory, source: Checkpoint, *, overwrite: bool, **identity: str) -> None:
    """Check the written checkpoint, write its manifest, and rename it to the output."""
    open_checkpoint(work.stage)
    write_manifest(work.stage, {"identity": {"versions": {"gptq_cli": __version__}, **identity}})
    source.check_unchanged()
    work.publish(source.directory, overwrite=overwrite)


@contextmanager
def _fresh(output: Path, report: Report) -> Iterator[WorkDirectory]:
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


def _moved_zeros(stored: Tensor, module: PackedModule, origin: str, to: str) -> Tensor:
    """Return zero points [G, O * bits / 32] of format `origin` as format `to` stores them."""
    zeros = (unpack(stored.T, module.bits).int() + STORED_OFFSET[origin]) & (2**module.bits - 1)
    if STORED_OFFSET[to] and not bool((zeros >= 1).all()):
        raise InputError(
            "E_CKPT_ZEROS",
            f"layer `{module.name}` has zero points of 0, which format {to} cannot store",
            hint="keep gptq_v2: in format gptq, engines disagree about such a zero point",
        )
    return pack(zeros - STORED_OFFSET[to], module.bits).T.contiguous()


def _units(
    source: Checkpoint,
    together: Container[str],
    spec: Callable[[TensorInfo], TensorSpec | None],
) -> list[tuple[TensorSpec, ...]]:
    """Return the tensors to write, in file order; parts of a linear in `together` are one unit."""
    units: dict[str, tuple[TensorSpec, ...]] = {}
    for tensor in source.tensors.values():
        planned = spec(tensor)
        if planned is None:
            continue
        key = tensor.name
        module = tensor.name.rpartition(".")[0]
        if module in together and tensor.name.endswith(PARTS):
            key = module
        units[key] = (*units.get(key, ()), planned)
    return list(units.values())


def _write_tensors(
    directory: Path, units: list[tuple[TensorSpec, ...]], write: Callable[[CheckpointWriter], None]
) -> int:
    """Write the tensors of a checkpoint; return their size in bytes, without headers."""
    max_shard_size = QuantizeConfig.model_fields["max_shard_size"].default
    layout = plan_layout(units, size_in_bytes(max_shard_size))
    with CheckpointWriter(directory, layout) as writer:
        write(writer)
        writer.finish()
    return sum(spec.nbytes for spec in layout.specs.values())


def _meta(source: Checkpoint) -> dict[str, Any]:
    """Return the notes of quantization tools, for quantize_config.json only.

    Engines that read config.json do not accept the notes there.
    """
    file = source.directory / QUANTIZE_CONFIG
    content = None
    with suppress(InputError):  # a damaged file is a defect, which a new file corrects
        if is_file(file):
            content = read_json(file)
    for settings in (content, source.quantization):
        if isinstance(settings, dict) and isinstance(settings.get("meta"), dict):
            return {"meta": settings["meta"]}
    return {}
