"""The stand-ins of these tests have the signatures and fields of the real pipeline."""

from __future__ import annotations

import dataclasses
import inspect

from gptq_cli.evaluation import perplexity
from gptq_cli.quantization import run

from . import conftest


def test_the_pipeline_takes_the_calls_of_the_command_line() -> None:
    bound = inspect.signature(run.carry_out).bind("prepared", print, "worker")
    assert bound.arguments == {"prepared": "prepared", "report": print, "worker": "worker"}
    _, *fake_parameters = inspect.signature(conftest.FakeQuantizer.__call__).parameters
    assert list(bound.arguments) == fake_parameters
    bound = inspect.signature(perplexity.evaluate_perplexity).bind("m", "request", print)
    assert bound.arguments == {"model": "m", "request": "request", "report": print}


def test_results_have_the_fields_of_their_stand_ins() -> None:
    pairs = [
        (conftest.FakeEvaluated, perplexity.EvalResult),
        (conftest.FakeQuantized, run.QuantizeResult),
    ]
    for fake, real in pairs:
        fake_names = {item.name for item in dataclasses.fields(fake)}
        real_names = {item.name for item in dataclasses.fields(real)}
        assert fake_names <= real_names
        assert hasattr(real, "to_json") == hasattr(fake, "to_json")
