"""`gptq quantize` turns flags into one call of the pipeline and prints its result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.cli.app import load_command
from gptq_cli.cli.console import BEGAN
from gptq_cli.config.fields import seconds
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ResourceError
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import LayerReport
from gptq_cli.planning.run_plan import default_name

from . import conftest
from .conftest import FakeEvaluated, FakeEvaluator, FakeQuantized, FakeQuantizer, Run

RUN_FLAGS = [
    "--revision=v1",
    "--overwrite",
    "--resume=require",
    "--max-runtime=3h30m",
    "--allow-network-fs",
    "--stream-download",
]
EVERY_FLAG = [
    "--bits=3",
    "--group-size=-1",
    "--asym",
    "--desc-act",
    "--no-act-group-aware",
    "--static-groups",
    "--no-signed-scales",
    "--scale-search=mse",
    "--refine-sweeps=2",
    "--damp-mode=diagonal",
    "--no-true-sequential",
    "--damp-percent=0.02",
    "--preset=act-order",
    "--dynamic",
    "-:.*x",
    "--dynamic",
    "+:.*y={bits: 8, sym: true}",
    "--lm-head",
    "--dataset=org/t",
    "--dataset-config=en",
    "--dataset-split=train",
    "--text-column=body",
    "--chat-template=t.jinja",
    "--nsamples=6",
    "--seqlen=64",
    "--batch-size=2",
    "--seed=7",
    "--format=gptq",
    "--max-shard-size=1GB",
    "--device=cpu",
    "--dtype=float32",
    "--trust-remote-code",
]
EVERY_FIELD = {
    "bits": 3,
    "group_size": -1,
    "sym": False,
    "desc_act": True,
    "act_group_aware": False,
    "static_groups": True,
    "signed_scales": False,
    "scale_search": "mse",
    "refine_sweeps": 2,
    "damp_mode": "diagonal",
    "true_sequential": False,
    "damp_percent": 0.02,
    "preset": "act-order",
    "dynamic": {"-:.*x": {}, "+:.*y": {"bits": 8, "sym": True}},
    "lm_head": True,
    "dataset": "org/t",
    "dataset_config": "en",
    "dataset_split": "train",
    "text_column": "body",
    "chat_template": "t.jinja",
    "nsamples": 6,
    "seqlen": 64,
    "batch_size": 2,
    "seed": 7,
    "format": "gptq",
    "max_shard_size": "1GB",
    "device": "cpu",
    "dtype": "float32",
    "trust_remote_code": True,
}


def test_every_flag_reaches_its_field(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jinja").write_text("a template")
    result = gptq("quantize", "org/m", "-o", tmp_path / "out", *RUN_FLAGS, *EVERY_FLAG)
    assert result.exit_code == 0, result.stderr
    (call,) = quantizer.calls
    assert call == {
        "model": "org/m",
        "output": tmp_path / "out",
        "revision": "v1",
        "overwrite": True,
        "resume": "require",
        "max_seconds": 12600,
        "allow_network_fs": True,
        "stream_download": True,
        "spent_seconds": 0.0,
        "config": QuantizeConfig(**EVERY_FIELD),
    }


def test_every_field_that_quantize_uses_has_a_flag() -> None:
    options = {parameter.name for parameter in load_command("quantize").params}
    missing = set(QuantizeConfig.model_fields) - options
    assert missing == {"backend", "modules_in_block_to_quantize"}


def test_underscores_in_flags_are_accepted_and_values_kept(
    gptq: Run, quantizer: FakeQuantizer
) -> None:
    text = ("--dataset=org/t", "--text_column=my_text")
    result = gptq("quantize", "m", "-b", "4", "--group_size", "64", "--no-act_group_aware", *text)
    assert result.exit_code == 0, result.stderr
    config = quantizer.calls[0]["config"]
    assert (config.group_size, config.act_group_aware, config.text_column) == (64, False, "my_text")


def test_a_negative_group_size_is_a_value_and_no_option(
    gptq: Run, quantizer: FakeQuantizer
) -> None:
    assert gptq("quantize", "m", "-b", "4", "-g", "-1").exit_code == 0
    assert quantizer.calls[0]["config"].group_size == -1


def test_flags_override_variables_and_variables_the_file(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "c.yaml"
    recipe.write_text("bits: 2\nseed: 1\ngroup_size: 32\npad_token_id: 0\n", encoding="utf-8")
    monkeypatch.setenv("GPTQ_SEED", "2")
    result = gptq("quantize", "m", "-c", recipe, "-g", "64")
    config = quantizer.calls[0]["config"]
    assert (config.bits, config.seed, config.group_size) == (2, 2, 64)
    assert "note: pad_token_id has no effect" in result.stderr


def test_a_repeated_dataset_is_a_list(gptq: Run, quantizer: FakeQuantizer) -> None:
    gptq("quantize", "m", "-b", "4", "--dataset", "one", "--dataset", "two")
    gptq("quantize", "m", "-b", "4", "--dataset", "one")
    assert [call["config"].dataset for call in quantizer.calls] == [["one", "two"], "one"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-b", "9"], "error[E_CFG_RANGE]: --bits must be 2, 3, 4, 5, 6, 7 or 8, or an average"),
        (["--dtype", "half"], '--dtype must be auto, bfloat16, float16 or float32, got "half"'),
        (["-b", "4", "--dynamic", "+:.*x"], "--dynamic '+:.*x' changes nothing"),
        (["-b", "4", "--dynamic", "-:x", "--dynamic", "-:x"], "--dynamic has '-:x' twice"),
        (["-b", "4", "--dynamic", "+:x={bitz: 1}"], "--dynamic['+:x'].bitz is not a known key"),
        (["-b", "4", "--dynamic", "+:x={bits 1}"], "--dynamic['+:x']['bits 1'] is not a known key"),
        (["-b", "4", "--dynamic", "+:x={@}"], "--dynamic['+:x'] must be a mapping of settings"),
        (
            ["-b", "4", "-c", "none.yaml"],
            "error[E_CFG_FILE]: cannot read the configuration none.yaml",
        ),
    ],
)
def test_wrong_settings_are_refused_before_loading(
    words: list[str], message: str, gptq: Run, quantizer: FakeQuantizer
) -> None:
    result = gptq("quantize", "m", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert quantizer.calls == []


def test_a_missing_dataset_is_refused_before_loading(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "org/m", "-b", "4", "--dataset", "none.txt")
    assert result.exit_code == 3
    assert result.stderr.startswith(
        "error[E_DATA_NOT_FOUND]: dataset `none.txt` does not exist\n\nhint: give a file (.txt"
    )
    assert quantizer.calls == []


def test_a_misspelt_dataset_is_told_the_file_that_is_there(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("calibration.txt", "notes.txt"):
        Path(name).write_text("text")
    result = gptq("quantize", "org/m", "-b", "4", "--dataset", "calibraton.txt")
    assert result.exit_code == 3
    assert result.stderr == (
        "error[E_DATA_NOT_FOUND]: dataset `calibraton.txt` does not exist\n\n"
        "hint: did you mean calibration.txt?\n"
    )
    assert quantizer.calls == []


def test_a_misspelt_configuration_is_told_the_file_that_is_there(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("bits: 4")
    result = gptq("quantize", "org/m", "--config", "recpie.yaml")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "hint: did you mean recipe.yaml?"
    assert quantizer.calls == []


@pytest.mark.parametrize("model", ["./none", "/none", "~/none", "a/b/c", "none dir"])
def test_a_wrong_path_is_refused_before_loading(
    model: str, gptq: Run, quantizer: FakeQuantizer
) -> None:
    result = gptq("quantize", model, "-b", "4")
    assert result.exit_code == 3
    assert f"error[E_MODEL_NOT_FOUND]: `{model}` is not a directory" in result.stderr
    assert quantizer.calls == []


def test_the_summary_names_output_size_error_and_engines(
    gptq: Run, quantizer: FakeQuantizer
) -> None:
    result = gptq("quantize", "org/name", "-b", "4", "--desc-act")
    assert (
        result.stdout
        == """\
name-GPTQ-Int4-g128
size   8 MB -> 2.5 MB (3.20x smaller)
error  2.00e-04 mean output error of 4 layers, round-to-nearest 6.00e-04
time   1:02:03
loads in sglang, transformers, gptqmodel, llama.cpp, onnxruntime-genai, exllamav2
does not load in vllm: it refuses desc_act
loads WRONGLY in openvino: it ignores g_idx
does not load in lmdeploy: TurboMind refuses desc_act
does not load in auto-round: it refuses desc_act without static_groups
loads with limits in aphrodite: desc_act is slow
"""
    )
    assert len(quantizer.calls) == 1


def test_the_summary_tells_of_a_sample_of_rows(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = conftest.layer_report

    def sampled(*arguments: Any, **named: Any) -> LayerReport:
        return replace(usual(*arguments, **named), rtn_rows=1366)

    monkeypatch.setattr(conftest, "layer_report", sampled)
    result = gptq("quantize", "org/name", "-b", "4")
    assert ", round-to-nearest 6.00e-04 on a sample of rows\n" in result.stdout
    assert len(quantizer.calls) == 1


def test_the_time_counts_from_the_start_of_the_command(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BEGAN, "1000")
    monkeypatch.setattr("gptq_cli.cli.console.time", lambda: 1000 + 4000.4)
    result = gptq("quantize", "org/name", "-b", "4")
    assert "time   1:06:40\n" in result.stdout  # of 3723 seconds for the work itself
    assert len(quantizer.calls) == 1


def test_summary_and_log_tell_the_strengths_of_following(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = conftest.layer_report

    def followed(index: int, *arguments: Any, **named: Any) -> LayerReport:
        report = usual(index, *arguments, **named)
        return replace(report, asymmetric_calibration=0.25 + index / 2)

    monkeypatch.setattr(conftest, "layer_report", followed)
    result = gptq("quantize", "org/name", "-b", "4", "-v")
    words = "follow each layer makes up for 50% of earlier errors on average, from 25% to 75%\n"
    assert words in result.stdout
    assert "damp 0.1 follows 0.75 tokens 4096" in result.stderr
    assert len(quantizer.calls) == 1


def test_summary_and_log_tell_what_loss_aware_rounding_gains(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = conftest.layer_report

    def aware(index: int, *arguments: Any, **named: Any) -> LayerReport:
        return replace(usual(index, *arguments, **named), loss_ratio=0.5 + index / 4)

    monkeypatch.setattr(conftest, "layer_report", aware)
    result = gptq("quantize", "org/name", "-b", "4", "-v")
    gain = "gradients lower the expected increase of the model's loss by 38%"
    words = f"loss   {gain}, mean of 4 layers\n"
    assert words in result.stdout
    assert "damp 0.1 loss x0.75 tokens 4096" in result.stderr
    assert len(quantizer.calls) == 1


@pytest.mark.parametrize(
    ("words", "serving"),
    [
        ([], "vllm serve 'my out'"),
        (["--target", "sglang"], "python -m sglang.launch_server --model-path 'my out'"),
        (["-b", "2"], "python convert_hf_to_gguf.py 'my out' --outfile model.gguf"),
        (["-b", "3"], "gptq generate 'my out' \"Why is the sky blue?\""),
    ],
)
def test_a_finished_run_shows_the_next_two_commands(
    words: list[str], serving: str, gptq: Run, quantizer: FakeQuantizer
) -> None:
    del quantizer
    words = ["--dataset", "wikitext2", *words]
    result = gptq("quantize", "m", "-b", "4", "-o", "my out", *words)
    assert result.stderr.splitlines()[-2:] == [
        "next: gptq eval-ppl 'my out' --baseline m",
        f"next: {serving}",
    ]
    assert "next:" not in result.stdout


def test_the_next_command_measures_on_text_that_the_calibration_has_not_read(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    del quantizer
    rows = tmp_path / "my rows.jsonl"
    rows.write_text('{"a": "x", "b": "y"}')
    words = ["--dataset", rows, "--seqlen", "64", "--text-column", "a", "--text-column", "b"]
    result = gptq("quantize", "m", "-b", "4", "-o", "out", *words)
    measuring = result.stderr.splitlines()[-2]
    assert measuring == (
        "next: gptq eval-ppl out --baseline m --dataset FILE --seqlen 64 "
        "--text-column a --text-column b"
    )
    kind = f"text of the same kind as `{rows}`, but which the calibration has not read"
    assert result.stderr.splitlines()[-3] == f"note: FILE stands for {kind}"
    result = gptq("quantize", "m", "-o", "out", "--dataset", "english", "--seqlen", "64")
    assert "FILE" not in result.stderr
    measuring = result.stderr.splitlines()[-2]
    assert measuring == "next: gptq eval-ppl out --baseline m --dataset english --seqlen 64"


CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}'


@pytest.mark.parametrize("first", ["chats.jsonl", "plain.txt"])
def test_the_next_command_has_the_template_of_chats_in_a_mix(
    first: str, gptq: Run, quantizer: FakeQuantizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del quantizer
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text(CHAT)
    Path("plain.txt").write_text("a b c")
    Path("chat.jinja").write_text("{{ messages[0].content }}")
    texts = sorted(["chats.jsonl", "plain.txt"], key=lambda name: name != first)
    words = ["--dataset", f"{texts[0]}:0.75", "--dataset", f"{texts[1]}:0.25", "--seqlen", "64"]
    result = gptq("quantize", "m", "-o", "out", *words, "--chat-template", "chat.jinja")
    expected = "next: gptq eval-ppl out --baseline m --dataset FILE --seqlen 64"
    if first == "chats.jsonl":
        expected += " --chat-template chat.jinja"
    assert result.stderr.splitlines()[-2] == expected


@pytest.mark.parametrize("text", ["english", "rows.jsonl", "c4"])
def test_eval_measures_the_output_at_the_end(
    text: str,
    gptq: Run,
    quantizer: FakeQuantizer,
    evaluator: FakeEvaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"a": "x", "b": "y"}')
    evaluator.result = FakeEvaluated(baseline_perplexity=12.25, kl=0.3, top1_agreement=0.7)
    words = ["--dataset", text, "--seqlen", "64", "--nsamples", "9", "--device", "cpu", "--eval"]
    if text == "rows.jsonl":
        words += ["--text-column", "b"]
    result = gptq("quantize", "m", "-o", "out", *words)
    assert (result.exit_code, len(quantizer.calls)) == (0, 1), result.stderr
    [(measured, request)] = evaluator.calls
    expected: dict[str, Any] = {"baseline": "m", "device": "cpu"}
    if text != "c4":
        expected |= {"dataset": text, "seqlen": 64, "max_windows": 9}
    if text == "rows.jsonl":
        expected["text_column"] = ["b"]
    assert (measured, request) == ("out", EvalRequest(**expected))
    assert "\nagreement   KL 0.3, top-1 70.00%\n" in result.stdout
    assert "the model has lost much of the original: KL is below 0.5" in result.stdout
    assert [line for line in result.stderr.splitlines() if line.startswith("next: ")] == [
        "next: vllm serve out"
    ]
    assert [run[-1] for run in quantizer.runs] == [None, evaluator.result.to_json()]
    same = f"note: --eval measures on `{text}`, which the calibration has read; "
    other = "to measure on other text: gptq eval-ppl out --baseline m --dataset FILE"
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: --eval")]
    assert notes == [same + other] * (text == "rows.jsonl")


def test_the_json_of_a_run_has_its_evaluation(
    gptq: Run, quantizer: FakeQuantizer, evaluator: FakeEvaluator
) -> None:
    evaluator.result = FakeEvaluated(baseline_perplexity=12.25, kl=0.3, top1_agreement=0.7)
    for words, expected in (([], None), (["--eval"], evaluator.result.to_json())):
        data = json.loads(gptq("quantize", "m", "--json", *words).stdout)
        assert data["evaluation"] == expected
    assert (len(quantizer.calls), len(evaluator.calls)) == (2, 1)


def test_eval_refuses_an_adapter_before_the_run(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "m", "--lora", "adapter", "--eval")
    assert (result.exit_code, quantizer.calls) == (2, [])
    assert "error[E_CFG_CONFLICT]: --eval compares with the model as it is" in result.stderr
    assert "hint: omit --eval, and compare with the merged model" in result.stderr


def test_a_report_that_cannot_be_written_is_a_warning(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    del quantizer

    def fail(*_: object) -> None:
        raise ResourceError("E_DISK", "cannot write `m/gptq_report.json`: No space left on device")

    monkeypatch.setattr("gptq_cli.storage.manifest.write_report_data", fail)
    result = gptq("quantize", "m", "-b", "4")
    assert result.exit_code == 0
    complete = "the checkpoint is complete, but not its report"
    expected = f"warning[W_REPORT]: {complete}: cannot write `m/gptq_report.json`: No space left"
    assert expected in result.stderr


def test_quiet_prints_only_the_path_and_warnings(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "m", "-b", "4", "-q", "-o", "somewhere")
    assert result.stdout == "somewhere\n"
    assert result.stderr.splitlines() == [
        "warning[W_TEST]: a warning in block 0",
        "warning[W_TEST]: a warning in block 1",
    ]
    assert len(quantizer.calls) == 1


def test_json_is_one_object_without_nan(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "m", "-b", "4", "--json", "-o", "o")
    layers: list[str] = []
    for block in ("model.layers.0", "model.layers.1"):
        layers += [f"{block}.q_proj", f"{block}.[bold]down"]
    expected: dict[str, Any] = {"schema": 1, "status": "ok", "output": "o", "layers": layers}
    expected |= {"worst": None, "evaluation": None}
    assert json.loads(result.stdout) == expected
    assert result.stdout.count("\n") == 1
    assert len(quantizer.calls) == 1


def test_print_config_prints_the_configuration_and_exits(
    gptq: Run, quantizer: FakeQuantizer, tmp_path: Path
) -> None:
    result = gptq("quantize", "m", "-b", "4", "--asym", "--print-config")
    assert "bits: 4  # --bits\n" in result.stdout
    assert "format: gptq_v2  # because sym is false\n" in result.stdout
    saved = tmp_path / "saved.yaml"
    saved.write_text(result.stdout, encoding="utf-8")
    again = gptq("quantize", "m", "-c", saved, "--print-config", "--json")
    data = json.loads(again.stdout)
    assert data["config"]["format"] == "gptq_v2"
    assert data["origins"]["sym"] == f"{saved}:3"
    assert quantizer.calls == []


def test_the_default_output_is_named_like_published_ones(tmp_path: Path) -> None:
    model = tmp_path / "Tiny-1B"
    model.mkdir()
    config = QuantizeConfig(bits=8, group_size=-1)
    assert default_name(f"{model}/", config) == "Tiny-1B-GPTQ-Int8-channel"
    (tmp_path / "Linked-2B").symlink_to(model)
    assert default_name(str(tmp_path / "Linked-2B"), config) == "Linked-2B-GPTQ-Int8-channel"
    assert default_name(str(model / ".."), config) == f"{tmp_path.name}-GPTQ-Int8-channel"
    config = QuantizeConfig(bits=4, group_size=64)
    assert default_name("hf://org/Big", config) == "Big-GPTQ-Int4-g64"


@pytest.mark.parametrize(
    ("time", "expected"), [("3h30m", 12600), ("90m", 5400), ("45s", 45), ("1h1s", 3601)]
)
def test_max_runtime_is_read_as_seconds(time: str, expected: int) -> None:
    assert seconds(time) == expected


@pytest.mark.parametrize("time", ["", "0s", "10", "1.5h", "3m2h", "-5m", "h"])
def test_a_wrong_max_runtime_is_refused(time: str, gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "m", "-b", "4", f"--max-runtime={time}")
    assert result.exit_code == 2
    expected = "--max-runtime must be a time such as 3h30m, 90m or 45s"
    assert f"error[E_CFG_RANGE]: {expected}, got {time!r}" in result.stderr
    assert quantizer.calls == []


def test_an_unknown_resume_policy_is_refused(gptq: Run, quantizer: FakeQuantizer) -> None:
    result = gptq("quantize", "m", "-b", "4", "--resume=always")
    assert result.exit_code == 2
    expected = "error[E_CFG_RANGE]: --resume must be auto, require or never, got 'always'"
    assert expected in result.stderr
    assert quantizer.calls == []


def test_the_summary_reports_a_run_that_was_complete(
    gptq: Run, quantizer: FakeQuantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeQuantized, "already_done", True)
    monkeypatch.setattr(
        FakeQuantized.__init__, "__defaults__", ((), (), 3723.4, 8_000_000, 2_500_000, True, 0)
    )
    result = gptq("quantize", "m", "-b", "4")
    assert "done   already, by an earlier run of the same command\n" in result.stdout
    assert len(quantizer.calls) == 1
