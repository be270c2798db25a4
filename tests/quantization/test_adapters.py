"""Adapters merged while the model is read: peft's bits, refusals, identity, provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_cli.checkpoint.decoded import with_adapters
from gptq_cli.checkpoint.headers import DAMAGED
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import ConfigError, ExistsError, InputError
from gptq_cli.events import BlockStarted, Event
from gptq_cli.planning.checks import with_lora
from gptq_cli.quantization.run import quantize_checkpoint
from tests.disks import Killed
from tests.families import save_model
from tests.runs import config, digest, quantize_with_events
from tests.tiny import SMALL, killer

QKV = "model.layers.0.self_attn.q_proj"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """Write an adapter of rank 4 and alpha 8 with these tensors, by names of the model."""
    directory.mkdir(exist_ok=True)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, directory / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes
    (directory / SETTINGS).write_text(json.dumps(settings))
    return directory


def pair(module: str, outputs: int, inputs: int, rank: int = 4) -> dict[str, Tensor]:
    """Return the two factors of a LoRA of one linear."""
    return {
        f"{module}.lora_A.weight": noise(rank, inputs, seed=1),
        f"{module}.lora_B.weight": noise(outputs, rank, seed=2),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model in bfloat16; q_proj of its blocks is [128, 32]."""
    folder = tmp_path_factory.mktemp("adapters") / "model"
    return in_bfloat16(save_model(folder, **SMALL))


def in_bfloat16(model: Path) -> Path:
    tensors = load_file(model / "model.safetensors")
    stored = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(stored, model / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    return model


def merged(model: Path, *names: Path | str) -> dict[str, Tensor]:
    """Return each tensor of the model with adapters merged."""
    reader = open_reader(with_adapters(open_checkpoint(model), map(str, names)))
    return {name: reader.read(name) for name in reader.names()}


def by_definition(weight: Tensor, a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Return weight + factor B A, each element summed by hand in float32."""
    product = torch.stack([torch.mv(b, a[:, column]) for column in range(a.shape[1])], dim=1)
    return (weight.float() + factor * product).bfloat16()


KINDS: dict[str, tuple[dict[str, Any], str, float]] = {
    "lora": ({}, "", 2.0),
    "scaled": ({}, ":0.5", 1.0),
    "rslora": ({"use_rslora": True}, "", 4.0),
    "alpha of a pattern": ({"alpha_pattern": {"self_attn.q_proj": 20}}, "", 5.0),
    "alpha of another": ({"alpha_pattern": {"k_proj": 20}}, "", 2.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_added_as_in_its_definition(kind: str, model: Path, tmp_path: Path) -> None:
    changes, scale, factor = KINDS[kind]
    tensors = pair(QKV, 128, 32)
    adapter = write_adapter(tmp_path / "adapter", tensors, **changes)
    found, plain = merged(model, f"{adapter}{scale}"), load_file(model / "model.safetensors")
    a, b = tensors.values()
    wanted = by_definition(plain[f"{QKV}.weight"], a, b, factor)
    assert found[f"{QKV}.weight"].dtype == torch.bfloat16
    close = (found[f"{QKV}.weight"].float() - wanted.float()).abs()
    assert close.max() <= wanted.float().abs().max() * 2**-8
    assert (close > 0).float().mean() < 0.01, "almost all bits are equal"
    assert not torch.equal(found[f"{QKV}.weight"], plain[f"{QKV}.weight"])
    for name in plain:
        if name != f"{QKV}.weight":
            assert torch.equal(found[name], plain[name])


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_gives_each_output_its_trained_norm(
    transposed: bool, model: Path, tmp_path: Path
) -> None:
    tensors, magnitude = pair(QKV, 128, 32), 1 + noise(128, seed=4).abs()
    a, b = tensors.values()
    if transposed:  # the model stores [O, I], so that such an adapter has 128 inputs here
        tensors, magnitude = pair(QKV, 32, 128), 1 + noise(32, seed=4).abs()
        a, b = tensors.values()
    tensors[f"{QKV}.lora_magnitude_vector"] = magnitude
    settings = {"use_dora": True, "fan_in_fan_out": transposed}
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    found = merged(model, adapter)[f"{QKV}.weight"].double()
    weight = load_file(model / "model.safetensors")[f"{QKV}.weight"].double()
    if transposed:
        found, weight = found.T, weight.T
    total = weight + 2 * b.double() @ a.double()
    wanted = torch.stack([m * row / row.norm() for m, row in zip(magnitude, total, strict=True)])
    assert torch.allclose(found, wanted, rtol=2**-8, atol=1e-6)
    assert torch.allclose(found.norm(dim=1), magnitude.double(), rtol=2**-8)


def test_embeddings_heads_and_whole_modules_are_merged(tmp_path: Path) -> None:
    model = in_bfloat16(save_model(tmp_path / "model", **SMALL))
    table, norm = "model.embed_tokens", "model.norm.weight"
    tensors = {
        f"{table}.lora_embedding_A": noise(4, 512, seed=1),
        f"{table}.lora_embedding_B": noise(32, 4, seed=2),
        norm: noise(32, seed=3),
        "lm_head.weight": noise(512, 32, seed=4),
    }
    found = merged(model, write_adapter(tmp_path / "adapter", tensors))
    plain = load_file(model / "model.safetensors")
    a, b = tensors[f"{table}.lora_embedding_A"], tensors[f"{table}.lora_embedding_B"]
    wanted = plain[f"{table}.weight"] + (2 * (b @ a).T).bfloat16()
    assert torch.equal(found[f"{table}.weight"], wanted)
    assert torch.equal(found[norm], tensors[norm].bfloat16())
    assert torch.equal(found["lm_head.weight"], tensors["lm_head.weight"].bfloat16())


def test_an_embedding_that_is_tied_to_the_head_is_not_replaced(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tie_word_embeddings=True, **SMALL)
    adapter = write_adapter(tmp_path / "adapter", {"model.embed_tokens.weight": noise(512, 32)})
    with pytest.raises(InputError, match="but the output head is tied to it") as caught:
        with_lora(open_checkpoint(model), config(lora=str(adapter)))
    assert caught.value.code == "E_LORA"


Damage = Callable[[dict[str, Tensor], dict[str, Any]], None]


def wrong_rank(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[f"{QKV}.lora_A.weight"] = noise(3, 32)


def wrong_shape(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[f"{QKV}.lora_A.weight"] = noise(4, 48)


def half_a_pair(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    del tensors[f"{QKV}.lora_B.weight"]


def unknown(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors |= pair("model.layers.9.self_attn.q_proj", 128, 32)


def setting(**changes: Any) -> Damage:
    return lambda _, settings: settings.update(changes)


def stored(changes: Mapping[str, Tensor], **settings: Any) -> Damage:
    """Return the damage of other tensors of the module, and of settings."""
    renamed = {f"{QKV}.{name}": tensor for name, tensor in changes.items()}

    def damage(tensors: dict[str, Tensor], changed: dict[str, Any]) -> None:
        tensors |= renamed
        changed |= settings

    return damage


def without_tensors(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors.clear()


def magnitude(*shape: int) -> Damage:
    return stored({"lora_magnitude_vector": torch.ones(shape)}, use_dora=True)


def factors_in(dtype: torch.dtype) -> Damage:
    a, b = noise(4, 32).to(dtype), noise(128, 4).to(dtype)
    return stored({"lora_A.weight": a, "lora_B.weight": b})


SLOW = "(.*.*.*.*.*.*.*.*)*x"
OTHERS = stored({"lora_A.weight": noise(0, 32), "lora_B.weight": noise(128, 0)})
NUMBERS = stored({"lora_A.weight": torch.tensor(1.0), "lora_B.weight": torch.tensor(1.0)})
BAD_SHAPES: dict[str, tuple[Damage, str, str]] = {
    "no rank": (OTHERS, "of shape [0, 32], but it must be [4, 32]", "its own adapter_config"),
    "numbers": (NUMBERS, "of shape [], but it must be [4, 32]", "was trained on"),
    "magnitude": (magnitude(7), "of shape [7], but it must be [128]", "was trained on"),
    "one magnitude": (magnitude(1), "of shape [1], but it must be [128]", "was trained on"),
    "flat magnitude": (magnitude(), "of shape [], but it must be [128]", "was trained on"),
    "whole": (stored({"weight": noise(5, 5)}), "[5, 5], but it must be [128, 32]", "trained on"),
    "other rank": (setting(r=99), "of shape [4, 32], but it must be [99, 32]", "its own"),
    "rank of a pattern": (setting(rank_pattern={"q_proj": 17}), "it must be [17, 32]", "its own"),
    "no magnitude": (setting(use_dora=True), "has the parts lora_A, lora_B, and use_dora", "merge"),
    "no tensor": (without_tensors, f"its {WEIGHTS} holds no tensor", "merge_and_unload"),
    "two names": (stored({"lora_A": noise(4, 32)}), "are the same part of", "merge_and_unload"),
    "bool": (factors_in(torch.bool), "dtype BOOL, not a float type", "merge_and_unload"),
    "int8": (factors_in(torch.int8), "dtype I8, not a float type", "merge_and_unload"),
    "fp8": (factors_in(torch.float8_e4m3fn), "dtype F8_E4M3, not a float", "merge_and_unload"),
    "complex": (factors_in(torch.complex64), "dtype C64, not a float type", "merge_and_unload"),
}
BAD_SETTINGS: dict[str, tuple[Damage, str, str]] = {
    "slow": (setting(alpha_pattern={SLOW: 3}), "takes more than 1 s to match", "merge_and"),
    "list": (setting(rank_pattern=[1]), "its patterns for r are [1], not an object", "merge_and"),
    "text": (setting(alpha_pattern="q"), 'lora_alpha are "q", not an object', "merge_and"),
    "regex": (setting(alpha_pattern={"(": 1}), "is not a regular expression", "merge_and"),
    "null": (setting(alpha_pattern={"q": None}), "is null, not a number", "merge_and"),
    "word": (setting(rank_pattern={"q": "x"}), 'is "x", not a number', "merge_and"),
    "digits": (setting(lora_alpha=10**400), "0..., not a finite number", "merge_and"),
    "rank 0": (setting(r=0), "it has the rank 0", "merge_and"),
    "alpha 0": (setting(lora_alpha=0), "is multiplied by 0", "a scale above 0"),
    "flag": (setting(use_rslora="no"), 'its use_rslora is "no", not true or', "merge_and"),
    "tokens": (setting(trainable_token_indices=[3]), "it uses trainable_token_in", "merge_and"),
}
WRONG: dict[str, tuple[Damage, str, str]] = {
    **BAD_SHAPES,
    **BAD_SETTINGS,
    "rank": (wrong_rank, "of shape [3, 32], but it must be [4, 32]", "was trained on"),
    "shape": (wrong_shape, "of shape [4, 48], but it must be [4, 32]", "was trained on"),
    "half": (half_a_pair, "has the parts lora_A, and use_dora is false", "merge_and_unload"),
    "unknown": (unknown, "changes `model.layers.9.self_attn.q_proj.weight`, which", "trained on"),
    "kind": (setting(peft_type="IA3"), "its peft_type is 'IA3', not 'LORA'", "merge_and_unload"),
    "alpha": (setting(lora_alpha="8"), 'its lora_alpha is "8", not a number', "merge_and"),
    "unread": (setting(layer_replication=[[0, 2]]), "it uses layer_replication", "merge_and"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_does_not_fit_is_refused(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_cli.config.layer.SECONDS", 0.05)
    damage, message, hint = WRONG[case]
    tensors: dict[str, Tensor] = pair(QKV, 128, 32)
    settings: dict[str, Any] = {}
    damage(tensors, settings)
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    with pytest.raises(InputError) as caught:
        with_lora(open_checkpoint(model), config(lora=str(adapter)))
    assert (caught.value.code, caught.value.exit_code) == ("E_LORA", 3)
    assert message in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_a_directory_without_an_adapter_is_refused(model: Path, tmp_path: Path) -> None:
    for name, message in ((tmp_path, f"has no {SETTINGS}"), ("gone", "is not a directory")):
        with pytest.raises(InputError, match=message) as caught:
            with_lora(open_checkpoint(model), config(lora=[str(name)]))
        assert caught.value.code == "E_LORA"
        assert caught.value.hint


def test_an_adapter_that_counts_twice_or_not_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pair(QKV, 128, 32))
    for names, message in (
        ([f"{adapter}:0"], "is multiplied by 0"),
        ([str(adapter), f"{adapter}:0.5"], "is given twice"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            with_lora(open_checkpoint(model), config(lora=names))
        assert (caught.value.code, caught.value.exit_code) == ("E_LORA", 3)
        assert "scale" in (caught.value.hint or "")


def test_none_beside_another_adapter_is_a_conflict() -> None:
    with pytest.raises(ConfigError, match="lora has `none` beside other adapters") as caught:
        config(lora=["adapter", "none"])
    assert (caught.value.code, caught.value.exit_code) == ("E_CFG_CONFLICT", 2)
    assert "leave out `none`" in (caught.value.hint or "")


def test_an_adapter_beside_the_model_asks_which_is_meant(model: Path, tmp_path: Path) -> None:
    both = shutil.copytree(model, tmp_path / "both")
    write_adapter(both, pair(QKV, 128, 32))
    with pytest.raises(InputError, match="holds a model and an adapter: which is") as caught:
        quantize_checkpoint(str(both), tmp_path / "out", config())
    assert caught.value.hint == (
        f"merge the adapter with --lora {both}, or leave it out with --lora none"
    )
    plain, _ = quantize_with_events(both, tmp_path / "plain", lora="none")
    alone, _ = quantize_with_events(model, tmp_path / "alone")
    with_both, _ = quantize_with_events(both, tmp_path / "merged", lora=str(both))
    weights = [digest(result.output)["model.safetensors"] for result in (plain, alone, with_both)]
    assert weights[0] == weights[1] != weights[2]
    assert not (with_both.output / SETTINGS).exists()


def test_a_run_with_adapters_writes_what_the_merged_model_gives(
    model: Path, tmp_path: Path
) -> None:
    tensors = pair(QKV, 128, 32) | {"model.norm.weight": noise(32, seed=3)}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    second = write_adapter(tmp_path / "second", pair("model.layers.1.mlp.up_proj", 64, 32))
    by_hand = shutil.copytree(model, tmp_path / "by-hand")
    names = [str(adapter), f"{second}:0.8"]
    save_file(merged(model, *names), by_hand / "model.safetensors", metadata={"format": "pt"})
    wanted, _ = quantize_with_events(by_hand, tmp_path / "wanted")
    found, _ = quantize_with_events(model, tmp_path / "found", lora=names)
    assert digest(found.output)["model.safetensors"] == digest(wanted.output)["model.safetensors"]
    meta = json.loads((found.output / "quantize_config.json").read_text())["meta"]
    told = [(entry["adapter"], entry["scale"]) for entry in meta["lora"]]
    assert told == [("adapter", 1.0), ("second", 0.8)]


def test_a_changed_adapter_is_another_run_and_a_moved_one_is_not(
    model: Path, tmp_path: Path
) -> None:
    adapter, output = write_adapter(tmp_path / "adapter", pair(QKV, 128, 32)), tmp_path / "out"
    with pytest.raises(Killed):
        quantize_checkpoint(str(model), output, config(lora=str(adapter)), report=killer(0))
    moved = shutil.move(adapter, tmp_path / "moved")
    other = write_adapter(tmp_path / "other", pair(QKV, 128, 32), lora_alpha=9)
    for lora in (None, str(other), f"{moved}:0.5"):
        with pytest.raises(ExistsError, match="adapters was") as caught:
            quantize_checkpoint(str(model), output, config(lora=lora))
        assert caught.value.code == "E_RESUME_MISMATCH"
    resumed = quantize_checkpoint(str(model), output, config(lora=str(moved)))
    assert resumed.resumed_blocks == 1


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [f"{QKV}.lora_A.weight", "model.norm.weight"])
def test_an_adapter_that_is_not_finite_is_refused_before_a_block(
    name: str, value: float, model: Path, tmp_path: Path
) -> None:
    tensors = pair(QKV, 128, 32) | {"model.norm.weight": noise(32, seed=3)}
    tensors[name].view(-1)[3] = value
    adapter = write_adapter(tmp_path / "adapter", tensors)
    events: list[Event] = []
    sound = write_adapter(tmp_path / "sound", pair(QKV, 128, 32))
    settings = config(lora=[str(sound), str(adapter)])
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", settings, report=events.append)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_NONFINITE", 3)
    file = f"`base_model.model.{name}` in {WEIGHTS}"
    assert str(caught.value) == f"{file} holds NaN or infinity, 1 times"
    assert caught.value.hint == DAMAGED
    assert not [event for event in events if isinstance(event, BlockStarted)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "sound"]


def trained(model: Path, directory: Path, **settings: Any) -> dict[str, Tensor]:
    """Save a random adapter with peft; return the tensors of its own merged model."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                spread = 0.2 * torch.randn_like(parameter)
                parameter.add_(spread.to(parameter.dtype))
    wrapped.save_pretrained(directory)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    result = peft.PeftModel.from_pretrained(base, directory).merge_and_unload()
    return dict(result.state_dict())


LINEARS = ["q_proj", "down_proj"]
OF_PEFT: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LINEARS},
    "rslora": {"target_modules": LINEARS, "use_rslora": True, "rank_pattern": {"q_proj": 8}},
    "dora": {"target_modules": LINEARS, "use_dora": True, "alpha_pattern": {"down_proj": 3}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OF_PEFT)
def test_merged_weights_have_the_bits_of_peft(kind: str, model: Path, tmp_path: Path) -> None:
    wanted = trained(model, tmp_path / "adapter", **OF_PEFT[kind])
    found, plain = merged(model, tmp_path / "adapter"), load_file(model / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name
    changed = [name for name in found if not torch.equal(found[name], plain[name])]
    assert len(changed) == 4
