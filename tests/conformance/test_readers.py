"""By its own rules, each engine computes with the written weights, or as `serving_table` says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.config.serving import verdicts
from gptq_cli.inspection.summary import inspect_checkpoint
from gptq_cli.planning.run_plan import export_of_layers
from tests.conformance.readers import READERS, Refused, Weights, fused_modules
from tests.conformance.written import LINEARS, Written, write


def outcome(reader: str, written: Written) -> str:
    """Return "yes" if the engine gets the written weights, "wrong" for others, "no" if refused."""
    try:
        found = READERS[reader](written.output)
    except Refused:
        return "no"
    return "yes" if agree(found, written.weights) else "wrong"


def agree(found: Weights, truth: Weights) -> bool:
    expected = dict(truth)
    for prefix, shards in fused_modules(sorted(truth)):
        expected[prefix] = np.concatenate([truth[shard] for shard in shards])
    covered = {
        shard
        for prefix in found
        for shard in dict(fused_modules(sorted(truth))).get(prefix, [prefix])
    }
    same = all(
        name in expected and np.allclose(found[name], expected[name], 1e-3, 1e-6) for name in found
    )
    return same and covered == set(truth)


def promised(written: Written) -> dict[str, str]:
    """What `config/serving.py` says, where "limited" loads as "yes" does."""
    judged = verdicts(export_of_layers(written.plan.layers, written.config))
    return {verdict.engine: verdict.outcome.replace("limited", "yes") for verdict in judged}


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 64])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_engine_behaves_as_the_serving_table_promises(
    bits: int, sym: bool, format: str, group_size: int, desc_act: bool, tmp_path: Path
) -> None:
    order = {"desc_act": desc_act, "act_group_aware": not desc_act}
    written = write(tmp_path, bits=bits, sym=sym, format=format, group_size=group_size, **order)
    assert verify_checkpoint(written.output, full=True).defects == ()
    said, found = promised(written), {reader: outcome(reader, written) for reader in READERS}
    assert found == {reader: said[reader] for reader in found}


KEPT = {r"-:.*layers\.1\.self_attn\.(q|k|v)_proj": {}, r"-:.*layers\.0\.mlp\.down_proj": {}}
MIXED = {r"+:.*down_proj": {"bits": 8, "group_size": 64}}
CASES = {
    "signed scales": {"bits": 4, "group_size": 32, "signed_scales": True},
    "static groups": {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "act_group_aware": False,
        "static_groups": True,
    },
    "kept by rule": {"bits": 4, "group_size": 32, "dynamic": KEPT},
    "kept by list": {
        "bits": 4,
        "group_size": 32,
        "modules_in_block_to_quantize": [["mlp.down_proj"], ["o_proj"]],
    },
    "mixed bits": {"bits": 4, "group_size": 32, "dynamic": MIXED},
    "kept and mixed": {
        "bits": 8,
        "group_size": 32,
        "dynamic": {**KEPT, r"+:.*o_proj": {"bits": 4}},
    },
    "quantized head": {"bits": 4, "group_size": 32, "lm_head": True},
}


SPLIT = {
    "a fused group by its parts": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {
            r"+:.*self_attn\.[qkv]_proj": {"group_size": 64},
            r"+:.*layers\.1\.mlp\.(gate|up)_proj": {"bits": 8},
        },
    },
    "a rule for a fused name alone": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r"+:.*(gate_up_proj|qkv_proj|o_proj)$": {"bits": 8}},
    },
    "one of a fused group kept": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r"-:.*layers\.1\.self_attn\.k_proj": {}},
    },
    "one of a fused group with other bits": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r"+:.*layers\.0\.mlp\.up_proj": {"bits": 8}},
    },
    "a fused group with other bits": {
        "bits": 4,
        "group_size": 32,
        "dynamic": {r"+:.*\.(up_proj|gate_proj|gate_up_proj)": {"bits": 8}},
    },
}


@pytest.mark.parametrize("case", [*CASES, *SPLIT])
def test_each_engine_reads_rules_and_lists_as_promised(case: str, tmp_path: Path) -> None:
    settings = (CASES | SPLIT)[case]
    written = write(tmp_path, **settings)
    assert verify_checkpoint(written.output, full=True).defects == ()
    said = promised(written)
    assert {reader: outcome(reader, written) for reader in READERS} == {
        reader: said[reader] for reader in READERS
    }


def test_rules_that_name_the_parts_alone_are_inspected_as_refused(tmp_path: Path) -> None:
    case = SPLIT["a fused group by its parts"]
    written = write(tmp_path, **case)
    found = [engines_of(written.output)["vllm"]]
    described(written.output, dynamic=case["dynamic"])  # as the user wrote them
    (written.output / "quantize_config.json").unlink()
    found.append(engines_of(written.output)["vllm"])
    assert found == ["limited", "no"]
    assert [outcome(reader, written) for reader in ("vllm", "sglang")] == ["no", "no"]


def engines_of(checkpoint: Path) -> dict[str, str]:
    export = inspect_checkpoint(open_checkpoint(checkpoint)).export
    assert export is not None
    return {verdict.engine: verdict.outcome for verdict in verdicts(export)}


def rewritten(
    output: Path, module: str, part: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    for file in output.glob("*.safetensors"):
        tensors = load_file(file)
        if (name := f"{module}.{part}") in tensors:
            tensors[name] = np.ascontiguousarray(change(tensors[name]))
            save_file(tensors, file, metadata={"format": "pt"})


def described(output: Path, **changes: object) -> None:
    content = json.loads((output / "config.json").read_text())
    content["quantization_config"].update(changes)
    (output / "config.json").write_text(json.dumps(content))


Q0, V0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SLIPS: dict[str, tuple[dict[str, object], Callable[[Path], object], dict[str, str]]] = {
    "one zero point off": (
        {"bits": 4}, lambda out: rewritten(out, Q0, "qzeros", lambda words: words + 1),
        {"vllm": "yes", "sglang": "yes", "llama.cpp": "wrong", "exllamav2": "wrong"}),
    "v2 said by one key": (
        {"bits": 4, "format": "gptq_v2"}, lambda out: described(out, checkpoint_format="gptq"),
        {"vllm": "yes", "sglang": "yes", "llama.cpp": "wrong", "exllamav2": "wrong"}),
    "an order that v alone has": (
        {"bits": 4, "desc_act": True, "act_group_aware": False},
        lambda out: rewritten(out, V0, "g_idx", lambda order: order[::-1]),
        {"vllm": "no", "sglang": "wrong", "llama.cpp": "wrong", "exllamav2": "wrong"}),
    "an order that nobody is told": (
        {"bits": 4, "desc_act": True, "act_group_aware": False},
                                     lambda out: described(out, desc_act=False),
        {"vllm": "wrong", "sglang": "wrong", "llama.cpp": "yes", "exllamav2": "yes"}),
    "sym said wrongly": (
        {"bits": 4}, lambda out: described(out, sym=False),
                         {"vllm": "no", "llama.cpp": "yes", "exllamav2": "yes"}),
    "a short name listed": (
        {"bits": 4, "dynamic": KEPT},
        lambda out: described(out, modules_in_block_to_quantize=[["_proj"]], dynamic={}),
        {"vllm": "no", "sglang": "no", "llama.cpp": "yes", "exllamav2": "yes"}),
    "no rule for the fused name": (
        {"bits": 4, "dynamic": KEPT},
        lambda out: described(out, dynamic={r"-:.*\.(q|k|v|down)_proj$": {}}),
        {"sglang": "no", "llama.cpp": "yes"}),
    "codes shifted by a column": (
        {"bits": 4}, lambda out: rewritten(out, Q0, "qweight", lambda words: np.roll(words, 1, 1)),
        {"vllm": "wrong", "sglang": "wrong", "llama.cpp": "wrong", "exllamav2": "wrong"}),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_readers_notice_planted_defects_as_engines_would(slip: str, tmp_path: Path) -> None:
    settings, break_it, expected = SLIPS[slip]
    written = write(tmp_path, group_size=32, **settings)
    break_it(written.output)
    assert {reader: outcome(reader, written) for reader in expected} == expected


def test_written_models_have_every_fused_group() -> None:
    prefixes = dict(fused_modules([f"model.layers.0.{name}" for name in LINEARS]))
    assert [len(shards) for shards in prefixes.values()] == [3, 1, 2, 1]
