"""Scripts that no test runs whole: names that they import, and constants that they change."""

from __future__ import annotations

import ast
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

from gptq_cli.events import BlockFinished, BlockStarted
from gptq_cli.runtime import memory
from tests.families import save_model

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
OWN = ("gptq_cli", "tests")


def missing_names(script: Path) -> list[str]:
    """Return the names of this source tree that a script imports, but that are not there."""
    missing = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.partition(".")[0] not in OWN:
            continue
        if find_spec(node.module) is None:
            missing.append(node.module)
            continue
        module = import_module(node.module)
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            is_package = hasattr(module, "__path__")
            if not hasattr(module, alias.name) and not (is_package and find_spec(submodule)):
                missing.append(submodule)
    return missing


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.stem)
def test_names_that_a_script_imports_exist(script: Path) -> None:
    assert missing_names(script) == []


def test_a_name_that_does_not_exist_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from gptq_cli.errors import GptqError, Absent\nfrom gptq_cli import solver\n"
    )
    assert missing_names(script) == ["gptq_cli.errors.Absent"]


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return import_module(name)


def test_gpu_checks_find_the_same_bytes_with_other_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = script("check_gpu_quality", monkeypatch)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
    model = save_model(tmp_path / "model", "llama", **shape)
    quality = checks.Quality("cpu", tmp_path, tiny=True, model=model)
    quality.run(model, "balanced-here", "cpu", preset="balanced")
    quality.repeated_bytes()
    assert len(quality.figures) == 3
    assert quality.failed == []
    assert "W_MEM_REPLAY: 2 of 2 batches cannot wait inside a block" in capsys.readouterr().out


def test_forwards_are_compared_with_a_replay_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_forwards", monkeypatch)
    monkeypatch.setattr(bench, "WINDOWS", 16)
    monkeypatch.setattr(bench, "SEQLEN", 32)
    for owner, name in ((memory, "WAITING_SHARE"), (nn.Linear, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # the script changes both
    model = save_model(tmp_path / "model", "llama", hidden_size=128, intermediate_size=128)
    lockstep = bench.quantize(str(model), str(tmp_path / "lockstep"), "lockstep")
    replay = bench.quantize(str(model), str(tmp_path / "replay"), "replay")
    assert lockstep["executions"] < 2 < replay["executions"]
    assert lockstep["sha256"] == replay["sha256"]


class Ticking:
    """A device on which a second passes with each `work`."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def work(self) -> None:
        self.time += 1


def test_a_part_inside_another_is_charged_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, device = script("bench_engine", monkeypatch), Ticking()
    watch = bench.Stopwatch(device)

    def forwards() -> Iterator[int]:
        for batch in range(3):
            device.work()
            yield batch
        device.work()

    def gather() -> None:
        for _ in watch.timed("forward", forwards)():
            device.work()
            device.work()

    timed = watch.timed("hessian", gather)
    for index in range(3):
        watch(BlockStarted(index, 3, "block"))
        device.work()
        timed()
        watch(BlockFinished(index, 3, "block", 1.0, 0, 0))
        device.work()
    seconds = {"forward": 4.0, "hessian": 6.0, "other": 1.0}
    assert watch.blocks == [seconds, seconds]  # not of the first block


def test_the_parts_of_a_block_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = script("bench_engine", monkeypatch)
    arguments = Namespace(bits=4, group_size=32, preset="best")
    device = bench.Bench("cpu", 1)
    settings = bench.settings(arguments, device, 64)
    (block,) = bench.measure_blocks(device, bench.SHAPES["tiny-moe"], settings)
    least = bench.floors(bench.SHAPES["tiny-moe"], settings.base, bench.Text(64, 16), bench.H100)
    assert set(block) == {*least, "other"}
    assert all(seconds > 0 for seconds in block.values())


def test_each_recipe_of_a_peer_is_a_tool_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = script("bench_peers", monkeypatch)
    environments = dict.fromkeys(bench.PEERS)
    environments |= {"autoround": "ar/python", "autoround_light": "light/python"}
    sizes = {"bits": 3, "group_size": 64, "nsamples": 2, "seqlen": 8}
    arguments = Namespace(**sizes, **environments, presets=["gptq"])
    paths = [tmp_path / name for name in ("model", "text", "ids")]
    ours, whole, light = bench.tools(arguments, *paths)
    settings = [str(paths[0]), "OUT", str(paths[2]), "3", "64"]
    assert [tool.name for tool in (ours, whole, light)] == [
        "gptq_cli gptq",
        "autoround",
        "autoround_light",
    ]
    assert whole.command == ["ar/python", whole.command[1], *settings]
    assert light.command == ["light/python", whole.command[1], *settings, "light"]
    assert Path(whole.command[1]).is_file()
