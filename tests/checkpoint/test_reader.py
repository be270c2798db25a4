"""The read-ahead of readers and their errors; every test of a run checks the tensors they read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.reader import TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import GptqError
from tests.families import save_model
from tests.runs import quantize, reader

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File name, first byte and number of bytes of each announced range."""
    seen: list[tuple[str, int, int]] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return seen


def of_later_blocks(names: Iterable[str]) -> list[str]:
    """Return the names of the tensors of blocks 1 and 2."""
    return [name for name in names if ".layers.1." in name or ".layers.2." in name]


def ranges(tensors: Iterable[TensorInfo]) -> list[tuple[str, int, int]]:
    """Return file name, first byte and number of bytes of each tensor, sorted."""
    return sorted((t.file.name, t.start, t.end - t.start) for t in tensors)


def test_prefetch_announces_exactly_the_bytes_of_the_tensors(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path, max_shard_size="200KB"))
    names = of_later_blocks(checkpoint.tensors)
    TensorReader(checkpoint).prefetch(names)
    expected = [checkpoint.tensors[name] for name in names]
    assert len({tensor.file for tensor in expected}) > 1
    assert sorted(advised) == ranges(expected)


def test_prefetch_announces_all_parts_of_a_quantized_weight(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    output, _ = quantize(tmp_path, save_model(tmp_path / "model"))
    advised.clear()
    reader(output).prefetch(["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    tensors = open_checkpoint(output).tensors
    expected = [tensors["model.norm.weight"]]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        expected.append(tensors[f"model.layers.1.mlp.up_proj.{part}"])
    assert sorted(advised) == ranges(expected)


def test_a_run_announces_each_later_block_once(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    model = save_model(tmp_path / "model")
    quantize(tmp_path, model)
    tensors = open_checkpoint(model).tensors
    later = [tensors[name] for name in of_later_blocks(tensors)]
    assert sorted(advised) == ranges(later)


def test_prefetch_does_nothing_without_posix_fadvise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path))
    monkeypatch.delattr(os, "posix_fadvise")
    opened: list[object] = []
    monkeypatch.setattr(Path, "open", lambda *arguments, **_: opened.append(arguments))
    TensorReader(checkpoint).prefetch(list(checkpoint.tensors))
    assert opened == []


def read_and_fail(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a tensor from a file that cannot be opened because of `error`."""

    def fail(*_: object, **__: object) -> object:
        raise error

    tensors = TensorReader(open_checkpoint(save_model(tmp_path / "model", num_hidden_layers=1)))
    monkeypatch.setattr("gptq_cli.checkpoint.reader.safe_open", fail)
    tensors.read(tensors.names()[0])


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("unable to open file </a/x> in read-only mode: Too many open files (24)", "E_OPEN_FILES"),
        ("unable to mmap 1000 bytes from file </a/x>: Cannot allocate memory (12)", "E_OOM"),
        ("unable to open file </a/x> in read-only mode: Permission denied (13)", "E_FILE"),
    ],
)
def test_a_file_error_of_torch_has_a_code(
    message: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GptqError, match=r"model\.safetensors`: ") as caught:
        read_and_fail(RuntimeError(message), tmp_path, monkeypatch)
    assert caught.value.code == code
    assert caught.value.hint


def test_another_error_of_torch_is_raised_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="unable to do what was asked"):
        read_and_fail(RuntimeError("unable to do what was asked"), tmp_path, monkeypatch)
