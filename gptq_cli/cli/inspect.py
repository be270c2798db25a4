"""`gptq inspect`: the content of a checkpoint, or the numbers of one of its layers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from gptq_cli.cli import options as o
from gptq_cli.cli.console import (
    Console,
    aligned,
    counted,
    engine_lines,
    fitted,
    indented_lines,
    joined,
    on_one_line,
    row_data,
    row_lines,
)
from gptq_cli.config.serving import Verdict, engine_data, verdicts
from gptq_cli.errors import shown, size
from gptq_cli.inspection.summary import Inspection, inspect_checkpoint

if TYPE_CHECKING:
    from gptq_cli.checkpoint.defects import Defect
    from gptq_cli.checkpoint.layout import PackedModule
    from gptq_cli.inspection.layer_statistics import Histogram, LayerView, PackedView

MOST_BARS = 32  # in a histogram
BAR = 40  # letters of the longest bar


def inspect(
    model: o.Model,
    layer: Annotated[
        str | None,
        o.plain("--layer", help="show the codes, scales and weights of one layer", metavar="NAME"),
    ] = None,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Show what a checkpoint holds: layers, sizes, origin.

    MODEL is any safetensors checkpoint, quantized or not, from gptq or
    another tool. For a Hub id only the headers are downloaded. --layer
    accepts the end of a name too, but needs the checkpoint on this machine.

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
    lines = [on_one_line(source.name), "", *_lines(found, judged)]
    console.result(data, "\n".join(lines), _storage(found))


def _show_layer(console: Console, model: str, revision: str | None, name: str) -> None:
    from gptq_cli.checkpoint.locate import locate_model
    from gptq_cli.checkpoint.verify import open_decodable

    checkpoint = open_decodable(locate_model(model, revision).directory)
    from gptq_cli.inspection.layer_statistics import view_layer

    view = view_layer(checkpoint, name)
    console.result({"layer": view}, joined(_layer_lines(view)), on_one_line(view.name))


def _data(found: Inspection, judged: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "method": found.method,
        "format": found.format,
        "quantized": row_data(found.quantized),
        "kept": row_data(found.kept),
        "layers": list(map(_module_data, found.modules)),
        "bits_per_weight": found.bits_per_weight,
        "bits_per_parameter": found.bits_per_parameter,
        "parameters": found.parameters,
        "bytes": found.nbytes,
        "files": found.files,
        "provenance": found.provenance,
        "defects": found.defects,
        "engines": engine_data(judged),
    }


def _module_data(module: PackedModule) -> dict[str, Any]:
    return {
        "name": module.name,
        "shape": (module.out_features, module.in_features),
        "bits": module.bits,
        "group_size": module.group_size,
        "bytes": module.nbytes,
    }


def _storage(found: Inspection) -> str:
    """Return the format of the quantized layers in a word or two."""
    if found.method is None:
        return "not quantized"
    return on_one_line(found.format or found.method)


def _lines(found: Inspection, judged: Sequence[Verdict]) -> list[str]:
    rows = row_lines([*found.quantized, *found.kept])
    n_quantized = len(found.quantized)
    title = "tensors"
    lines = []
    if n_quantized:
        title = "unchanged"
        lines += [f"quantized ({_storage(found)})", *indented_lines(rows[:n_quantized])]
    elif found.method is not None:
        lines.append(f"quantized as {_storage(found)}, whose tensors are not decoded here")
    lines += [title, *indented_lines(rows[n_quantized:]), ""]
    lines += _size_lines(found) + _origin_lines(found) + _defect_lines(found.defects)
    return [*map(on_one_line, lines), *map(fitted, engine_lines(judged))]


def _size_lines(found: Inspection) -> list[str]:
    files = counted(len(found.files), "file")
    millions = f"{found.parameters / 1e6:.4g} million parameters"
    rate = f"{found.bits_per_parameter:.3g} per parameter"
    if found.bits_per_weight is not None:
        weight = f"{found.bits_per_weight:.3g} per quantized weight"
        rate = f"{weight}, with all that is stored for it; {rate}"
    return [f"size     {size(found.nbytes)} in {files}, {millions}", f"bits     {rate}"]


def _origin_lines(found: Inspection) -> list[str]:
    if not found.provenance:
        return []
    cells = []
    for key, value in found.provenance.items():
        if not isinstance(value, str):
            value = shown(value, 10**6)
        cells.append((key, value))
    return ["origin", *indented_lines(aligned(cells))]


def _defect_lines(defects: Sequence[Defect]) -> list[str]:
    """Return lines about the first defect; no line about engines follows for such a checkpoint."""
    if not defects:
        return []
    count = counted(len(defects), "defect")
    lines = [
        f"defects  {count}: engines fail or differ, `gptq verify` lists all",
        f"  {on_one_line(str(defects[0]))}",
    ]
    if defects[0].hint:
        lines.append(f"  hint: {on_one_line(defects[0].hint)}")
    return lines


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
    order = "in order" if packed.trivial_groups else "by g_idx"
    zeros = f"all zero points are {packed.zeros[0]}"
    if len(packed.zeros) > 1:
        zeros = f"zero points {packed.zeros[0]} to {packed.zeros[-1]}"
    scales = f"scales   {sum(packed.scales.counts)}"
    if packed.negative_scales:
        scales += f", {packed.negative_scales} negative"
    used = f"{packed.entropy:.2f} of {packed.bits} bits used"
    return [
        f"{counted(packed.groups, 'group')} {order}, {zeros}",
        "",
        f"codes    {used}, {packed.at_ends:.2%} of weights at an end of the grid",
        *_bars(packed.codes, whole=True),
        "",
        scales,
        *_bars(packed.scales),
    ]


def _bars(histogram: Histogram, *, whole: bool = False) -> list[str]:
    """Return a line for each bin: its lower edge, its count, a bar.

    Neighbouring bins are merged until at most MOST_BARS are left. With `whole` the edges are
    shown as whole numbers.
    """
    counts, edges = histogram.counts, histogram.edges
    merged = -(-len(counts) // MOST_BARS)  # bins for one line, rounded up
    sums = [sum(counts[start : start + merged]) for start in range(0, len(counts), merged)]
    encoding = getattr(sys.stdout, "encoding", None) or ""
    mark = "█" if "utf" in encoding.lower() else "#"
    cells = []
    for edge, count in zip(edges[:-1:merged], sums, strict=True):
        name = str(round(edge)) if whole else f"{edge:.3g}"
        cells.append((name, str(count), mark * round(BAR * count / max(sums))))
    return indented_lines(aligned(cells, right={0, 1}))
