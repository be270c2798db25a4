"""`--target` and notes on engines in quantize, plan and validate-config, before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.families import save_model

from .conftest import FakeQuantizer, Run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target") / "Tiny", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("target") / "Experts", "qwen3_moe")


def test_settings_that_the_target_cannot_load_are_refused(
    gptq: Run, quantizer: FakeQuantizer
) -> None:
    for command in ("quantize", "plan"):
        result = gptq(command, "org/name", "-b", "3", "--target", "vllm")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "error[E_TARGET]: vllm does not load 3 bits: it serves 4 and 8 bits in this format, "
            "others on GPUs as compressed-tensors\n\n"
            "hint: use --bits 4 or 8; "
            "as it is, it loads in transformers, gptqmodel, auto-round\n"
        )
    assert quantizer.calls == []


def test_a_refused_target_in_a_file_has_its_line(gptq: Run, tmp_path: Path) -> None:
    (tmp_path / "cfg.yaml").write_text("bits: 4\nsym: false\ntarget: sglang\n")
    result = gptq("validate-config", tmp_path / "cfg.yaml", "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["exit_code"]) == (2, 2)
    (problem,) = data["problems"]
    assert (problem["code"], problem["location"]["line"]) == ("E_TARGET", 3)
    assert problem["message"].startswith("sglang does not load asymmetric grids: the kernel for")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--target", "llama.cpp", "--dynamic", "+:.*down_proj={bits: 8}"],
            "llama.cpp does not load layers with 4, 8 bits",
        ),
        (
            ["--target", "vllm", "--dynamic", r"-:.*\.0\..*q_proj"],
            "vllm does not load layers that it fuses (q, k, v; gate, up) with",
        ),
        (
            ["--target", "transformers", "--lm-head"],
            "transformers would misread a quantized lm_head: it ignores",
        ),
        (["--target", "openvino", "--desc-act"], "openvino would misread desc_act"),
    ],
)
def test_rules_and_layers_are_checked_for_the_target_first(
    more: list[str], message: str, gptq: Run, model: Path, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    for command in ("quantize", "plan"):
        result = gptq(command, model, "-b", "4", "-g", "32", "-o", tmp_path / "out", *more)
        assert (result.exit_code, result.stdout) == (2, ""), result.stderr
        assert f"error[E_TARGET]: {message}" in result.stderr
        assert "hint: use " in result.stderr
        assert len([line for line in result.stderr.splitlines() if line]) <= 4
    assert quantizer.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_is_refused_for_transformers_and_loads_in_vllm(gptq: Run, mixture: Path) -> None:
    words = ["plan", mixture, "-b", "4", "-g", "32", "--target"]
    result = gptq(*words, "transformers")
    # these tiny models stack their experts in memory, but on disk each expert has its own tensors
    assert (result.exit_code, result.stdout) == (2, "")
    misread = "transformers would misread quantized experts: it leaves quantized experts random"
    assert misread in result.stderr
    served = gptq(*words, "vllm")
    assert served.exit_code == 0
    slower = "vllm: a slower kernel for experts whose hidden size is no multiple of 128"
    assert f"warning[W_TARGET]: {slower}" in served.stderr
    ordered = gptq(*words, "vllm@0.29", "--desc-act")
    assert "vllm@0.29 would misread experts of this width with desc_act" in ordered.stderr


def test_validate_config_checks_the_target_for_a_model(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "cfg.yaml").write_text(
        "bits: 4\ngroup_size: 32\ntarget: vllm\ndynamic: {'-:.*k_proj': {}}\n"
    )
    assert gptq("validate-config", tmp_path / "cfg.yaml").exit_code == 0
    result = gptq("validate-config", tmp_path / "cfg.yaml", "--model", model)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_TARGET]: vllm does not load layers that it fuses" in result.stderr


def test_an_unknown_target_gets_the_nearest_as_hint(gptq: Run) -> None:
    result = gptq("plan", "m", "-b", "4", "--target", "vlm")
    assert result.exit_code == 2
    assert "error[E_CFG_RANGE]: --target must be an engine, ENGINE@VERSION" in result.stderr
    assert "did you mean vllm?" in result.stderr


@pytest.mark.parametrize("target", ["vllm@0.99", "vllm@latest", "vllm/tpu", "vllm@0.29/"])
def test_an_unknown_version_or_platform_gets_the_known_ones(gptq: Run, target: str) -> None:
    result = gptq("plan", "m", "-b", "4", "--target", target)
    assert result.exit_code == 2
    assert "error[E_CFG_RANGE]: --target must be an engine, ENGINE@VERSION" in result.stderr
    assert f'got "{target}"' in result.stderr
    assert "hint: --target vllm, or with @0.29 to @0.33, /cuda, /cpu, /rocm" in result.stderr


@pytest.mark.parametrize(
    ("target", "exit_code", "words"),
    [
        ("vllm@0.30", 2, "error[E_TARGET]: vllm@0.30 does not load desc_act: it refuses desc_act"),
        ("vllm@0.29", 0, "warning[W_TARGET]: vllm@0.29: desc_act is slow"),
        ("vllm@0.29/cpu", 0, "warning[W_TARGET]: vllm@0.29/cpu: desc_act is slow"),
    ],
)
def test_the_version_of_the_target_decides(
    target: str, exit_code: int, words: str, gptq: Run, model: Path
) -> None:
    result = gptq("plan", model, "-b", "4", "-g", "32", "--desc-act", "--target", target)
    assert result.exit_code == exit_code
    assert words in result.stderr


def test_a_satisfied_target_does_not_change_the_plan(gptq: Run, model: Path) -> None:
    words = ["plan", model, "-b", "4", "-g", "32", "--json"]
    plain = json.loads(gptq(*words).stdout)
    with_target = json.loads(gptq(*words, "--target", "vllm@0.33/cpu").stdout)
    assert with_target["disk"].pop("free_bytes")
    assert with_target == plain | {"disk": with_target["disk"]}


def test_without_a_target_a_note_names_engines_that_fail(
    gptq: Run, model: Path, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    words = ["quantize", model, "-g", "32", "-o", tmp_path / "out", "-b"]
    first = gptq(*words, "3").stderr.splitlines()[0]
    assert first == (
        "note: the output does not load in vllm, sglang, llama.cpp, openvino, lmdeploy, "
        "onnxruntime-genai, exllamav2, aphrodite"
    )
    assert "note: the output loads WRONGLY in transformers" in gptq(*words, "4", "--lm-head").stderr
    lmdeploy = "note: the output does not load in lmdeploy"
    assert [line for line in gptq(*words, "4").stderr.splitlines() if "note:" in line] == [lmdeploy]
    assert "note:" not in gptq(*words, "8", "--target", "vllm").stderr
    assert len(quantizer.calls) == 4


def test_a_rule_that_splits_a_fused_group_warns(gptq: Run, model: Path) -> None:
    rule = r"-:.*\.1\..*up_proj"
    result = gptq("plan", model, "-b", "4", "-g", "32", "--dynamic", rule)
    assert result.exit_code == 0
    assert result.stderr == (
        "warning[W_CFG_FUSED]: the layers that engines fuse to `model.layers.1.mlp.gate_up_proj` "
        "differ in settings: not loaded by vllm, sglang, aphrodite\n"
    )
    result = gptq("plan", model, "-b", "3", "-g", "32", "--dynamic", rule)
    assert (result.exit_code, result.stderr) == (0, "")  # these load no 3 bits at all


def test_a_quantized_head_warns(gptq: Run, model: Path) -> None:
    stderr = gptq("plan", model, "-b", "4", "-g", "32", "--lm-head").stderr
    untied = "lm_head is untied from the embeddings and stored beside them, 0.0"
    assert f"warning[W_CFG_HEAD]: {untied}" in stderr
    assert "misread by transformers, openvino, auto-round; loaded with limits by lmdeploy" in stderr


def test_a_listed_module_that_no_layer_has_is_an_error(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "cfg.yaml").write_text(
        "bits: 4\n"
        "group_size: 32\n"
        "modules_in_block_to_quantize: [[self_attn.q_proj], [mlp.down_prj]]\n"
    )
    result = gptq("plan", model, "--config", tmp_path / "cfg.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    problem = "modules_in_block_to_quantize has 'mlp.down_prj', but no layer"
    assert f"error[E_CFG_NO_MATCH]: {problem}" in result.stderr
    assert "hint: a name stands for all layers that end with it" in result.stderr
