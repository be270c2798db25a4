"""Words where an id of the Hub belongs: an id, what holds one, a folder of the cache, or a refusal that helps."""

from __future__ import annotations

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


@pytest.mark.parametrize(("text", "meant"), PASTED)
def test_an_address_is_refused_with_its_id_as_hint(text: str, meant: str, tmp_path: Path) -> None:
    assert str(pasted_id(text)) == meant
    with pytest.raises(InputError) as model:
        hub_id(text)
    assert (model.value.code, model.value.hint) == ("E_MODEL_NOT_FOUND", f"use {meant}")
    with pytest.raises(InputError) as dataset:
        load_documents(DatasetSource(text))
    assert (dataset.value.code, dataset.value.hint) == (
        "E_DATA_NOT_FOUND",
        f"use --dataset {meant.split()[0]}",
    )
    if "/" in meant.split()[0]:
        for words in ({"repo": text}, {"repo": "me/x", "base_model": text}):
            with pytest.raises(ConfigError) as pushed:
                prepare_push(tmp_path, **words)
            assert (pushed.value.code, pushed.value.hint) == (
                "E_CFG_RANGE",
                f"use {meant.split()[0]}",
            )


@pytest.mark.parametrize("name", FLAWED)
def test_an_id_that_the_hub_client_refuses_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(name)
    assert id_flaw(name)
    if name:
        with pytest.raises(InputError, match="is not a directory, and not a Hub id") as model:
            hub_id(name)
        assert (model.value.code, model.value.exit_code) == ("E_MODEL_NOT_FOUND", 3)
        assert model.value.hint == "give a model directory or a Hub id"
    with pytest.raises(InputError) as dataset:
        load_documents(DatasetSource(name))
    assert dataset.value.code == "E_DATA_NOT_FOUND"
    with pytest.raises(ConfigError) as pushed:
        prepare_push(tmp_path, f"me/{name}")
    assert pushed.value.code == "E_CFG_RANGE"


@pytest.mark.parametrize("name", ["gpt2", "org/name", "hf://org/name", "Org-1/na_me.2"])
def test_hub_id_keeps_a_valid_id(name: str) -> None:
    assert hub_id(name) == name.removeprefix("hf://")
    assert pasted_id(name) is None


def test_an_address_of_another_site_holds_no_id() -> None:
    for text in (
        "https://example.com/org/name",
        "https://huggingface.co",
        "https://[::1",
        "ftp://x/y",
        "/models/x",
    ):
        assert pasted_id(text) is None


def cached(folder: Path, *commits: str, main: str | None = None) -> Path:
    """A model's folder in the cache with these snapshots."""
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
    assert (located.directory, located.name, located.commit) == (
        folder / "snapshots" / two,
        "name",
        None,
    )
    assert default_name(str(folder), QuantizeConfig(bits=4, group_size=32)) == "name-GPTQ-Int4-g32"
    alone = cached(tmp_path / "models--gpt2", one)
    assert model_directory(alone) == alone / "snapshots" / one
    assert locate_model(str(alone)).name == "gpt2"


def test_a_folder_of_the_cache_without_its_main_is_refused(tmp_path: Path) -> None:
    folder = cached(tmp_path / "models--org--name", "1" * 40, "2" * 40, main="../../../etc")
    with pytest.raises(
        InputError, match="with 2 snapshots, but none of its main branch"
    ) as several:
        locate_model(str(folder))
    assert several.value.hint == f"give one of them: {folder}/snapshots/{'1' * 40}"
    empty = cached(tmp_path / "models--org--empty")
    (empty / "snapshots").mkdir()
    with pytest.raises(InputError, match="with 0 snapshots") as none:
        locate_model(str(empty))
    assert (none.value.code, none.value.hint) == ("E_MODEL_NOT_FOUND", "use org/empty")


def test_a_file_is_refused_with_a_directory_as_hint(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "model.gguf", "other.txt"):
        (tmp_path / name).touch()
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "model.bin").touch()
    hints = {
        "config.json": f"give its directory: {tmp_path}",
        "model.safetensors": f"give its directory: {tmp_path}",
        "model.gguf": "the directory of the safetensors checkpoint that the file was made from",
        "apart/model.bin": "give the directory of a safetensors checkpoint",
    }
    for name, hint in hints.items():
        for look in (lambda file: locate_model(str(file)), local_model):
            with pytest.raises(InputError, match="is not a directory") as caught:
                look(tmp_path / name)
            assert caught.value.code == "E_MODEL_NOT_FOUND"
            assert (caught.value.hint or "").endswith(hint)


def test_broken_links_and_long_names_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    for name in ("loop", "dangling", "x" * 300):
        for look in (
            hub_id,
            model_directory,
            lambda dataset: load_documents(DatasetSource(f"./{dataset}")),
        ):
            with pytest.raises(InputError, match="cannot read") as caught:
                look(name)
            assert (caught.value.code, caught.value.exit_code) == ("E_FILE", 3)
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
