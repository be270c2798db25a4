"""What an output is called if nobody said."""

from __future__ import annotations

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.files import expanded, resolved
from gptq_cli.hub import plain_name


def default_name(model: str, config: QuantizeConfig) -> str:
    """The output's name as published checkpoints are called: Qwen3-0.6B-GPTQ-Int4-g128."""
    path = expanded(model)
    name = path.name if path.name not in ("", "..") else resolved(path).name  # a link is called as its owner calls it
    name = plain_name(name)
    group = f"g{config.group_size}" if config.group_size > 0 else "channel"
    return f"{name}-GPTQ-Int{config.bits}-{group}"
