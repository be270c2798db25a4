"""Quantize Hugging Face models to GPTQ checkpoints, one transformer block at a time.

    from gptq_cli import QuantizeConfig, quantize

    result = quantize("./Qwen3-0.6B", QuantizeConfig(bits=4))

Names are loaded when they are asked for: importing the package imports nothing else.
"""

# Nothing is imported here: with `python -m gptq_cli` a module of the same name in the current
# directory would run, before `__main__` leaves that directory out. Type checkers read the branch.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from gptq_cli import events
    from gptq_cli.api import evaluate_perplexity, generate, quantize
    from gptq_cli.config.resolve import load_config
    from gptq_cli.config.schema import QuantizeConfig
    from gptq_cli.errors import GptqError
    from gptq_cli.errors import __version__ as __version__
    from gptq_cli.evaluation.generate import GenerateResult
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.evaluation.request import EvalRequest, GenerateRequest
    from gptq_cli.quantization.run import QuantizeResult

__all__ = [
    "EvalRequest",
    "EvalResult",
    "GenerateRequest",
    "GenerateResult",
    "GptqError",
    "QuantizeConfig",
    "QuantizeResult",
    "evaluate_perplexity",
    "events",
    "generate",
    "load_config",
    "quantize",
]
_HOMES = {
    "EvalRequest": "evaluation.request",
    "EvalResult": "evaluation.perplexity",
    "GenerateRequest": "evaluation.request",
    "GenerateResult": "evaluation.generate",
    "GptqError": "errors",
    "QuantizeConfig": "config.schema",
    "QuantizeResult": "quantization.run",
    "__version__": "errors",
    "evaluate_perplexity": "api",
    "generate": "api",
    "load_config": "config.resolve",
    "quantize": "api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "events":
        return import_module(f"{__name__}.events")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
