"""How long a window of text may be for a model. Needs no torch."""

from __future__ import annotations

from typing import Any

from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import ConfigError


def longest_window(checkpoint: Checkpoint) -> int | None:
    """Positions that the model knows, if its config says."""
    config: dict[str, Any] = checkpoint.config.get("text_config") or checkpoint.config
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return found if isinstance(found, int) else None


def bounded_seqlen(seqlen: int, *, said: bool, checkpoint: Checkpoint) -> int:
    """`seqlen`, or the model's positions if they are fewer; ConfigError E_CFG_SEQLEN if the user said more."""
    limit = longest_window(checkpoint)
    if limit is None or seqlen <= limit:
        return seqlen
    if said:
        raise ConfigError(
            "E_CFG_SEQLEN", f"seqlen {seqlen} is more than the model's {limit} positions", hint=f"use --seqlen {limit}"
        )
    return limit
