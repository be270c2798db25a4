"""`gptq validate-config`: report all problems of a configuration, or say that it is ok."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_cli.cli.console import Console, engine_lines, fitted, on_one_line
from gptq_cli.cli.options import AsJson, Quiet, plain
from gptq_cli.config.resolve import Resolved, resolve, to_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, engine_data
from gptq_cli.errors import counted

if TYPE_CHECKING:
    from gptq_cli.planning.run_plan import LayerPlan, RunPlan


def validate_config(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML or JSON configuration", show_default=False)
    ],
    model: Annotated[
        Path | None,
        plain("--model", help="model directory to plan for; only headers are read", metavar="DIR"),
    ] = None,
    print_config: Annotated[
        bool,
        plain("--print-config", help="print the resolved configuration, which is a file as well"),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a configuration file, and show what it does to a model.

    All problems are reported at once, each with its line. For a valid file
    one line says ok. GPTQ_* variables are ignored.

    Example: gptq validate-config recipe.yaml --model ./Qwen3-0.6B
    """
    console = Console(as_json, quiet)
    resolved = resolve({}, {}, file)
    console.show_notes(resolved.notes)
    data: dict[str, Any] = {"config": resolved.config, "notes": resolved.notes}
    lines: list[str] = []
    if model is not None:
        from gptq_cli.preview import layer_data

        plan, judged = _plan(console, model, resolved)
        data["plan"] = {"layers": layer_data(plan), "engines": engine_data(judged)}
        lines = [*_plan_lines(plan.layers), *engine_lines(judged)]
    if print_config:
        text = to_yaml(resolved.config) + "".join(f"# {line}\n" for line in lines)
        return console.document(data, text.rstrip("\n"))
    summary = on_one_line(f"{file}: ok, {_settings(resolved.config)}")
    return console.result(data, "\n".join(map(fitted, [summary, *lines])), "ok")


def _settings(config: QuantizeConfig) -> str:
    """Return the settings that matter most, in a few words."""
    groups = f"group_size {config.group_size}"
    return f"{config.bits:g} bits, {groups}, format {config.format}, preset {config.preset}"


def _plan(console: Console, model: Path, resolved: Resolved) -> tuple[RunPlan, tuple[Verdict, ...]]:
    from gptq_cli.checkpoint.locate import local_model
    from gptq_cli.checkpoint.source import open_checkpoint
    from gptq_cli.planning.checks import with_lora
    from gptq_cli.planning.plan import plan_checkpoint, with_group_size
    from gptq_cli.planning.run_plan import judge_plan, remarks

    config = resolved.config
    if config.allocates:
        from gptq_cli.allocation.goals import starting_config

        config = starting_config(config)
        console.say(f"note: layers get widths when they are measured; here all have {config.bits}")
    source = with_lora(open_checkpoint(local_model(model)), config)
    config = with_group_size(source, config)
    plan = plan_checkpoint(source, config)
    for code, remark in remarks(plan, config):
        console.warn(code, remark)
    return plan, judge_plan(plan, config)


def _plan_lines(layers: Sequence[LayerPlan]) -> list[str]:
    """Return a line for each pair of settings and reason, with its number of layers."""
    kinds = Counter((layer.config, layer.why) for layer in layers)
    lines = []
    for (config, why), count in kinds.items():
        storage = "full precision"
        if config:
            storage = f"{config.bits} bits, group_size {config.group_size}"
        lines.append(f"{counted(count, 'layer')}: {storage} ({why})")
    return lines
