"""Checkpoints written by `quantize_checkpoint`, loaded by the programs that people use them with.

`make test` skips these tests: scripts/test_compat.sh makes the environments of the consumers.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

if "GPTQ_COMPAT_VENVS" not in os.environ:
    pytest.skip("needs the environments that `make test-compat` makes", allow_module_level=True)

import torch
from consumers import VENV_OF, Case, Consumer, limit_of
from transformers import AutoModelForCausalLM

from gptq_cli.checkpoint.layout import packed_modules
from gptq_cli.checkpoint.reader import DequantizingReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import save_model, texts

# The consumers compute in the model's dtype, the reference in float32; a zero point off by one
# gives 0.07 or more.
LARGEST_DIFFERENCE = {"float16": 5e-3, "bfloat16": 2e-2}
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 256,
    "tie_word_embeddings": False,
}
# Both layers of Gemma are of different kinds and see different masks; its head is tied.
CHANGES: dict[str, dict[str, object]] = {
    "gemma2": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "opt": {"ffn_dim": 256, "word_embed_proj_dim": 128},
}
SHARED = {"group_size": 64, "dataset": texts(), "seqlen": 64, "nsamples": 16, "device": "cpu"}
O_PROJ = r"model\.layers\.1\.self_attn\.o_proj$"
ALL_BUT_DOWN_PROJ = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
]


def _grid() -> Iterator[Case]:
    for bits, sym, format, desc_act in itertools.product(
        (2, 3, 4, 8), (True, False), ("gptq", "gptq_v2"), (False, True)
    ):
        words = (
            f"{bits}bit",
            "sym" if sym else "asym",
            format,
            *(["desc_act"] if desc_act else []),
        )
        settings = {"bits": bits, "sym": sym, "format": format, "desc_act": desc_act}
        yield Case("-".join(words), settings | {"preset": "gptq"})


def _families() -> Iterator[Case]:
    for family, bits in itertools.product(
        ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "gpt_neox"), (4, 8)
    ):
        yield Case(f"{family}-{bits}bit", {"bits": bits}, family)


SIGNED = ("balanced", "best")
CASES = (
    *_grid(),
    *_families(),
    *(
        Case(f"{bits}bit-group{size}", {"bits": bits, "group_size": size})
        for bits in (3, 4)
        for size in (-1, 32, 128)
    ),
    Case("plain-order", {"bits": 4, "act_group_aware": False, "preset": "gptq"}),
    Case("static-groups", {"bits": 4, "desc_act": True, "static_groups": True, "preset": "gptq"}),
    *(
        Case(f"{preset}-{bits}bit", {"bits": bits, "preset": preset})
        for preset in SIGNED
        for bits in (2, 3, 4, 8)
    ),
    Case("signed-desc_act", {"bits": 4, "desc_act": True}),
    Case("whole-rows-desc_act", {"bits": 4, "group_size": -1, "desc_act": True}),
    Case("kept-by-rule", {"bits": 4, "dynamic": {f"-:{O_PROJ}": {}}}),
    Case("kept-by-list", {"bits": 4, "modules_in_block_to_quantize": ALL_BUT_DOWN_PROJ}),
    Case("kept-fused-group", {"bits": 4, "dynamic": {r"-:.*\.1\.self_attn\.[qkv]_proj": {}}}),
    Case("kept-block", {"bits": 4, "dynamic": {r"-:model\.layers\.0\.": {}}}),
    Case("mixed-bits", {"bits": 4, "dynamic": {r"+:.*\.down_proj": {"bits": 8}}}),
    Case(
        "mixed-bits-and-kept",
        {"bits": 4, "dynamic": {f"-:{O_PROJ}": {}, r"+:.*\.down_proj": {"bits": 8}}},
    ),
    Case("mixed-groups", {"bits": 4, "dynamic": {r"+:.*\.down_proj": {"group_size": 32}}}),
    Case("mixed-orders", {"bits": 4, "dynamic": {r"+:.*\.down_proj": {"desc_act": True}}}),
    Case("mixed-symmetry", {"bits": 4, "dynamic": {r"+:.*\.down_proj": {"sym": False}}}),
    Case("quantized-head", {"bits": 4, "lm_head": True}),
    Case("quantized-head-was-tied", {"bits": 4, "lm_head": True}, "gemma2"),
    Case("head-kept-by-rule", {"bits": 4, "lm_head": True, "dynamic": {"-:lm_head": {}}}),
    Case("many-shards", {"bits": 4, "max_shard_size": "100KB"}),
    Case("bfloat16", {"bits": 4}, dtype="bfloat16"),
    Case("bfloat16-qwen2", {"bits": 8}, "qwen2", dtype="bfloat16"),
)
PAIRS = [(consumer, case) for consumer in VENV_OF for case in CASES]


def _with_limit(kind: Callable[[str, Case], bool]) -> pytest.MarkDecorator:
    pairs = [pytest.param(*pair, id=f"{pair[0]}-{pair[1].id}") for pair in PAIRS if kind(*pair)]
    return pytest.mark.parametrize(("consumer", "case"), pairs)


def _is_read(consumer: str, case: Case) -> bool:
    return limit_of(consumer, case) is None


def _is_refused(consumer: str, case: Case) -> bool:
    limit = limit_of(consumer, case)
    return limit is not None and limit.words is not None


def _is_misread(consumer: str, case: Case) -> bool:
    limit = limit_of(consumer, case)
    return limit is not None and limit.words is None


@dataclass(frozen=True, slots=True)
class Written:
    """A quantized checkpoint, ids [B, T], and float32 logits [B, T, V] of dequantized weights."""

    directory: Path
    ids: Path
    logits: np.ndarray


@dataclass(frozen=True, slots=True)
class Loaded:
    """A consumer's error and tensor names, and its relative distance to the expected logits."""

    error: str | None
    names: list[str]
    difference: float


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """Quantizes the case of that id, once."""
    root = tmp_path_factory.mktemp("checkpoints")
    ids = np.random.default_rng(0).integers(2, 300, (2, 24))
    np.save(root / "ids.npy", ids)

    @cache
    def source_of(family: str, dtype: str) -> Path:
        sizes = SIZES | CHANGES.get(family, {})
        return save_model(root / f"{family}-{dtype}", family, dtype=getattr(torch, dtype), **sizes)

    cases = {case.id: case for case in CASES}

    @cache
    def write_case(case_id: str) -> Written:
        case, output = cases[case_id], root / f"quantized-{case_id}"
        source = source_of(case.family, case.dtype)
        quantize_checkpoint(str(source), output, QuantizeConfig(**(SHARED | case.settings)))
        return Written(
            output, root / "ids.npy", _logits_of_dequantized(source, output, torch.from_numpy(ids))
        )

    return write_case


@pytest.fixture(scope="session")
def load(
    write: Callable[[str], Written], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, Case], Loaded]]:
    """Loads a case with a consumer."""
    scratch = tmp_path_factory.mktemp("consumers")
    venvs = Path(os.environ["GPTQ_COMPAT_VENVS"])
    started: dict[str, Consumer] = {}

    def load_case(consumer: str, case: Case) -> Loaded:
        written, logits = write(case.id), scratch / "logits.npy"
        process = started.pop(consumer, None) or Consumer(consumer, venvs, scratch)
        answer = process.load(written.directory, written.ids, logits)
        started[consumer] = process
        if answer["error"]:
            return Loaded(answer["error"], [], float("inf"))
        return Loaded(
            None,
            answer["missing"] + answer["unexpected"],
            _difference(np.load(logits), written.logits),
        )

    yield load_case
    for process in started.values():
        process.close()


@_with_limit(_is_read)
def test_consumer_gives_the_logits_of_dequantized_weights(
    consumer: str, case: Case, load: Callable[[str, Case], Loaded]
) -> None:
    loaded = load(consumer, case)
    # auto-round wants no g_idx where it is trivial, and says so
    names = [
        name for name in loaded.names if not (consumer == "auto-round" and name.endswith(".g_idx"))
    ]
    assert loaded.error is None
    assert names == []
    assert loaded.difference <= LARGEST_DIFFERENCE[case.dtype]


@_with_limit(_is_refused)
def test_consumer_refuses_settings_that_it_cannot_read(
    consumer: str, case: Case, load: Callable[[str, Case], Loaded]
) -> None:
    loaded, limit = load(consumer, case), limit_of(consumer, case)
    assert loaded.error is not None
    assert limit.words in loaded.error


@_with_limit(_is_misread)
def test_consumer_still_misreads_known_settings(
    consumer: str, case: Case, load: Callable[[str, Case], Loaded]
) -> None:
    loaded = load(consumer, case)
    assert loaded.error is None
    assert not loaded.difference <= LARGEST_DIFFERENCE[case.dtype]  # NaN is a misreading too


def _logits_of_dequantized(source: Path, quantized: Path, ids: torch.Tensor) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    checkpoint = open_checkpoint(quantized)
    reader = DequantizingReader(checkpoint, torch.device("cpu"), "torch")
    with torch.inference_mode():
        for name in (module.name for module in packed_modules(checkpoint.tensors)):
            # a new parameter: the old one may be the embedding's too
            model.get_submodule(name).weight = torch.nn.Parameter(reader.read(f"{name}.weight"))
        return model(input_ids=ids).logits.numpy()


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm((found - expected).astype(np.float64)) / np.linalg.norm(expected))
