"""The writer takes what was planned, once, and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from gptq_cli.checkpoint.durable import Disk
from gptq_cli.checkpoint.layout import TensorSpec, plan_layout
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import ResourceError
from tests.disks import using

LAYOUT = plan_layout([(TensorSpec("a", "F32", (2, 3)),), (TensorSpec("b", "I32", (4,)),)], 30)
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4, dtype=torch.int32)


def test_tensors_reach_their_shards_in_any_order_and_are_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        hashes = {"b": writer.write("b", B), "a": writer.write("a", A)}
        writer.finish()
    (tmp_path / "out" / "config.json").write_text("{}")
    assert sorted(open_checkpoint(tmp_path / "out").tensors) == ["a", "b"]
    with CheckpointWriter(tmp_path / "out", LAYOUT) as again:
        assert again.holds(hashes)
        assert not again.holds({"a": hashes["b"]})
        assert not again.holds({"c": hashes["b"]})
        again.adopt(hashes)
        again.finish()


def test_what_is_written_again_takes_the_place_of_what_was(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        old = writer.write("a", A - 1)
        writer.sync()
        hashes = {"b": writer.write("b", B), "a": writer.write("a", A)}
        writer.finish()
    with CheckpointWriter(tmp_path / "out", LAYOUT) as again:
        assert again.holds(hashes)
        assert not again.holds({"a": old})


def test_what_was_not_planned_or_never_came_is_a_mistake(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", LAYOUT) as writer:
        with pytest.raises(ValueError, match=r"a: planned F32 \(2, 3\), got torch.float32 \(3, 2\)"):
            writer.write("a", A.T)
        writer.write("a", A)
        with pytest.raises(ValueError, match="never written: b"):
            writer.finish()


def test_shards_that_cannot_all_be_opened_are_given_back(tmp_path: Path) -> None:
    class Second(Disk):
        opened: list[int]

        def open(self, path: Path, flags: int) -> int:
            if "00002" in path.name:
                raise OSError(errno.EMFILE, "too many")
            self.opened = [*getattr(self, "opened", []), super().open(path, flags)]
            return self.opened[-1]

    disk = Second()
    with using(disk), pytest.raises(ResourceError, match="too many"), CheckpointWriter(tmp_path / "out", LAYOUT):
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(disk.opened[-1])
