"""Quantize Hugging Face models to GPTQ checkpoints, one transformer block at a time.

    from gptq_cli import quantize

    result = quantize("./Qwen3-0.6B", bits=4)

Names are loaded when they are asked for: importing the package imports nothing else.
"""

# Nothing is imported here: with `python -m gptq_cli` a module of the same name in the current
# directory would run, before `__main__` leaves that directory out. Type checkers read the branch.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from gptq_cli import events
    from gptq_cli.allocation.result import AllocateResult
    from gptq_cli.api import (
        allocate,
        compare,
        convert,
        dequantize,
        evaluate_perplexity,
        generate,
        inspect,
        plan,
        push,
        quantize,
        verify,
    )
    from gptq_cli.checkpoint.verify import Verification
    from gptq_cli.config.resolve import load_config
    from gptq_cli.config.schema import QuantizeConfig
    from gptq_cli.errors import GptqError
    from gptq_cli.errors import __version__ as __version__
    from gptq_cli.evaluation.comparison import CompareResult
    from gptq_cli.evaluation.generate import GenerateResult
    from gptq_cli.evaluation.perplexity import EvalResult
    from gptq_cli.evaluation.request import EvalRequest, GenerateRequest
    from gptq_cli.inspection.layer_statistics import LayerView
    from gptq_cli.inspection.rewriting import Rewritten
    from gptq_cli.inspection.summary import Inspection
    from gptq_cli.preview import PlanResult
    from gptq_cli.publish.push import PushResult
    from gptq_cli.quantization.run import QuantizeResult

__all__ = [
    "AllocateResult",
    "CompareResult",
    "EvalRequest",
    "EvalResult",
    "GenerateRequest",
    "GenerateResult",
    "GptqError",
    "Inspection",
    "LayerView",
    "PlanResult",
    "PushResult",
    "QuantizeConfig",
    "QuantizeResult",
    "Rewritten",
    "Verification",
    "allocate",
    "compare",
    "convert",
    "dequantize",
    "evaluate_perplexity",
    "events",
    "generate",
    "inspect",
    "load_config",
    "plan",
    "push",
    "quantize",
    "verify",
]
_HOMES = {
    "AllocateResult": "allocation.result",
    "CompareResult": "evaluation.comparison",
    "EvalRequest": "evaluation.request",
    "EvalResult": "evaluation.perplexity",
    "GenerateRequest": "evaluation.request",
    "GenerateResult": "evaluation.generate",
    "GptqError": "errors",
    "Inspection": "inspection.summary",
    "LayerView": "inspection.layer_statistics",
    "PlanResult": "preview",
    "PushResult": "publish.push",
    "QuantizeConfig": "config.schema",
    "QuantizeResult": "quantization.run",
    "Rewritten": "inspection.rewriting",
    "Verification": "checkpoint.verify",
    "__version__": "errors",
    "allocate": "api",
    "compare": "api",
    "convert": "api",
    "dequantize": "api",
    "evaluate_perplexity": "api",
    "generate": "api",
    "inspect": "api",
    "load_config": "config.resolve",
    "plan": "api",
    "push": "api",
    "quantize": "api",
    "verify": "api",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "events":
        return import_module(f"{__name__}.events")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if _HOMES[name] != "api":
        return found
    from gptq_cli.config.python_names import for_python
    from gptq_cli.config.schema import QuantizeConfig

    return for_python(found, QuantizeConfig.model_fields)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
