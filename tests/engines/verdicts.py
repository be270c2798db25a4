"""What the table of engines says of a checkpoint, in the words in which a run is recorded."""

from __future__ import annotations

from gptq_cli.config.serving import LOADS, Export, verdict_of
from tests.engines.engines import ENGINES

TARGETS = {engine.name: engine.target for engine in ENGINES}


def said_of(engine: str, export: Export) -> str:
    """Return what the table says that the `engine` that runs here does: "yes", "no" or "wrong"."""
    outcome = verdict_of(export, TARGETS[engine]).outcome
    if outcome in LOADS:
        return "yes"
    return outcome
