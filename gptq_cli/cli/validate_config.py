"""`gptq validate-config`: every problem of a configuration at once, or what it resolves to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_cli.cli.console import Console, engine_lines
from gptq_cli.cli.options import AsJson, plain
from gptq_cli.config.resolve import Resolved, resolve, to_yaml
from gptq_cli.config.serving import Verdict, engine_data

if TYPE_CHECKING:
    from gptq_cli.planning.run_plan import LayerPlan, RunPlan


def validate_config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML or JSON configuration", show_default=False)
    ],
    model: Annotated[
        Path | None,
        plain("--model", help="model directory to plan for, headers are read only", metavar="DIR"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a configuration file, and with a model what it would do.

    Every problem is reported at once with its line.
    A valid file prints the resolved configuration.
    GPTQ_* variables do not count here, only the file does.

    Example: gptq validate-config recipe.yaml --model ./Qwen3-0.6B
    """
    console = Console(as_json)
    resolved = resolve({}, {}, file)
    for note in resolved.notes:
        console.say(f"note: {note}")
    data: dict[str, Any] = {
        "config": resolved.config.model_dump(mode="json"),
        "notes": list(resolved.notes),
    }
    text = to_yaml(resolved.config)
    if model is not None:
        from gptq_cli.cli.plan_view import layer_data

        plan, judged = _plan(console, model, resolved)
        data["plan"] = {"layers": layer_data(plan), "engines": engine_data(judged)}
        text += "\n" + "".join(
            f"# {line}\n" for line in [*_plan_lines(plan.layers), *engine_lines(judged)]
        )
    console.document(data, text.rstrip("\n"))


def _plan(console: Console, model: Path, resolved: Resolved) -> tuple[RunPlan, tuple[Verdict, ...]]:
    from gptq_cli.checkpoint.locate import local_model
    from gptq_cli.planning.plan import plan_run
    from gptq_cli.planning.run_plan import judge_plan, remarks

    plan = plan_run(local_model(model), resolved.config)
    for code, remark in remarks(plan, resolved.config):
        console.warn(code, remark)
    return plan, judge_plan(plan, resolved.config)


def _plan_lines(layers: Sequence[LayerPlan]) -> list[str]:
    """One line for each setting and reason that occurs, with how many layers it takes."""
    kinds = Counter((layer.config, layer.why) for layer in layers)
    lines = []
    for (config, why), count in kinds.items():
        what = f"{config.bits} bits, group_size {config.group_size}" if config else "full precision"
        lines.append(f"{count} layer{'s' if count > 1 else ''}: {what} ({why})")
    return lines
