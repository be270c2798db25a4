"""A model whose files change during a read is refused: no mixture of versions is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptq_cli.checkpoint import verify
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.checkpoint.writer import copy_side_files
from gptq_cli.errors import InputError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    Event,
    LayerSolved,
    LayerStarted,
    PhaseStarted,
)
from gptq_cli.inspection import compare, convert, dequantize, layer_statistics
from gptq_cli.inspection.compare import compare_checkpoints
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from gptq_cli.inspection.layer_statistics import view_layer
from gptq_cli.publish.push import prepare_push, push_upload
from gptq_cli.quantization import resume
from gptq_cli.quantization.resume import identify
from tests.families import save_model, text_file
from tests.runs import CPU, config, digest
from tests.tiny import WORK, Case

WEIGHTS = "model.safetensors"
Change = Callable[[Path], None]


def in_place(file: Path) -> None:
    """Write as many other bytes through the inode of the file."""
    with file.open("r+b") as stream:
        stream.seek(-16, os.SEEK_END)
        stream.write(b"\x3d" * 16)


def in_place_with_its_old_time(file: Path) -> None:
    known = file.stat()
    in_place(file)
    os.utime(file, ns=(known.st_atime_ns, known.st_mtime_ns))


def renamed_over_with_its_old_time(file: Path) -> None:
    known, other = file.stat(), file.with_name("other")
    shutil.copy(file, other)
    in_place(other)
    os.utime(other, ns=(known.st_atime_ns, known.st_mtime_ns))
    other.rename(file)


def one_byte_more(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def gone(file: Path) -> None:
    file.unlink()


CHANGES = {
    in_place: "was written again",
    in_place_with_its_old_time: "was written again",
    renamed_over_with_its_old_time: "was replaced by another file",
    one_byte_more: "had {size} bytes, but now has {larger}",
    gone: "is gone",
}


def block_is_finished(event: Event) -> bool:
    return isinstance(event, BlockFinished) and event.index == 0


def last_block_is_at_work(event: Event) -> bool:
    return isinstance(event, LayerSolved) and event.report.block == 1


def everything_is_copied(event: Event) -> bool:
    return isinstance(event, PhaseStarted) and event.name == "verify"


RESUMED_AFTER = {block_is_finished: 1, last_block_is_at_work: 1, everything_is_copied: 3}


@pytest.fixture
def own(case: Case, tmp_path: Path) -> Case:
    """Return the case with a copy of its model that a test may change."""
    return replace(case, model=Path(shutil.copytree(case.model, tmp_path / "model")))


def when(moment: Callable[[Event], bool], change: Change, file: Path) -> Callable[[Event], None]:
    """Return a report that changes `file` once."""
    done: list[Event] = []

    def report(event: Event) -> None:
        if moment(event) and not done:
            done.append(event)
            change(file)

    return report


def check(error: InputError, file: Path, how: str) -> None:
    assert (error.code, error.exit_code) == ("E_SOURCE_CHANGED", 3)
    assert str(error) == f"`{file}` has changed while it was read: it {how}"
    assert (
        error.hint
        == "let nothing write to the model while it is read, then run the same command again"
    )


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "config.json"])
@pytest.mark.parametrize("change", CHANGES)
def test_an_error_names_the_changed_file_and_publishes_nothing(
    change: Change, name: str, own: Case, tmp_path: Path
) -> None:
    file = own.model / name
    size = file.stat().st_size
    with pytest.raises(InputError) as caught:
        own.run(tmp_path / "out", report=when(block_is_finished, change, file))
    check(caught.value, file, CHANGES[change].format(size=size, larger=size + 1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("moment", "resumed_blocks"), RESUMED_AFTER.items())
def test_no_block_of_a_changed_model_counts_as_finished(
    moment: Callable[[Event], bool], resumed_blocks: int, own: Case, tmp_path: Path
) -> None:
    file = own.model / WEIGHTS
    whole = file.read_bytes()
    with pytest.raises(InputError, match="was written again"):
        own.run(tmp_path / "out", report=when(moment, in_place, file))
    file.write_bytes(whole)
    assert own.run(tmp_path / "out").resumed_blocks == resumed_blocks
    assert digest(tmp_path / "out") == own.tree
    assert not (tmp_path / WORK).exists()


def test_a_model_that_changes_during_hashing_is_refused(
    own: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(own.model)
    hashes = resume.file_hashes

    def late(files: object) -> object:
        yield from hashes(files)  # type: ignore[arg-type]
        in_place(own.model / WEIGHTS)

    monkeypatch.setattr(resume, "file_hashes", late)
    with pytest.raises(InputError) as caught:
        identify(source, None, config(), CPU, "a")
    check(caught.value, own.model / WEIGHTS, "was written again")


def test_a_side_file_is_copied_only_with_its_known_bytes(own: Case, tmp_path: Path) -> None:
    source = open_checkpoint(own.model)
    hashes = identify(source, None, config(), CPU, "a")["source"]["files"]
    copy_side_files(source, tmp_path / "copy", without=(), hashes=hashes)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (
        own.model / "tokenizer.json"
    ).read_bytes()
    in_place_with_its_old_time(own.model / "tokenizer.json")
    with pytest.raises(InputError) as caught:
        copy_side_files(source, tmp_path / "other", without=(), hashes=hashes)
    check(caught.value, own.model / "tokenizer.json", "holds other bytes")
    assert not (tmp_path / "other" / "tokenizer.json").exists()


def test_a_file_that_appears_later_is_no_part_of_the_model(own: Case, tmp_path: Path) -> None:
    def appear(file: Path) -> None:
        file.write_text("{}")

    own.run(
        tmp_path / "out",
        report=when(block_is_finished, appear, own.model / "added.json"),
    )
    assert digest(tmp_path / "out") == own.tree


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("command", ["convert", "dequantize"])
def test_rewriting_a_checkpoint_that_changes_is_refused(
    command: str, late: bool, own: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.run(tmp_path / "quantized")
    file = sorted((tmp_path / "quantized").glob("*.safetensors"))[-1]

    write_json = convert.write_json

    def write_late(path: Path, content: dict[str, object]) -> None:
        in_place_with_its_old_time(file)
        write_json(path, content)

    if late:  # all tensors are written
        monkeypatch.setattr(convert, "write_json", write_late)
        monkeypatch.setattr(dequantize, "write_json", write_late)

    def early(event: Event) -> bool:
        return isinstance(event, LayerStarted) and not late

    report = when(early, in_place_with_its_old_time, file)
    calls = {
        "convert": partial(convert_checkpoint, to="gptq_v2"),
        "dequantize": dequantize_checkpoint,
    }
    with pytest.raises(InputError) as caught:
        calls[command](str(tmp_path / "quantized"), tmp_path / "out", report=report)
    check(caught.value, file, "was written again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "quantized"]


@pytest.mark.parametrize("changing", ["model", "baseline"])
def test_a_model_that_changes_gets_no_perplexity(changing: str, tmp_path: Path) -> None:
    models = {
        name: save_model(tmp_path / name, num_hidden_layers=2) for name in ("model", "baseline")
    }
    first = "model.layers.1"
    seen: list[str] = []

    def moment(event: Event) -> bool:
        if isinstance(event, BlockStarted) and event.name == first:
            seen.append(event.name)
        return len(seen) == 1 + (changing == "baseline")

    request = EvalRequest(
        dataset=text_file(),
        seqlen=32,
        max_windows=2,
        device="cpu",
        baseline=str(models["baseline"]),
    )
    file = models[changing] / WEIGHTS
    with pytest.raises(InputError) as caught:
        evaluate_perplexity(
            str(models["model"]), request, when(moment, in_place_with_its_old_time, file)
        )
    check(caught.value, file, "was written again")


@pytest.mark.parametrize("changing", ["a", "b"])
def test_checkpoints_that_change_are_not_compared(
    changing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {
        name: save_model(tmp_path / name, num_hidden_layers=2, seed=seed)
        for seed, name in enumerate("ab")
    }
    difference = compare._difference

    def late(name: str, a: torch.Tensor, b: torch.Tensor) -> object:
        if name == "model.norm.weight":
            in_place(models[changing] / WEIGHTS)
        return difference(name, a, b)

    monkeypatch.setattr(compare, "_difference", late)
    with pytest.raises(InputError) as caught:
        compare_checkpoints(str(models["a"]), str(models["b"]))
    check(caught.value, models[changing] / WEIGHTS, "was written again")


def test_a_shard_that_is_replaced_is_found_at_the_next_block(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_shard_size="100KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    file = model / index["weight_map"]["model.layers.2.mlp.up_proj.weight"]
    started: list[int] = []

    def replace_it(file: Path) -> None:
        doubled = {name: tensor * 2 for name, tensor in load_file(file).items()}
        save_file(doubled, file.with_name("new"))
        file.with_name("new").rename(file)

    change = when(block_is_finished, replace_it, file)

    def report(event: Event) -> None:
        if isinstance(event, BlockStarted):
            started.append(event.index)
        change(event)

    with pytest.raises(InputError, match=f"`{file}` has changed"):
        Case(model, {}, []).run(tmp_path / "out", report=report, seqlen=16, nsamples=2)
    assert started == [0, 1]


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_checkpoint_that_changes_is_not_inspected(
    command: str, own: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own.run(tmp_path / "quantized")
    file = tmp_path / "quantized" / "config.json"
    module, called = {
        "verify": (verify, "check_manifest"),
        "inspect": (layer_statistics, "_view"),
    }[command]
    usual = getattr(module, called)

    def late(*arguments: object, **options: object) -> object:
        in_place_with_its_old_time(file)
        return usual(*arguments, **options)

    monkeypatch.setattr(module, called, late)
    source = open_checkpoint(tmp_path / "quantized")
    look: dict[str, Callable[[], object]] = {
        "verify": lambda: verify_checkpoint(source.directory, full=True),
        "inspect": lambda: view_layer(source, "layers.1.mlp.down_proj"),
    }
    with pytest.raises(InputError) as caught:
        look[command]()
    check(caught.value, file, "was written again")


def test_only_verified_bytes_are_pushed(own: Case, tmp_path: Path) -> None:
    own.run(tmp_path / "quantized")
    parcel = prepare_push(tmp_path / "quantized", "me/tiny", base_model="org/tiny")
    file = sorted((tmp_path / "quantized").glob("*.safetensors"))[0]
    in_place_with_its_old_time(file)
    with pytest.raises(InputError) as caught:
        push_upload(parcel, public=False, overwrite=False, progress=False)
    check(caught.value, file, "was written again")
