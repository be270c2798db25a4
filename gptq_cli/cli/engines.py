"""Which engines load a checkpoint, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from gptq_cli.cli.console import on_one_line
from gptq_cli.config.engines import Outcome
from gptq_cli.config.targets import Verdict

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
    lines += [f"{WORDS[verdict.outcome]} {verdict.engine}: {verdict.reason}" for verdict in remarks]
    return list(map(on_one_line, lines))


def unread_line(judged: Sequence[Verdict]) -> str | None:
    """One line that names who will not load a checkpoint, None if all will."""
    found: dict[str, list[str]] = {}
    for verdict in judged:
        if verdict.outcome in ("no", "wrong"):
            found.setdefault(WORDS[verdict.outcome], []).append(verdict.engine)
    return "; ".join(f"{word} {', '.join(names)}" for word, names in found.items()) or None
