"""`gptq inspect`: the content of a checkpoint, or the numbers of one of its layers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from gptq_cli.cli import options as o
from gptq_cli.cli.console import (
    Console,
    aligned,
    engine_lines,
    fitted,
    indented_lines,
    joined,
    on_one_line,
    row_lines,
)
from gptq_cli.cli.progress import Progress
from gptq_cli.errors import counted, shown, size

if TYPE_CHECKING:
    from gptq_cli.checkpoint.defects import Defect
    from gptq_cli.inspection.layer_statistics import Histogram, LayerView, PackedView
    from gptq_cli.inspection.summary import Inspection

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
    from gptq_cli.api import inspect

    report = Progress(console)
    if layer is not None:
        view = inspect(model, layer=layer, revision=revision, on_event=report)
        console.result({"layer": view}, joined(_layer_lines(view)), on_one_line(view.name))
        return
    found = inspect(model, revision=revision, on_event=report)
    lines = [on_one_line(found.model), "", *_lines(found)]
    console.result(found.to_json(), "\n".join(lines), _storage(found))


def _storage(found: Inspection) -> str:
    """Return the format of the quantized layers in a word or two."""
    if found.method is None:
        return "not quantized"
    return on_one_line(found.format or found.method)


def _lines(found: Inspection) -> list[str]:
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
    return [*map(on_one_line, lines), *map(fitted, engine_lines(found.engines))]


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
