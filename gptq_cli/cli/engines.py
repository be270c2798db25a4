"""Which engines load a checkpoint, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.targets import Export, Outcome, Verdict, verdicts

if TYPE_CHECKING:
    from gptq_cli.pipeline.plan import RunPlan

WORDS: dict[Outcome, str] = {
    "yes": "loads in",
    "limited": "loads with limits in",
    "wrong": "loads WRONGLY in",
    "no": "does not load in",
}


def judge_plan(plan: RunPlan, config: QuantizeConfig) -> tuple[Verdict, ...]:
    """Who will load what `plan` makes."""
    return verdicts(
        Export.of(
            [layer.config for layer in plan.quantized if layer.config],
            config.format,
            config.lm_head,
            names=[layer.name for layer in plan.quantized],
            split_experts=bool(plan.split_experts),
        )
    )


def engine_lines(judged: Sequence[Verdict]) -> list[str]:
    """A line for the engines without a remark, then one for each with its reason."""
    clean = [verdict.engine for verdict in judged if verdict.outcome == "yes"]
    remarks = [verdict for verdict in judged if verdict.outcome != "yes"]
    lines = [f"{WORDS['yes']} {', '.join(clean)}"] if clean else []
    return lines + [f"{WORDS[verdict.outcome]} {verdict.engine}: {verdict.reason}" for verdict in remarks]


def engine_data(judged: Sequence[Verdict]) -> dict[str, Any]:
    """What each engine makes of a checkpoint, as plain JSON values."""
    return {verdict.engine: {"outcome": verdict.outcome, "reason": verdict.reason} for verdict in judged}
