"""Rows as aligned text, for people; nothing is wrapped or cut, whatever the width of the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from gptq_cli.cli.console import on_one_line
from gptq_cli.pipeline.overview import Row


def row_lines(rows: Sequence[Row]) -> list[str]:
    """A line a row: count, name, shape, settings, reason."""
    cells = [(f"{row.count} x", row.name, "x".join(map(str, row.shape)), row.settings, row.why) for row in rows]
    return aligned(cells, right={0})


def aligned(cells: Sequence[Sequence[str]], right: set[int] | None = None) -> list[str]:
    """Lines with each column as wide as its longest cell, two blanks apart; columns in `right` are flush right."""
    cells = [[on_one_line(cell) for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_fit(cell, i, width, right) for i, (cell, width) in enumerate(zip(line, widths, strict=True)))
            .rstrip() for line in cells]  # fmt: skip


def _fit(cell: str, column: int, width: int, right: set[int] | None) -> str:
    return cell.rjust(width) if column in (right or ()) else cell.ljust(width)


def row_data(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Rows as plain JSON values."""
    return [
        {
            "count": row.count,
            "name": row.name,
            "shape": list(row.shape),
            "settings": row.settings,
            "why": row.why,
            "bytes": row.nbytes,
        }
        for row in rows
    ]
