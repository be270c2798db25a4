"""The manifest of a finished checkpoint: it lists every file, and its checksum covers itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.storage.manifest import digest, read_manifest, write_manifest
from tests.checkpoint.gptq_files import SHARDS, gptq_files


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound checkpoint with a manifest."""
    directory = gptq_files().write(tmp_path / "c")
    entries = {}
    for path in directory.iterdir():
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        entries[path.name] = {"sha256": sha256, "size": path.stat().st_size}
    write_content(directory, {"files": entries})
    return directory


def write_content(directory: Path, content: dict[str, object]) -> None:
    """Write `content` as the manifest of `directory`, with its checksum."""
    text = json.dumps({**content, "checksum": digest(content)})
    (directory / "gptq_manifest.json").write_text(text)


def flip(original: bytes, position: int, bit: int) -> bytes:
    """Return `original` with one bit of the byte at `position` changed."""
    changed = bytes([original[position] ^ 1 << bit])
    return original[:position] + changed + original[position + 1 :]


def codes(directory: Path, *, full: bool = False) -> list[str]:
    """Return the codes of the defects of the checkpoint."""
    return [defect.code for defect in verify_checkpoint(directory, full=full).defects]


def test_full_verify_hashes_every_file(directory: Path) -> None:
    found = verify_checkpoint(directory, full=True)
    assert (found.defects, found.hashed) == ((), 4)


@pytest.mark.parametrize("from_end", [1, 5000])
def test_full_verify_finds_a_changed_byte_of_a_shard(from_end: int, directory: Path) -> None:
    shard = directory / SHARDS[1]
    original = shard.read_bytes()
    shard.write_bytes(flip(original, len(original) - from_end, 0))
    found = verify_checkpoint(directory, full=True)
    assert ("E_CKPT_HASH", SHARDS[1]) in [(defect.code, defect.file) for defect in found.defects]


def test_quick_verify_finds_a_changed_side_file(directory: Path) -> None:
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    (defect,) = verify_checkpoint(directory).defects
    assert (defect.code, defect.file) == ("E_CKPT_HASH", "config.json")


def test_unsafe_missing_and_unlisted_names_are_defects(directory: Path) -> None:
    content = json.loads((directory / "gptq_manifest.json").read_text())
    content["files"]["../secret"] = content["files"]["gone.json"] = {"sha256": "0", "size": 1}
    del content["checksum"]
    write_content(directory, content)
    save_file({"x": np.ones(1)}, directory / "stray.safetensors")
    found = {(defect.code, defect.file) for defect in verify_checkpoint(directory).defects}
    assert found == {
        ("E_UNSAFE_PATH", "gptq_manifest.json"),
        ("E_CKPT_MISSING", "gone.json"),
        ("E_CKPT_HASH", "stray.safetensors"),
    }


@pytest.mark.parametrize("text", ["{", "[]", '{"files": {"x": 1}}'])
def test_a_broken_manifest_is_a_defect(text: str, directory: Path) -> None:
    (directory / "gptq_manifest.json").write_text(text)
    assert codes(directory) == ["E_CKPT_HASH"]


ADDED = [
    "adapter_config.json", "modeling_llama.py", "pytorch_model.bin", "chat_template.jinja",
    "extra.safetensors", "generation_config.json", "gptq_config.yaml",
    "additional_chat_templates/tool.jinja", "vocab.txt",
]  # fmt: skip
BESIDE = [
    "gptq_report.json",
    "gptq_report.html",
    "README.md",
    "LICENSE",
    ".gitattributes",
    ".cache/huggingface/x.lock",
]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ADDED)
def test_a_file_added_to_an_output_is_a_defect(name: str, full: bool, directory: Path) -> None:
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"{}")
    found = verify_checkpoint(directory, full=full).defects
    hashes = [defect for defect in found if defect.code == "E_CKPT_HASH"]
    expected = [(name, "is not in the manifest")]
    assert [(defect.file, defect.message) for defect in hashes] == expected


@pytest.mark.parametrize("name", BESIDE)
def test_a_file_that_no_reader_loads_may_be_added(name: str, directory: Path) -> None:
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_bytes(b"{}")
    assert verify_checkpoint(directory, full=True).ok


def test_a_manifest_may_list_files_in_folders(tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("{}")
    write_manifest(directory, {})
    assert verify_checkpoint(directory, full=True).ok
    (directory / "additional_chat_templates" / "tool.jinja").write_text("[]")
    assert codes(directory, full=True) == ["E_CKPT_HASH"]


def test_a_link_to_a_folder_is_an_added_file(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (directory / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (defect,) = verify_checkpoint(directory).defects
    assert defect.file == "additional_chat_templates"


def test_a_flipped_bit_in_the_manifest_is_a_defect(directory: Path) -> None:
    file = directory / "gptq_manifest.json"
    original = file.read_bytes()
    for position in range(0, len(original), 3):
        file.write_bytes(flip(original, position, position % 8))
        assert "E_CKPT_HASH" in codes(directory)


def test_read_manifest_of_another_content_is_none(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"identity": {"a": 1}})
    known = read_manifest(tmp_path)
    assert known is not None
    assert known["identity"] == {"a": 1}
    file = tmp_path / "gptq_manifest.json"
    changed = json.dumps(known | {"identity": {}})
    for text in ("", "[]", "{}", "[" * 100_000, changed, json.dumps({"schema": 1})):
        file.write_text(text)
        assert read_manifest(tmp_path) is None
