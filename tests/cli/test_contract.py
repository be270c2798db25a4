"""The stand-ins of these tests have the shape of what they stand for."""

from __future__ import annotations

import dataclasses
import inspect

from gptq_cli.evaluation import perplexity
from gptq_cli.quantization import run

from . import conftest


def test_the_pipeline_takes_the_calls_that_the_command_line_makes() -> None:
    options = {"revision": None, "overwrite": False, "resume": "auto", "max_seconds": None, "allow_network_fs": False}
    options |= {"report": print, "place": None}
    bound = inspect.signature(run.quantize_checkpoint).bind("m", "out", "config", **options)
    assert bound.arguments == {"model": "m", "output": "out", "config": "config", **options}
    bound = inspect.signature(perplexity.evaluate_perplexity).bind("m", "request", print)
    assert bound.arguments == {"model": "m", "request": "request", "report": print}


def test_requests_and_results_have_the_fields_that_the_command_line_uses() -> None:
    pairs = [
        (conftest.FakeEvaluated, perplexity.EvalResult),
        (conftest.FakeQuantized, run.QuantizeResult),
    ]
    for fake, real in pairs:
        assert {item.name for item in dataclasses.fields(fake)} <= {item.name for item in dataclasses.fields(real)}
        assert hasattr(real, "to_json") == hasattr(fake, "to_json")
