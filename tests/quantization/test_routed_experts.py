"""Mixtures of experts end to end; a slow reference routes in the whole transformers model."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, GateError, InputError
from gptq_cli.models.experts import Routed
from gptq_cli.quantization.routed_experts import RoutedInputs
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime.memory import PauseBudget
from gptq_cli.solver.hessian import HessianAccumulator
from tests.families import random_model, save_tokenizer
from tests.models.test_experts import mixtral_experts, separated
from tests.reference import follow, gptq
from tests.runs import (
    calibration_ids,
    config,
    digest,
    messages,
    quantize,
    quantize_with_events,
    reader,
)

N_EXPERTS, IDLE = 5, 4
NAMES = {  # of an expert's gate, up and down in the checkpoint
    "mixtral": ("model.layers.{}.block_sparse_moe.experts.{}.w{}", (1, 3, 2)),
    "qwen3_moe": ("model.layers.{}.mlp.experts.{}.{}_proj", ("gate", "up", "down")),
}
# With this seed no value lies between two codes; a different rounding would change later layers.
SEEDS = {"gpt_oss": 1}
# These experts are transposed and interleaved, and have biases.
STACKED = {"gpt_oss": ("model.layers.{}.mlp.experts.{}.{}_proj", ("gate", "up", "down"))}
ATTENTION = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]


def save_mixture(directory: Path, family: str, *, idle: bool = False, **changes: object) -> Path:
    """Save a tiny mixture; if `idle`, the routers of both blocks never choose the last expert."""
    model = random_model(family, **changes)
    for block in model.model.layers if idle else ():
        rows = block.mlp.gate.weight.data
        # The logits are a, -a, b, -b and 0; the two largest of these are never 0.
        rows[1], rows[3], rows[IDLE] = -rows[0], -rows[2], 0
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def seen_by(whole: PreTrainedModel, path: str, windows: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments of the call of module `path`."""
    calls: list[tuple[Tensor, ...]] = []
    hook = whole.get_submodule(path).register_forward_pre_hook(lambda _, args: calls.append(args))
    with torch.no_grad():
        whole(input_ids=windows, use_cache=False)
    hook.remove()
    return calls[0]


def matrices(experts: nn.Module, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views [O, I] of the gate, up and down of one expert."""
    gate_up, down = experts.gate_up_proj.data[number], experts.down_proj.data[number]
    if biased(experts):
        return gate_up[:, ::2].T, gate_up[:, 1::2].T, down.T
    gate, up = gate_up.chunk(2)
    return gate, up, down


def between(experts: nn.Module, number: int, tokens: Tensor) -> Tensor:
    """Return the inputs of the down_proj of one expert."""
    gate_up = experts.gate_up_proj[number]
    if biased(experts):
        return experts._apply_gate(tokens @ gate_up + experts.gate_up_proj_bias[number])
    gate, up = (tokens @ half.T for half in gate_up.chunk(2))
    return torch.nn.functional.silu(gate) * up


def biased(experts: nn.Module) -> bool:
    return hasattr(experts, "gate_up_proj_bias")


def drift_of(
    stage: list[str], wanted: tuple[Tensor, ...], found: tuple[Tensor, ...]
) -> Tensor | float:
    """Return what the inputs of a block lack, if the linears of `stage` add their outputs to it."""
    if stage != ["o_proj"]:
        return 0.0
    return (wanted[0].double() - found[0].double()).flatten(0, 1)


def slow_codes(
    model: Path, family: str, windows: Tensor, settings: QuantizeConfig
) -> dict[str, Tensor]:
    """Return the codes of every layer; each stage and each down_proj runs the whole model anew."""
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    untouched = AutoModelForCausalLM.from_pretrained(model, **options).eval()
    codes = {}
    pattern, parts = (NAMES | STACKED)[family]

    def solve(
        name: str, weight: Tensor, tokens: Tensor, originals: Tensor, drift: Tensor | float = 0.0
    ) -> None:
        tokens, originals, moved = tokens.double(), originals.double(), weight.clone()
        if settings.asymmetric_calibration:
            moved = follow(moved.double(), tokens, originals, settings.base, drift=drift)
        found = gptq(moved, tokens.T @ tokens, settings.base, len(tokens))
        group = torch.tensor(found.g_idx)
        codes[name] = found.codes
        weight.copy_((found.scales[:, group] * (found.codes - found.zeros[:, group])).float())

    for block in range(2):
        for stage in ATTENTION:
            paths = [f"model.layers.{block}.self_attn.{leaf}" for leaf in stage]
            tokens = seen_by(whole, paths[0], windows)[0].flatten(0, 1)
            originals = seen_by(untouched, paths[0], windows)[0].flatten(0, 1)
            norm = f"model.layers.{block}.input_layernorm"
            drift = drift_of(stage, *[seen_by(each, norm, windows) for each in (untouched, whole)])
            for path in paths:
                solve(path, whole.get_submodule(path).weight.data, tokens, originals, drift)
        path = f"model.layers.{block}.mlp.experts"
        experts = whole.get_submodule(path)
        hidden, chosen, _ = seen_by(whole, path, windows)
        before, _, _ = seen_by(untouched, path, windows)
        for number in range(N_EXPERTS):
            mine = [token for token in range(len(hidden)) if number in chosen[token].tolist()]
            *halves, down = matrices(experts, number)
            for part, weight in zip(parts, halves, strict=False):
                solve(pattern.format(block, number, part), weight, hidden[mine], before[mine])
            old = untouched.get_submodule(path)
            given = (between(experts, number, hidden[mine]), between(old, number, before[mine]))
            solve(pattern.format(block, number, parts[2]), down, *given)
    return codes


@pytest.mark.parametrize("asymmetric", [0.0, 0.75])
@pytest.mark.parametrize("family", NAMES | STACKED)
def test_codes_of_experts_equal_the_whole_model_reference(
    family: str, asymmetric: float, tmp_path: Path
) -> None:
    model = save_mixture(tmp_path / "model", family, seed=SEEDS.get(family, 0))
    settings = config(preset="gptq", act_group_aware=False, asymmetric_calibration=asymmetric)
    output = tmp_path / "out"
    result = quantize_checkpoint(str(model), output, settings)
    windows = calibration_ids(model, settings)
    with torch.no_grad():
        expected = slow_codes(model, family, windows, settings)
    assert len(expected) == 2 * (4 + 3 * N_EXPERTS) == len(result.layers)
    for name, codes in expected.items():
        assert (reader(output).linear(name).codes == codes).float().mean() > 0.995, name
    seen = [sum(layer.tokens) for layer in result.experts]
    assert seen == [2 * windows.numel()] * 2


@pytest.mark.parametrize("family", NAMES)
def test_an_expert_without_tokens_stops_the_run_by_default(family: str, tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", family, idle=True)
    with pytest.raises(GateError) as caught:
        quantize(tmp_path, model)
    assert caught.value.code == "E_NUM_EXPERT"
    assert caught.value.exit_code == 4
    experts = NAMES[family][0].format(0, 4, "").rpartition(".4.")[0]
    assert str(caught.value) == f"1 of 5 experts of `{experts}` were sent no calibration token: 4"
    assert "--moe-uncovered rtn or all-tokens" in (caught.value.hint or "")


def rounded_codes(model: Path, layer: str, settings: QuantizeConfig) -> Tensor:
    """Return the codes of a layer without tokens: its Hessian is the identity."""
    weight = load_file(model / "model.safetensors")[f"{layer}.weight"]
    identity = torch.eye(weight.shape[1], dtype=torch.float64)
    return gptq(weight, identity, settings.base, 1).codes


@pytest.mark.parametrize("family", NAMES)
def test_moe_uncovered_rounds_an_idle_expert_or_uses_all_tokens(
    family: str, tmp_path: Path
) -> None:
    model = save_mixture(tmp_path / "model", family, idle=True)
    plain = {"preset": "gptq", "act_group_aware": False}
    rounded, result = quantize(tmp_path, model, moe_uncovered="rtn", **plain)
    calibrated, other = quantize(tmp_path, model, moe_uncovered="all-tokens", **plain)
    pattern, parts = NAMES[family]
    for part in parts:
        idle, busy = (pattern.format(1, number, part) for number in (IDLE, 0))
        without, with_tokens = reader(rounded), reader(calibrated)
        assert torch.equal(without.linear(busy).codes, with_tokens.linear(busy).codes)
        alone = rounded_codes(model, idle, config(**plain))
        assert torch.equal(without.linear(idle).codes, alone)
        assert not torch.equal(with_tokens.linear(idle).codes, alone)
        tokens = {layer.name: layer.tokens for layer in other.layers}
        assert tokens[idle] == other.tokens
        assert {layer.name: layer.tokens for layer in result.layers}[idle] == 0
    assert [layer.uncovered for layer in result.experts] == [(IDLE,), (IDLE,)]
    content = json.loads(json.dumps(result.to_json(), default=str))
    assert [layer["min_tokens"] for layer in content["experts"]] == [0, 0]


def test_an_expert_without_tokens_has_no_original_to_follow(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe", idle=True)
    plain = {"preset": "gptq", "act_group_aware": False, "moe_uncovered": "rtn"}
    output, _ = quantize(tmp_path, model, asymmetric_calibration=0.75, **plain)
    pattern, parts = NAMES["qwen3_moe"]
    for block, part in product(range(2), parts):
        name = pattern.format(block, IDLE, part)
        alone = rounded_codes(model, name, config(**plain))
        assert torch.equal(reader(output).linear(name).codes, alone)


def test_a_token_of_another_original_expert_stands_for_itself() -> None:
    """If tokens come in rows of each expert, a row of zeros stands for a token of other experts."""
    ways = [separated(mixtral_experts()) for _ in range(2)]
    ways[1][2].up_proj.weight.data.mul_(1.1)
    # For each batch of three tokens: the tokens of expert 2 in the quantized and original model.
    sent: list[tuple[set[int], set[int]]] = [({0, 2}, {0, 1}), ({1}, {1}), ({0, 1, 2}, set())]
    inputs, pairs = RoutedInputs("experts", ways), []
    for number, tokens in enumerate(sent):
        batch = []
        for mine in tokens:
            hidden = torch.randn(4, 3, 32)
            hidden[2, sorted({0, 1, 2} - mine)] = 0
            batch.append(Routed(hidden.reshape(12, 32)))
        inputs.add(number, *batch)
        first, other = (routed.hidden.view(4, 3, 32)[2] for routed in batch)
        for token in sorted(tokens[0]):
            original = other[token] if token in tokens[1] else first[token]
            pairs.append((first[token], original))
    rows = inputs.rows()[2]
    assert [mine.tolist() for mine in rows] == [[6, 8], [7], [6, 7, 8]]
    for down in (False, True):
        if down:
            pairs = [
                (ways[0].intermediate(2, x[None])[0], ways[1].intermediate(2, old[None])[0])
                for x, old in pairs
            ]
        hessian = inputs.hessian(2, rows, torch.device("cpu"), down=down)
        square = sum(torch.outer(x, x) for x, _ in pairs)
        shift = sum(torch.outer(old - x, x) for x, old in pairs)
        assert torch.allclose(hessian.hessian, square, atol=1e-4)
        assert torch.allclose(hessian.shifts[0] + hessian.shifts[1], shift, atol=1e-4)
        assert hessian.tokens == 6


@pytest.mark.parametrize("family", [*NAMES, "llama4_text"])
@pytest.mark.parametrize("asymmetric", [0.0, 0.75])
def test_pausing_and_replaying_write_the_same_bytes(
    family: str, asymmetric: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_mixture(tmp_path / "model", family)
    waited, _ = quantize(tmp_path, model, asymmetric_calibration=asymmetric)
    again, _ = quantize(tmp_path, model, asymmetric_calibration=asymmetric)
    monkeypatch.setattr(PauseBudget, "n_paused", lambda *_: 0)
    replayed, _ = quantize(tmp_path, model, asymmetric_calibration=asymmetric)
    assert digest(waited) == digest(again) == digest(replayed)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_expert_hessians_exist_one_at_a_time(
    true_sequential: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: WeakSet[HessianAccumulator] = WeakSet()
    most = 0

    class Counted(HessianAccumulator):
        def __init__(self, *args: Any, **named: Any) -> None:
            nonlocal most
            super().__init__(*args, **named)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr("gptq_cli.quantization.routed_experts.HessianAccumulator", Counted)
    model = save_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1, num_experts=12)
    _, result = quantize(
        tmp_path, model, true_sequential=true_sequential, moe_uncovered="rtn", preset="gptq"
    )
    assert len(result.layers) == 4 + 3 * 12
    assert most == (1 if true_sequential else 2)


def test_down_proj_sees_original_inputs_without_true_sequential(
    tmp_path: Path,
) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1)
    plain = {"preset": "gptq", "act_group_aware": False}
    together, _ = quantize(tmp_path, model, true_sequential=False, **plain)
    only_down, _ = quantize(tmp_path, model, modules_in_block_to_quantize=[["down_proj"]], **plain)
    name = "model.layers.0.mlp.experts.0.down_proj"
    assert torch.equal(reader(together).linear(name).codes, reader(only_down).linear(name).codes)
    sequential, _ = quantize(tmp_path, model, **plain)
    assert not torch.equal(
        reader(together).linear(name).codes, reader(sequential).linear(name).codes
    )


def bytes_of(tensor: TensorInfo) -> bytes:
    return tensor.file.read_bytes()[tensor.start : tensor.start + tensor.nbytes]


def test_shards_ties_and_extra_tensors_pass_through(tmp_path: Path) -> None:
    model = tmp_path / "model"
    random_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(
        model, max_shard_size="200KB"
    )
    save_tokenizer(model)
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) >= 3
    extra = {
        "model.layers.2.mlp.experts.0.up_proj.weight": torch.randn(64, 64),
        "mtp.norm.weight": torch.randn(7),
    }
    save_file(load_file(shards[-1]) | extra, shards[-1], metadata={"format": "pt"})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(extra, shards[-1].name)
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    output, result = quantize(tmp_path, model, preset="gptq")
    assert len(result.layers) == 2 * (4 + 3 * N_EXPERTS)
    written, source = open_checkpoint(output), open_checkpoint(model)
    kept = {name for name in source.tensors if name in written.tensors}
    assert set(extra) < kept
    routers = {f"model.layers.{block}.mlp.gate.weight" for block in range(2)}
    assert {name for name in kept if "mlp" in name} == {next(iter(extra)), *routers}
    for name in kept:
        assert bytes_of(written.tensors[name]) == bytes_of(source.tensors[name]), name


def test_experts_stored_in_one_tensor_are_written_one_by_one(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "llama4_text")
    output, result = quantize(tmp_path, model)
    names = {layer.name for layer in result.layers}
    assert "model.layers.1.feed_forward.experts.4.gate_proj" in names
    for name in open_checkpoint(output).tensors:
        assert not name.endswith(("gate_up_proj", "experts.down_proj"))
    tensors = load_file(model / "model.safetensors")
    stack = tensors["model.layers.1.feed_forward.experts.gate_up_proj"]
    near = reader(output).read("model.layers.1.feed_forward.experts.3.up_proj.weight")
    assert (near - stack[3, :, 128:].T).norm() < 0.2 * stack[3, :, 128:].norm()
    with pytest.raises(ConfigError, match="holds all experts in one tensor") as caught:
        quantize(tmp_path, model, dynamic={r"-:.*experts\.2\.": {}})
    assert caught.value.code == "E_CFG_CONFLICT"


def test_rules_that_split_the_experts_of_a_layer_cause_a_warning(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe")
    rule = r"+:model\.layers\.1\.mlp\.experts\.2\."
    settings = {"preset": "gptq", "dynamic": {rule: {"bits": 8}}}
    result, events = quantize_with_events(model, tmp_path / "out", **settings)
    assert result.split_experts == ("model.layers.1.mlp.experts",)
    assert messages(events, "W_CFG_EXPERTS") == [
        "the experts of `model.layers.1.mlp.experts` differ in settings: "
        "not loaded by vllm, sglang, aphrodite"
    ]


@pytest.mark.filterwarnings("ignore")  # the warnings of transformers do not matter here
def test_experts_with_biases_cause_a_warning(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "gpt_oss", num_hidden_layers=1)
    _, events = quantize_with_events(model, tmp_path / "out", preset="fast")
    experts = "model.layers.0.mlp.experts"
    assert messages(events, "W_ARCH_EXPERTS") == [
        f"the experts of `{experts}` have biases: "
        "no engine is known to load them quantized, but `gptq eval-ppl` does"
    ]
    written = set(open_checkpoint(tmp_path / "out").tensors)
    assert {f"{experts}.gate_up_proj_bias", f"{experts}.4.up_proj.qweight"} < written
    assert not {f"{experts}.gate_up_proj", f"{experts}.down_proj"} & written


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "mixtral")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"has 4 tensors for up_proj of `model\.layers\.1\.mlp\.experts`, not 5"
    ) as caught:
        quantize(tmp_path, model)
    assert caught.value.code == "E_CKPT_INCOMPLETE"


def test_the_config_lists_kept_routers_and_experts(tmp_path: Path) -> None:
    model = save_mixture(tmp_path / "model", "qwen3_moe")
    output, result = quantize(
        tmp_path, model, preset="gptq", dynamic={r"-:model\.layers\.1\.mlp\.experts": {}}
    )
    described = json.loads((output / "config.json").read_text())["quantization_config"]
    patterns = [rule.removeprefix("-:") for rule in described["dynamic"]]

    def skipped(name: str) -> bool:
        return any(re.match(pattern, name) for pattern in patterns)

    assert skipped("model.layers.1.mlp.experts")
    assert skipped("model.layers.1.mlp.experts.3.gate_proj")
    assert skipped("model.layers.0.mlp.gate")
    for name in ("experts", "experts.3.gate_proj", "gate_up_proj"):
        assert not skipped(f"model.layers.0.mlp.{name}")
    assert "modules_in_block_to_quantize" not in described
    assert [layer.name for layer in result.experts] == ["model.layers.0.mlp.experts"]
