"""How long a window of text may be for a model. Needs no torch."""

from __future__ import annotations

from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError


def bounded(config: QuantizeConfig, checkpoint: Checkpoint) -> QuantizeConfig:
    """`config` with windows for which the model has positions; ConfigError as `bounded_seqlen`."""
    seqlen = bounded_seqlen(config.seqlen, said="seqlen" in config.model_fields_set, checkpoint=checkpoint)
    return config.model_copy(update={"seqlen": seqlen})


def bounded_seqlen(seqlen: int, *, said: bool, checkpoint: Checkpoint) -> int:
    """`seqlen`, or the model's positions if they are fewer; ConfigError E_CFG_SEQLEN if the user said more."""
    declared = checkpoint.text_config
    limit = declared.get("max_position_embeddings") or declared.get("n_positions")
    if not isinstance(limit, int) or seqlen <= limit:
        return seqlen
    if said:
        raise ConfigError(
            "E_CFG_SEQLEN", f"seqlen {seqlen} is more than the model's {limit} positions", hint=f"use --seqlen {limit}"
        )
    return limit
