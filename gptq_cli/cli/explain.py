"""`gptq explain`: what a code of an error or a warning means, and what to do about it."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer
import yaml

from gptq_cli.cli.console import Console, fitted
from gptq_cli.cli.options import AsJson
from gptq_cli.config.finding import nearest
from gptq_cli.errors import ConfigError


def explain(
    code: Annotated[
        str | None,
        typer.Argument(
            metavar="CODE", help="as in error[CODE]; all codes if left out", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Explain the code of an error or a warning.

    Example: gptq explain E_SHAPE
    """
    console, texts = Console(as_json), explanations()
    if code is None:
        lines = [fitted(f"{name:<22}{text.splitlines()[0]}", 22) for name, text in texts.items()]
        console.result({"codes": texts}, "\n".join(lines), "\n".join(texts))
        return
    known = code.strip().upper().replace("-", "_")
    if known not in texts:
        near = nearest(known.lower(), [name.lower() for name in texts])
        hint = f"did you mean {near.upper()}?" if near else "gptq explain lists all codes"
        raise ConfigError("E_CODE", f"there is no code `{code}`", hint=hint)
    shown = "\n".join(fitted(line, 0) for line in texts[known].splitlines())
    console.result({"code": known, "text": texts[known]}, f"{known}\n\n{shown}", texts[known])


def explanations() -> dict[str, str]:
    """The text for each code, in the order of the file."""
    content: dict[str, str] = yaml.safe_load(
        files("gptq_cli.cli").joinpath("codes.yaml").read_text(encoding="utf-8")
    )
    return {code: text.strip() for code, text in content.items()}
