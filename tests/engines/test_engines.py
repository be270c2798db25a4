"""Checkpoints of `quantize_checkpoint` in the programs that people load them with.

The truth is tests/engines/truth.py: the weights, unpacked by other code, in float32. What an engine
does must be what the table of engines says of it. `make test` skips these tests:
scripts/test_engines.sh makes the environments of the engines.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "GPTQ_ENGINES" not in os.environ:
    pytest.skip("needs the environments that `make test-engines` makes", allow_module_level=True)

import torch
from transformers import AutoTokenizer

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import Export
from gptq_cli.evaluation.generate import generate_text
from gptq_cli.evaluation.request import GenerateRequest
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.plan import plan_checkpoint
from gptq_cli.planning.run_plan import export_of_layers
from gptq_cli.quantization.run import quantize_checkpoint
from tests.engines.cases import CASES, CHANGES, SHARED, SIZES, Case
from tests.engines.engines import (
    ENGINES,
    LARGEST_DIFFERENCE,
    READERS,
    Engine,
    Process,
    can_try,
    known_words,
)
from tests.engines.results import RESULTS, Results
from tests.engines.truth import logits_of, unpack
from tests.engines.verdicts import said_of
from tests.families import save_model, text_file

ENVIRONMENTS = Path(os.environ["GPTQ_ENGINES_HOME"])
ASKED = os.environ["GPTQ_ENGINES"].split()
KNOWN = {engine.name: engine for engine in ENGINES}
DECODED = [f"compressed-tensors-{bits}-bits-asym" for bits in (2, 3, 4, 8)]
PAIRS = [
    pytest.param(engine, case, id=f"{engine.name}-{case.id}")
    for engine in ENGINES
    for case in CASES
    if engine.name in ASKED and can_try(engine, case)
]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint, the dtype of its model, and the place of its unpacked weights."""

    directory: Path
    dtype: str
    plain: Path


@cache
def truth_of(checkpoint: Checkpoint, ids: Path) -> np.ndarray:
    """Return the float32 logits [B, T, V] of a checkpoint; unpack its weights the first time."""
    if not checkpoint.plain.exists():
        unpack(checkpoint.directory, checkpoint.plain)
    return logits_of(checkpoint.plain, np.load(ids))


@dataclass(frozen=True, slots=True)
class Written:
    """A quantized checkpoint and its source, and what the table sees in plan and output."""

    source: Checkpoint
    output: Checkpoint
    planned: Export
    inspected: Export | None


@dataclass(frozen=True, slots=True)
class Seen:
    """What an engine did: "yes", "no" or "wrong", its words, and its distance to the truth.

    The outcome is "other" if the engine does not run the unquantized model either.
    """

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
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Written]:
    """Return a function that quantizes a case, once."""
    root = tmp_path_factory.mktemp("checkpoints")
    written: dict[str, Written] = {}

    @cache
    def source_of(family: str, dtype: str) -> Checkpoint:
        directory = root / f"{family}-{dtype}"
        sizes = SIZES | CHANGES.get(family, {})
        save_model(directory, family, dtype=getattr(torch, dtype), **sizes)
        make_usual(directory)
        return Checkpoint(directory, dtype, directory)

    def write_case(case: Case) -> Written:
        if case.id not in written:
            config = QuantizeConfig(**(SHARED | {"dataset": text_file()} | case.settings))
            source, output = source_of(case.family, case.dtype), root / case.id
            plan = plan_checkpoint(open_checkpoint(source.directory), config)
            quantize_checkpoint(str(source.directory), output, config)
            written[case.id] = Written(
                source,
                Checkpoint(output, case.dtype, root / f"{case.id}-plain"),
                export_of_layers(plan.layers, config),
                inspect_checkpoint(open_checkpoint(output)).export,
            )
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
def load(ids: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Seen]]:
    """Return a function that shows what an engine does; one engine runs at a time."""
    scratch = tmp_path_factory.mktemp("engines")
    running: dict[str, Process] = {}

    def load_checkpoint(engine: Engine, checkpoint: Checkpoint, *, fresh: bool = False) -> Seen:
        if fresh or engine.name not in running:
            stop()
            running[engine.name] = Process(engine, ENVIRONMENTS, scratch)
        process = running.pop(engine.name)  # if it dies, the next case starts another one
        answer = process.load(checkpoint.directory, ids, scratch / "logits.npy")
        running[engine.name] = process
        difference = None
        if answer.get("computed"):
            truth = truth_of(checkpoint, ids)
            difference = _difference(np.load(scratch / "logits.npy"), truth)
        return _seen(engine, checkpoint, answer, difference)

    def stop() -> None:
        while running:
            running.popitem()[1].close()

    yield load_checkpoint
    stop()


@pytest.fixture(scope="session")
def runs_unquantized(
    load: Callable[..., Seen],
) -> Callable[[Engine, Checkpoint], bool]:
    """Return a function that tells whether an engine runs a model that is not quantized."""
    found: dict[tuple[str, Path], bool] = {}

    def runs(engine: Engine, source: Checkpoint) -> bool:
        key = (engine.name, source.directory)
        if key not in found:
            # It changes classes of transformers for the rest of a process.
            fresh = engine.name == "auto-round"
            found[key] = load(engine, source, fresh=fresh).outcome == "yes"
        return found[key]

    return runs


def _seen(
    engine: Engine, checkpoint: Checkpoint, answer: dict[str, Any], difference: float | None
) -> Seen:
    """Return what the answer of an engine tells, with the distance of its logits if it has some."""
    if answer["error"]:
        words = answer["error"].replace(str(checkpoint.directory), "CHECKPOINT")
        return Seen("no", " ".join(words.split())[:300], None)
    agrees = True
    if difference is not None:
        limit = LARGEST_DIFFERENCE[engine.precision or checkpoint.dtype]
        agrees = difference <= limit  # NaN is a misreading too
        if not np.isfinite(difference):
            difference = None
    outcome = "wrong"
    if agrees and not answer["unknown"]:
        outcome = "yes"
    return Seen(outcome, ", ".join(answer["unknown"][:3]), difference)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the relative distance of logits that four fifths of all positions keep.

    Log-probabilities are logits up to a constant. A mixture may send a token to another expert if
    two are as good, which changes the positions from there on; a misread grid changes all.
    """
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    found = found - found.mean(-1, keepdims=True)
    expected = expected - expected.mean(-1, keepdims=True)
    distances = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.quantile(distances, 0.8))


@pytest.fixture(scope="session")
def record() -> Callable[[Engine, Case, Export, dict[str, Any]], None]:
    """Return a function that notes a result in the file of results."""
    return Results(Path(os.environ.get("GPTQ_ENGINES_RESULTS", RESULTS)), ENVIRONMENTS).note


@pytest.mark.parametrize(("engine", "case"), PAIRS)
def test_engine_does_what_the_table_says_of_it(
    engine: Engine,
    case: Case,
    write: Callable[[Case], Written],
    load: Callable[..., Seen],
    runs_unquantized: Callable[[Engine, Checkpoint], bool],
    record: Callable[[Engine, Case, Export, dict[str, Any]], None],
) -> None:
    written = write(case)
    seen = load(engine, written.output)
    if seen.outcome != "yes" and not runs_unquantized(engine, written.source):
        seen = replace(seen, outcome="other")
    record(engine, case, written.planned, asdict(seen))
    assert (case.family, seen.outcome) != ("llama", "other"), "the reader is broken"
    said = said_of(engine.name, written.planned)
    assert said == said_of(engine.name, written.inspected)
    assert seen.outcome in (said, "other"), f"{seen.words} {seen.difference}"
    if seen.outcome == "no":
        assert known_words(engine.name, seen.words), f"an unknown refusal: {seen.words}"


@pytest.mark.skipif("transformers" not in ASKED, reason="transformers was not asked for")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.id in DECODED], ids=attrgetter("id")
)
def test_transformers_decodes_asymmetric_grids_if_told(
    case: Case, write: Callable[[Case], Written], load: Callable[..., Seen]
) -> None:
    engine = replace(KNOWN["transformers"], name="decoded", reader="run_decoded.py")
    seen = load(engine, write(case).output)
    assert (seen.outcome, seen.words) == ("yes", ""), seen.difference


@pytest.mark.skipif("mlx-lm" not in ASKED, reason="MLX-LM was not asked for")
def test_mlx_loads_the_experts_of_mixtral(
    write: Callable[[Case], Written], load: Callable[..., Seen]
) -> None:
    case = Case("mlx", "mixtral", {"bits": 4, "format": "mlx"}, "mixtral")
    seen = load(KNOWN["mlx-lm"], write(case).output)
    assert (seen.outcome, seen.words) == ("yes", ""), seen.difference


@pytest.mark.skipif("mlx-lm" not in ASKED, reason="MLX-LM was not asked for")
@pytest.mark.parametrize("bits", [3, 4])
def test_mlx_writes_the_text_that_generate_writes(
    bits: int, write: Callable[[Case], Written], tmp_path: Path
) -> None:
    source = write(Case("text", f"{bits} bits", {"bits": bits})).output.directory
    request = GenerateRequest("the history", max_new_tokens=48, device="cpu", dtype="float32")
    ours = generate_text(str(source), request, str)

    convert_checkpoint(str(source), tmp_path / "mlx", "mlx")
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = json.dumps(tokenizer(request.prompt)["input_ids"])
    command = [ENVIRONMENTS / "mlx-lm/bin/python", READERS / "generate_mlx.py"]
    command += [tmp_path / "mlx", prompt, str(ours.tokens)]
    written = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert len(written) > 4
    assert tokenizer.decode(written, skip_special_tokens=True) == ours.text
