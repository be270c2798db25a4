"""Chats with images: what is read, what identifies them, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY, Mock

import pyarrow
import pytest
import torch
from PIL import Image

from gptq_cli.allocation.run import Place, measure_model
from gptq_cli.calibration import images
from gptq_cli.calibration.chats import ChatRow
from gptq_cli.calibration.images import ImageWindow, load_processor, located
from gptq_cli.calibration.windows import Windows
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import GptqError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import Event, Noted, PhaseStarted, ignore
from gptq_cli.planning.checks import RunOptions, prepare_run
from gptq_cli.preview import plan_text
from gptq_cli.quantization.run import calibrate, quantize_checkpoint
from gptq_cli.runtime.ranks import SINGLE_PROCESS
from tests.calibration.rows import json_lines, parquet_bytes
from tests.disks import Killed
from tests.families import save_model, text_file
from tests.runs import config, digest, quantize_with_events
from tests.tiny import killer
from tests.vision import save_chats, save_image, save_vision_model

ASKED = {"type": "text", "text": "what?"}
ANSWER = {"role": "assistant", "content": "noise"}
PLACE = {"type": "image"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model like Gemma 3, whose processor needs no code of its own."""
    return save_vision_model(tmp_path_factory.mktemp("gemma3"), "gemma3")


def settings(dataset: Path | list[str], **changes: Any) -> Any:
    if isinstance(dataset, Path):
        dataset = str(dataset)
    given = {"dataset": dataset, "nsamples": 1, "seqlen": 100, "batch_size": 1} | changes
    return config(**given)


def windows(model: Path, dataset: Path | list[str], **changes: Any) -> Windows:
    checkpoint = open_checkpoint(model)
    return calibrate(checkpoint, settings(dataset, **changes), ignore, SINGLE_PROCESS).windows


def asking(*parts: Any, **columns: Any) -> dict[str, Any]:
    """Return a row with a chat of one question and one answer."""
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **columns}


def row_file(folder: Path, *rows: dict[str, Any], name: str = "chats.jsonl") -> Path:
    file = folder / name
    file.write_text(json_lines(rows))
    return file


def refusal(call: Callable[[], object]) -> GptqError:
    with pytest.raises(GptqError) as caught:
        call()
    return caught.value


WAYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "path": lambda file: asking({"type": "image", "path": file.name}, ASKED),
    "url of a file": lambda file: asking({"type": "image", "url": f"file://{file}"}, ASKED),
    "openai": lambda file: asking({"type": "image_url", "image_url": {"url": data(file)}}, ASKED),
    "column": lambda file: asking(PLACE, ASKED, images=[file.name]),
    "column of one": lambda file: asking(PLACE, ASKED, image=str(file)),
    "mark": lambda file: {
        "messages": [{"role": "user", "content": "<image>what?"}, ANSWER],
        "images": [file.name],
    },
    "sharegpt": lambda file: {
        "conversations": [
            {"from": "human", "value": "<image>what?"},
            {"from": "gpt", "value": "noise"},
        ],
        "image": file.name,
    },
}


def data(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_write_an_image_is_the_same(way: str, model: Path, tmp_path: Path) -> None:
    file = save_image(tmp_path / "a.png", 24, 16)
    plain = row_file(tmp_path, asking({"type": "image", "image": str(file)}, ASKED))
    (truth,) = windows(model, plain).batches(1)
    (found,) = windows(model, row_file(tmp_path, WAYS[way](file), name="other.jsonl")).batches(1)
    assert isinstance(found, ImageWindow)
    assert found.sha256 == truth.sha256


def test_images_of_a_hub_dataset_keep_their_colours(tmp_path: Path) -> None:
    row = ChatRow([], None, [], "row 1", tmp_path)
    picture = Image.open(save_image(tmp_path / "a.png", 24, 16))
    for source in (picture, {"bytes": None, "path": "a.png"}):
        found = located(source, row)
        content = found if isinstance(found, bytes) else found.read_bytes()
        assert Image.open(io.BytesIO(content)).tobytes() == picture.tobytes()


def test_images_are_read_from_parquet(model: Path, tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"{seed}.png", 24, 16, seed) for seed in (0, 1)]
    rows = []
    for file in files:
        stored = {"bytes": file.read_bytes(), "path": file.name}
        rows.append(asking(PLACE | {"text": None}, ASKED, images=[stored]))
    rows[0]["messages"][1] = rows[1]["messages"][1] = {
        "role": "assistant",
        "content": [{"type": "text", "text": "noise"}],
    }
    table = tmp_path / "chats.parquet"
    table.write_bytes(parquet_bytes(pyarrow.Table.from_pylist(rows)))
    found = windows(model, table, nsamples=2).batches(1)
    kept = {window.images[0] for window in found}
    assert kept == {file.read_bytes() for file in files}


def test_a_chat_is_cut_behind_its_images_only(model: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 24, 16)
    image = {"type": "image", "image": "a.png"}
    file = row_file(tmp_path, asking(ASKED, image, ASKED))
    (whole,) = windows(model, file).batches(1)
    tokens = whole.ids[0].tolist()
    token = load_processor(model, trust_remote_code=False).image_token_ids[0]
    end = len(tokens) - tokens[::-1].index(token)
    assert tokens.count(token) == 4
    short = settings(file, seqlen=end)
    calibration = calibrate(open_checkpoint(model), short, ignore, SINGLE_PROCESS)
    (cut,) = calibration.batches(short, model)
    assert cut.ids[0].tolist() == tokens[:end]
    assert cut.inputs["token_type_ids"].shape == cut.ids.shape == (1, end)
    refused = refusal(lambda: windows(model, file, seqlen=end - 1))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert f"{len(tokens)} tokens, and its last image ends at token {end}" in str(refused)
    assert refused.hint == f"use --seqlen {end} or more, or smaller images"


def test_the_hint_about_length_fits_all_chats(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    refused = refusal(lambda: windows(model, chats, nsamples=4, seqlen=8))
    length = re.search(r"--seqlen (\d+)", refused.hint or "")
    assert refused.code == "E_DATA_IMAGE"
    assert length
    found = windows(model, chats, nsamples=4, seqlen=int(length[1]))
    assert len(found.images) == 3
    assert refusal(lambda: windows(model, chats, nsamples=4, seqlen=int(length[1]) - 1))


@pytest.mark.parametrize("fault", ["short", "no image"])
def test_plan_refuses_the_images_that_a_run_refuses(
    fault: str, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    chats, given = row_file(tmp_path, FAULTS["no image"][0]), {"seqlen": 100}
    if fault == "short":
        chats, given = save_chats(tmp_path), {"seqlen": 8, "nsamples": 4}
    of_run = refusal(lambda: windows(model, chats, **given))
    of_plan = refusal(lambda: plan_text(settings(chats, **given), model, True, ignore))
    assert (of_plan.code, str(of_plan), of_plan.hint) == (of_run.code, str(of_run), of_run.hint)


def test_an_image_of_too_many_pixels_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_image(tmp_path / "a.png", 24, 16)
    file = row_file(tmp_path, asking({"type": "image", "image": "a.png"}, ASKED))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 383)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused = refusal(lambda: windows(model, file))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert str(refused).endswith("it has 24 x 16 pixels, more than the 383 it allows")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 384)
    assert len(windows(model, file).images) == 1


def test_chats_with_and_without_images_share_a_run(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    mixed = windows(model, [str(chats), text_file()], nsamples=8, seqlen=60)
    kinds = [type(batch) for batch in mixed.batches(2)]
    assert kinds.count(ImageWindow) == 3
    by_length = [batch.shape for batch in mixed.batches(2) if isinstance(batch, torch.Tensor)]
    assert by_length[:2] == [(2, 60), (2, 60)]
    assert sum(shape[0] for shape in by_length) == 5
    assert mixed.tokens == sum(map(token_count, mixed.batches(2)))


def token_count(batch: torch.Tensor | ImageWindow) -> int:
    ids = batch if isinstance(batch, torch.Tensor) else batch.ids
    return ids.numel()


def test_another_picture_is_another_run(model: Path, tmp_path: Path) -> None:
    file = row_file(tmp_path, asking({"type": "image", "image": "a.png"}, ASKED))
    hashes = []
    for seed in (0, 1, 0):
        save_image(tmp_path / "a.png", 24, 16, seed)
        found = windows(model, file)
        hashes.append((found.sha256, found.ids.tolist()))
    assert hashes[0] == hashes[2]
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1] == hashes[1][1]


def test_a_run_on_images_resumes_with_the_same_bytes(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    given = settings(chats, nsamples=4, preset="best")
    whole, events = quantize_with_events(model, tmp_path / "whole", **given.model_dump())
    assert whole.image_windows == 3
    (text,) = [event.detail for event in events if event == PhaseStarted("text", ANY)]
    assert text.startswith(f"{chats}, 4 chats, rendered with the model's chat template, 3 with")
    output = tmp_path / "out"
    with pytest.raises(Killed):
        quantize_checkpoint(str(model), output, given, report=killer(1))
    save_image(tmp_path / "low.png", 24, 16, seed=5)
    changed = refusal(lambda: quantize_checkpoint(str(model), output, given, resume="require"))
    assert changed.code == "E_RESUME_MISMATCH"
    hint = "restore the text as it was, with its images, or discard it: --resume never"
    assert changed.hint == hint
    save_image(tmp_path / "low.png", 24, 16)
    quantize_checkpoint(str(model), output, given, resume="require")
    assert digest(output) == digest(tmp_path / "whole")


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing": (
        asking({"type": "image", "image": "none.png"}),
        "line 1 of dataset `{file}`: there is no image `{folder}/none.png`",
        "fix the path: it is relative to the folder of the dataset",
    ),
    "no image": (
        asking({"type": "image", "image": "broken.png"}),
        "line 1 of dataset `{file}`: `{folder}/broken.png` is not an image that Pillow reads: ",
        "fix the row, or remove it",
    ),
    "web": (
        asking({"type": "image", "url": "https://a.org/a.png"}),
        "line 1 of dataset `{file}`: the image `https://a.org/a.png` is on the web, which is not",
        "download it, and write its path",
    ),
    "data": (
        asking({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}),
        "line 1 of dataset `{file}`: a data URL holds no image: it is not base64",
        "fix the row, or remove it",
    ),
    "number": (
        asking({"type": "image", "image": 4}),
        "line 1 of dataset `{file}`: an image is a number, not a path",
        "fix the row, or remove it",
    ),
    "two for one place": (
        asking(PLACE, images=["broken.png", "broken.png"]),
        "line 1 of dataset `{file}` has 2 images for 1 places in its messages",
        'write {"type": "image"} or <image> where each image stands',
    ),
    "twice": (
        asking({"type": "image", "image": "broken.png"}, images=["a.png"]),
        "line 1 of dataset `{file}` has images both in its messages and in a column",
        "keep one of them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_unusable_image_is_refused_with_its_row(fault: str, model: Path, tmp_path: Path) -> None:
    row, message, hint = FAULTS[fault]
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = row_file(tmp_path, row)
    refused = refusal(lambda: windows(model, file))
    assert (refused.code, refused.exit_code, refused.hint) == ("E_DATA_IMAGE", 3, hint)
    assert str(refused).startswith(message.format(file=file, folder=tmp_path))


def test_a_text_model_refuses_chats_with_images(tmp_path: Path) -> None:
    text_model = save_model(tmp_path / "llama")
    refused = refusal(lambda: windows(text_model, save_chats(tmp_path)))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert str(refused) == f"the dataset holds images, but `{text_model}` (llama) reads text only"
    assert refused.hint == "give chats or text without images"


def test_other_commands_refuse_images(model: Path, tmp_path: Path) -> None:
    chats = str(save_chats(tmp_path))
    request = EvalRequest(dataset=chats, seqlen=16, device="cpu")
    refused = refusal(lambda: evaluate_perplexity(str(model), request))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    only = "holds an image, but only the calibration of `gptq quantize` reads images"
    assert str(refused) == f"line 1 of dataset `{chats}` {only}"
    assert refused.hint == "give chats or text without images"


def test_too_few_chats_are_counted(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    refused = refusal(lambda: windows(model, chats, nsamples=5))
    assert (refused.code, refused.exit_code) == ("E_DATA_SHORT", 3)
    assert str(refused) == f"dataset `{chats}` has 4 chats, but 5 are needed"
    assert refused.hint == "give more chats, or fewer --nsamples"


@pytest.fixture
def fresh() -> Any:
    """Forget the processors that earlier tests have loaded, before the test and after it."""
    images.load_processor.cache_clear()
    yield
    images.load_processor.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", "gemma3")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink(missing_ok=True)
    refused = refusal(lambda: windows(model, save_chats(tmp_path)))
    assert (refused.code, refused.exit_code) == ("E_PROCESSOR", 3)
    assert str(refused).startswith(f"`{model}` has no usable processor of images: ")
    assert refused.hint is not None
    assert refused.hint.startswith("copy preprocessor_config.json and processor_config.json")


@pytest.mark.usefixtures("fresh")
def test_a_processor_without_torchvision_names_it(tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", "qwen2_5_vl")
    (model / "processor_config.json").unlink()  # the processor of transformers reads videos, too
    refused = refusal(lambda: windows(model, save_chats(tmp_path)))
    assert (refused.code, refused.exit_code) == ("E_PROCESSOR", 3)
    assert refused.hint == "install the torchvision that belongs to your torch"


@pytest.mark.usefixtures("fresh")
def test_code_of_a_processor_needs_consent(tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", "llama4")
    refused = refusal(lambda: windows(model, save_chats(tmp_path)))
    assert (refused.code, refused.exit_code) == ("E_REMOTE_CODE", 3)
    assert "the processor of" in str(refused)


@pytest.mark.usefixtures("fresh")
def test_missing_pillow_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "find_spec", Mock(return_value=None))
    refused = refusal(lambda: windows(model, save_chats(tmp_path)))
    assert (refused.code, refused.exit_code) == ("E_PROCESSOR", 3)
    assert str(refused) == "images need Pillow"
    assert refused.hint == "install it: pip install 'gptq_cli[vision]'"


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_a_template_that_leaves_images_out_is_refused(family: str, tmp_path: Path) -> None:
    reader = save_vision_model(tmp_path / "model", family)
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message.role }}{% endfor %}")
    chats = save_chats(tmp_path)
    given = {"chat_template": str(template), "nsamples": 4, "trust_remote_code": True}
    refused = refusal(lambda: windows(reader, chats, **given))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert str(refused).startswith("the model's processor refuses line ")
    assert f"of dataset `{chats}`: " in str(refused)
    assert refused.hint == "fix the row, or remove it"


def test_another_image_token_in_the_config_is_refused(tmp_path: Path) -> None:
    reader = save_vision_model(tmp_path / "model", "gemma3")
    description = json.loads((reader / "config.json").read_text())
    description["image_token_index"] = description["image_token_id"] = 400
    (reader / "config.json").write_text(json.dumps(description))
    refused = refusal(lambda: windows(reader, save_chats(tmp_path), nsamples=4))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert str(refused).endswith("have no token 400")
    assert refused.hint is not None
    assert refused.hint.startswith("compare image_token_id in config.json and the tokenizer")


def test_the_plan_counts_chats_with_images(model: Path, tmp_path: Path) -> None:
    chats = save_chats(tmp_path)
    (text,) = plan_text(settings(chats, nsamples=2), model, True, ignore)
    assert (text.chats, text.chats_with_images, text.tokens) == (4, 3, None)
    assert text.summary.endswith("3 with images; 2 chats of up to 100 tokens are needed")
    noted: list[Event] = []
    plan_text(settings(chats, nsamples=5), model, True, noted.append)
    assert [event.text for event in noted if isinstance(event, Noted)] == [
        f"quantize will refuse the text: dataset `{chats}` has 4 chats, but 5 are needed; "
        "give more chats, or fewer --nsamples"
    ]


def test_widths_are_not_measured_on_images(model: Path, tmp_path: Path) -> None:
    given = settings(save_chats(tmp_path), nsamples=4)
    goal = given.model_copy(update={"bits": 3.5})
    place = Place.beside(tmp_path / "widths.yaml")
    prepared = prepare_run(str(model), place.output, given, RunOptions(), writes=False)
    refused = refusal(lambda: measure_model(prepared, goal, place=place))
    assert (refused.code, refused.exit_code) == ("E_DATA_IMAGE", 3)
    assert str(refused) == "widths are measured on text, but the dataset holds images"
