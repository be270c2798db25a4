"""Quantize Hugging Face models to GPTQ checkpoints, one transformer block at a time.

    from gptq_cli import QuantizeConfig, quantize

    result = quantize("./Qwen3-0.6B", QuantizeConfig(bits=4))

Names are loaded when they are asked for: importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptq_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from gptq_cli.config.resolve import load_config
    from gptq_cli.config.schema import QuantizeConfig
    from gptq_cli.errors import GptqError
    from gptq_cli.pipeline import events
    from gptq_cli.pipeline.eval_request import EvalRequest
    from gptq_cli.pipeline.evaluate import EvalResult
    from gptq_cli.pipeline.quantize import QuantizeResult
    from gptq_cli.pipeline.run import evaluate_perplexity, quantize

__all__ = [
    "EvalRequest",
    "EvalResult",
    "GptqError",
    "QuantizeConfig",
    "QuantizeResult",
    "evaluate_perplexity",
    "events",
    "load_config",
    "quantize",
]
_HOMES = {
    "EvalRequest": "pipeline.eval_request",
    "EvalResult": "pipeline.evaluate",
    "GptqError": "errors",
    "QuantizeConfig": "config.schema",
    "QuantizeResult": "pipeline.quantize",
    "evaluate_perplexity": "pipeline.run",
    "load_config": "config.resolve",
    "quantize": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name == "events":
        return import_module(f"{__name__}.pipeline.events")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
