"""Damaged work is repeated and never reaches the output."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from gptq_cli.checkpoint.writer import CheckpointWriter
from gptq_cli.errors import ExistsError, GateError, GptqError
from gptq_cli.events import Event, Resumed, Warned
from gptq_cli.quantization.resume import BlockStore
from gptq_cli.storage.manifest import Journal, read_sealed, sealed
from gptq_cli.storage.manifest import digest as digest_of
from tests.disks import CountingDisk, DyingDisk, Killed, using
from tests.runs import digest, messages
from tests.tiny import WORK, Case, kill_after_block

FILES = ("journal.jsonl", "run.json", "hidden-0", "hidden-1", "shard")


@pytest.fixture(scope="module")
def unfinished(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the work of two finished blocks, but without the head."""
    directory = tmp_path_factory.mktemp("unfinished")
    kill_after_block(case, directory / "out", 1)
    return directory


def resumed(case: Case, directory: Path) -> tuple[list[Event], dict[str, str]]:
    events: list[Event] = []
    with using(CountingDisk()):
        case.run(directory / "out", report=events.append)
    return events, digest(directory / "out")


def resume_codes(events: list[Event]) -> list[str]:
    warned = [event.code for event in events if isinstance(event, Warned)]
    return [code for code in warned if code.startswith("W_RESUME")]


def resumed_after(events: list[Event]) -> int:
    """Return the number of blocks that the run reused; 0 = it started over."""
    indices = [event.index for event in events if isinstance(event, Resumed)]
    assert len(indices) <= 1
    assert 0 not in indices
    return sum(indices)


def copy_of(unfinished: Path, target: Path) -> Path:
    return shutil.copytree(unfinished, target)


def flip(file: Path, where: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 4
    file.write_bytes(content)


def shard_of(directory: Path, tensor: str) -> tuple[Path, int]:
    """Return the shard that holds `tensor` and its first byte there."""
    for shard in (directory / WORK / "out").glob("*.safetensors"):
        content = shard.read_bytes()
        length = int.from_bytes(content[:8], "little")
        entry = json.loads(content[8 : 8 + length]).get(tensor)
        if entry:
            return shard, 8 + length + entry["data_offsets"][0]
    raise LookupError(tensor)


def flip_tensor(directory: Path, tensor: str) -> None:
    shard, start = shard_of(directory, tensor)
    content = bytearray(shard.read_bytes())
    content[start] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_a_rerun_repairs_a_flipped_bit_in_unfinished_work(
    name: str, where: float, case: Case, unfinished: Path, tmp_path: Path
) -> None:
    directory = copy_of(unfinished, tmp_path / "work")
    file = directory / WORK / name
    if name == "shard":
        file, _ = shard_of(directory, "model.layers.0.mlp.down_proj.scales")
    flip(file, where)
    assert resumed(case, directory)[1] == case.tree


@pytest.mark.parametrize(
    ("name", "where", "first", "words"),
    [
        ("hidden-1", 0.5, 1, "the hidden states after block 2 are not as they were written"),
        ("journal.jsonl", 0.1, 0, "bytes of the journal are not valid"),
        ("journal.jsonl", 0.9, 1, "bytes of the journal are not valid"),
        ("run.json", 0.5, 0, "run.json` cannot be read: the run starts over"),
    ],
)
def test_damage_is_reported_and_only_dependent_blocks_rerun(
    name: str, where: float, first: int, words: str, case: Case, unfinished: Path, tmp_path: Path
) -> None:
    directory = copy_of(unfinished, tmp_path / "work")
    flip(directory / WORK / name, where)
    events, tree = resumed(case, directory)
    assert resume_codes(events) == ["W_RESUME_DAMAGED"]
    assert words in messages(events, "W_RESUME_DAMAGED")[0]
    assert resumed_after(events) == first
    assert tree == case.tree


@pytest.mark.parametrize("missing", [["identity"], ["request"], ["identity", "request"]])
def test_a_run_file_without_its_parts_is_damaged(
    missing: list[str], case: Case, unfinished: Path, tmp_path: Path
) -> None:
    directory = copy_of(unfinished, tmp_path / "work")
    file = directory / WORK / "run.json"
    run = json.loads(file.read_bytes())
    rest = {key: value for key, value in run.items() if key not in missing}
    file.write_text(json.dumps(sealed(rest)))
    events, tree = resumed(case, directory)
    assert (resume_codes(events), tree) == (["W_RESUME_DAMAGED"], case.tree)


def test_a_run_file_without_a_model_belongs_to_another_run(
    case: Case, unfinished: Path, tmp_path: Path
) -> None:
    directory = copy_of(unfinished, tmp_path / "work")
    file = directory / WORK / "run.json"
    run = json.loads(file.read_bytes())
    for request in ({}, {"model": 7, "config": 7}):
        identity = run["identity"] | {"source": {"files": 1}}
        file.write_text(json.dumps(sealed({"identity": identity, "request": request})))
        (directory / WORK / "journal.jsonl").unlink(missing_ok=True)
        Journal(directory / WORK / "journal.jsonl", digest_of(identity)).append({"block": 0})
        with pytest.raises(ExistsError) as caught:
            resumed(case, directory)
        assert (caught.value.code, caught.value.exit_code) == ("E_RESUME_MISMATCH", 6)


def test_a_damaged_tensor_reruns_its_block_and_later_blocks(
    case: Case, unfinished: Path, tmp_path: Path
) -> None:
    for block in (0, 1):
        directory = copy_of(unfinished, tmp_path / str(block))
        flip_tensor(directory, f"model.layers.{block}.mlp.down_proj.scales")
        events, tree = resumed(case, directory)
        warned = messages(events, "W_RESUME_DAMAGED")
        assert warned[0].startswith(f"block {block + 1} is not as it was written")
        assert resumed_after(events) == block
        assert tree == case.tree


def test_a_truncated_journal_is_read_up_to_its_last_whole_line(
    unfinished: Path, tmp_path: Path
) -> None:
    content = (unfinished / WORK / "journal.jsonl").read_bytes()
    seed = json.loads((unfinished / WORK / "run.json").read_bytes())
    assert content.count(b"\n") == 2
    first_line = content.index(b"\n") + 1
    near_first_line = range(first_line - 3, first_line + 3)
    for length in sorted({*range(0, len(content), 7), *near_first_line, len(content)}):
        (tmp_path / "journal").write_bytes(content[:length])
        journal = Journal(tmp_path / "journal", digest_of(seed["identity"]))
        expected = (length >= first_line) + (length == len(content))
        assert len(journal.entries) == expected
        assert journal.damaged_bytes == length - (0, first_line, len(content))[expected]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.99])
def test_a_run_resumes_from_a_truncated_journal(
    share: float, case: Case, unfinished: Path, tmp_path: Path
) -> None:
    directory = copy_of(unfinished, tmp_path / "work")
    journal = directory / WORK / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[: int(share * journal.stat().st_size)])
    assert resumed(case, directory)[1] == case.tree


def test_a_journal_rejects_moved_lines_and_lines_of_other_runs(
    unfinished: Path, tmp_path: Path
) -> None:
    lines = (unfinished / WORK / "journal.jsonl").read_bytes().splitlines(keepends=True)
    seed = digest_of(json.loads((unfinished / WORK / "run.json").read_bytes())["identity"])
    for content, given, count in (
        (lines[1:] + lines[:1], seed, 0),
        (lines[:1] * 2, seed, 1),
        (lines, "other", 0),
    ):
        (tmp_path / "journal").write_bytes(b"".join(content))
        assert len(Journal(tmp_path / "journal", given).entries) == count
    (tmp_path / "journal").write_bytes(b'["no", "object"]\n')
    assert Journal(tmp_path / "journal", seed).entries == []


def test_a_journal_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GptqError) as caught:
        Journal(tmp_path, "")
    assert (caught.value.code, caught.value.exit_code) == ("E_FILE", 3)
    assert str(caught.value).startswith(f"cannot read `{tmp_path}`: ")


@pytest.mark.parametrize("depth", [*range(sys.getrecursionlimit() - 150, 1000, 2), 100_000])
def test_nested_brackets_are_damage(depth: int, tmp_path: Path) -> None:
    nested = '{"checksum": "", "seed": ' + "[" * depth + "]" * depth + "}\n"
    (tmp_path / "file").write_text(nested)
    assert read_sealed(tmp_path / "file") is None
    journal = Journal(tmp_path / "file", "")
    assert (journal.entries, journal.damaged_bytes) == ([], len(nested))


def test_bytes_that_the_disk_altered_are_not_published(case: Case, tmp_path: Path) -> None:
    class Forgetful(CountingDisk):
        def write(self, descriptor: int, data: memoryview, offset: int) -> int:
            flipped = bytearray(data)
            if len(data) == 2048:  # codes of 4 bits, 64 x 64 of them
                flipped[7] ^= 1
            return super().write(descriptor, memoryview(flipped), offset)

    with (
        using(Forgetful()),
        pytest.raises(GateError, match="reads back with other bytes") as caught,
    ):
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_VERIFY", 4)
    assert not (tmp_path / "out").exists()


def test_a_damaged_output_does_not_count_as_finished(case: Case, tmp_path: Path) -> None:
    case.run(tmp_path / "out")
    flip(tmp_path / "out" / "config.json", 0.5)
    with pytest.raises(
        ExistsError, match=r"is not what this run writes: config\.json is damaged"
    ) as caught:
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_EXISTS", 6)
    assert not case.run(tmp_path / "out", overwrite=True).already_done
    assert digest(tmp_path / "out") == case.tree
    with pytest.raises(ExistsError, match="--bits was 4, is 3"):
        case.run(tmp_path / "out", bits=3)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "code.py", "chat_template.jinja", "pytorch_model.bin"]
)
def test_an_output_with_an_extra_file_does_not_count_as_finished(
    name: str, case: Case, tmp_path: Path
) -> None:
    case.run(tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(
        ExistsError, match=f"is not what this run writes: {name} is not in the manifest"
    ) as caught:
        case.run(tmp_path / "out")
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_EXISTS", 6)
    assert (caught.value.hint or "").startswith(
        "move the files that are not of the checkpoint away"
    )
    (tmp_path / "out" / name).unlink()
    assert case.run(tmp_path / "out").already_done


def change_report(directory: Path) -> None:
    journal = directory / WORK / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"dead_columns": 0', b'"dead_columns": 7'))


def change_tensor(directory: Path) -> None:
    flip_tensor(directory, "model.layers.1.mlp.down_proj.scales")


def change_hidden(directory: Path) -> None:
    path = directory / WORK / "hidden-1"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for position in range(middle, middle + 400):
        content[position] ^= 64
    path.write_bytes(content)


MUTATIONS = {
    "the journal's checksums": (Journal, "_sum", lambda *_: "0", change_report),
    "the hashes of tensors": (CheckpointWriter, "holds", lambda *_: True, change_tensor),
    "the hash of hidden states": (BlockStore, "_has_hidden", lambda *_: True, change_hidden),
}


@pytest.mark.parametrize("kind", MUTATIONS)
def test_each_checksum_is_needed_to_catch_its_damage(
    kind: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, instead, damage = MUTATIONS[kind]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, instead)
        kill_after_block(case, tmp_path / "mutated" / "out", 1)
        damage(tmp_path / "mutated")
        try:
            harmless = resumed(case, tmp_path / "mutated")[1] == case.tree
        except Exception:  # noqa: BLE001
            harmless = False
    assert not harmless
    kill_after_block(case, tmp_path / "real" / "out", 1)
    damage(tmp_path / "real")
    assert resumed(case, tmp_path / "real")[1] == case.tree


def test_a_run_that_is_killed_repeatedly_still_finishes(case: Case, tmp_path: Path) -> None:
    output, kills = tmp_path / "out", 0
    while True:
        try:
            with using(DyingDisk(60 + 10 * kills)):
                case.run(output)
            break
        except Killed:
            kills += 1
    assert kills > 4
    assert digest(output) == case.tree
