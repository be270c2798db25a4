"""Figures of a run as inline SVG, in the colours of the page around them, or as PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

INK = "#010203"  # stands for the colour of the page's text
NEVER = "#d64550"  # an expert without a token
LINE = 0.5
MOST_NUMBERS = 24  # blocks; with more the cells are too small for numbers
MOST_SHAPES = 2000  # cells; with more an embedded picture is smaller
TALLEST = 9.0  # inches
LONGEST_NAME = 24  # letters
SMALLEST, LARGEST = 1e-300, 1e300  # a logarithmic scale shows what is between, with a margin
GB = 1e9

Grid = Sequence[Sequence[float | None]]
Cells = NDArray[numpy.float64]
Point = tuple[float, float, float]
_STYLE: Mapping[str, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK,
    "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": LINE, "xtick.major.width": LINE, "ytick.major.width": LINE,
    "font.size": 9, "svg.fonttype": "none", "font.family": "sans-serif",
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def heat_maps(blocks: Sequence[int], linears: Sequence[str], error: Grid, against_rtn: Grid) -> Any:
    """Return two maps side by side: the error, and the error divided by that of round-to-nearest.

    Rows are blocks, columns linears.
    """
    with pyplot.rc_context(dict(_STYLE)):
        figure, axes = pyplot.subplots(
            1,
            2,
            figsize=(2.4 + 1.1 * len(linears), 1.6 + min(0.26 * len(blocks), TALLEST)),
            layout="constrained",
            sharey=True,
        )
        cells = _cells(error)
        lowest, highest = _range(cells, (0.1, 1.0))
        by_decades = LogNorm(lowest / 1.0001, highest * 1.0001)
        _map(axes[0], cells, by_decades, "{:.1e}", "error", blocks, linears)
        cells = _cells(against_rtn)
        lowest, highest = _range(cells, (0.1, 1.0))
        around_1 = Normalize(min(lowest, 1.0), max(highest, 1.0))
        _map(axes[1], cells, around_1, "{:.2f}", "error / round-to-nearest", blocks, linears)
        axes[0].set_ylabel("block")
    return figure


def width_map(blocks: Sequence[int], linears: Sequence[str], bits: Grid) -> Any:
    """Return a map of the bits of each linear: rows are blocks, columns linears."""
    with pyplot.rc_context(dict(_STYLE)):
        figure, axes = pyplot.subplots(
            figsize=(1.6 + 0.75 * len(linears), 1.6 + min(0.26 * len(blocks), TALLEST)),
            layout="constrained",
        )
        cells = _cells(bits)
        least, most = _range(cells, (1.0, 8.0))
        bar = _map(axes, cells, Normalize(least, most), "{:.3g}", "bits", blocks, linears)
        bar.set_ticks(range(math.ceil(least), math.floor(most) + 1))
        axes.set_ylabel("block")
    return figure


def frontier(
    allocated: Sequence[Point], uniform: Sequence[Point], chosen: tuple[float, float]
) -> Any:
    """Return the expected KL against the size, of allocated and of uniform widths.

    A point is the bytes of the output, its expected KL and its average bits. `chosen` are bytes and
    KL of the output itself.
    """
    with pyplot.rc_context(dict(_STYLE)):
        figure, axes = pyplot.subplots(figsize=(10, 3.4), layout="constrained")
        _points(axes, allocated, "o-", "#3b82c4", "allocated")
        _points(axes, uniform, "s", "#8a8f98", "one width for all layers")
        axes.plot(chosen[0], chosen[1], "o", ms=10, mfc="none", color="#d9822b", label="chosen")
        for nbytes, kl, bits in uniform:
            if kl > SMALLEST:
                text = f"all {bits:.3g} bits"
                axes.annotate(text, (nbytes, kl), (5, 5), textcoords="offset points", fontsize=8)
        axes.set(xlabel="size", ylabel="expected KL in nats a token", yscale="log")
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.margins(0.08)
        axes.legend(frameon=False)
    return figure


def _points(axes: Axes, points: Sequence[Point], marks: str, colour: str, label: str) -> None:
    """Draw points; a logarithmic scale has no place for a KL of 0."""
    shown = [point for point in points if point[1] > SMALLEST]
    sizes = [point[0] for point in shown]
    divergences = [point[1] for point in shown]
    axes.plot(sizes, divergences, marks, ms=5, color=colour, label=label)


def coverage(blocks: Sequence[int], tokens: Sequence[Sequence[int]]) -> Any:
    """Return a map of calibration tokens; experts without a token are red.

    Rows are layers with experts, columns experts.
    """
    widest = max(map(len, tokens))
    counts = numpy.full((len(tokens), widest), numpy.nan)  # NaN: the layer has no such expert
    for row, of_layer in zip(counts, tokens, strict=True):
        row[: len(of_layer)] = of_layer
    seen = numpy.where(counts > 0, counts, numpy.nan)
    never = numpy.where(counts == 0, counts, numpy.nan)
    with pyplot.rc_context(dict(_STYLE)):
        height = 1.3 + min(0.2 * len(blocks), TALLEST)
        figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
        least, most = _range(seen, (1.0, 1.0))
        norm = LogNorm(least / 1.0001, most * 1.0001)
        style: Any = {
            "edgecolors": "face",
            "linewidth": 0.4,
            "rasterized": counts.size > MOST_SHAPES,
        }
        mesh = axes.pcolormesh(seen, norm=norm, cmap="viridis", **style)
        axes.pcolormesh(never, cmap=ListedColormap([NEVER]), **style)
        axes.set(xlabel="expert", ylabel="block", ylim=(len(blocks), 0))
        _ticks(axes.set_xticks, range(widest))
        _ticks(axes.set_yticks, blocks)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _colour_bar(mesh, axes, len(blocks), "tokens")
    return figure


def bars(
    blocks: Sequence[int], seconds: Sequence[float], host: Sequence[int], device: Sequence[int]
) -> Any:
    """Return the time of each block, above the memory in use after it."""
    with pyplot.rc_context(dict(_STYLE)):
        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(10, 3.6), layout="constrained", sharex=True
        )
        above.bar(blocks, seconds, color="#3b82c4")
        above.set_ylabel("seconds")
        below.plot(blocks, _gigabytes(host), "o-", ms=3, color="#3b82c4", label="host")
        if any(device):
            label = "device, peak so far"
            below.plot(blocks, _gigabytes(device), "o-", ms=3, color="#d9822b", label=label)
        below.set(ylabel="GB", xlabel="block", ylim=(0, 1.2 * max([*host, *device]) / GB))
        below.xaxis.get_major_locator().set_params(integer=True)
        below.legend(frameon=False, loc="lower right")
    return figure


def _gigabytes(sizes: Sequence[int]) -> list[float]:
    return [size / GB for size in sizes]


def as_svg(figure: Any, salt: str) -> str:
    """Return the figure as an SVG element with the text colour of the page around it.

    `salt` makes the names inside differ from those of other figures on the page.
    """
    with pyplot.rc_context({**_STYLE, "svg.hashsalt": salt}):
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def as_png(figure: Any) -> bytes:
    """Return the figure as a PNG on white."""
    data = io.BytesIO()
    with pyplot.rc_context(dict(_STYLE)):
        figure.savefig(
            data, format="png", dpi=160, facecolor="white", metadata={"Software": "gptq_cli"}
        )
    pyplot.close(figure)
    return data.getvalue()


def _cells(grid: Grid) -> Cells:
    """Return a grid with NaN for what has no value or cannot be drawn."""
    cells = numpy.array(grid, dtype=float)  # None becomes NaN
    cells[~((cells > SMALLEST) & (cells < LARGEST))] = numpy.nan
    return cells


def _map(
    axes: Axes,
    cells: Cells,
    norm: Normalize,
    pattern: str,
    title: str,
    blocks: Sequence[int],
    linears: Sequence[str],
) -> Any:
    """Draw the cells, each with its number in `pattern` if there are few of them.

    Return the colour bar.
    """
    mesh = axes.pcolormesh(cells, norm=norm, cmap="viridis", edgecolors="face", linewidth=0.4)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(
        _centres(range(len(linears))),
        list(map(_short_name, linears)),
        rotation=35,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,  # a $ in a name is a letter
    )
    _ticks(axes.set_yticks, blocks)
    axes.set_ylim(len(blocks), 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(blocks) <= MOST_NUMBERS:
        _numbers(axes, cells, norm, pattern)
    return _colour_bar(mesh, axes, len(blocks))


def _range(cells: Cells, if_empty: tuple[float, float]) -> tuple[float, float]:
    """Return the smallest and the largest number of `cells`; NaN does not count."""
    numbers = cells[~numpy.isnan(cells)]
    if not numbers.size:
        return if_empty
    return float(numbers.min()), float(numbers.max())


def _short_name(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    return f"...{name[3 - LONGEST_NAME :]}"


def _ticks(put: Callable[[list[float], list[str]], object], names: Sequence[int]) -> None:
    """Put a name in the middle of each cell, or of every nth cell if there are many."""
    step = -(-len(names) // MOST_NUMBERS)
    put(_centres(range(0, len(names), step)), list(map(str, names[::step])))


def _centres(cells: range) -> list[float]:
    return [cell + 0.5 for cell in cells]


def _colour_bar(mesh: Any, axes: Axes, rows: int, label: str = "") -> Any:
    figure: Any = axes.figure
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.03, aspect=20 + rows, label=label)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    return bar


def _numbers(axes: Axes, cells: Cells, norm: Any, pattern: str) -> None:
    """Write the number of each cell into it, in black on the bright colours."""
    style: Any = {"ha": "center", "va": "center", "fontsize": 7}
    for row, values in enumerate(cells.tolist()):
        for column, value in enumerate(values):
            if math.isnan(value):
                continue
            ink = "white"
            if norm(value) > 0.55:
                ink = "black"
            axes.text(column + 0.5, row + 0.5, pattern.format(value), color=ink, **style)
