"""The content of a checkpoint in a few rows, from its headers and settings. Needs no torch.

The same tensor of every block is one row.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptq_cli.checkpoint.decoded import stores_transposed
from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import GPTQ, PackedModule, Packing, packed_modules, part_names
from gptq_cli.checkpoint.quantization_config import (
    declared_format,
    dialect_of,
    misnamed,
    other_packing,
    packing_of,
    recorded_notes,
    recorded_settings,
    stored_config,
)
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import examine
from gptq_cli.config.layer import (
    FORMATS,
    GPTQ_FORMATS,
    HEAD,
    LayerConfig,
    Settings,
    Stored,
    StoredConfig,
    kind_of,
    list_item,
)
from gptq_cli.config.serving import Export, Verdict, engine_data, export_of, verdicts
from gptq_cli.errors import InputError, to_json
from gptq_cli.planning.run_plan import RunPlan

if TYPE_CHECKING:
    from gptq_cli.checkpoint.coded import Coded

FROM_CONFIG = ("model_type", "architectures", "transformers_version")
FROM_RUN = ("preset", "dataset", "nsamples", "seqlen", "seed")
VECTORS = "norms, biases, other vectors"


@dataclass(frozen=True, slots=True)
class Row:
    """A row for `count` equal tensors, with their size in bytes together.

    `name` is without the prefix of the blocks; `shape` is (O, I) for a linear; `settings` is the
    form of storage ("4 bit g128", "BF16"), `why` the reason for it.
    """

    name: str
    shape: tuple[int, ...]
    settings: str
    why: str = ""
    count: int = 1
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Inspection:
    """The content of a checkpoint; `defects` are those of a GPTQ checkpoint.

    `method` is None if the checkpoint is not quantized; for methods that are not read, only
    tensors are listed. `settings` are those that the configuration gives to each module, empty if
    it is unusable. `matrices` are the modules with a plain 2-D weight; `transposed` tells whether
    the original stores its linears [I, O]. `parameters` counts a packed linear by its weights.
    `provenance` holds the notes in the files about the origin of the checkpoint. `model` is its
    name, `commit` that of a checkpoint on the Hub.
    """

    method: str | None
    format: str | None
    sym: bool
    desc_act: bool
    modules: tuple[PackedModule, ...]
    settings: Mapping[str, Settings]
    matrices: tuple[str, ...]
    transposed: bool
    quantized: tuple[Row, ...]
    kept: tuple[Row, ...]
    parameters: int
    nbytes: int
    files: dict[str, int]
    provenance: dict[str, Any]
    defects: tuple[Defect, ...] = ()
    misnamed: str = ""  # a name for which the rules do not say what its parts have
    model: str = ""
    commit: str | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight of the quantized linears, with all that is stored for them."""
        weights = nbytes = 0
        for module in self.modules:
            weights += module.weights
            nbytes += module.nbytes
        if not weights:
            return None
        return 8 * nbytes / weights

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits of the whole checkpoint, per parameter."""
        return 8 * self.nbytes / self.parameters

    @property
    def export(self) -> Export | None:
        """The properties that decide which engine loads the checkpoint.

        None if the checkpoint has defects, or nothing that the serving table covers is quantized.
        """
        if not self.modules or self.format is None or self.defects:
            return None
        settings: dict[str, LayerConfig | None] = dict.fromkeys(self.matrices)
        shapes = {}
        for module in self.modules:
            shapes[module.name] = (module.out_features, module.in_features)
            stored = self.settings[module.name]
            settings[module.name] = LayerConfig(
                bits=module.bits,
                group_size=stored.group_size,  # which engines read, even if it is a whole row
                sym=stored.sym,
                desc_act=stored.desc_act,
            )
        return export_of(
            settings,
            self.format,
            lm_head=settings.get(HEAD) is not None,
            shapes=shapes,
            transposed=self.transposed,
            misnamed=self.misnamed,
        )

    @property
    def engines(self) -> tuple[Verdict, ...]:
        """The verdict of each engine; none if `export` is None."""
        if self.export is None:
            return ()
        return verdicts(self.export)

    def to_json(self) -> dict[str, Any]:
        """Return the content as plain JSON values."""
        return {
            "model": self.model,
            "commit": self.commit,
            "method": self.method,
            "format": self.format,
            "quantized": row_data(self.quantized),
            "kept": row_data(self.kept),
            "layers": list(map(_module_data, self.modules)),
            "bits_per_weight": self.bits_per_weight,
            "bits_per_parameter": self.bits_per_parameter,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "files": self.files,
            "provenance": to_json(self.provenance),
            "defects": to_json(self.defects),
            "engines": engine_data(self.engines),
        }


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Return the content of `checkpoint`.

    The zero points, scales and g_idx of a local GPTQ checkpoint are read as well, because engines
    do not load one with defects. Raises InputError E_CKPT_INCOMPLETE if a part of a linear is
    missing or does not fit.
    """
    content = _Content()
    coded = checkpoint.coded()
    if checkpoint.method in FORMATS and not coded:
        content = _packed_content(checkpoint)
    modules = content.modules
    others = _other_tensors(checkpoint, content, coded.values())
    blocks = _blocks(checkpoint.tensors)
    matrices = _matrices(others, blocks, checkpoint.n_blocks)
    quantized = [_row(module, blocks, sym=content.is_sym(module.name)) for module in modules]
    quantized += _coded_rows(checkpoint, coded.values(), blocks)
    parameters = sum(module.weights for module in modules)
    for tensor in [*others, *(weight.plain for weight in coded.values())]:
        parameters += math.prod(tensor.shape)
    return Inspection(
        method=checkpoint.method,
        format=content.format,
        sym=all(content.is_sym(module.name) for module in modules),
        desc_act=content.desc_act,
        modules=modules,
        settings=content.settings,
        matrices=matrices,
        transposed=stores_transposed(checkpoint.config),
        quantized=tuple(collapse(quantized)),
        kept=tuple([replace(row, why="") for row in other_rows(others, blocks)]),
        parameters=parameters,
        nbytes=checkpoint.nbytes,
        files=_files(checkpoint),
        provenance=_provenance(checkpoint),
        defects=content.defects,
        misnamed=_misnamed(content, matrices),
    )


@dataclass(frozen=True, slots=True)
class _Content:
    """The quantized part of a checkpoint; `config` is None if its settings are unusable."""

    modules: tuple[PackedModule, ...] = ()
    format: str | None = None
    packing: Packing = GPTQ
    config: StoredConfig | None = None
    defects: tuple[Defect, ...] = ()

    @property
    def settings(self) -> dict[str, Settings]:
        """The settings of each module, empty if the configuration is unusable."""
        if self.config is None:
            return {}
        return {module.name: self.config.settings(module.name) for module in self.modules}

    def is_sym(self, module: str) -> bool:
        """Return whether the grid of a module is symmetric, as far as the settings tell."""
        return self.config is None or self.config.settings(module).sym

    @property
    def desc_act(self) -> bool:
        """Whether the columns of the groups of some module need not follow one another."""
        if self.config is None:
            return False
        return any(self.config.settings(module.name).desc_act for module in self.modules)


def _packed_content(checkpoint: Checkpoint) -> _Content:
    """Return the packed linears, the format and the defects of a checkpoint in codes."""
    dialect = dialect_of(checkpoint.method)
    format = str(declared_format(checkpoint.quantization or {}))
    packing = GPTQ
    if dialect is not None:
        if dialect.unreadable(checkpoint.quantization or {}):
            return _Content()
        format, packing = str(checkpoint.method), packing_of(checkpoint)
    elif other := other_packing(checkpoint):
        return _Content(format=other.lower(), defects=_defects(checkpoint))
    config = None
    if format in FORMATS:
        config, _ = stored_config(checkpoint)
    modules: tuple[PackedModule, ...] = ()
    if config is not None or dialect is None:  # other formats tell bits in their settings alone
        modules = packed_modules(checkpoint.tensors, packing)
    return _Content(modules, format, packing, config, _defects(checkpoint))


def _misnamed(content: _Content, matrices: Iterable[str]) -> str:
    """Return a name by which engines ask, if the rules do not give what is stored under it."""
    config = content.config
    if config is None or content.format not in GPTQ_FORMATS:
        return ""
    stored: dict[str, Stored | None] = dict.fromkeys(matrices)
    for module in content.modules:
        found = config.settings(module.name)
        stored[module.name] = Stored(found.bits, found.group_size, found.sym)
    base = Stored(config.base.bits, config.base.group_size, config.base.sym)
    return next(iter(misnamed(stored, base, config.dynamic)), "")


def _other_tensors(
    checkpoint: Checkpoint, content: _Content, coded: Iterable[Coded]
) -> list[TensorInfo]:
    """Return the tensors that are no part of a quantized weight."""
    hidden: set[str] = set()
    for weight in coded:
        hidden.update(weight.parts.values())
    for module in content.modules:
        hidden.update(part_names(module.name, checkpoint.tensors, content.packing))
    return [tensor for name, tensor in checkpoint.tensors.items() if name not in hidden]


def _matrices(tensors: Iterable[TensorInfo], blocks: str, n_blocks: int | None) -> tuple[str, ...]:
    """Return the modules with a 2-D weight, without those of blocks that the model does not run.

    A tensor of all experts of a layer counts as a linear of the first one.
    """
    names = []
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        parent, _, leaf = name.rpartition(".")
        if len(tensor.shape) == 3 and parent.endswith(".experts"):
            name = f"{parent}.0.{leaf}"
        elif len(tensor.shape) != 2:
            continue
        if _is_run(name, blocks, n_blocks):
            names.append(name)
    return tuple(names)


def _is_run(name: str, blocks: str, n_blocks: int | None) -> bool:
    """Return whether a module is one of the `n_blocks` that the model runs, or in no list."""
    item = list_item(name)
    if item is None:
        return True
    return item.list_name == blocks and (n_blocks is None or int(item.number) < n_blocks)


def _defects(checkpoint: Checkpoint) -> tuple[Defect, ...]:
    """Return the defects of a GPTQ checkpoint; if only headers are here, those seen in them."""
    is_local = all(tensor.file.is_file() for tensor in checkpoint.tensors.values())
    try:
        return examine(checkpoint, numbers=is_local).defects
    except InputError as error:  # this form of packing cannot be decoded here
        return tuple(Defect(found.code, found.message, hint=found.hint) for found in error.problems)


def _row(module: PackedModule, blocks: str, *, sym: bool) -> Row:
    return Row(
        kind_in_block(module.name, blocks),
        (module.out_features, module.in_features),
        settings(module.bits, module.group_size, sym=sym),
        nbytes=module.nbytes,
    )


def _coded_rows(checkpoint: Checkpoint, coded: Iterable[Coded], blocks: str) -> list[Row]:
    """Return a row for each weight in codes; its bytes include those of its scales."""
    found = []
    for weight in coded:
        name = kind_in_block(weight.plain.name.removesuffix(".weight"), blocks)
        nbytes = sum(checkpoint.tensors[part].nbytes for part in weight.parts.values())
        found.append(Row(name, weight.plain.shape, weight.form, nbytes=nbytes))
    return found


def _blocks(names: Iterable[str]) -> str:
    """Return the numbered list that most tensors are in; empty if there is no list."""
    lists: Counter[str] = Counter()
    for name in names:
        item = list_item(name)
        if item is not None:
            lists[item.list_name] += 1
    if not lists:
        return ""
    return lists.most_common(1)[0][0]


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the bytes of tensors in each file of weights."""
    files: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        files[tensor.file.name] += tensor.nbytes
    return dict(sorted(files.items()))


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the notes on the origin of a checkpoint in its configuration files."""
    found = _known(checkpoint.config, FROM_CONFIG)
    notes = recorded_notes(checkpoint)
    found |= _known(notes, notes)
    settings = recorded_settings(checkpoint.directory)
    if isinstance(settings.get("dataset"), list):
        settings["dataset"] = ", ".join(map(str, settings["dataset"]))
    return found | _known(settings, FROM_RUN)


def _known(content: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: content[key] for key in keys if content.get(key) is not None}


def plan_rows(plan: RunPlan) -> tuple[list[Row], list[Row]]:
    """Return rows of the layers to quantize, and of the other tensors with the reason."""
    quantized, kept = [], []
    for layer in plan.layers:
        name, shape = (
            kind_in_block(layer.name, plan.blocks),
            (layer.out_features, layer.in_features),
        )
        if layer.config is None:
            how = _stored(layer.weight, plan.plain.parts)
            kept.append(Row(name, shape, how, layer.why, nbytes=layer.weight.nbytes))
            continue
        how = settings(layer.config.bits, layer.config.group_size, sym=layer.config.sym)
        row = Row(name, shape, how, nbytes=layer.packed_bytes(plan.packing))
        if layer.why != "default":
            row = replace(row, why=layer.why)
        quantized.append(row)
    linears = {layer.weight.name for layer in plan.layers}
    others = [tensor for tensor in plan.copied if tensor.name not in linears]
    return collapse(quantized), collapse(kept) + other_rows(others, plan.blocks, plan.plain.parts)


def other_rows(
    tensors: Iterable[TensorInfo], blocks: str, decoded: Collection[str] = ()
) -> list[Row]:
    """Return rows of tensors that are no linears to quantize; the last row is for all vectors.

    The names in `decoded` are tensors whose stored form is decoded when they are read.
    """
    rows = []
    vectors = Row(VECTORS, (), "", count=0)
    for tensor in tensors:
        if len(tensor.shape) < 2:
            vectors = _merged(vectors, Row(VECTORS, (), "", nbytes=tensor.nbytes))
            continue
        why = "not in a block"
        if tensor.name == f"{HEAD}.weight":
            why = "see --lm-head"
        name = kind_in_block(tensor.name.removesuffix(".weight"), blocks)
        how = _stored(tensor, decoded)
        rows.append(Row(name, tensor.shape, how, why, nbytes=tensor.nbytes))
    rows = collapse(rows)
    if vectors.count:
        rows.append(vectors)
    return rows


def _stored(tensor: TensorInfo, decoded: Collection[str]) -> str:
    if tensor.name in decoded:
        return f"{tensor.dtype} (decoded)"
    return tensor.dtype


def collapse(rows: Iterable[Row]) -> list[Row]:
    """Merge rows that differ only in count and bytes.

    Rows with the same name stand together, in order of first appearance.
    """
    by_name: dict[str, dict[Row, Row]] = defaultdict(dict)
    for row in rows:
        alike = by_name[row.name]
        key = replace(row, count=0, nbytes=0)
        alike[key] = _merged(alike.get(key, key), row)
    merged: list[Row] = []
    for alike in by_name.values():
        merged += alike.values()
    return merged


def _merged(row: Row, other: Row) -> Row:
    return replace(row, count=row.count + other.count, nbytes=row.nbytes + other.nbytes)


def _module_data(module: PackedModule) -> dict[str, Any]:
    return {
        "name": module.name,
        "shape": [module.out_features, module.in_features],
        "bits": module.bits,
        "group_size": module.group_size,
        "bytes": module.nbytes,
    }


def row_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as plain JSON values, with `nbytes` under the name `bytes`."""
    found: list[dict[str, Any]] = to_json(rows)
    for row in found:
        row["bytes"] = row.pop("nbytes")
    return found


def kind_in_block(name: str, blocks: str) -> str:
    """Return the name of a module without its block: self_attn.q_proj, mlp.experts.N.down_proj."""
    inner = re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name)
    return kind_of(inner, last_too=True)


def settings(bits: int, group_size: int, *, sym: bool = True) -> str:
    """Return how a linear is quantized, in short: 4 bit g128, 8 bit channel asym."""
    text = f"{bits} bit channel"
    if group_size > 0:
        text = f"{bits} bit g{group_size}"
    if not sym:
        text += " asym"
    return text
