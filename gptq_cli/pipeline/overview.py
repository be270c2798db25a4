"""A checkpoint in a few rows: the same tensor of every block is one row. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.pipeline.run_plan import RunPlan

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
            changed.append(Row(name, shape, how, why, nbytes=sum(spec.nbytes for spec in layer.packed())))
    others = [tensor for tensor in plan.copied if tensor.name not in linears]
    return collapse(changed), collapse(kept) + other_rows(others, plan.blocks, plan.plain.parts)


def other_rows(tensors: Iterable[TensorInfo], blocks: str, decoded: Collection[str] = ()) -> list[Row]:
    """Tensors that are no linears to quantize, `decoded` ones not stored so; all vectors together are the last row."""
    rows, vectors = [], Row(VECTORS, (), "", count=0)
    for tensor in tensors:
        if len(tensor.shape) < 2:
            vectors = replace(vectors, count=vectors.count + 1, nbytes=vectors.nbytes + tensor.nbytes)
        else:
            why = "output head, see --lm-head" if tensor.name == "lm_head.weight" else "no linear layer of a block"
            name = kind_of(tensor.name.removesuffix(".weight"), blocks)
            rows.append(Row(name, tensor.shape, _stored(tensor, decoded), why, nbytes=tensor.nbytes))
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
