"""The report of a run as one HTML file that needs nothing else."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gptq_cli.config.finding import clock, size
from gptq_cli.publish.charts import as_png, as_svg, bars, coverage, heat_maps
from gptq_cli.publish.report_data import Damaged

WORST = 10
MOST_LINEARS, MOST_CELLS = 200, 50_000  # of the heat maps


@dataclass(frozen=True, slots=True)
class Grids:
    """Errors by block and linear; None where a block has no such linear. Experts of a block are one, by their mean."""

    blocks: tuple[int, ...]
    linears: tuple[str, ...]
    error: tuple[tuple[float | None, ...], ...]
    against_rtn: tuple[tuple[float | None, ...], ...]


def render(run: Mapping[str, Any]) -> str:
    """The page for the data of a run, as `gptq quantize --report` leaves it."""
    environment = Environment(
        loader=PackageLoader("gptq_cli.publish", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"size": size, "clock": clock, "short": _short}
    worst = sorted(run["layers"], key=lambda layer: -(layer["relative_error"] or 0))[:WORST]
    return environment.get_template("report.html.j2").render(
        run=run,
        worst=worst,
        mean=_mean(run["layers"], "relative_error"),
        rtn=_mean(run["layers"], "rtn_relative_error"),
        heat=Markup(as_svg(_heat(run), "heat")),
        experts=experts_of(run["experts"]) if run.get("experts") else None,
        coverage=Markup(as_svg(_coverage(run), "coverage")) if run.get("experts") else None,
        bars=Markup(as_svg(_bars(run), "bars")) if run["blocks"] else None,
    )


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """Tokens of the experts of one layer."""

    name: str
    least: int
    median: float
    most: int
    uncovered: int


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """The layers with the least calibrated experts, and figures of all."""

    rows: tuple[ExpertRow, ...]
    count: int
    least: int
    median: float
    uncovered: int


def experts_of(layers: Sequence[Mapping[str, Any]]) -> ExpertTable:
    """What the page says of the tokens that each expert has seen."""
    rows = [
        ExpertRow(layer["name"], min(layer["tokens"]), median(layer["tokens"]), max(layer["tokens"]),
                  sum(not seen for seen in layer["tokens"]))
        for layer in layers
    ]  # fmt: skip
    seen = [count for layer in layers for count in layer["tokens"]]
    worst = sorted(rows, key=lambda row: (-row.uncovered, row.least, row.median))[:WORST]
    return ExpertTable(
        tuple(worst), len(seen), min(seen), median(seen), sum(not count for count in seen)
    )


def picture(run: Mapping[str, Any]) -> bytes:
    """The heat maps alone, as PNG."""
    return as_png(_heat(run))


def grids(layers: Sequence[Mapping[str, Any]]) -> Grids:
    """The errors of `layers` in rows and columns, in the order in which they come."""
    cells: dict[tuple[int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        cells[layer["block"], _linear(layer["name"])].append(layer)
    blocks = tuple(sorted({block for block, _ in cells}))
    linears = tuple(dict.fromkeys(linear for _, linear in cells))

    def rows(value: Any) -> tuple[tuple[float | None, ...], ...]:
        return tuple(
            tuple(value(cells.get((block, linear), [])) for linear in linears) for block in blocks
        )

    return Grids(blocks, linears, rows(lambda found: _mean(found, "relative_error")), rows(_ratio))


def _heat(run: Mapping[str, Any]) -> Any:
    found = grids(run["layers"])
    if len(found.blocks) * len(found.linears) > MOST_CELLS or len(found.linears) > MOST_LINEARS:
        raise Damaged(
            f"{len(found.linears)} kinds of layers in {len(found.blocks)} blocks are too many to be drawn"
        )
    return heat_maps(found.blocks, found.linears, found.error, found.against_rtn)


def _coverage(run: Mapping[str, Any]) -> Any:
    blocks = [int(found[1]) if (found := re.search(r"\.(\d+)\.", layer["name"])) else index
              for index, layer in enumerate(run["experts"])]  # fmt: skip
    return coverage(blocks, [layer["tokens"] for layer in run["experts"]])


def _bars(run: Mapping[str, Any]) -> Any:
    columns = [
        [block[key] for block in run["blocks"]]
        for key in ("index", "seconds", "host_bytes", "device_bytes")
    ]
    return bars(*columns)


def _linear(name: str) -> str:
    """The last two parts of a name, without numbers: mlp.up_proj; lm_head as it is."""
    inner = re.sub(r"^.*?\.\d+\.", "", name)
    return ".".join(part for part in inner.split(".") if not part.isdigit()).removeprefix(
        "self_attn."
    )


def _mean(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [layer[key] for layer in layers if layer[key] is not None]
    return math.fsum(values) / len(values) if values else None


def _ratio(layers: Sequence[Mapping[str, Any]]) -> float | None:
    mine, rtn = _mean(layers, "relative_error"), _mean(layers, "rtn_relative_error")
    return mine / rtn if mine is not None and rtn else None


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
