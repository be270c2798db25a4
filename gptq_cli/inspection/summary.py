"""The content of a checkpoint, quantized or not, from its headers and settings alone, in a few
rows: the same tensor of every block is one row. Needs no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.decoded import stores_transposed
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.packed import PARTS, PackedModule, packed_modules
from gptq_cli.checkpoint.quantization_config import (
    Defect,
    other_packing,
    recorded_settings,
    said_format,
)
from gptq_cli.checkpoint.source import SCALES, Checkpoint, block_size, read_json
from gptq_cli.checkpoint.verify import examine
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.serving import export_of
from gptq_cli.config.serving_table import Export
from gptq_cli.errors import InputError
from gptq_cli.files import is_file
from gptq_cli.planning.run_plan import HEAD, RunPlan, has_narrow_experts
from gptq_cli.storage.manifest import QUANTIZE_CONFIG

FROM_CONFIG = ("model_type", "architectures", "transformers_version")
FROM_RUN = ("preset", "dataset", "nsamples", "seqlen", "seed")
_IN_LIST = re.compile(r"^(.*?)\.\d+\.")

VECTORS = "norms, biases and other vectors"


@dataclass(frozen=True, slots=True)
class Row:
    """`count` alike tensors: `name` without the blocks' prefix, `shape` (O, I) of a linear; `settings` says how it is
    stored ("4 bit g128", "BF16"), `why` for what reason; `nbytes` of all of them."""

    name: str
    shape: tuple[int, ...]
    settings: str
    why: str = ""
    count: int = 1
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found; `defects` are those of a GPTQ checkpoint.

    `method` is None for a checkpoint that is not quantized; of methods but gptq and fp8 only tensors are told.

    `matrices` are what has a 2-D weight, `transposed` says whether the original stores its linears [I, O].
    `parameters` counts a packed linear by the weights it stands for. `provenance` is what files say about how the
    checkpoint came to be.
    """

    method: str | None
    format: str | None
    sym: bool
    desc_act: bool
    modules: tuple[PackedModule, ...]
    matrices: tuple[str, ...]
    transposed: bool
    quantized: tuple[Row, ...]
    kept: tuple[Row, ...]
    parameters: int
    nbytes: int
    files: dict[str, int]
    provenance: dict[str, Any]
    defects: tuple[Defect, ...] = ()

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of the quantized linears, scales, zero points and g_idx included, per weight."""
        weights = sum(module.weights for module in self.modules)
        return 8 * sum(module.nbytes for module in self.modules) / weights if weights else None

    @property
    def bits_per_parameter(self) -> float:
        """Stored bits of everything, per parameter."""
        return 8 * self.nbytes / self.parameters

    @property
    def export(self) -> Export | None:
        """What readers see of it; None for a defective one, and where nothing is quantized that the table is about."""
        if not self.modules or self.format is None or self.defects:
            return None
        settings: dict[str, LayerConfig | None] = dict.fromkeys(self.matrices)
        settings |= {
            m.name: LayerConfig(
                bits=m.bits, group_size=m.group_size, sym=self.sym, desc_act=self.desc_act
            )
            for m in self.modules
        }
        return export_of(
            settings,
            self.format,
            lm_head=HEAD in settings and settings[HEAD] is not None,
            narrow_experts=has_narrow_experts({m.name: m.out_features for m in self.modules}),
            transposed=self.transposed,
        )


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What `checkpoint` holds; InputError E_CKPT_INCOMPLETE if the parts of a linear lack one or do not fit.

    Of a GPTQ checkpoint on this machine the zero points, scales and g_idx are read, too: one with
    defects is not what engines load.
    """
    said, method = checkpoint.quantization or {}, checkpoint.method
    is_read = method == "gptq" and other_packing(checkpoint) is None
    modules = packed_modules(checkpoint.tensors) if is_read else ()
    packed = {f"{module.name}.{part}" for module in modules for part in PARTS}
    scales = checkpoint.scales()
    hidden = packed | set(scales) | set(scales.values())
    others = [tensor for name, tensor in checkpoint.tensors.items() if name not in hidden]
    scaled = [checkpoint.tensors[name] for name in scales]
    blocks = _blocks(checkpoint.tensors)
    sym = bool(said.get("sym", True))
    return Inspection(
        method=method,
        format=_format(checkpoint) if method == "gptq" else None,
        sym=sym,
        desc_act=bool(said.get("desc_act")),
        modules=modules,
        matrices=tuple(t.name.removesuffix(".weight") for t in others if len(t.shape) == 2),
        transposed=stores_transposed(checkpoint.config),
        quantized=tuple(
            collapse(
                [
                    *(_row(module, blocks, sym=sym) for module in modules),
                    *_scaled_rows(checkpoint, scaled, blocks),
                ]
            )
        ),
        kept=tuple(replace(row, why="") for row in other_rows(others, blocks)),
        parameters=sum(module.weights for module in modules)
        + sum(math.prod(tensor.shape) for tensor in [*others, *scaled]),
        nbytes=checkpoint.nbytes,
        files=_files(checkpoint),
        provenance=_provenance(checkpoint),
        defects=_defects(checkpoint) if method == "gptq" else (),
    )


def _format(checkpoint: Checkpoint) -> str:
    packing = other_packing(checkpoint)
    return packing.lower() if packing else str(said_format(checkpoint.quantization or {}))


def _defects(checkpoint: Checkpoint) -> tuple[Defect, ...]:
    """What is wrong with a GPTQ checkpoint as far as is seen from here; of the Hub's only headers are here."""
    here = all(tensor.file.is_file() for tensor in checkpoint.tensors.values())
    try:
        return examine(checkpoint, numbers=here).defects
    except InputError as error:  # a form that is not read here
        return tuple(
            Defect(problem.code, problem.message, hint=problem.hint) for problem in error.problems
        )


def _row(module: PackedModule, blocks: str, *, sym: bool) -> Row:
    how = settings(module.bits, module.group_size, sym=sym)
    return Row(
        kind_of(module.name, blocks),
        (module.out_features, module.in_features),
        how,
        count=1,
        nbytes=module.nbytes,
    )


def _scaled_rows(checkpoint: Checkpoint, scaled: list[TensorInfo], blocks: str) -> list[Row]:
    """Weights in 8-bit floats, each with its scales."""
    rows, columns = block_size(checkpoint.quantization or {}) or (0, 0)
    how = f"{{}} in blocks of {rows}x{columns}"
    return [
        Row(
            kind_of(weight.name.removesuffix(".weight"), blocks),
            weight.shape,
            how.format(weight.dtype),
            nbytes=weight.nbytes + checkpoint.tensors[f"{weight.name}{SCALES}"].nbytes,
        )
        for weight in scaled
    ]


def _blocks(names: Iterable[str]) -> str:
    lists = Counter(match[1] for name in names if (match := _IN_LIST.match(name)))
    return lists.most_common(1)[0][0] if lists else ""


def _files(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of tensors in each file of weights."""
    files: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        files[tensor.file.name] += tensor.nbytes
    return dict(sorted(files.items()))


def _provenance(checkpoint: Checkpoint) -> dict[str, Any]:
    found = {
        key: checkpoint.config[key] for key in FROM_CONFIG if checkpoint.config.get(key) is not None
    }
    file = checkpoint.directory / QUANTIZE_CONFIG
    content = read_json(file) if is_file(file) else checkpoint.quantization
    meta = content.get("meta") if isinstance(content, dict) else None
    found |= (
        {key: value for key, value in meta.items() if value is not None}
        if isinstance(meta, dict)
        else {}
    )
    return found | _run_settings(checkpoint.directory)


def _run_settings(directory: Path) -> dict[str, Any]:
    """What the configuration of a run of ours says about its text."""
    content = recorded_settings(directory)
    if isinstance(content.get("dataset"), list):
        content["dataset"] = f"{len(content['dataset'])} texts"
    return {key: content[key] for key in FROM_RUN if content.get(key) is not None}


def plan_rows(plan: RunPlan) -> tuple[list[Row], list[Row]]:
    """What will be quantized, and what stays as it is, with the reason."""
    changed, kept, linears = [], [], set()
    for layer in plan.layers:
        linears.add(layer.weight.name)
        name, shape = kind_of(layer.name, plan.blocks), (layer.out_features, layer.in_features)
        if layer.config is None:
            how = _stored(layer.weight, plan.plain.parts)
            kept.append(Row(name, shape, how, layer.why, nbytes=layer.weight.nbytes))
        else:
            how = settings(layer.config.bits, layer.config.group_size, sym=layer.config.sym)
            why = "" if layer.why == "default" else layer.why
            changed.append(
                Row(name, shape, how, why, nbytes=sum(spec.nbytes for spec in layer.packed()))
            )
    others = [tensor for tensor in plan.copied if tensor.name not in linears]
    return collapse(changed), collapse(kept) + other_rows(others, plan.blocks, plan.plain.parts)


def other_rows(
    tensors: Iterable[TensorInfo], blocks: str, decoded: Collection[str] = ()
) -> list[Row]:
    """Tensors that are no linears to quantize, `decoded` ones not stored so; all vectors together are the last row."""
    rows, vectors = [], Row(VECTORS, (), "", count=0)
    for tensor in tensors:
        if len(tensor.shape) < 2:
            vectors = replace(
                vectors, count=vectors.count + 1, nbytes=vectors.nbytes + tensor.nbytes
            )
        else:
            why = (
                "output head, see --lm-head"
                if tensor.name == "lm_head.weight"
                else "no linear layer of a block"
            )
            name = kind_of(tensor.name.removesuffix(".weight"), blocks)
            rows.append(
                Row(name, tensor.shape, _stored(tensor, decoded), why, nbytes=tensor.nbytes)
            )
    return collapse(rows) + ([vectors] if vectors.count else [])


def _stored(tensor: TensorInfo, decoded: Collection[str]) -> str:
    return f"{tensor.dtype} (decoded)" if tensor.name in decoded else tensor.dtype


def collapse(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in count and bytes only become one; those of one name together, in order of first appearance."""
    found: dict[Row, Row] = {}
    for row in rows:
        key = replace(row, count=0, nbytes=0)
        seen = found.get(key, key)
        found[key] = replace(seen, count=seen.count + row.count, nbytes=seen.nbytes + row.nbytes)
    names = {name: place for place, name in enumerate(dict.fromkeys(row.name for row in found))}
    return sorted(found.values(), key=lambda row: names[row.name])


def kind_of(name: str, blocks: str) -> str:
    """The name that the same module of every block shares: self_attn.q_proj, mlp.experts.N.down_proj."""
    inner = re.sub(rf"^{re.escape(blocks)}\.\d+\.", "", name)
    return re.sub(r"\.\d+(?=\.|$)", ".N", inner)


def settings(bits: int, group_size: int, *, sym: bool = True) -> str:
    """How a linear is quantized, in short: 4 bit g128, 8 bit channel asym."""
    group = f"g{group_size}" if group_size > 0 else "channel"
    return f"{bits} bit {group}" + ("" if sym else " asym")
