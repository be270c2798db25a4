"""What counts as the same run, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.quantization.resume import (
    Identity,
    check_agreement,
    differences,
    identify,
    in_words,
)
from gptq_cli.runtime.ranks import Ranks
from tests.families import save_model
from tests.runs import config

CPU = torch.device("cpu")


def test_every_byte_belongs_to_the_identity_but_no_path(tmp_path: Path) -> None:
    one, other = (
        save_model(tmp_path / "a", max_shard_size="200KB"),
        save_model(tmp_path / "b", max_shard_size="200KB"),
    )
    known = identify(open_checkpoint(one), None, config(), CPU, "a")
    assert identify(open_checkpoint(other), None, config(), CPU, "a") == known
    assert str(tmp_path) not in str(known)
    files = known["source"]["files"]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < set(files)
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    for name in files:
        path = other / name
        whole = path.read_bytes()
        last = bytes([whole[-1] ^ 1]) if path.suffix == ".safetensors" else whole[-1:] + b" "
        path.write_bytes(whole[:-1] + last)
        changed = identify(open_checkpoint(other), None, config(), CPU, "a")
        assert [line.partition(" ")[0] for line in differences(known, changed)] == [
            f"source.files.{name}"
        ]
        path.write_bytes(whole)


def test_the_commit_and_the_headers_identify_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    known = identify(open_checkpoint(model), "c0ffee", config(), CPU, "a")
    assert known["source"]["commit"] == "c0ffee"
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    assert known["source"]["files"]["model.safetensors"].startswith(
        f"{len(content)} bytes, header "
    )
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identify(open_checkpoint(model), "c0ffee", config(), CPU, "a") == known
    assert differences(known, identify(open_checkpoint(model), "beef", config(), CPU, "a")) == [
        'source.commit was "c0ffee", is "beef"'
    ]


def test_threads_and_devices_belong_to_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(save_model(tmp_path / "model"))
    known = identify(source, None, config(), CPU, "a")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert differences(known, identify(source, None, config(), CPU, "a")) == [
        "device.threads was 1, is 7"
    ]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    on_gpu = identify(source, None, config(), torch.device("cuda", 1), "a")
    assert (on_gpu["device"]["name"], on_gpu["device"]["capability"]) == ("H100", "9.0")
    assert "device.threads was 1, is missing" in differences(known, on_gpu)


def test_differences_name_each_field_with_both_values() -> None:
    known = {"config": {"bits": 4, "dynamic": {}}, "calibration_sha256": "a"}
    assert differences(known, dict(known)) == []
    assert differences(known, {**known, "calibration_sha256": "b"}) == [
        'calibration_sha256 was "a", is "b"'
    ]
    assert differences(known, {**known, "config": {"bits": 4, "dynamic": {"-:x": {}}}}) == [
        "config.dynamic was {}, is missing",
        "config.dynamic.-:x was missing, is {}",
    ]


def test_a_user_reads_differences_in_words_without_hashes() -> None:
    rules = {"+:.*[.]v_proj$": {"bits": 8}, "+:.*[.]o_proj$": {"bits": 3}}
    known = {
        "config": {"bits": 4, "group_size": 128, "dynamic": rules, "dataset": "sha256 5ea1"},
        "calibration_sha256": "5ea1",
        "source": {"files": {"model.safetensors": "5ea1", "config.json": "5ea1"}},
        "device": {"threads": 1},
    }
    changed = {
        "config": {"bits": 3, "group_size": 64, "dynamic": {}, "dataset": "sha256 c0de"},
        "calibration_sha256": "c0de",
        "source": {"files": {"model.safetensors": "c0de", "config.json": "5ea1"}},
        "device": {"threads": 2},
    }
    assert in_words(differences(known, changed)) == (
        "--bits was 4, is 3; the calibration text is another one; "
        "the rules of --dynamic differ; --group-size was 128, is 64; 2 more"
    )
    del known["config"], changed["config"]
    assert in_words(differences(known, changed)) == (
        "the calibration text is another one; device.threads was 1, is 2; "
        "`model.safetensors` of the model is not the same"
    )
    long = in_words([f"adapters was {'x' * 300}, is []"])
    assert (len(long), long[:14]) == (100, "adapters was x")


def test_settings_are_named_before_hashes() -> None:
    known = {"calibration_sha256": "a", "config": {"bits": 4, "seed": 0}}
    changed = {"calibration_sha256": "b", "config": {"bits": 3, "seed": 1}}
    names = [line.partition(" ")[0] for line in differences(known, changed)]
    assert names == ["config.bits", "config.seed", "calibration_sha256"]


class TeamOf(Ranks):
    """A team whose processes have these identities."""

    def __init__(self, *identities: Identity) -> None:
        self.identities = list(identities)

    def all_gather(self, mine: object) -> list[Identity]:  # type: ignore[override]
        del mine
        return self.identities


def test_a_process_with_another_identity_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(save_model(tmp_path / "model"))
    first = identify(source, None, config(), CPU, "a")
    beside_it = identify(source, None, config(), CPU, "a", hashed=False)
    assert first.keys() - beside_it.keys() == {
        "source"
    }  # whose hashes the first one on that machine tells
    check_agreement(TeamOf(first, beside_it, first), first)
    with pytest.raises(InputError) as caught:
        check_agreement(
            TeamOf(first, first, identify(source, "c0ffee", config(seed=7), CPU, "a")), first
        )
    assert str(caught.value).startswith(
        "process 2 differs from process 0: config.seed was 0, is 7; source.commit was"
    )
    assert (caught.value.code, caught.value.exit_code) == ("E_RANK_MISMATCH", 3)
    assert caught.value.hint == "run on equal devices and versions, with equal copies of the model"
