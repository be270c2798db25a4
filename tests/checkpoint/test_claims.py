"""Claims of config.json that are refused: code from the Hub, and parts that have no tensors."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from gptq_cli.checkpoint import claims
from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.models.skeleton import load_config
from gptq_cli.planning.plan import plan_run
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import save_model
from tests.runs import config as settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("claims") / "model", num_hidden_layers=2)


def copy_with(model: Path, directory: Path, **claimed: Any) -> Path:
    """Copy `model` into `directory` and add the claims to its config.json; return `directory`."""
    shutil.copytree(model, directory)
    config = json.loads((model / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | claimed))
    return directory


def checkpoint(model: Path, **claimed: Any) -> Checkpoint:
    """Open `model` and add the claims to its configuration, but not to the file."""
    source = open_checkpoint(model)
    source.config.update(claimed)
    return source


KERNELS = [
    ({"attn_implementation": "org/repo"}, "attn_implementation: `org/repo`"),
    (
        {"_attn_implementation": "org/repo@v1:attention"},
        "_attn_implementation: `org/repo@v1:attention`",
    ),
    ({"_attn_implementation_internal": "org/repo"}, "_attn_implementation_internal: `org/repo`"),
    ({"attn_implementation": "paged|org/repo"}, "attn_implementation: `paged|org/repo`"),
    ({"attn_implementation": {"": "eager", "text_config": "o/r"}}, "attn_implementation: `o/r`"),
    ({"experts_implementation": "org/repo"}, "experts_implementation: `org/repo`"),
    (
        {"text_config": {"_experts_implementation": "o/r"}},
        "text_config._experts_implementation: `o/r`",
    ),
    ({"parts": [{"attn_implementation": "o/r"}]}, "parts.attn_implementation: `o/r`"),
    ({"attn_implementation": "flash_attention_2"}, "attn_implementation: `flash_attention_2`"),
    ({"use_kernels": True}, "use_kernels: `use_kernels`"),
    (
        {"vision_config": {"kernel_config": {"RMSNorm": "o/r:x"}}},
        "vision_config.kernel_config: `kernel_config`",
    ),
]


@pytest.mark.parametrize(("claimed", "setting"), KERNELS)
def test_a_kernel_of_the_hub_is_refused(claimed: dict[str, Any], setting: str, model: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_claims(checkpoint(model, **claimed))
    assert (caught.value.code, caught.value.exit_code) == ("E_REMOTE_CODE", 3)
    message = f"config.json of `{model}` sets {setting}, for which code would come from the Hub"
    assert str(caught.value) == message
    key = setting.partition(":")[0]
    hint = f"remove `{key}` from config.json: transformers then uses an installed one"
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "claimed",
    [
        {"attn_implementation": "sdpa"},
        {"_attn_implementation": "eager"},
        {"attn_implementation": None},
        {"attn_implementation": {"": "eager"}},
        {"use_kernels": False},
        {"conv_kernel": 4, "use_mamba_kernels": True},
        {"num_hidden_layers": 32, "n_layer": 1},
        {"num_experts": 8, "num_labels": 2, "num_nextn_predict_layers": 1},
        {"vision_config": {"depth": 32, "num_hidden_layers": 48}},
        {"max_position_embeddings": 10_485_760, "rope_theta": 10**9, "num_parameters": 7 * 10**9},
    ],
)
def test_usual_settings_are_accepted(claimed: dict[str, Any], model: Path) -> None:
    check_claims(checkpoint(model, **claimed))


def test_a_package_that_is_installed_is_used(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {"flash_attn": importlib.util.find_spec("os")}
    monkeypatch.setattr(claims, "find_spec", specs.get)
    source = checkpoint(model, attn_implementation="flash_attention_2")
    check_claims(source)
    specs.clear()  # now it is not installed
    with pytest.raises(
        InputError, match="`flash_attention_2`, for which code would come from the Hub"
    ):
        check_claims(source)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers"])
@pytest.mark.parametrize(("nested", "count"), [(False, 200_000), (True, 33)])
def test_a_count_of_blocks_far_above_the_tensors_is_refused(
    nested: bool, count: int, key: str, model: Path
) -> None:
    claimed: dict[str, Any] = {key: count}
    if nested:
        claimed = {"text_config": claimed}
    with pytest.raises(InputError) as caught:
        check_claims(checkpoint(model, **claimed))
    assert caught.value.code == "E_CKPT_INCOMPLETE"
    message = f"config.json sets {key} to {count}, but there are tensors of 2 blocks"
    assert str(caught.value) == message
    assert caught.value.hint == "download config.json and the weights again, of one revision"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("vision_config.num_hidden_layers", 200_000),
        ("vision_config.depth", 1025),
        ("encoder_layers", 10**12),
        ("num_local_experts", 10**7),
        ("text_config.n_routed_experts", 1025),
        ("num_labels", 10**9),
    ],
)
def test_a_count_of_parts_far_above_the_tensors_is_refused(
    place: str, value: int, model: Path
) -> None:
    outer, _, inner = place.rpartition(".")
    claimed: dict[str, Any] = {inner: value}
    if outer:
        claimed = {outer: claimed}
    with pytest.raises(InputError) as caught:
        check_claims(checkpoint(model, **claimed))
    assert (caught.value.code, caught.value.hint) == ("E_CKPT_CONFIG", "download config.json again")
    message = f"config.json sets {place} to {value}, but there are no tensors of so many"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("claimed", "code"),
    [
        ({"num_hidden_layers": 10**12}, "E_CKPT_INCOMPLETE"),
        ({"attn_implementation": "org/repo"}, "E_REMOTE_CODE"),
    ],
)
def test_plan_quantize_and_evaluate_refuse_such_a_config(
    claimed: dict[str, Any], code: str, model: Path, tmp_path: Path
) -> None:
    source = copy_with(model, tmp_path / "model", **claimed)
    (tmp_path / "text.txt").write_text("some words " * 500)
    request = EvalRequest(dataset=str(tmp_path / "text.txt"), seqlen=32)
    with pytest.raises(InputError) as planned:
        plan_run(source, settings())
    with pytest.raises(InputError) as quantized:
        quantize_checkpoint(str(source), tmp_path / "out", settings(trust_remote_code=True))
    with pytest.raises(InputError) as evaluated:
        evaluate_perplexity(str(source), request, lambda _: None)
    codes = [caught.value.code for caught in (planned, quantized, evaluated)]
    assert codes == [code] * 3
    assert not (tmp_path / "out").exists()


def test_load_config_removes_auto_map_if_code_is_not_trusted(model: Path, tmp_path: Path) -> None:
    code = {"AutoModelForCausalLM": "evil.Model"}
    source = copy_with(model, tmp_path / "model", auto_map=code)
    assert not hasattr(load_config(source, trust_remote_code=False), "auto_map")


def test_load_config_removes_auto_map_of_nested_configs(model: Path, tmp_path: Path) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModel": "org/repo--evil.Model"}
    nested = AutoConfig.for_model("gemma3").to_dict()
    nested["text_config"]["auto_map"] = nested["vision_config"]["auto_map"] = code
    config = load_config(copy_with(model, tmp_path / "model", **nested), trust_remote_code=False)
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]
    assert len(parts) == 2
    assert not any(hasattr(part, "auto_map") for part in [config, *parts])


def test_buffers_that_would_fill_the_memory_are_refused(model: Path, tmp_path: Path) -> None:
    source = copy_with(model, tmp_path / "model", head_dim=2**33)
    message = r"^config.json asks for 34 GB of buffers, such as `model"
    with pytest.raises(InputError, match=message) as caught:
        quantize_checkpoint(str(source), tmp_path / "out", settings())
    assert caught.value.code == "E_ARCH"
    assert caught.value.hint is not None
    assert "head_dim in config.json" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_types", [[["global", "local"], 10**10]]),
        ("hybrid_override_pattern", "M-" * 100_000),
        ("layer_types", ["full_attention"] * 200_000),
    ],
)
def test_a_list_of_kinds_longer_than_the_blocks_is_refused(
    key: str, value: object, model: Path, tmp_path: Path
) -> None:
    source = copy_with(model, tmp_path / "model", **{key: value})
    message = rf"config.json gives {key} for \d+ blocks, but there are tensors of 2"
    with pytest.raises(InputError, match=message) as caught:
        check_claims(open_checkpoint(source))
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_CONFIG", 3)
    assert caught.value.hint == "download config.json again"
