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
        _map(axes[0], error, "error", blocks, linears, log=True)
        _map(axes[1], against_rtn, "error / round-to-nearest", blocks, linears, log=False)
        axes[0].set_ylabel("block")
    return figure


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


def _map(
    axes: Axes, grid: Grid, title: str, blocks: Sequence[int], linears: Sequence[str], *, log: bool
) -> None:
    cells = numpy.array(grid, dtype=float)  # None becomes NaN
    cells[~((cells > SMALLEST) & (cells < LARGEST))] = numpy.nan
    lowest, highest = _range(cells, (0.1, 1.0))
    if log:
        norm: Normalize = LogNorm(lowest / 1.0001, highest * 1.0001)
        pattern = "{:.1e}"
    else:
        norm = Normalize(min(lowest, 1.0), max(highest, 1.0))
        pattern = "{:.2f}"
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
    _colour_bar(mesh, axes, len(blocks))


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


def _colour_bar(mesh: Any, axes: Axes, rows: int, label: str = "") -> None:
    figure: Any = axes.figure
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.03, aspect=20 + rows, label=label)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()


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
