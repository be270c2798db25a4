"""Words in the place of an id of the Hub: ids, addresses, folders of the cache, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from gptq_cli.calibration.corpus import DatasetSource, load_documents
from gptq_cli.checkpoint.locate import hub_id, local_model, locate_model, model_directory
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.hub_errors import id_flaw, pasted_id
from gptq_cli.planning.run_plan import default_name
from gptq_cli.publish.push import prepare_push

PASTED = [
    ("https://huggingface.co/org/name", "org/name"),
    ("http://www.huggingface.co/org/name/", "org/name"),
    ("huggingface.co/org/name", "org/name"),
    ("hf.co/org/name?library=vllm#usage", "org/name"),
    ("https://huggingface.co/org/name/tree/main", "org/name"),
    ("https://huggingface.co/org/name/tree/v1.0/sub", "org/name --revision v1.0"),
    (
        "https://huggingface.co/org/name/blob/refs%2Fpr%2F1/config.json",
        "org/name --revision refs/pr/1",
    ),
    ("https://huggingface.co/org/name/discussions/7", "org/name"),
    ("https://huggingface.co/gpt2/resolve/main/config.json", "gpt2"),
    ("https://huggingface.co/gpt2", "gpt2"),
    ("https://user:secret@huggingface.co/org/name.git", "org/name"),
    ("https://huggingface.co/datasets/org/name", "org/name"),
    ("git@hf.co:org/name.git", "org/name"),
    ("hf://datasets/org/name", "org/name"),
    ("hf://org/name@dev", "org/name --revision dev"),
    ("models--org--name", "org/name"),
    ("models--gpt2", "gpt2"),
    ("datasets--org--name", "org/name"),
]
PASTED_WITH_OWNER = [pair for pair in PASTED if pair[1] != "gpt2"]
FLAWED = [
    "foo--bar",
    "-",
    "foo.git",
    "a//b",
    "a..b",
    "org/name/more",
    "two words",
    "a/",
    "x" * 97,
    "",
    "a\nb",
    "\udcff",
]


@pytest.mark.parametrize(("text", "words"), PASTED)
def test_an_address_as_model_is_refused_with_its_id_as_hint(text: str, words: str) -> None:
    assert str(pasted_id(text)) == words
    with pytest.raises(InputError) as caught:
        hub_id(text)
    assert (caught.value.code, caught.value.hint) == ("E_MODEL_NOT_FOUND", f"use {words}")


@pytest.mark.parametrize(("text", "words"), PASTED)
def test_an_address_as_dataset_is_refused_with_its_id_as_hint(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_documents(DatasetSource(text))
    assert caught.value.code == "E_DATA_NOT_FOUND"
    assert caught.value.hint == f"use --dataset {words.split()[0]}"


@pytest.mark.parametrize(("text", "words"), PASTED_WITH_OWNER)
def test_push_refuses_an_address_with_its_id_as_hint(text: str, words: str, tmp_path: Path) -> None:
    for names in ({"repo": text}, {"repo": "me/x", "base_model": text}):
        with pytest.raises(ConfigError) as caught:
            prepare_push(tmp_path, **names)
        assert (caught.value.code, caught.value.hint) == ("E_CFG_RANGE", f"use {words.split()[0]}")


@pytest.mark.parametrize("name", FLAWED)
def test_the_hub_client_refuses_the_same_ids(name: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert id_flaw(name)


@pytest.mark.parametrize("name", [name for name in FLAWED if name])
def test_a_flawed_id_of_a_model_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="is not a directory, and not a Hub id") as caught:
        hub_id(name)
    assert (caught.value.code, caught.value.exit_code) == ("E_MODEL_NOT_FOUND", 3)
    assert caught.value.hint == "give a model directory or a Hub id"


@pytest.mark.parametrize(
    ("typed", "meant"), [("Qwen3-0.6", "Qwen3-0.6B"), ("qwen3_0.6b", "Qwen3-0.6B"), ("Qw", None)]
)
def test_a_folder_with_nearly_the_name_is_suggested(
    typed: str, meant: str | None, tmp_path: Path
) -> None:
    (tmp_path / "Qwen3-0.6B").mkdir()
    (tmp_path / "Qwen3-0.6C").write_text("no folder")
    for look in (lambda: hub_id(str(tmp_path / typed)), lambda: local_model(tmp_path / typed)):
        with pytest.raises(InputError) as caught:
            look()
        suggested = caught.value.hint == f"did you mean {tmp_path / 'Qwen3-0.6B'}?"
        assert suggested == (meant is not None)
    with pytest.raises(InputError) as caught:
        hub_id(str(tmp_path / "none" / typed))
    assert caught.value.hint == "give a model directory or a Hub id"


@pytest.mark.parametrize("name", FLAWED)
def test_a_flawed_id_of_a_dataset_is_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_documents(DatasetSource(name))
    assert caught.value.code == "E_DATA_NOT_FOUND"


@pytest.mark.parametrize("name", FLAWED)
def test_push_refuses_a_flawed_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepare_push(tmp_path, f"me/{name}")
    assert caught.value.code == "E_CFG_RANGE"


@pytest.mark.parametrize("name", ["gpt2", "org/name", "hf://org/name", "Org-1/na_me.2"])
def test_hub_id_keeps_a_valid_id(name: str) -> None:
    assert hub_id(name) == name.removeprefix("hf://")
    assert pasted_id(name) is None


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/org/name",
        "https://huggingface.co",
        "https://[::1",
        "ftp://x/y",
        "/models/x",
    ],
)
def test_an_address_of_another_site_holds_no_id(text: str) -> None:
    assert pasted_id(text) is None


def cached(folder: Path, *commits: str, main: str | None = None) -> Path:
    """Write the folder of a model as in the cache, with these snapshots; return it."""
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "config.json").write_text("{}")
    (folder / "refs").mkdir(parents=True)
    if main is not None:
        (folder / "refs" / "main").write_text(main)
    return folder


def test_a_folder_of_the_cache_means_its_snapshot(tmp_path: Path) -> None:
    one, two = "1" * 40, "2" * 40
    folder = cached(tmp_path / "models--org--name", one, two, main=two)
    assert model_directory(folder) == local_model(folder) == folder / "snapshots" / two
    located = locate_model(str(folder))
    assert located.directory == folder / "snapshots" / two
    assert (located.name, located.commit) == ("name", None)
    assert default_name(str(folder), QuantizeConfig(bits=4, group_size=32)) == "name-GPTQ-Int4-g32"


def test_a_folder_of_the_cache_may_hold_one_snapshot_only(tmp_path: Path) -> None:
    commit = "1" * 40
    folder = cached(tmp_path / "models--gpt2", commit)
    assert model_directory(folder) == folder / "snapshots" / commit
    assert locate_model(str(folder)).name == "gpt2"


def test_a_folder_of_the_cache_without_its_main_is_refused(tmp_path: Path) -> None:
    folder = cached(tmp_path / "models--org--name", "1" * 40, "2" * 40, main="../../../etc")
    message = "with 2 snapshots, but none of its main branch"
    with pytest.raises(InputError, match=message) as caught:
        locate_model(str(folder))
    assert caught.value.hint == f"give one of them: {folder}/snapshots/{'1' * 40}"


def test_a_folder_of_the_cache_without_snapshots_is_refused(tmp_path: Path) -> None:
    empty = cached(tmp_path / "models--org--empty")
    (empty / "snapshots").mkdir()
    with pytest.raises(InputError, match="with 0 snapshots") as caught:
        locate_model(str(empty))
    assert (caught.value.code, caught.value.hint) == ("E_MODEL_NOT_FOUND", "use org/empty")


def locate_text(file: Path) -> object:
    return locate_model(str(file))


@pytest.mark.parametrize("find", [locate_text, local_model])
@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("config.json", "give its directory: {directory}"),
        ("model.safetensors", "give its directory: {directory}"),
        ("model.gguf", "the directory of the safetensors checkpoint that the file was made from"),
        ("apart/model.bin", "give the directory of a safetensors checkpoint"),
    ],
)
def test_a_file_is_refused_with_a_directory_as_hint(
    name: str, hint: str, find: Callable[[Path], object], tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors", "model.gguf", "other.txt"):
        (tmp_path / file).touch()
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "model.bin").touch()
    with pytest.raises(InputError, match="is not a directory") as caught:
        find(tmp_path / name)
    assert caught.value.code == "E_MODEL_NOT_FOUND"
    assert (caught.value.hint or "").endswith(hint.format(directory=tmp_path))


def load_file_of_texts(name: str) -> object:
    return load_documents(DatasetSource(f"./{name}"))


@pytest.mark.parametrize("find", [hub_id, model_directory, load_file_of_texts])
@pytest.mark.parametrize("name", ["loop", "dangling", "x" * 300])
def test_broken_links_and_long_names_cannot_be_read(
    name: str, find: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(InputError, match="cannot read") as caught:
        find(name)
    assert (caught.value.code, caught.value.exit_code) == ("E_FILE", 3)


def test_a_home_of_an_unknown_user_is_no_directory() -> None:
    assert model_directory("~no-such-user/x") is None


def test_a_directory_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    odd = tmp_path / "caf\udce9"
    odd.mkdir()
    with pytest.raises(InputError, match="its name is not UTF-8") as caught:
        locate_model(str(odd))
    assert caught.value.code == "E_FILE"
    assert (caught.value.hint or "").endswith(f"ln -s $'{tmp_path}/caf\\xe9' model")
    (tmp_path / "model").symlink_to(odd)
    assert locate_model(str(tmp_path / "model")).directory == tmp_path / "model"
