"""What readers tell the system to read ahead; that they read rightly is seen wherever a checkpoint is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gptq_cli.checkpoint.reader import TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import GptqError
from tests.families import save_model
from tests.runs import quantize, reader

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """File name, first byte and number of bytes of everything that was announced."""
    seen: list[tuple[str, int, int]] = []

    def advise(descriptor: int, start: int, length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_WILLNEED:
            seen.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, start, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return seen


def test_prefetch_announces_exactly_the_bytes_of_the_tensors(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path, max_shard_size="200KB"))
    names = [name for name in checkpoint.tensors if ".layers.1." in name or ".layers.2." in name]
    TensorReader(checkpoint).prefetch(names)
    expected = [checkpoint.tensors[name] for name in names]
    assert len({tensor.file for tensor in expected}) > 1
    assert sorted(advised) == sorted((t.file.name, t.start, t.end - t.start) for t in expected)


def test_prefetch_announces_all_parts_of_a_quantized_weight(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    output, _ = quantize(tmp_path, save_model(tmp_path / "model"))
    advised.clear()
    reader(output).prefetch(["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
    tensors = open_checkpoint(output).tensors
    parts = [
        f"model.layers.1.mlp.up_proj.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    ]
    expected = [tensors[name] for name in (*parts, "model.norm.weight")]
    assert sorted(advised) == sorted((t.file.name, t.start, t.end - t.start) for t in expected)


def test_a_run_announces_each_later_block_once(
    tmp_path: Path, advised: list[tuple[str, int, int]]
) -> None:
    model = save_model(tmp_path / "model")
    quantize(tmp_path, model)
    tensors = open_checkpoint(model).tensors
    later = [t for name, t in tensors.items() if ".layers.1." in name or ".layers.2." in name]
    assert sorted(advised) == sorted((t.file.name, t.start, t.end - t.start) for t in later)


def test_prefetch_does_nothing_without_posix_fadvise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(save_model(tmp_path))
    monkeypatch.delattr(os, "posix_fadvise")
    opened: list[object] = []
    monkeypatch.setattr(Path, "open", lambda *arguments, **_: opened.append(arguments))
    TensorReader(checkpoint).prefetch(list(checkpoint.tensors))
    assert opened == []


@pytest.mark.parametrize(
    ("says", "code"),
    [
        ("unable to open file </a/x> in read-only mode: Too many open files (24)", "E_OPEN_FILES"),
        ("unable to mmap 1000 bytes from file </a/x>: Cannot allocate memory (12)", "E_OOM"),
        ("unable to open file </a/x> in read-only mode: Permission denied (13)", "E_FILE"),
    ],
)
def test_a_file_error_of_torch_has_a_code(
    says: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError(says)

    tensors = TensorReader(open_checkpoint(save_model(tmp_path / "model", num_hidden_layers=1)))
    monkeypatch.setattr("gptq_cli.checkpoint.reader.safe_open", fail)
    with pytest.raises(GptqError, match=r"model\.safetensors`: ") as caught:
        tensors.read(tensors.names()[0])
    assert (caught.value.code, bool(caught.value.hint)) == (code, True)
    says = "unable to do what was asked"
    with pytest.raises(RuntimeError, match=says):
        tensors.read(tensors.names()[0])
