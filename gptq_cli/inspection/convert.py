"""Write a quantized checkpoint in another format, one linear at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import (
    PackedModule,
    Packing,
    Sizes,
    TensorSpec,
    packed_specs,
    part_names,
)
from gptq_cli.checkpoint.quantization_config import (
    describe_linears,
    dialect_of,
    format_of,
    packing_for,
    packing_of,
    portable_settings,
    recorded_notes,
    stored_config,
    valid_json,
    with_quantization,
)
from gptq_cli.checkpoint.reader import DequantizingReader, columns_in_order, encode
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import check_written, refuse_damaged
from gptq_cli.checkpoint.writer import CheckpointWriter, copy_side_files
from gptq_cli.config.layer import FORMATS, GPTQ_FORMATS, HEAD, Linears, formats_for, misfits
from gptq_cli.config.resolve import resolve, to_yaml
from gptq_cli.errors import ConfigError, InputError, Problem, counted, one_of
from gptq_cli.events import LayerStarted, PhaseStarted, Report, ignore
from gptq_cli.files import ByteCount, is_file
from gptq_cli.inspection.rewriting import Rewritten, fresh, open_source, publish, write_tensors
from gptq_cli.runtime.open_model import warn_of
from gptq_cli.storage.durable import write_file, write_json
from gptq_cli.storage.manifest import CONFIG_FILE, MANIFEST, QUANTIZE_CONFIG

CPU = torch.device("cpu")


def convert_checkpoint(
    model: str, output: Path, to: str, *, overwrite: bool = False, report: Report = ignore
) -> Rewritten:
    """Write the quantized checkpoint MODEL in format `to`, as all engines accept it.

    The decoded weights keep every bit, and all tensors that are not quantized are copied. Raises
    ConfigError E_CFG_NOTHING_TO_DO if nothing would change, E_CFG_FORMAT if `to` cannot store a
    layer; InputError E_CKPT_QUANTIZED if the checkpoint cannot be decoded, E_CKPT_ZEROS if a zero
    point of 0 would have to be stored as -1, about which engines disagree, and the code of a defect
    that is not corrected here; GateError E_CKPT_HASH if a file differs from the source's manifest.
    """
    source, modules, defects = open_source(model, output, report, overwrite=overwrite)
    _refuse_lasting(source, defects)
    warn_of(source, report)
    format = format_of(source)
    if format == to and not defects:
        message = f"`{model}` is of format {to} already"
        raise ConfigError("E_CFG_NOTHING_TO_DO", message, hint="use it unchanged")
    conversion = _Conversion(source, modules, to)
    conversion.check()
    refuse_damaged(source.directory, report=report)
    with fresh(output, report) as work:
        layers = counted(len(modules), "layer")
        report(PhaseStarted("convert", f"{layers} from {format} to {to}"))
        write = partial(conversion.write, report)
        written = write_tensors(work.stage, conversion.units(), write, report)
        copy_side_files(source, work.stage, without={CONFIG_FILE, MANIFEST})
        _write_settings(work.stage, source, conversion.linears(), to)
        check_written(work.stage)
        kept = _kept(source, to)
        publish(work, source, kept, report, overwrite=overwrite, command="convert", format=to)
    return Rewritten(output, len(modules), source.nbytes, written, defects)


def _refuse_lasting(source: Checkpoint, defects: Iterable[Defect]) -> None:
    """Raise InputError with the code of the first defect that the output would have as well."""
    for defect in defects:
        if defect.effect == "readers":
            hint = f"see all defects: gptq verify {quote(str(source.directory))}"
            if defect.hint:
                hint = f"{defect.hint}; {hint}"
            message = f"`{source.directory}`, {defect.place}: {defect.message}"
            raise InputError(defect.code, message, hint=hint)


class _Conversion:
    """The tensors of a quantized checkpoint in another format."""

    def __init__(self, source: Checkpoint, modules: Sequence[PackedModule], to: str) -> None:
        self._source, self._to = source, to
        self._modules = {module.name: module for module in modules}
        self._origin = packing_of(source)
        self._reader = DequantizingReader(source, CPU, "torch")
        config, _ = stored_config(source)
        assert config is not None  # its defects would have been refused
        self._settings = {module.name: config.settings(module.name) for module in modules}
        sym = all(settings.sym for settings in self._settings.values())
        self._packing: Packing = packing_for(to, sym=sym)

    def check(self) -> None:
        """Raise ConfigError E_CFG_FORMAT for each kind of layer that the format cannot store."""
        layers: dict[str, list[str]] = defaultdict(list)
        could = list(FORMATS)
        for name, settings in self._settings.items():
            g_idx = settings.desc_act and not self._is_in_order(name)
            size = settings.group_size
            for reason in misfits(self._to, settings.bits, size, g_idx=g_idx).values():
                layers[reason].append(name)
            holders = formats_for(settings.bits, size, g_idx=g_idx)
            could = [format for format in could if format in holders]
        if not layers:
            return
        hint = "quantize the original model again with other settings"
        if could:
            hint = f"what stores all layers: --to {one_of(could)}"
        problems = []
        for reason, names in layers.items():
            message = f"{reason}, but `{names[0]}`{_others(names)} needs more"
            problems.append(Problem("E_CFG_FORMAT", message, hint))
        raise ConfigError.of(problems)

    def _is_in_order(self, name: str) -> bool:
        linear, module = self._reader.linear(name), self._modules[name]
        in_order = columns_in_order(module.in_features, module.groups)
        return torch.equal(linear.group_of_column.int(), in_order)

    def linears(self) -> Linears:
        """Return the linears of the checkpoint; every other matrix counts as a kept one."""
        in_features = {name: module.in_features for name, module in self._modules.items()}
        kept = []
        for name, tensor in self._source.tensors.items():
            module = name.removesuffix(".weight")
            if module != name and module not in self._modules and len(tensor.shape) == 2:
                kept.append(module)
        return Linears(self._settings, in_features, tuple(kept))

    def units(self) -> list[tuple[TensorSpec, ...]]:
        """Return the tensors to write; those of one linear are one unit."""
        units = []
        for unit in self._in_order():
            if isinstance(unit, str):
                units.append(packed_specs(f"{unit}.weight", self._sizes(unit), self._packing))
            else:
                units.append((TensorSpec(unit.name, unit.dtype, unit.shape),))
        return units

    def _in_order(self) -> list[str | TensorInfo]:
        """Return the name of each module at the place of its first part, and other tensors."""
        owners = {}
        for name in self._modules:
            for part in part_names(name, self._source.tensors, self._origin):
                owners[part] = name
        found: dict[str, str | TensorInfo] = {}
        for name, tensor in self._source.tensors.items():
            if name in owners:
                found.setdefault(owners[name], owners[name])
            else:
                found[f"{name} itself"] = tensor
        return list(found.values())

    def _sizes(self, name: str) -> Sizes:
        module = self._modules[name]
        scales = self._source.tensors[f"{name}.{self._origin.scales}"].dtype
        return Sizes(
            module.out_features,
            module.in_features,
            module.groups,
            module.bits,
            self._settings[name].sym,
            scales,
        )

    def write(self, report: Report, writer: CheckpointWriter, count: ByteCount) -> None:
        """Write all tensors in file order."""
        for unit in self._in_order():
            if not isinstance(unit, str):
                writer.copy(unit, count)
                continue
            report(LayerStarted(unit))
            linear = self._reader.linear(unit)
            if self._packing.zero_offset and not bool((linear.zeros >= 1).all()):
                raise _zero_point_of_zero(unit, self._to)
            tensors = encode(linear, self._packing, sym=self._settings[unit].sym)
            for part, tensor in tensors.items():
                writer.write(f"{unit}.{part}", tensor)
                count.passed(tensor.nbytes)


def _others(names: Sequence[str]) -> str:
    """Return how many names follow the first one, "" if none does."""
    if len(names) == 1:
        return ""
    return f" and {len(names) - 1} more"


def _zero_point_of_zero(name: str, to: str) -> InputError:
    message = f"layer `{name}` has zero points of 0, which format {to} cannot store"
    hint = f"keep gptq_v2: in format {to}, engines disagree about such a zero point"
    return InputError("E_CKPT_ZEROS", message, hint=hint)


def _write_settings(directory: Path, source: Checkpoint, linears: Linears, to: str) -> None:
    """Write the configuration of a converted checkpoint, with the settings of format `to`."""
    dialect = dialect_of(to)
    if dialect is not None:
        described = dialect.describe(linears)
    else:
        settings = _gptq_settings(source, linears, to)
        described = {"quantization_config": settings}
        write_json(directory / QUANTIZE_CONFIG, settings | _meta(source))
    write_json(directory / "config.json", with_quantization(source.config, described))
    if is_file(source.directory / CONFIG_FILE):
        config = resolve({}, {}, source.directory / CONFIG_FILE).config
        config = config.model_copy(update={"format": to, "target": None})
        write_file(directory / CONFIG_FILE, to_yaml(config).encode())


def _gptq_settings(source: Checkpoint, linears: Linears, to: str) -> dict[str, Any]:
    """Return the `quantization_config` of a GPTQ checkpoint, from that of the source if it can."""
    if format_of(source) in GPTQ_FORMATS:
        lm_head = HEAD in linears.quantized
        return portable_settings(source.quantization or {}, to, lm_head=lm_head)
    return describe_linears(linears, to)


def _meta(source: Checkpoint) -> dict[str, Any]:
    """Return the notes of quantization tools under their key, {} if there are none.

    Engines that read config.json do not accept the notes there.
    """
    notes = recorded_notes(source)
    if not notes:
        return {}
    return {"meta": notes}


def _kept(source: Checkpoint, to: str) -> dict[str, Any]:
    """Return what the manifest of the source tells about the origin of the weights.

    The notes of quantization tools are added if format `to` has no file of its own for them.
    """
    kept = {}
    manifest = valid_json(source.directory / MANIFEST)
    if isinstance(manifest, dict) and isinstance(manifest.get("origin"), dict):
        kept["origin"] = manifest["origin"]
    if dialect_of(to) is not None:
        kept |= _meta(source)
    return kept
