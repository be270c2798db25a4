"""`gptq inspect`: what a checkpoint holds, and how one of its layers looks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import (
    Console,
    aligned,
    engine_lines,
    fitted,
    joined,
    on_one_line,
    row_data,
    row_lines,
)
from gptq_cli.config.finding import shown, size
from gptq_cli.config.serving import Verdict, engine_data, verdicts
from gptq_cli.inspection.summary import Inspection, inspect_checkpoint

if TYPE_CHECKING:
    from gptq_cli.checkpoint.quantization_config import Defect
    from gptq_cli.inspection.layer_statistics import Histogram, LayerView, PackedView

MOST_BARS = 32
BAR = 40


def inspect(
    model: o.Model,
    layer: Annotated[
        str | None,
        o.plain(
            "--layer", help="look into one layer: its codes, scales and weights", metavar="NAME"
        ),
    ] = None,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what a checkpoint holds: what is quantized how, sizes, origin.

    Takes any safetensors checkpoint, quantized or not, ours or another
    tool's; of a Hub id the headers alone are fetched. --layer takes the
    end of a name too, and needs the checkpoint on this machine.

    Example: gptq inspect ./Qwen3-0.6B-GPTQ-Int4-g128 --layer 0.mlp.up_proj
    """
    console = Console(as_json, quiet)
    if layer is not None:
        _show_layer(console, model, revision, layer)
        return
    from gptq_cli.checkpoint.locate import peek_model

    source, checkpoint = peek_model(model, revision)
    for code, remark in checkpoint.remarks:
        console.warn(code, remark)
    found = inspect_checkpoint(checkpoint)
    judged = verdicts(found.export) if found.export else ()
    data = {"model": source.name, "commit": source.commit, **_data(found, judged)}
    console.result(
        data, "\n".join([on_one_line(source.name), "", *_lines(found, judged)]), _how(found)
    )


def _show_layer(console: Console, model: str, revision: str | None, name: str) -> None:
    from gptq_cli.checkpoint.locate import locate_model
    from gptq_cli.checkpoint.verify import open_decodable

    checkpoint = open_decodable(locate_model(model, revision).directory)
    from gptq_cli.inspection.layer_statistics import view_layer

    view = view_layer(checkpoint, name)
    console.result({"layer": asdict(view)}, joined(_layer_lines(view)), on_one_line(view.name))


def _data(found: Inspection, judged: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "method": found.method,
        "format": found.format,
        "quantized": row_data(found.quantized),
        "kept": row_data(found.kept),
        "layers": [
            {
                "name": module.name,
                "shape": [module.out_features, module.in_features],
                "bits": module.bits,
                "group_size": module.group_size,
                "bytes": module.nbytes,
            }
            for module in found.modules
        ],
        "bits_per_weight": found.bits_per_weight,
        "bits_per_parameter": found.bits_per_parameter,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "files": found.files,
        "provenance": found.provenance,
        "defects": [asdict(defect) for defect in found.defects],
        "engines": engine_data(judged),
    }


def _how(found: Inspection) -> str:
    return "not quantized" if found.method is None else on_one_line(found.format or found.method)


def _lines(found: Inspection, judged: Sequence[Verdict]) -> list[str]:
    rows = row_lines([*found.quantized, *found.kept])
    files = f"{len(found.files)} file" + ("s" if len(found.files) != 1 else "")
    lines = (
        [f"quantized ({_how(found)})", *_indented(rows[: len(found.quantized)])]
        if found.quantized
        else []
    )
    if found.method is not None and not found.quantized:
        lines.append(f"quantized as {_how(found)}, whose tensors are not decoded here")
    lines.append("as it was" if found.quantized else "tensors")
    lines += [*_indented(rows[len(found.quantized) :]), ""]
    lines.append(
        f"size     {size(found.nbytes)} in {files}, {found.parameters / 1e6:.4g} million parameters"
    )
    rate = f"{found.bits_per_parameter:.3g} a parameter"
    if found.bits_per_weight is not None:
        rate = f"{found.bits_per_weight:.3g} a quantized weight, with scales, zero points and g_idx; {rate}"
    lines.append(f"bits     {rate}")
    told = (
        aligned(
            [
                (key, value if isinstance(value, str) else shown(value, 10**6))
                for key, value in found.provenance.items()
            ]
        )
        if found.provenance
        else []
    )
    if told:
        lines += ["origin", *_indented(told)]
    lines += _defect_lines(found.defects)
    return [*map(on_one_line, lines), *map(fitted, engine_lines(judged))]


def _defect_lines(defects: Sequence[Defect]) -> list[str]:
    """The first defect and its remedy; no engine is said to load such a checkpoint."""
    if not defects:
        return []
    count = f"{len(defects)} defect" + ("s" if len(defects) > 1 else "")
    lines = [
        f"defects  {count}: engines fail or differ, `gptq verify` lists all",
        f"  {on_one_line(str(defects[0]))}",
    ]
    if defects[0].hint:
        lines.append(f"  hint: {on_one_line(defects[0].hint)}")
    return lines


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _layer_lines(view: LayerView) -> list[str]:
    shape = "x".join(map(str, view.shape))
    lines = [f"{view.name}  {shape}  {view.dtype}"]
    if view.packed:
        lines += _packed_lines(view.packed)
    lines += [
        "",
        f"weights  mean {view.mean:.3g}, standard deviation {view.std:.3g}",
        *_bars(view.weights),
    ]
    return lines


def _packed_lines(packed: PackedView) -> list[str]:
    zeros = f"zero points {packed.zeros[0]} to {packed.zeros[-1]}" if len(packed.zeros) > 1 else ""
    zeros = zeros or f"all zero points are {packed.zeros[0]}"
    order = "in order" if packed.trivial_groups else "by g_idx"
    used = f"{packed.entropy:.2f} of {packed.bits} bits used, {packed.at_ends:.2%} of weights at an end of the grid"
    negative = f", {packed.negative_scales} negative" if packed.negative_scales else ""
    return [
        f"{packed.groups} group{'s' if packed.groups > 1 else ''} {order}, {zeros}",
        "",
        f"codes    {used}",
        *_bars(packed.codes, whole=True),
        "",
        f"scales   {sum(packed.scales.counts)}{negative}",
        *_bars(packed.scales),
    ]


def _bars(histogram: Histogram, *, whole: bool = False) -> list[str]:
    """A line a bin: where it begins, how many, a bar; neighbours are joined until there are few enough."""
    together = -(-len(histogram.counts) // MOST_BARS)
    counts = [
        sum(histogram.counts[i : i + together]) for i in range(0, len(histogram.counts), together)
    ]
    edges = histogram.edges[:-1:together]
    mark = "█" if "utf" in (getattr(sys.stdout, "encoding", None) or "").lower() else "#"
    most = max(counts)
    bars = [mark * round(BAR * count / most) for count in counts]
    names = [str(round(edge)) if whole else f"{edge:.3g}" for edge in edges]
    return _indented(aligned([*zip(names, map(str, counts), bars, strict=True)], right={0, 1}))
