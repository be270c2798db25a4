"""Checkpoints of `quantize_checkpoint` in the programs that people load them with.

The truth is tests/engines/truth.py: the weights, unpacked by other code, in float32. What an engine
does must be what the table of engines says of it. `make test` skips these tests:
scripts/test_engines.sh makes the environments of the engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "GPTQ_ENGINES" not in os.environ:
    pytest.skip("needs the environments that `make test-engines` makes", allow_module_level=True)

import torch

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Export
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import export_of_layers
from gptq_cli.quantization.run import quantize_checkpoint
from tests.engines.cases import CASES, CHANGES, SHARED, SIZES, Case
from tests.engines.engines import ENGINES, LARGEST_DIFFERENCE, Engine, Process
from tests.engines.results import RESULTS, Results
from tests.engines.truth import logits_of
from tests.engines.verdicts import said_of
from tests.families import save_model, text_file

ENVIRONMENTS = Path(os.environ["GPTQ_ENGINES_HOME"])
ASKED = os.environ["GPTQ_ENGINES"].split()
PAIRS = [
    pytest.param(engine, case, id=f"{engine.name}-{case.id}")
    for engine in ENGINES
    for case in CASES
    if engine.name in ASKED
]


@dataclass(frozen=True, slots=True)
class Written:
    """A quantized checkpoint, its float32 logits [B, T, V], and what the table sees of it."""

    directory: Path
    logits: np.ndarray
    planned: Export
    inspected: Export | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What an engine did: "yes", "no" or "wrong", its words, and its distance to the truth."""

    outcome: str
    words: str
    difference: float | None


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of token ids [2, 24]."""
    file = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(3, 250, (2, 24)))
    return file


@pytest.fixture(scope="session")
def write(ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Written]:
    """Return a function that quantizes a case, once."""
    root = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Written] = {}

    @cache
    def model_of(family: str, dtype: str) -> Path:
        sizes = SIZES | CHANGES.get(family, {})
        directory = root / f"{family}-{dtype}"
        save_model(directory, family, dtype=getattr(torch, dtype), **sizes)
        make_usual(directory)
        return directory

    def write_case(case: Case) -> Written:
        if case.id not in written:
            config = QuantizeConfig(**(SHARED | {"dataset": text_file()} | case.settings))
            source, output = model_of(case.family, case.dtype), root / case.id
            planned = export_of_layers(
                plan_checkpoint(open_checkpoint(source), config).layers, config
            )
            quantize_checkpoint(str(source), output, config)
            inspected = inspect_checkpoint(open_checkpoint(output)).export
            logits = logits_of(output, np.load(ids), root / f"{case.id}-plain")
            written[case.id] = Written(output, logits, planned, inspected)
        return written[case.id]

    return write_case


def make_usual(model: Path) -> None:
    """Give `model` a tokenizer as llama.cpp's converter expects it.

    It has a pair of bytes to merge, and a class that transformers 4 knows too.
    """
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["th"] = len(vocabulary)
    tokenizer["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def load(
    ids: Path, write: Callable[[Case], Written], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Engine, Case], Seen]]:
    """Return a function that shows what an engine does with a case; one engine runs at a time."""
    scratch = tmp_path_factory.mktemp("engines")
    running: dict[str, Process] = {}

    def load_case(engine: Engine, case: Case) -> Seen:
        written = write(case)
        if engine.name not in running:
            stop()
            running[engine.name] = Process(engine, ENVIRONMENTS, scratch)
        process = running.pop(engine.name)  # if it dies, the next case starts another one
        answer = process.load(written.directory, ids, scratch / "logits.npy")
        running[engine.name] = process
        if answer["error"]:
            words = " ".join(answer["error"].replace(str(written.directory), "CHECKPOINT").split())
            return Seen("no", words[:300], None)
        if not answer["computed"]:
            return Seen("yes", "", None)
        difference = _difference(np.load(scratch / "logits.npy"), written.logits)
        precision = engine.precision or case.dtype
        outcome = "wrong"  # NaN is a misreading too
        if difference <= LARGEST_DIFFERENCE[precision] and not answer["unknown"]:
            outcome = "yes"
        return Seen(outcome, ", ".join(answer["unknown"][:3]), difference)

    def stop() -> None:
        while running:
            running.popitem()[1].close()

    yield load_case
    stop()


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative distance of logits; log-probabilities are logits up to a constant."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    found = found - found.mean(-1, keepdims=True)
    expected = expected - expected.mean(-1, keepdims=True)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="session")
def record() -> Iterator[Callable[[Engine, Case, Export, dict[str, Any]], None]]:
    """Return a function that notes a result; the file of results is written at the end."""
    results = Results(Path(os.environ.get("GPTQ_ENGINES_RESULTS", RESULTS)), ENVIRONMENTS)
    yield results.note
    results.write()


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_engine_does_what_the_table_says_of_it(
    engine: Engine,
    case: Case,
    write: Callable[[Case], Written],
    load: Callable[[Engine, Case], Seen],
    record: Callable[[Engine, Case, Export, dict[str, Any]], None],
) -> None:
    written = write(case)
    seen = load(engine, case)
    record(engine, case, written.planned, asdict(seen))
    said = said_of(engine.name, written.planned)
    assert said == said_of(engine.name, written.inspected)
    assert seen.outcome == said, f"{seen.words} {seen.difference}"
