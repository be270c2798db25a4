"""The stand-ins of these tests have the shape of what they stand for."""

from __future__ import annotations

import dataclasses
import inspect

from gptq_cli.evaluation import perplexity
from gptq_cli.quantization import run

from . import conftest


def test_the_pipeline_takes_the_calls_of_the_command_line() -> None:
    bound = inspect.signature(run.carry_out).bind("prepared", print, "worker")
    assert bound.arguments == {"prepared": "prepared", "report": print, "worker": "worker"}
    assert (
        list(bound.arguments)
        == list(inspect.signature(conftest.FakeQuantizer.__call__).parameters)[1:]
    )
    bound = inspect.signature(perplexity.evaluate_perplexity).bind("m", "request", print)
    assert bound.arguments == {"model": "m", "request": "request", "report": print}


def test_results_have_the_fields_of_their_stand_ins() -> None:
    pairs = [
        (conftest.FakeEvaluated, perplexity.EvalResult),
        (conftest.FakeQuantized, run.QuantizeResult),
    ]
    for fake, real in pairs:
        assert {item.name for item in dataclasses.fields(fake)} <= {
            item.name for item in dataclasses.fields(real)
        }
        assert hasattr(real, "to_json") == hasattr(fake, "to_json")
