"""What an output is called if nobody said."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.config.schema import QuantizeConfig


def default_name(model: str, config: QuantizeConfig) -> str:
    """The output's name as published checkpoints are called: Qwen3-0.6B-GPTQ-Int4-g128."""
    path = Path(model).expanduser()
    name = path.name if path.name not in ("", "..") else path.resolve().name  # a link is called as its owner calls it
    group = f"g{config.group_size}" if config.group_size > 0 else "channel"
    return f"{name}-GPTQ-Int{config.bits}-{group}"
