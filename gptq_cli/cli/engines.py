"""Which engines load a checkpoint, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptq_cli.config.targets import Outcome, Verdict

WORDS: dict[Outcome, str] = {
    "yes": "loads in",
    "limited": "loads with limits in",
    "wrong": "loads WRONGLY in",
    "no": "does not load in",
}


def engine_lines(judged: Sequence[Verdict]) -> list[str]:
    """A line for the engines without a remark, then one for each with its reason."""
    clean = [verdict.engine for verdict in judged if verdict.outcome == "yes"]
    remarks = [verdict for verdict in judged if verdict.outcome != "yes"]
    lines = [f"{WORDS['yes']} {', '.join(clean)}"] if clean else []
    return lines + [f"{WORDS[verdict.outcome]} {verdict.engine}: {verdict.reason}" for verdict in remarks]


def engine_data(judged: Sequence[Verdict]) -> dict[str, Any]:
    """What each engine makes of a checkpoint, as plain JSON values."""
    return {verdict.engine: {"outcome": verdict.outcome, "reason": verdict.reason} for verdict in judged}
