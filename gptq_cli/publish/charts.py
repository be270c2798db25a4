"""Pictures of a run as inline SVG, in the colours of the page around them, or as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm

INK = "#010203"  # stands for the colour of the page's text
NEVER = "#d64550"  # an expert without a token
LINE = 0.5
MOST_NUMBERS = 24  # blocks; with more the cells are too small for numbers
MOST_SHAPES = 2000  # cells; with more an embedded picture is smaller
TALLEST = 9.0  # inches
LONGEST_NAME = 24  # letters
GB = 1e9

Grid = Sequence[Sequence[float | None]]
_STYLE: Mapping[str, Any] = {
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.linewidth": LINE, "xtick.major.width": LINE, "ytick.major.width": LINE, "font.size": 9,
    "svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def heat_maps(blocks: Sequence[int], linears: Sequence[str], error: Grid, against_rtn: Grid) -> Any:
    """Two maps side by side, rows are blocks and columns linears: the error, and its share of round-to-nearest's."""
    with pyplot.rc_context(dict(_STYLE)):
        figure, axes = pyplot.subplots(
            1,
            2,
            figsize=(2.4 + 1.1 * len(linears), 1.6 + min(0.26 * len(blocks), TALLEST)),
            layout="constrained",
            sharey=True,
        )
        _map(figure, axes[0], error, "error", blocks, linears, log=True)
        _map(figure, axes[1], against_rtn, "error / round-to-nearest", blocks, linears, log=False)
        axes[0].set_ylabel("block")
    return figure


def coverage(blocks: Sequence[int], tokens: Sequence[Sequence[int]]) -> Any:
    """A map of calibration tokens, rows are layers with experts and columns experts; without a token they are red."""
    widest = max(map(len, tokens))
    seen = [
        [count or float("nan") for count in row] + [float("nan")] * (widest - len(row))
        for row in tokens
    ]
    never = [
        [0.0 if not count else float("nan") for count in row] + [float("nan")] * (widest - len(row))
        for row in tokens
    ]
    counts = [count for row in tokens for count in row if count] or [1]
    with pyplot.rc_context(dict(_STYLE)):
        height = 1.3 + min(0.2 * len(blocks), TALLEST)
        figure, axes = pyplot.subplots(figsize=(10, height), layout="constrained")
        norm = LogNorm(min(counts) / 1.0001, max(counts) * 1.0001)
        cells: Any = {
            "edgecolors": "face",
            "linewidth": 0.4,
            "rasterized": widest * len(tokens) > MOST_SHAPES,
        }
        mesh = axes.pcolormesh(seen, norm=norm, cmap="viridis", **cells)
        axes.pcolormesh(never, cmap=ListedColormap([NEVER]), **cells)
        axes.set(xlabel="expert", ylabel="block", ylim=(len(blocks), 0))
        _ticks(axes.set_xticks, range(widest))
        _ticks(axes.set_yticks, blocks)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        _colour_bar(figure, mesh, axes, len(blocks), "tokens")
    return figure


def bars(
    blocks: Sequence[int], seconds: Sequence[float], host: Sequence[int], device: Sequence[int]
) -> Any:
    """Time of each block above the memory after it."""
    with pyplot.rc_context(dict(_STYLE)):
        figure, axes = pyplot.subplots(2, 1, figsize=(10, 3.6), layout="constrained", sharex=True)
        axes[0].bar(blocks, seconds, color="#3b82c4")
        axes[0].set_ylabel("seconds")
        axes[1].plot(blocks, [n / GB for n in host], "o-", ms=3, color="#3b82c4", label="host")
        if any(device):
            axes[1].plot(
                blocks,
                [n / GB for n in device],
                "o-",
                ms=3,
                color="#d9822b",
                label="device, peak so far",
            )
        axes[1].set(ylabel="GB", xlabel="block", ylim=(0, 1.2 * max([*host, *device]) / GB))
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        axes[1].legend(frameon=False, loc="lower right")
    return figure


def as_svg(figure: Any, salt: str) -> str:
    """The figure as an SVG element whose ink is the page's own; `salt` keeps names apart on one page."""
    with pyplot.rc_context({**_STYLE, "svg.hashsalt": salt}):
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def as_png(figure: Any) -> bytes:
    """The figure as a PNG on white."""
    data = io.BytesIO()
    with pyplot.rc_context(dict(_STYLE)):
        figure.savefig(
            data, format="png", dpi=160, facecolor="white", metadata={"Software": "gptq_cli"}
        )
    pyplot.close(figure)
    return data.getvalue()


def _map(
    figure: Any,
    axes: Axes,
    grid: Grid,
    title: str,
    blocks: Sequence[int],
    linears: Sequence[str],
    *,
    log: bool,
) -> None:
    values = [value for row in grid for value in row if _is_drawn(value)]
    lowest, highest = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        norm: Any = LogNorm(lowest / 1.0001, highest * 1.0001)
    else:
        norm = matplotlib.colors.Normalize(min(lowest, 1.0), max(highest, 1.0))
    cells = [[value if _is_drawn(value) else float("nan") for value in row] for row in grid]
    mesh = axes.pcolormesh(cells, norm=norm, cmap="viridis", edgecolors="face", linewidth=0.4)
    axes.set_title(title, fontsize=10)
    names = [
        name if len(name) <= LONGEST_NAME else f"...{name[3 - LONGEST_NAME :]}" for name in linears
    ]
    words: Any = {
        "rotation": 35,
        "ha": "right",
        "rotation_mode": "anchor",
        "parse_math": False,
    }  # a $ is a letter
    axes.set_xticks([i + 0.5 for i in range(len(linears))], names, **words)
    _ticks(axes.set_yticks, blocks)
    axes.set_ylim(len(blocks), 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(blocks) <= MOST_NUMBERS:
        _numbers(axes, cells, norm, "{:.1e}" if log else "{:.2f}")
    _colour_bar(figure, mesh, axes, len(blocks))


def _is_drawn(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic scale has a place for `value`, with some room beside it."""
    return value is not None and 1e-300 < value < 1e300


def _ticks(put: Callable[[list[float], list[str]], object], names: Sequence[int]) -> None:
    """A name in the middle of each cell, or of as many as there is room for."""
    step = -(-len(names) // MOST_NUMBERS)
    put([i + 0.5 for i in range(0, len(names), step)], [str(name) for name in names[::step]])


def _colour_bar(figure: Any, mesh: Any, axes: Axes, rows: int, label: str = "") -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.03, aspect=20 + rows, label=label)
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()


def _numbers(axes: Axes, cells: Sequence[Sequence[float]], norm: Any, pattern: str) -> None:
    for row, values in enumerate(cells):
        for column, value in enumerate(values):
            if value == value:
                ink = "black" if norm(value) > 0.55 else "white"
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    pattern.format(value),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=ink,
                )
