"""The manifest of a finished checkpoint: every file is the one it lists, and it is itself as it was written."""

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


def with_manifest(directory: Path) -> Path:
    entries = {
        path.name: {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
        }
        for path in directory.iterdir()
    }
    return with_content(directory, {"files": entries})


def with_content(directory: Path, content: dict[str, object]) -> Path:
    (directory / "gptq_manifest.json").write_text(
        json.dumps({**content, "checksum": digest(content)})
    )
    return directory


def test_a_changed_file_differs_from_the_manifest(tmp_path: Path) -> None:
    directory = with_manifest(gptq_files().write(tmp_path / "c"))
    found = verify_checkpoint(directory, full=True)
    assert (found.defects, found.hashed) == ((), 4)
    shard = directory / SHARDS[1]
    original = shard.read_bytes()
    for position in (len(original) - 1, len(original) - 5000):
        shard.write_bytes(
            original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :]
        )
        found = verify_checkpoint(directory, full=True)
        assert "E_CKPT_HASH" in {
            defect.code for defect in found.defects if defect.file == SHARDS[1]
        }
    shard.write_bytes(original)
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    (quick,) = verify_checkpoint(directory).defects
    assert (quick.code, quick.file) == ("E_CKPT_HASH", "config.json")


def test_unsafe_missing_and_unlisted_names_are_defects(tmp_path: Path) -> None:
    directory = with_manifest(gptq_files(format="gptq").write(tmp_path / "c"))
    content = json.loads((directory / "gptq_manifest.json").read_text())
    content["files"]["../secret"] = content["files"]["gone.json"] = {"sha256": "0", "size": 1}
    del content["checksum"]
    with_content(directory, content)
    save_file({"x": np.ones(1)}, directory / "stray.safetensors")
    found = {(defect.code, defect.file) for defect in verify_checkpoint(directory).defects}
    assert found == {
        ("E_UNSAFE_PATH", "gptq_manifest.json"),
        ("E_CKPT_MISSING", "gone.json"),
        ("E_CKPT_HASH", "stray.safetensors"),
    }
    for broken in ("{", "[]", '{"files": {"x": 1}}'):
        (directory / "gptq_manifest.json").write_text(broken)
        assert [defect.code for defect in verify_checkpoint(directory).defects] == ["E_CKPT_HASH"]


ADDED = [
    "adapter_config.json", "modeling_llama.py", "pytorch_model.bin", "chat_template.jinja", "extra.safetensors",
    "generation_config.json", "gptq_config.yaml", "additional_chat_templates/tool.jinja", "vocab.txt",
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
def test_a_file_added_to_an_output_is_a_defect(name: str, full: bool, tmp_path: Path) -> None:
    directory = with_manifest(gptq_files().write(tmp_path / "c"))
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"{}")
    found = [
        defect
        for defect in verify_checkpoint(directory, full=full).defects
        if defect.code == "E_CKPT_HASH"
    ]
    assert [(defect.file, defect.message) for defect in found] == [(name, "is not in the manifest")]


@pytest.mark.parametrize("name", BESIDE)
def test_a_file_that_no_reader_loads_may_be_added(name: str, tmp_path: Path) -> None:
    directory = with_manifest(gptq_files().write(tmp_path / "c"))
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
    assert [defect.code for defect in verify_checkpoint(directory, full=True).defects] == [
        "E_CKPT_HASH"
    ]


def test_a_link_to_a_folder_is_an_added_file(tmp_path: Path) -> None:
    directory = with_manifest(gptq_files().write(tmp_path / "c"))
    (tmp_path / "elsewhere").mkdir()
    (directory / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    assert [defect.file for defect in verify_checkpoint(directory).defects] == [
        "additional_chat_templates"
    ]


def test_a_flipped_bit_in_the_manifest_is_a_defect(tmp_path: Path) -> None:
    directory = with_manifest(gptq_files().write(tmp_path / "c"))
    original = (directory / "gptq_manifest.json").read_bytes()
    for position in range(0, len(original), 3):
        flipped = bytes([original[position] ^ 1 << position % 8])
        (directory / "gptq_manifest.json").write_bytes(
            original[:position] + flipped + original[position + 1 :]
        )
        assert "E_CKPT_HASH" in {defect.code for defect in verify_checkpoint(directory).defects}


def test_read_manifest_of_another_content_is_none(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"identity": {"a": 1}})
    known = read_manifest(tmp_path)
    assert known is not None
    assert known["identity"] == {"a": 1}
    file = tmp_path / "gptq_manifest.json"
    for other in (
        "",
        "[]",
        "{}",
        "[" * 100_000,
        json.dumps(known | {"identity": {}}),
        json.dumps({"schema": 1}),
    ):
        file.write_text(other)
        assert read_manifest(tmp_path) is None
