"""What the user asks for: the widths that layers may get, and the goal that the widths must meet.

A goal is an average of bits (`bits: 3.5`), a size of the output (`target_size`) or an expected KL
(`target_kl`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.fields import size_in_bytes
from gptq_cli.config.layer import HOLDS, LayerConfig
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import (
    ANY,
    Export,
    Verdict,
    engines_that_fuse,
    export_of,
    target_problems,
    verdicts,
)
from gptq_cli.errors import ConfigError, Problem, one_of, size
from gptq_cli.planning.plan import plan_checkpoint, with_group_size

NO_GOAL = {"target_size": None, "target_kl": None, "allow_bits": None, "protect": None}


def allowed_bits(config: QuantizeConfig) -> list[int]:
    """Return the widths that layers may get: those of `allow_bits`, or all that suit the run.

    These are the widths that the format stores and the target takes. Raises ConfigError E_TARGET if
    the target does not load one of `allow_bits`, or no mixture of widths; E_ALLOC_GOAL if `bits` is
    no average of these widths.
    """
    held = HOLDS[config.format].bits
    if config.allow_bits is None:
        widths = [width for width in held if not _problems(config, [width])]
    else:
        widths = [*config.allow_bits]
    problems = _problems(config, widths or held)
    if problems:
        raise ConfigError.of(problems)
    if len(widths) < 2:
        raise ConfigError(
            "E_TARGET",
            f"{config.target} takes {one_of(widths)} bits only, so there is nothing to allocate",
            hint=f"use --bits {widths[0]}, or another --target",
        )
    if has_average(config):
        _check_average(config, widths)
    return widths


def fusing_engines(config: QuantizeConfig) -> list[str]:
    """Return the engines that load layers of the allowed widths, but what they fuse with one width.

    The parts of a fused layer are one unit if there is such an engine. These are all engines, or
    only the target if there is one.
    """
    return engines_that_fuse(_export(config, allowed_bits(config)), config.target)


def engines_of_goal(config: QuantizeConfig) -> tuple[Verdict, ...]:
    """Return the verdict of each engine on an output that has layers of all allowed widths."""
    return verdicts(_export(config, allowed_bits(config)))


def about_units(fusing: Sequence[str], target: str | None) -> str:
    """Return the sentence that tells whether fused linears get one width, and why.

    >>> about_units(["vllm", "sglang"], None)
    'q, k and v get one width, and so do gate and up, because vllm or sglang fuses them'
    >>> about_units([], "gptqmodel")
    'q, k, v, gate and up get widths of their own, because gptqmodel does not fuse them'
    """
    if fusing:
        why = f"because {one_of(fusing)} fuses them"
        return f"q, k and v get one width, and so do gate and up, {why}"
    why = "because no engine that takes these widths fuses them"
    if target not in (None, ANY):
        why = f"because {target} does not fuse them"
    return f"q, k, v, gate and up get widths of their own, {why}"


def _check_average(config: QuantizeConfig, widths: Sequence[int]) -> None:
    if widths[0] <= config.bits <= widths[-1]:
        return
    who, others = "layers may get", "allow other widths with --allow-bits"
    if config.allow_bits is None and config.target is not None:
        who, others = f"{config.target} takes", "another --target"
    raise ConfigError(
        "E_ALLOC_GOAL",
        f"layers cannot have {config.bits:g} bits on average: {who} {one_of(widths)} bits",
        hint=f"use an average between these, or {others}",
    )


def starting_config(config: QuantizeConfig) -> QuantizeConfig:
    """Return `config` with the widest of the allowed widths for all layers, and without a goal.

    A run is prepared with it until the widths are known; raises what `allowed_bits` raises.
    """
    return at_width(config, allowed_bits(config)[-1])


def sizes(checkpoint: Checkpoint, config: QuantizeConfig) -> tuple[int, int]:
    """Return the bytes of the smallest and the largest output that the allowed widths make.

    Raises ConfigError E_ALLOC_GOAL if `target_size` is not between them.
    """
    widths = allowed_bits(config)
    ends = []
    for width in (widths[0], widths[-1]):
        uniform = with_group_size(checkpoint, at_width(config, width))
        ends.append(plan_checkpoint(checkpoint, uniform).layout.nbytes)
    if config.target_size is not None:
        check_size(config.target_size, ends[0], ends[1])
    return ends[0], ends[1]


def check_size(target: int | str, least: int, most: int) -> None:
    """Raise ConfigError E_ALLOC_GOAL if no output is as small as `target`, or each one is."""
    n_bytes = size_in_bytes(target)
    if n_bytes < least:
        raise unreachable(f"--target-size {target}", f"smallest output has {_in_bytes(least)}")
    if n_bytes > most:
        raise ConfigError(
            "E_ALLOC_GOAL",
            f"--target-size {target} leaves nothing to choose: "
            f"the largest output has {_in_bytes(most)}",
            hint="choose a smaller size, or allow other widths with --allow-bits",
        )


def unreachable(goal: str, least: str) -> ConfigError:
    """Return the error about a goal that is lower than the `least` that the widths can do."""
    return ConfigError(
        "E_ALLOC_GOAL",
        f"no choice of widths meets {goal}: the {least}",
        hint="choose another goal, or allow other widths with --allow-bits",
    )


def _in_bytes(n_bytes: int) -> str:
    """Return a size in words and exactly."""
    return f"{size(n_bytes)} ({n_bytes:,} bytes)"


def has_average(config: QuantizeConfig) -> bool:
    """Return whether `bits` is the goal, as an average over all quantized weights."""
    return config.target_size is None and config.target_kl is None


def at_width(config: QuantizeConfig, width: int) -> QuantizeConfig:
    """Return `config` with one width for all layers, and without a goal."""
    return config.model_copy(update={"bits": width, **NO_GOAL})


def _problems(config: QuantizeConfig, widths: Sequence[int]) -> list[Problem]:
    """Return the reasons why the target does not load layers of these widths in one checkpoint."""
    return target_problems(_export(config, widths), config.target)


def _export(config: QuantizeConfig, widths: Sequence[int]) -> Export:
    """Return what readers see of a checkpoint with layers of these widths."""
    base = at_width(config, widths[0]).base
    layers: dict[str, LayerConfig | None] = {}
    for width in widths:
        layers[str(width)] = replace(base, bits=width)
    return export_of(layers, config.format, lm_head=config.lm_head)
