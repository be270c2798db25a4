"""Plan and run agree about tensors that the model does not use or that have other names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_cli.errors import InputError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import Event, Warned
from gptq_cli.planning.plan import plan_run
from gptq_cli.planning.run_plan import remarks
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.storage.manifest import INDEX_NAME
from tests.families import save_model, text_file
from tests.runs import config, quantize_with_events

Tensors = dict[str, Tensor]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def change(model: Path, edit: Callable[[Tensors], Tensors]) -> None:
    file = model / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def without(absent: str) -> Callable[[Tensors], Tensors]:
    """Return an edit that removes one tensor."""

    def edit(tensors: Tensors) -> Tensors:
        del tensors[absent]
        return tensors

    return edit


def warnings_of(model: Path, output: Path, **settings: object) -> list[tuple[str, str]]:
    _, events = quantize_with_events(model, output, **settings)
    return [(event.code, event.message) for event in events if isinstance(event, Warned)]


def with_adapter(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    for block in range(3):
        for name, rows in (("self_attn.q_proj", 128), ("mlp.up_proj", 128)):
            module = f"model.layers.{block}.{name}"
            tensors[f"{module}.lora_A.default.weight"] = torch.randn(32, 64, generator=generator)
            tensors[f"{module}.lora_B.default.weight"] = torch.randn(rows, 32, generator=generator)
    return tensors


def compiled_twice(tensors: Tensors) -> Tensors:
    again = {}
    for name, tensor in tensors.items():
        if "layers.1." in name:
            again[name.replace("layers.1.", "layers.1._orig_mod.")] = tensor.clone()
    return tensors | again


@pytest.mark.parametrize(
    ("edit", "first", "more", "adapter"),
    [
        (with_adapter, "model.layers.0.mlp.up_proj.lora_A.default.weight", 11, True),
        (compiled_twice, "model.layers.1._orig_mod.input_layernorm.weight", 8, False),
    ],
)
def test_the_plan_and_the_run_name_the_same_unused_tensors(
    edit: Callable[[Tensors], Tensors], first: str, more: int, adapter: bool, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    plain = plan_run(model, config())
    change(model, edit)
    plan = plan_run(model, config())
    text = f"the model does not use `{first}` and {more} more: transformers ignores them"
    if adapter:
        text += ", an adapter that is not merged"
    assert remarks(plan, config()) == [("W_CKPT_UNUSED", text)]
    assert warnings_of(model, tmp_path / "out") == [("W_CKPT_UNUSED", text)]
    assert [layer.name for layer in plan.quantized] == [layer.name for layer in plain.quantized]
    assert len(plan.kept) == len(plain.kept)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        name: spec.shape for name, spec in plan.layout.specs.items()
    }
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == plan.layout.nbytes
    source = load_file(model / "model.safetensors")
    assert all(torch.equal(written[name], source[name]) for name in plan.unused)
    written_config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "dynamic" not in written_config["quantization_config"]


def test_evaluation_names_unused_tensors(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    request = EvalRequest(dataset=text_file(), seqlen=32, max_windows=2, device="cpu")
    events: list[Event] = []
    before = evaluate_perplexity(str(model), request, events.append)
    assert not [event for event in events if isinstance(event, Warned)]
    change(model, with_adapter)
    assert evaluate_perplexity(str(model), request, events.append).perplexity == before.perplexity
    assert [event.code for event in events if isinstance(event, Warned)] == ["W_CKPT_UNUSED"]


def test_tensors_that_transformers_ignores_cause_no_warning(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    change(
        model,
        lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)},
    )
    assert warnings_of(model, tmp_path / "out") == []


WRAPPED: dict[str, Callable[[str], str]] = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "wrapped.inside.": lambda name: f"wrapped.inside.{name}",
    "base_layer.": lambda name: name.replace("q_proj.", "q_proj.base_layer."),
}


@pytest.mark.parametrize("part", WRAPPED)
def test_an_error_shows_the_part_that_names_have_too_much(part: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    change(model, lambda tensors: {WRAPPED[part](name): tensor for name, tensor in tensors.items()})
    calls: list[Callable[[], object]] = [
        lambda: quantize_checkpoint(str(model), tmp_path / "out", config())
    ]
    if part != "wrapped.inside.":  # only the model itself can show this part
        calls.append(lambda: plan_run(model, config()))
    for call in calls:
        with pytest.raises(InputError) as caught:
            call()
        assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_INCOMPLETE", 3)
        message = str(caught.value)
        assert f"its names have `{part}` in them, but those of the model do not" in message
        assert "download" not in (caught.value.hint or "")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_reports_a_missing_head(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", tie_word_embeddings=False)
    change(model, without("lm_head.weight"))
    with pytest.raises(
        InputError, match=r"no output head, and config\.json says tie_word_embeddings: false"
    ) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert caught.value.hint == (
        'write "tie_word_embeddings": true into config.json if the embeddings are its head; '
        "else it is incomplete"
    )
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    assert warnings_of(model, tmp_path / "out") == []


def test_an_error_reports_a_classifier(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def classify(tensors: Tensors) -> Tensors:
        tensors["score.weight"] = tensors.pop("lm_head.weight")
        return tensors

    change(model, classify)
    with pytest.raises(
        InputError, match=r"first `lm_head\.weight`.*first `score\.weight`: it is a classifier"
    ) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert "ForCausalLM" in (caught.value.hint or "")


def shard(model: Path, absent: tuple[str, ...] = (), unlisted: tuple[str, ...] = ()) -> None:
    """Write two shards and an index that lists `absent` tensors too, but no `unlisted` ones."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for file, part in zip(SHARDS, (names[:9], names[9:]), strict=True):
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    for name in unlisted:
        del weight_map[name]
    weight_map |= dict.fromkeys(absent, SHARDS[1])
    (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / "model.safetensors").unlink()


def test_a_wrong_index_is_read_as_in_transformers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    extra = {"mtp.fc.weight": torch.ones(64, 64)}
    change(model, lambda tensors: tensors | extra)
    plain = Path(shutil.copytree(model, tmp_path / "plain"))
    shard(model, absent=("mtp.gone.weight",), unlisted=("mtp.fc.weight", "model.norm.weight"))
    index = model / INDEX_NAME
    found = warnings_of(model, tmp_path / "out")
    assert found == [
        ("W_CKPT_INDEX", f"`{index}` lists `mtp.gone.weight`, which no shard holds"),
        (
            "W_CKPT_INDEX",
            f"`{index}` does not list `model.norm.weight` and 1 more, which its shards hold",
        ),
        (
            "W_CKPT_UNUSED",
            "the model does not use `mtp.fc.weight`: transformers ignores it",
        ),
    ]
    assert remarks(plan_run(model, config()), config()) == found[:2]
    warnings_of(plain, tmp_path / "truth")
    expected = load_file(tmp_path / "truth" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(expected)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    norm = load_file(plain / "model.safetensors")["model.norm.weight"]
    assert torch.equal(loaded.model.norm.weight, norm)


def test_a_listed_tensor_that_the_model_needs_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    change(model, without("model.norm.weight"))
    shard(model, absent=("model.norm.weight",))
    with pytest.raises(
        InputError, match=r"first `model\.norm\.weight`: the index lists 1 tensors"
    ) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_INCOMPLETE", 3)
    assert "download the index and the shards again" in (caught.value.hint or "")


def test_a_bitsandbytes_leftover_changes_no_byte_of_the_weights(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    warnings_of(model, tmp_path / "truth")
    content = json.loads((model / "config.json").read_text())
    leftover = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (model / "config.json").write_text(json.dumps(content | {"quantization_config": leftover}))
    assert [code for code, _ in warnings_of(model, tmp_path / "out")] == ["W_CKPT_CONFIG"]
    for name in ("model.safetensors", "config.json", "quantize_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "truth" / name).read_bytes()
    request = EvalRequest(dataset=text_file(), seqlen=32, max_windows=2, device="cpu")
    assert evaluate_perplexity(str(model), request).perplexity > 1


def test_an_adapter_beside_the_model_is_reported_but_not_copied(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    warnings_of(model, tmp_path / "truth")
    (model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file(
        {"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, model / "adapter_model.safetensors"
    )
    text = f"`{model}` holds an adapter beside the model (adapter_config.json): "
    text += "it is not applied and not copied"
    assert warnings_of(model, tmp_path / "out", lora="none") == [("W_CKPT_ADAPTER", text)]
    published, expected = (
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "truth")
    )
    assert published == expected
