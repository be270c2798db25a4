"""Stand-ins for the pipeline: the tests of the command line run no model unless they name one."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from typer.testing import CliRunner, Result

from gptq_cli.cli.app import app
from gptq_cli.config.resolve import settings_export
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Verdict, verdicts
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    ExpertsCovered,
    LayerReport,
    LayerSolved,
    LayerStarted,
    PhaseStarted,
    Report,
    RunPlanned,
    Warned,
)
from gptq_cli.planning import checks
from gptq_cli.planning.checks import PreparedRun

OUTPUT_SCHEMA_FILE = Path(__file__).parents[2] / "gptq_cli" / "cli" / "output.schema.json"
OUTPUT_SCHEMA = json.loads(OUTPUT_SCHEMA_FILE.read_text(encoding="utf-8"))

Run = Callable[..., Result]


def run_gptq(*arguments: str | Path) -> Result:
    """Run the program in this process; return its exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def remove_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the variables that change the settings or the output of the program."""
    for variable in [*os.environ]:
        if variable.startswith("GPTQ_") or variable in ("GITHUB_ACTIONS", "FORCE_COLOR"):
            monkeypatch.delenv(variable)


@pytest.fixture
def gptq(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return `run_gptq` for an environment without variables of the program."""
    remove_variables(monkeypatch)
    return run_gptq


def validate_output(data: object, kind: str) -> None:
    """Raise an error if `data` does not fit the part of the output schema for `kind`."""
    part = {"$defs": OUTPUT_SCHEMA["$defs"], "$ref": f"#/$defs/{kind}"}
    Draft202012Validator(part).validate(data)


def layer_report(index: int, name: str = "q_proj", error: float = 1e-4) -> LayerReport:
    """Return the report of layer `name` in block `index`."""
    return LayerReport(
        name=f"model.layers.{index}.{name}",
        block=index,
        bits=4,
        group_size=128,
        relative_error=error,
        rtn_relative_error=3 * error,
        damp_percent=0.1,
        damp_retries=0,
        dead_columns=0,
        tokens=4096,
        seconds=0.5,
    )


def play(
    report: Report, n_blocks: int = 2, config: QuantizeConfig | None = None
) -> tuple[LayerReport, ...]:
    """Report the events of a small run in order; return the reports of its layers."""
    solved = []
    engines: tuple[Verdict, ...] = ()
    target = None
    if config:
        engines, target = verdicts(settings_export(config)), config.target
    report(RunPlanned("m", n_blocks, 2 * n_blocks, 1, 8_000_000, 2_500_000, 4.25, engines, target))
    report(PhaseStarted("calibration", "128 windows"))
    for index in range(n_blocks):
        report(BlockStarted(index, n_blocks, f"model.layers.{index}"))
        for name, error in (("q_proj", 1e-4), ("[bold]down", 3e-4)):
            report(LayerStarted(f"model.layers.{index}.{name}"))
            solved.append(layer_report(index, name, error))
            report(LayerSolved(solved[-1]))
        report(Warned("W_TEST", f"a warning in block {index}"))
        report(BlockFinished(index, n_blocks, f"model.layers.{index}", 18.2, 2 * 2**30, 0))
    return tuple(solved)


@dataclass
class FakeQuantizer:
    """Stands for `carry_out`: records options and settings by name; raises `error` if it is set."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    error: BaseException | None = None
    runs: list[tuple[Any, ...]] = field(default_factory=list)

    def keep_run(self, *arguments: Any) -> None:
        """Stand for `write_report_data`: the output is not there."""
        self.runs.append(arguments)

    def __call__(self, prepared: PreparedRun, report: Report, worker: object = None) -> Any:
        del worker
        config = prepared.config
        named = {"model": prepared.model, "output": prepared.output, "config": config}
        self.calls.append(named | dataclasses.asdict(prepared.options))
        layers = play(report, config=config)
        if self.error:
            raise self.error
        return FakeQuantized(prepared.output, layers, engines=verdicts(settings_export(config)))


@dataclass(frozen=True)
class FakeQuantized:
    output: Path
    layers: tuple[LayerReport, ...]
    experts: tuple[ExpertsCovered, ...] = ()
    engines: tuple[Verdict, ...] = ()
    seconds: float = 3723.4
    bytes_before: int = 8_000_000
    bytes_after: int = 2_500_000
    already_done: bool = False
    image_windows: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "layers": [layer.name for layer in self.layers],
            "worst": float("nan"),
        }


def _plan_without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept a model that is not there as one of the Hub; open and plan models that are there."""
    where = {"directory": Path("/no/such/model"), "name": "m", "commit": None}
    nowhere = SimpleNamespace(**where, is_complete=True)
    unopened = SimpleNamespace(remarks=())
    locate, open_there = checks.locate_model, checks.open_checkpoint
    plan, bound = checks.plan_checkpoint, checks.bounded

    def located(model: str, revision: str | None) -> Any:
        return locate(model, revision) if Path(model).is_dir() else nowhere

    def opened(directory: Path) -> Any:
        return unopened if directory == nowhere.directory else open_there(directory)

    def planned(source: Any, config: QuantizeConfig) -> Any:
        return None if source is unopened else plan(source, config)

    def bounded(config: QuantizeConfig, source: Any) -> QuantizeConfig:
        return config if source is unopened else bound(config, source)

    def streamed(*_arguments: object) -> Any:
        return nowhere, unopened

    monkeypatch.setattr("gptq_cli.checkpoint.streaming.stream_model", streamed)
    monkeypatch.setattr(checks, "locate_model", located)
    monkeypatch.setattr(checks, "open_checkpoint", opened)
    monkeypatch.setattr(checks, "plan_checkpoint", planned)
    monkeypatch.setattr(checks, "bounded", bounded)
    monkeypatch.setattr(checks, "scanning", lambda prepared, **_: nullcontext(prepared))


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **functions: object) -> None:
    """Replace a module by one that has only these functions, so that torch is not imported."""
    replaced = ModuleType(module)
    vars(replaced).update(functions)
    monkeypatch.setitem(sys.modules, module, replaced)


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> FakeQuantizer:
    """Replace the quantization by a stand-in; return it."""
    fake = FakeQuantizer()
    stand_in(monkeypatch, "gptq_cli.quantization.run", carry_out=fake)
    _plan_without_model(monkeypatch)
    monkeypatch.setattr("gptq_cli.storage.manifest.write_report_data", fake.keep_run)
    return fake


@dataclass(frozen=True)
class FakeEvaluated:
    perplexity: float = 12.5
    baseline_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    dataset: str = "wikitext2"
    windows: int = 3
    seqlen: int = 128
    dtype: str = "bfloat16"
    seconds: float = 61.0

    def to_json(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "baseline_perplexity": self.baseline_perplexity}


@dataclass
class FakeEvaluator:
    """Stands for `evaluate_perplexity`: records its calls and returns `result`."""

    result: FakeEvaluated = field(default_factory=FakeEvaluated)
    calls: list[tuple[str, EvalRequest]] = field(default_factory=list)

    def __call__(self, model: str, request: EvalRequest, report: Report) -> FakeEvaluated:
        self.calls.append((model, request))
        report(PhaseStarted("evaluation", model))
        report(BlockStarted(0, 1, "model.layers.0"))
        report(BlockFinished(0, 1, "model.layers.0", 1.0, 2**30, 3 * 2**30))
        return self.result


@pytest.fixture
def evaluator(monkeypatch: pytest.MonkeyPatch) -> FakeEvaluator:
    """Replace the evaluation by a stand-in; return it."""
    fake = FakeEvaluator()
    stand_in(monkeypatch, "gptq_cli.evaluation.perplexity", evaluate_perplexity=fake)
    return fake
