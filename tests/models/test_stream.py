"""The stream against the whole transformers model: same hidden states, same logits, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gptq_cli.checkpoint.reader import TensorReader
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import InputError
from gptq_cli.models.paused_forwards import Stage, probe_block, watch_inputs
from gptq_cli.models.skeleton import build_skeleton, find_blocks, load_config, place
from gptq_cli.models.stream import ModelStream
from tests.architectures import build
from tests.families import FAMILIES, VOCABULARY, save, save_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def inference():
    with torch.inference_mode():
        yield


def open_stream(directory: Path, dtype: torch.dtype = torch.float32) -> ModelStream:
    checkpoint = open_checkpoint(directory)
    config = load_config(directory, trust_remote_code=False)
    reader = TensorReader(checkpoint)
    skeleton = build_skeleton(
        directory, config, reader.names(), dtype, CPU, trust_remote_code=False
    )
    return ModelStream(skeleton, reader, CPU)


def own_forward(directory: Path, batches: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Outputs of every block for each batch, and logits, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    outputs: list[list[Tensor]] = []

    def note(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs[-1].append(output[0] if isinstance(output, tuple) else output)

    for block in find_blocks(model)[1]:
        block.register_forward_hook(note)
    logits = []
    for ids in batches:
        outputs.append([])
        logits.append(model(input_ids=ids, use_cache=False).logits)
    return outputs, logits


def token_batches(*sizes: int, seqlen: int = 48) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, VOCABULARY, (size, seqlen)) for size in sizes]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_states_and_logits_equal_the_models_own_forward(
    family: str, tmp_path: Path
) -> None:
    directory = save_model(tmp_path, family)
    batches = token_batches(2, 2, 1)
    expected, expected_logits = own_forward(directory, batches)
    stream = open_stream(directory)
    hidden = stream.embed(batches)
    for index in range(stream.n_blocks):
        with stream.block(index) as block:
            hidden = [block.run(batch, state) for batch, state in enumerate(hidden)]
        for batch, state in enumerate(hidden):
            assert torch.equal(state, expected[batch][index])
    with stream.head() as logits:
        for ids, state, wanted in zip(batches, hidden, expected_logits, strict=True):
            assert torch.equal(logits(ids, state), wanted)


def test_only_the_current_block_holds_weights(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    stream = open_stream(directory)
    stream.embed(token_batches(1))

    def loaded() -> list[str]:
        return [
            name for name, parameter in stream._model.named_parameters() if not parameter.is_meta
        ]

    assert loaded() == []
    with stream.block(1):
        assert loaded()
        assert all(name.startswith("model.layers.1.") for name in loaded())
    assert loaded() == []


def test_a_weight_that_is_replaced_is_freed_inside_its_block(tmp_path: Path) -> None:
    stream = open_stream(save_model(tmp_path), torch.bfloat16)  # not the dtype of the file
    stream.embed(token_batches(1))
    with stream.block(1) as block:
        for linear in block.linears.values():
            weight = linear.get_parameter("weight")
            memory = ref(weight.untyped_storage())
            place(linear, "weight", torch.zeros_like(weight))
            del weight
            assert memory() is None


LLAMA_LIKE = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
STAGES = dict.fromkeys(
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"], LLAMA_LIKE
) | {
    "phi": [("q_proj", "k_proj", "v_proj", "fc1"), ("dense",), ("fc2",)],
    "phi3": [("qkv_proj",), ("o_proj",), ("gate_up_proj",), ("down_proj",)],
    "opt": [("q_proj", "k_proj", "v_proj"), ("out_proj",), ("fc1",), ("fc2",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_equal_those_written_by_hand(family: str, tmp_path: Path) -> None:
    stream = open_stream(save_model(tmp_path, family))
    hidden = stream.embed(token_batches(2))
    with stream.block(1) as block:
        stages = probe_block(block.linears, lambda: block.run(0, hidden[0])).stages(block.linears)
    found = []
    for stage in stages:
        found.append(tuple(name.rpartition(".")[2] for name in stage.names))
    assert found == STAGES[family]


def test_next_block_is_prefetched_unless_the_run_ends_or_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[list[str]] = []
    monkeypatch.setattr(TensorReader, "prefetch", lambda _self, names: told.append(sorted(names)))
    directory = save_model(tmp_path, num_hidden_layers=3)
    names = sorted(open_checkpoint(directory).tensors)
    blocks: list[list[str]] = []
    for index in range(3):
        prefix = f"model.layers.{index}."
        blocks.append([name for name in names if name.startswith(prefix)])
    stream = open_stream(directory)
    stream.embed(token_batches(1))
    for index in range(3):
        with stream.block(index):
            pass
    assert told == [blocks[1], blocks[2], []]
    with pytest.raises(ArithmeticError), stream.block(0):
        raise ArithmeticError
    assert told[3:] == [blocks[1], []]


def test_model_with_one_block_streams(tmp_path: Path) -> None:
    directory = save_model(tmp_path, num_hidden_layers=1)
    batches = token_batches(1, 1)
    expected, _ = own_forward(directory, batches)
    stream = open_stream(directory)
    hidden = stream.embed(batches)
    with stream.block(0) as block:
        assert torch.equal(block.run(1, hidden[1]), expected[1][0])


def test_equal_masks_of_batches_are_stored_once(tmp_path: Path) -> None:
    stream = open_stream(save_model(tmp_path, "gemma2"))
    stream.embed(token_batches(2, 2, 2))
    masks: set[int] = set()
    for calls in stream._calls:
        for batch in range(3):
            mask = calls[batch].kwargs["attention_mask"]
            if mask is not None:
                masks.add(mask.data_ptr())
    assert len(masks) <= 2  # one sliding, one full


@pytest.mark.filterwarnings("ignore")  # what transformers says about its own models is not at stake
def test_unquantized_copy_keeps_state_for_later_blocks_apart(tmp_path: Path) -> None:
    directory, batches = save(build("gemma4_text"), tmp_path), token_batches(2, 1)

    def run(*, changed: bool, beside: bool) -> tuple[list[Tensor], list[Tensor]]:
        stream = open_stream(directory)
        states = stream.embed(batches)
        others = list(states)
        for index in range(stream.n_blocks):
            with stream.block(index) as block:
                twin = block.unquantized_copy()
                if changed:
                    for linear in block.linears.values():
                        place(linear, "weight", linear.get_parameter("weight") * 0.9)
                states = [block.run(batch, state) for batch, state in enumerate(states)]
                if beside:
                    others = [twin.run(batch, state) for batch, state in enumerate(others)]
        return states, others

    changed, original = run(changed=True, beside=True)
    assert all(map(torch.equal, changed, run(changed=True, beside=False)[0]))
    assert all(map(torch.equal, original, run(changed=False, beside=False)[0]))
    assert not torch.equal(changed[0], original[0])


def test_linears_shared_by_blocks_are_found_by_their_tensor(tmp_path: Path) -> None:
    stream = open_stream(save_model(tmp_path))
    assert stream.shared_linears() == set()
    own, other = (f"model.layers.{block}.mlp.up_proj.weight" for block in (2, 1))
    stream._sources[own] = other
    assert stream.shared_linears() == {"model.layers.1.mlp.up_proj"}
    assert len(stream.all_linears()) == 3 * 7


def test_watched_forward_ends_after_its_last_input() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    linears = {str(index): module for index, module in enumerate(block)}
    seen: list[tuple[tuple[str, ...], Tensor]] = []
    calls = [0, 0, 0]
    for index, module in enumerate(block):
        module.register_forward_hook(
            lambda *_, index=index: calls.__setitem__(index, calls[index] + 1)
        )
    inputs = [torch.randn(2, 4), torch.randn(3, 4)]
    for x in inputs:
        watch_inputs(
            [Stage(("1",), 1)],
            linears,
            lambda found: seen.append((found.stage.names, found.inputs)),
            partial(block, x),
            block,
        )
    assert calls == [2, 0, 0]
    assert [names for names, _ in seen] == [("1",), ("1",)]
    assert all(
        torch.equal(x, block[0](wanted)) for (_, x), wanted in zip(seen, inputs, strict=True)
    )
    assert not any(module._forward_pre_hooks for module in block)


def test_hooks_are_removed_when_a_forward_raises() -> None:
    block = nn.Linear(4, 4)
    with pytest.raises(RuntimeError):
        watch_inputs(
            [Stage(("a",), 2)],
            {"a": block},
            lambda _: None,
            lambda: block(torch.randn(2, 3)),
            block,
        )
    assert not block._forward_pre_hooks


def test_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    names = [
        name
        for name in open_checkpoint(directory).tensors
        if name != "model.layers.1.mlp.up_proj.weight"
    ]
    config = load_config(directory, trust_remote_code=False)
    with pytest.raises(
        InputError, match=r"no tensor for 1 parameters, first `model\.layers\.1\.mlp\.up_proj"
    ):
        build_skeleton(directory, config, names, torch.float32, CPU, trust_remote_code=False)


def test_config_with_a_wrong_shape_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path)
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        text.replace('"intermediate_size": 128', '"intermediate_size": 256')
    )
    stream = open_stream(directory)
    batches = token_batches(1)
    message = r"is \[128, 64\] in the checkpoint, \[256, 64\] in config\.json"
    with pytest.raises(InputError, match=message) as caught:
        stream.embed(batches)  # which reads block 0
    assert caught.value.code == "E_CKPT_SHAPE"


def test_unknown_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(InputError) as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert caught.value.code == "E_ARCH"


def test_model_with_own_code_needs_consent(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(InputError) as caught:
        load_config(tmp_path, trust_remote_code=False)
    assert caught.value.code == "E_REMOTE_CODE"
    assert "--trust-remote-code" in (caught.value.hint or "")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs a list of mapped files")
def test_no_checkpoint_file_stays_mapped_after_its_block(
    tmp_path: Path,
) -> None:
    directory = save_model(tmp_path / "model", max_shard_size="200KB")

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {Path(line.split()[-1]).name for line in lines if str(directory) in line}

    stream = open_stream(directory)
    states = stream.embed(token_batches(2, 3))
    assert mapped() == set()
    for index in range(2):
        with stream.block(index) as block:
            states = [block.run(batch, state) for batch, state in enumerate(states)]
            assert mapped()
        del block
        assert mapped() == set()
