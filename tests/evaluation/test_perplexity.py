"""Streamed perplexity, KL and agreement equal those of the whole transformers model."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_cli.checkpoint.layout import packed_modules
from gptq_cli.checkpoint.reader import DequantizingReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.evaluation.perplexity import Divergence, Perplexity, evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import BlockFinished, Event
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import save_model, text_file, texts

SEQLEN = 48


def request(**changes: object) -> EvalRequest:
    return EvalRequest(
        **(
            {"dataset": text_file(2000, seed=3), "seqlen": SEQLEN, "batch_size": 3, "device": "cpu"}
            | changes
        )
    )


def quantized(tmp_path: Path, model: Path, **changes: object) -> Path:
    settings = {
        "bits": 3,
        "group_size": 32,
        "dataset": text_file(),
        "seqlen": 64,
        "nsamples": 6,
        "device": "cpu",
    }
    output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    return quantize_checkpoint(str(model), output, QuantizeConfig(**(settings | changes))).output


def whole_model(directory: Path, original: Path) -> AutoModelForCausalLM:
    """Return the full model in memory; quantized weights are decoded by hand."""
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    checkpoint = open_checkpoint(directory)
    reader = DequantizingReader(checkpoint, torch.device("cpu"), "torch")
    for name in (module.name for module in packed_modules(checkpoint.tensors)):
        linear = reader.linear(name)
        group = linear.group_of_column.long()
        codes = linear.codes.float() - linear.zeros.float()[:, group]
        model.get_submodule(name).weight.data = codes * linear.scales.float()[:, group]
    return model


def all_logits(model: AutoModelForCausalLM, directory: Path, text: str) -> tuple[Tensor, Tensor]:
    """Windows [n, SEQLEN] as the paper cuts them, and float64 logits."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(directory)(text)["input_ids"])
    windows = ids[: len(ids) // SEQLEN * SEQLEN].reshape(-1, SEQLEN)
    with torch.no_grad():
        return windows, model(input_ids=windows).logits.double()


def direct_perplexity(windows: Tensor, logits: Tensor) -> float:
    losses = [
        functional.cross_entropy(row[:-1], ids[1:]).item()
        for row, ids in zip(logits, windows, strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_plain_perplexity_equals_a_direct_computation(family: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", family)
    windows, logits = all_logits(whole_model(model, model), model, texts(2000, seed=3)[0])
    result = evaluate_perplexity(str(model), request())
    assert result.perplexity == pytest.approx(direct_perplexity(windows, logits), rel=1e-6)
    assert (result.windows, result.tokens) == (len(windows), windows.numel())
    assert result.windows > 10
    assert result.per_window == ()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sym": False, "bits": 2},
        {"desc_act": True, "bits": 4},
        {"dynamic": {"+:.*down_proj": {"bits": 8}}},
        {"lm_head": True},
    ],
    ids=str,
)
def test_quantized_measures_equal_a_direct_computation(
    settings: dict[str, object], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    output = quantized(tmp_path, model, **settings)
    text = texts(2000, seed=3)[0]
    windows, wanted = all_logits(whole_model(model, model), model, text)
    _, got = all_logits(whole_model(output, model), model, text)
    result = evaluate_perplexity(str(output), request(baseline=str(model)))
    assert result.perplexity == pytest.approx(direct_perplexity(windows, got), rel=1e-6)
    assert result.baseline_perplexity == pytest.approx(direct_perplexity(windows, wanted), rel=1e-6)
    log_p, log_q = wanted[:, :-1].log_softmax(-1), got[:, :-1].log_softmax(-1)
    assert result.kl == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4
    )
    same = wanted[:, :-1].argmax(-1) == got[:, :-1].argmax(-1)
    assert result.top1_agreement == pytest.approx(float(same.double().mean()), abs=1e-9)
    assert 0 < result.kl < 1
    assert result.top1_agreement < 1
    for index, window in enumerate(result.per_window):
        assert window.first_token == index * SEQLEN
        assert window.kl == pytest.approx(
            float((log_p[index].exp() * (log_p - log_q)[index]).sum(-1).mean()), rel=1e-4
        )
        assert window.top1_agreement == pytest.approx(float(same[index].double().mean()), abs=1e-9)
        one = slice(index, index + 1)
        assert window.perplexity == pytest.approx(
            direct_perplexity(windows[one], got[one]), rel=1e-5
        )
        assert window.baseline_perplexity == pytest.approx(
            direct_perplexity(windows[one], wanted[one]), rel=1e-5
        )
    assert len(result.per_window) == len(windows) > 10


def test_a_model_has_no_divergence_from_itself(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    result = evaluate_perplexity(str(model), request(baseline=str(model)))
    assert result.kl == pytest.approx(0, abs=1e-9)
    assert result.top1_agreement == 1
    assert result.perplexity == result.baseline_perplexity


def test_the_batch_size_changes_no_result(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    results = [evaluate_perplexity(str(model), request(batch_size=size)) for size in (1, 4)]
    assert results[0].perplexity == pytest.approx(results[1].perplexity, rel=1e-6)
    assert evaluate_perplexity(str(model), request(max_windows=3)).windows == 3


def test_a_foreign_checkpoint_without_g_idx_is_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = save_model(tmp_path / "model")
    output = quantized(tmp_path, model, bits=4)
    expected = evaluate_perplexity(str(output), request()).perplexity
    tensors = {
        name: tensor
        for name, tensor in load_file(output / "model.safetensors").items()
        if "g_idx" not in name
    }
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    assert evaluate_perplexity(str(output), request()).perplexity == expected


def test_the_result_holds_the_protocol_and_events_the_blocks(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    events: list[Event] = []
    result = evaluate_perplexity(str(model), request(), events.append)
    content = json.loads(json.dumps(result.to_json()))
    assert content["dtype"] == "bfloat16"
    assert content["seqlen"] == SEQLEN
    assert content["dataset_sha256"] == hashlib.sha256(texts(2000, seed=3)[0].encode()).hexdigest()
    assert content["join"] == "\n\n"
    assert [event.index for event in events if isinstance(event, BlockFinished)] == [0, 1, 2]


def test_triton_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs a GPU") as caught:
        evaluate_perplexity(str(save_model(tmp_path / "model")), request(backend="triton"))
    assert caught.value.code == "E_CFG_CONFLICT"


def test_the_backend_defaults_to_that_of_the_checkpoint(
    tmp_path: Path,
) -> None:
    output = quantized(tmp_path, save_model(tmp_path / "model"), backend="triton")
    with pytest.raises(ConfigError, match="backend triton needs a GPU"):
        evaluate_perplexity(str(output), request())
    assert evaluate_perplexity(str(output), request(backend="torch")).windows > 10


def test_the_models_positions_bound_seqlen(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="128 positions"):
        evaluate_perplexity(str(model), request(seqlen=129))
    assert evaluate_perplexity(str(model), request(seqlen=None)).seqlen == 128


def test_a_baseline_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model, other = save_model(tmp_path / "a"), save_model(tmp_path / "b", vocab_size=544)
    with pytest.raises(InputError, match="different vocabularies: 512 and 544") as caught:
        evaluate_perplexity(str(model), request(baseline=str(other)))
    assert caught.value.code == "E_TOKENIZER"


@pytest.mark.parametrize("method", ["awq", "aqlm"])
def test_a_checkpoint_of_another_method_is_refused(method: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    described = json.loads((model / "config.json").read_text()) | {
        "quantization_config": {"quant_method": method}
    }
    (model / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=f"quantized as {method}") as caught:
        evaluate_perplexity(str(model), request())
    assert caught.value.code == "E_CKPT_QUANTIZED"


def test_perplexity_over_chunks_of_positions_equals_one_piece() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 600, 50) * 3, torch.randint(50, (2, 600))
    perplexity, divergence = Perplexity(), Divergence()
    for row, tokens in zip(logits, ids, strict=True):
        perplexity.add(row, tokens)
        divergence.add(row, row * 0.9)
    assert perplexity.value == pytest.approx(direct_perplexity(ids, logits.double()), rel=1e-6)
    p, q = logits[:, :-1].double().log_softmax(-1), (logits[:, :-1] * 0.9).double().log_softmax(-1)
    assert divergence.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert divergence.positions == [599, 599]


def test_a_nan_loss_stays_visible() -> None:
    assert math.isnan(Perplexity([float("nan")]).value)
    assert Perplexity([1e4]).value == math.inf
