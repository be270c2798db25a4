"""The report of a run as one HTML file that needs no other file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gptq_cli.config.layer import list_item
from gptq_cli.errors import clock, size
from gptq_cli.publish.charts import (
    as_png,
    as_svg,
    bars,
    coverage,
    frontier,
    heat_maps,
    width_map,
)
from gptq_cli.publish.report_data import Damaged

WORST = 10
MOST_LINEARS, MOST_CELLS = 200, 50_000  # of the heat maps


@dataclass(frozen=True, slots=True)
class Grids:
    """Errors and bits by block and linear; None if a block has no such linear.

    All experts of a block are one linear, with their mean error.
    """

    blocks: tuple[int, ...]
    linears: tuple[str, ...]
    error: tuple[tuple[float | None, ...], ...]
    against_rtn: tuple[tuple[float | None, ...], ...]
    bits: tuple[tuple[float | None, ...], ...]


def render(run: Mapping[str, Any]) -> str:
    """Return the page for the data of a run, as `gptq quantize --report` writes it."""
    environment = Environment(
        loader=PackageLoader("gptq_cli.publish", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"size": size, "clock": clock, "short": _short}
    parts: dict[str, Any] = {
        "worst": sorted(run["layers"], key=lambda layer: -(layer["relative_error"] or 0))[:WORST],
        "mean": _mean(run["layers"], "relative_error"),
        "rtn": _mean(run["layers"], "rtn_relative_error"),
        "rtn_sampled": any(layer.get("rtn_rows") for layer in run["layers"]),
        "followed": strengths_of(run["layers"]),
        "heat": Markup(as_svg(_heat(run), "heat")),
        "experts": None,
        "coverage": None,
        "bars": None,
        "widths": None,
        "frontier": None,
    }
    if len(set(_column(run["layers"], "bits"))) > 1:
        parts["widths"] = Markup(as_svg(_widths(run), "widths"))
    if run.get("choice"):
        parts["frontier"] = Markup(as_svg(_frontier(run["choice"]), "frontier"))
    if run.get("experts"):
        parts["experts"] = experts_of(run["experts"])
        parts["coverage"] = Markup(as_svg(_coverage(run["experts"]), "coverage"))
    if run["blocks"]:
        parts["bars"] = Markup(as_svg(_bars(run["blocks"]), "bars"))
    return environment.get_template("report.html.j2").render(run=run, **parts)


@dataclass(frozen=True, slots=True)
class StrengthRow:
    """The strengths of asymmetric calibration of a linear over all blocks."""

    linear: str
    least: float
    mean: float
    most: float


def strengths_of(layers: Sequence[Mapping[str, Any]]) -> list[StrengthRow]:
    """Return a row for each linear that follows the unquantized model."""
    found: dict[str, list[float]] = defaultdict(list)
    for layer in layers:
        strength = layer.get("asymmetric_calibration")
        if strength is not None:
            found[_linear(layer["name"])].append(strength)
    rows = []
    for linear, strengths in found.items():
        mean = math.fsum(strengths) / len(strengths)
        rows.append(StrengthRow(linear, min(strengths), mean, max(strengths)))
    return rows


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """Tokens per expert of one layer; `uncovered` counts experts without a token."""

    name: str
    least: int
    median: float
    most: int
    uncovered: int


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """The layers with the least calibrated experts, and figures of all experts."""

    rows: tuple[ExpertRow, ...]
    count: int
    least: int
    median: float
    uncovered: int


def experts_of(layers: Sequence[Mapping[str, Any]]) -> ExpertTable:
    """Return the table of tokens per expert."""
    rows = []
    tokens: list[int] = []
    for layer in layers:
        rows.append(_expert_row(layer["name"], layer["tokens"]))
        tokens += layer["tokens"]
    worst = sorted(rows, key=lambda row: (-row.uncovered, row.least, row.median))[:WORST]
    return ExpertTable(tuple(worst), len(tokens), min(tokens), median(tokens), tokens.count(0))


def _expert_row(name: str, tokens: Sequence[int]) -> ExpertRow:
    return ExpertRow(name, min(tokens), median(tokens), max(tokens), tokens.count(0))


def picture(run: Mapping[str, Any]) -> bytes:
    """Return the heat maps alone, as PNG."""
    return as_png(_heat(run))


def grids(layers: Sequence[Mapping[str, Any]]) -> Grids:
    """Return the errors of `layers`, sorted by block, with linears in order of first appearance."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        cells[layer["block"], _linear(layer["name"])].append(layer)
    blocks = tuple(sorted({block for block, _ in cells}))
    linears = tuple(dict.fromkeys(linear for _, linear in cells))
    errors, ratios, bits = [], [], []
    for block in blocks:
        row = [cells.get((block, linear), []) for linear in linears]
        errors.append(tuple([_mean(alike, "relative_error") for alike in row]))
        ratios.append(tuple(map(_ratio, row)))
        bits.append(tuple([_mean(alike, "bits") for alike in row]))
    return Grids(blocks, linears, tuple(errors), tuple(ratios), tuple(bits))


def _heat(run: Mapping[str, Any]) -> Any:
    found = _drawable(run)
    return heat_maps(found.blocks, found.linears, found.error, found.against_rtn)


def _widths(run: Mapping[str, Any]) -> Any:
    found = _drawable(run)
    return width_map(found.blocks, found.linears, found.bits)


def _frontier(choice: Mapping[str, Any]) -> Any:
    points = {}
    for name in ("frontier", "uniform"):
        points[name] = [(row["bytes"], row["expected_kl"], row["bits"]) for row in choice[name]]
    chosen = choice["chosen"]
    return frontier(points["frontier"], points["uniform"], (chosen["bytes"], chosen["expected_kl"]))


def _drawable(run: Mapping[str, Any]) -> Grids:
    """Return the grids of a run; raise Damaged if they are too large to be drawn."""
    found = grids(run["layers"])
    n_blocks, n_linears = len(found.blocks), len(found.linears)
    if n_blocks * n_linears > MOST_CELLS or n_linears > MOST_LINEARS:
        raise Damaged(f"{n_linears} kinds of layers in {n_blocks} blocks are too many to be drawn")
    return found


def _coverage(layers: Sequence[Mapping[str, Any]]) -> Any:
    blocks = []
    for position, layer in enumerate(layers):
        item = list_item(layer["name"])
        if item is None:
            blocks.append(position)
        else:
            blocks.append(int(item.number))
    return coverage(blocks, _column(layers, "tokens"))


def _bars(blocks: Sequence[Mapping[str, Any]]) -> Any:
    return bars(
        _column(blocks, "index"),
        _column(blocks, "seconds"),
        _column(blocks, "host_bytes"),
        _column(blocks, "device_bytes"),
    )


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    return [row[key] for row in rows]


def _linear(name: str) -> str:
    """Return the name of a linear in its block, without numbers: mlp.up_proj; lm_head is kept."""
    item = list_item(name)
    if item is not None:
        name = item.inner
    words = [word for word in name.split(".") if not word.isdigit()]
    return ".".join(words).removeprefix("self_attn.")


def _mean(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [layer[key] for layer in layers if layer[key] is not None]
    if not values:
        return None
    return math.fsum(values) / len(values)


def _ratio(layers: Sequence[Mapping[str, Any]]) -> float | None:
    error, rtn_error = _mean(layers, "relative_error"), _mean(layers, "rtn_relative_error")
    if error is None or not rtn_error:
        return None
    return error / rtn_error


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2e}"
