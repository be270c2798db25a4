"""What the table of engines says of a checkpoint, in the words in which a run is recorded."""

from __future__ import annotations

from gptq_cli.config.serving import Export, verdicts


def said_of(engine: str, export: Export) -> str:
    """Return what the table says that `engine` does on this machine: "yes", "no" or "wrong"."""
    found = {verdict.engine: verdict for verdict in verdicts(export)}
    verdict = found.get(engine)
    if verdict is None:
        return "unknown"
    if verdict.outcome != "limited":
        return verdict.outcome
    if "GPU only" in verdict.reason or "not on CPU" in verdict.reason:
        return "no"
    return "yes"
