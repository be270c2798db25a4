"""A plan from headers alone predicts the files of the run exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch

from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ResourceError
from gptq_cli.events import Event, Noted
from gptq_cli.inspection.summary import VECTORS, plan_rows
from gptq_cli.planning.checks import check_memory, notes_on_limits
from gptq_cli.planning.estimate import (
    LIBRARIES_BYTES,
    estimate_disk,
    estimate_least_memory,
    estimate_memory,
    estimate_within_limits,
    gradient_terms,
    total,
)
from gptq_cli.planning.measuring import measuring_terms
from gptq_cli.planning.plan import plan_run, refine_plan
from gptq_cli.planning.seconds import Rates, estimate_time
from gptq_cli.preview import preview_run
from gptq_cli.runtime.open_model import open_stream
from tests.families import FAMILIES, save_model, text_file
from tests.runs import CPU, config, quantize
from tests.vision import save_chats, save_vision_model

GPT2: dict[str, object] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 128,
    "vocab_size": 512,
}


def planned_files(model: Path, **changes: object) -> dict[str, int]:
    plan = plan_run(model, config(**changes))
    return {shard.file: shard.size for shard in plan.layout.shards}


@pytest.mark.parametrize(
    ("family", "model", "run"),
    [
        ("llama", {}, {"bits": 2}),
        (
            "llama",
            {"max_shard_size": "100KB"},
            {"bits": 3, "group_size": 64, "max_shard_size": "150KB"},
        ),
        ("llama", {"dtype": torch.bfloat16}, {"bits": 4, "group_size": -1, "format": "gptq_v2"}),
        (
            "llama",
            {},
            {"bits": 8, "sym": False, "dynamic": {r"-:.*\.1\.mlp": {}, r".*q_proj": {"bits": 2}}},
        ),
        # The head is tied to the embeddings and written beside them.
        ("qwen3", {"max_shard_size": "100KB"}, {"bits": 4, "lm_head": True}),
        ("qwen3", {}, {"bits": 4}),
        ("gpt2", {}, {"bits": 4, "group_size": -1}),  # stored [I, O]
    ],
)
def test_planned_bytes_are_the_sizes_of_the_files(
    family: str,
    model: dict[str, object],
    run: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt2", GPT2)
    source = save_model(tmp_path / "model", family, **model)  # type: ignore[arg-type]
    output, result = quantize(tmp_path, source, **run)
    written = {file.name: file.stat().st_size for file in output.glob("*.safetensors")}
    assert planned_files(source, **run) == written
    assert result.bytes_after == sum(written.values())
    assert len(written) > 1 or "max_shard_size" not in run


@pytest.mark.parametrize("lm_head", [False, True])
def test_plan_and_run_keep_blocks_after_the_last_used_block(lm_head: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=3, tie_word_embeddings=False)
    declared = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(declared | {"num_hidden_layers": 2}))
    plan = plan_run(model, config(lm_head=lm_head))
    assert (plan.n_blocks, plan.n_steps) == (2, 2 + lm_head)
    assert {layer.block for layer in plan.quantized} == set(range(2 + lm_head))
    assert {layer.why for layer in plan.kept} == {"of a block that the model does not run"}
    output, _ = quantize(tmp_path, model, lm_head=lm_head)
    written = {file.name: file.stat().st_size for file in output.glob("*.safetensors")}
    assert planned_files(model, lm_head=lm_head) == written


def test_similar_layers_share_a_row_and_rows_sum_to_all_bytes(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    plan = plan_run(model, config(dynamic={r".*\.2\.mlp\.down": {"bits": 8}, r"-:.*v_proj": {}}))
    quantized, kept = plan_rows(plan)
    found = {(row.count, row.name, row.shape, row.settings): row.why for row in quantized}
    assert found[3, "self_attn.q_proj", (128, 64), "4 bit g32"] == ""
    assert found[2, "mlp.down_proj", (64, 128), "4 bit g32"] == ""
    assert found[1, "mlp.down_proj", (64, 128), "8 bit g32"] == r"rule '.*\.2\.mlp\.down'"
    assert len(found) == 7
    assert [(row.count, row.name, row.why) for row in kept[:2]] == [
        (3, "self_attn.v_proj", "rule '-:.*v_proj': kept"),
        (1, "lm_head", "see --lm-head"),
    ]
    assert kept[-1].name == VECTORS
    assert kept[-1].count == 3 * 2 + 1
    headers = sum(len(shard.header) for shard in plan.layout.shards)
    assert sum(row.nbytes for row in [*quantized, *kept]) + headers == plan.layout.nbytes


def test_shifts_of_rows_take_less_of_an_accelerator(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16, intermediate_size=192)
    solver = {}
    for dtype in ("bfloat16", "float16"):
        settings = config(preset="best", nsamples=1024, batch_size=1, seqlen=64, dtype=dtype)
        estimate = estimate_memory(plan_run(model, settings), settings)
        for part in ("cpu", "accelerator"):
            terms = {term.what: term.nbytes for term in getattr(estimate, part)}
            solver[dtype, part] = terms["solver"]
    assert solver["bfloat16", "cpu"] == solver["float16", "cpu"]
    saved = solver["float16", "accelerator"] - solver["bfloat16", "accelerator"]
    assert saved > 11 * 2 * (192 - 64) * 192 * 4  # of shifts alone; the drifts are left out, too


def test_the_memory_estimate_is_the_sum_of_documented_terms(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    settings = config(nsamples=6, seqlen=64, preset="balanced")
    plan = plan_run(model, settings)
    estimate = estimate_memory(plan, settings)
    terms = {term.what: term.nbytes for term in estimate.cpu}
    tokens = 6 * 64
    block = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 128
    assert terms["hidden states"] == tokens * 64 * 2
    assert terms["waiting batches"] == tokens * (2 * 64 + 128) * 2
    assert terms["block"] == block * 2
    solving = 2 * 128**2 * 4 + 64 * 128 * (3 * 4 + 2 + 2 + 1)
    assert terms["solver"] == solving + 4 * 64 * 128 * 4 + 4 * 64 * 128 * 2
    settings = config(nsamples=6, seqlen=64, batch_size=2, true_sequential=False)
    replayed = estimate_memory(plan, settings)
    terms = {term.what: term.nbytes for term in replayed.cpu}
    assert terms["waiting batches"] == 2 * 64 * (2 * 64 + 128) * 2
    assert total(replayed.accelerator) < total(replayed.cpu)


@pytest.mark.parametrize("option", ["max_ram", "max_vram"])
def test_a_limit_leaves_out_batches_that_wait_but_one(option: str, tmp_path: Path) -> None:
    plan = plan_run(save_model(tmp_path / "model"), config())
    part = {"max_ram": "cpu", "max_vram": "accelerator"}[option]
    other = {"max_ram": "accelerator", "max_vram": "cpu"}[option]
    settings = config(nsamples=64, seqlen=64, batch_size=2)
    most, least = estimate_memory(plan, settings), estimate_least_memory(plan, settings)
    wanted, needed = total(getattr(most, part)), total(getattr(least, part))
    between = (wanted + needed) // 2
    for allowed, expected in ((wanted, wanted), (between, between), (needed // 2, needed)):
        limited = estimate_within_limits(plan, settings.model_copy(update={option: allowed}))
        assert total(getattr(limited, part)) == expected
        assert getattr(limited, other) == getattr(most, other)
        names = [term.what for term in getattr(limited, part)]
        assert names == [term.what for term in getattr(most, part)]


@pytest.mark.parametrize(("preset", "n_square", "copies"), [("balanced", 2, 1), ("best", 4, 2)])
def test_presets_need_memory_for_copies_and_shifts(
    preset: str, n_square: int, copies: int, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    settings = config(nsamples=6, seqlen=64, preset=preset)
    plan = plan_run(model, settings)
    terms = {term.what: term.nbytes for term in estimate_memory(plan, settings).cpu}
    tokens, n, features = 4 * 64, 128, 64
    solving = n_square * n**2 * 4 + features * n * (3 * 4 + 2 + 2 + 1)
    copied = n
    if copies == 2:  # drifts, and residuals beside the inputs
        solving += 2 * features * n * 4
        copied += features
    assert terms["solver"] == solving + tokens * n * 4 + copies * tokens * copied * 2


def test_a_loss_aware_run_needs_memory_for_gradients_and_logits(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=192)
    settings = config(nsamples=6, seqlen=64, loss_aware=True)
    inside, at_the_end = gradient_terms(plan_run(model, settings), settings)
    tokens = 6 * 64
    shapes = [(128, 64), (64, 64), (64, 64), (64, 128), (192, 64), (192, 64), (64, 192)]
    weights = sum(rows * columns for rows, columns in shapes)
    widths = sum(2 * (rows + columns) for rows, columns in shapes)
    sums = int((9 / 16 + 1) * (128**2 + 4 * 64**2)) * 4  # q; k, v, o and down
    expected = [2 * tokens * 64 * 4, weights * 4, tokens * widths * 4, sums]
    assert [term.nbytes for term in inside] == expected
    outside = (2 * 512 * 64 + 64) * 4
    assert [term.nbytes for term in at_the_end] == [expected[0], outside, 5 * 64 * 512 * 4]


@pytest.mark.parametrize(("vocabulary", "tokens"), [(300_000, 55), (2**24 + 2, 1)])
def test_the_end_of_the_pass_for_gradients_holds_few_logits(
    vocabulary: int, tokens: int, tmp_path: Path
) -> None:
    settings = config(nsamples=6, seqlen=64, loss_aware=True)
    plan = plan_run(save_model(tmp_path / "model", intermediate_size=192), settings)
    tensors = {}
    for name, tensor in plan.plain.tensors.items():
        if tensor.shape[0] == 512:
            tensor = replace(tensor, shape=(vocabulary, 64))
        tensors[name] = tensor
    plan = replace(plan, plain=replace(plan.plain, tensors=tensors))
    _, at_the_end = gradient_terms(plan, settings)
    assert at_the_end[-1].nbytes == 5 * tokens * vocabulary * 4
    memory = estimate_memory(plan, settings)
    assert total(memory.accelerator) == total(at_the_end)
    assert "logits" in [term.what for term in memory.cpu]


def test_a_run_that_allocates_needs_memory_for_its_measurement(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=192)
    settings = config(nsamples=64, seqlen=64, batch_size=8, preset="balanced")
    rounding, reverse, at_the_end = measuring_terms(plan_run(model, settings), settings, "cpu", 1)
    shapes = [(128, 64), (64, 64), (64, 64), (64, 128), (192, 64), (192, 64), (64, 192)]
    weights = sum(rows * columns for rows, columns in shapes)
    widths = sum(2 * (rows + columns) for rows, columns in shapes)
    states = 64 * 64 * 64 * 4  # of the calibration; the probe has half as many
    inside = [states, states, weights * 4, 1024 * widths * 4]
    hessians = (64**2 + 128**2 + 64**2 + 192**2) * 4 * 9 // 16
    solving = 2 * 192**2 * 4 + 64 * 192 * (3 * 4 + 2 + 4 + 1)
    a_batch_twice = 2 * 8 * 64 * 192 * 4  # in float32, and limited
    solver = hessians + solving + a_batch_twice
    assert [term.nbytes for term in rounding] == [*inside, weights * 5, solver]
    errors = weights * 4 + 2 * 192 * 64 * 4
    assert [term.nbytes for term in reverse] == [*inside, errors]
    outside, logits = (2 * 512 * 64 + 64) * 4, 5 * 64 * 512 * 4
    assert [term.nbytes for term in at_the_end] == [states, states, outside, logits]
    allocating = preview_run(str(model), settings.model_copy(update={"bits": 3.5}))
    assert total(allocating.memory.cpu) == LIBRARIES_BYTES + total(rounding)
    assert total(allocating.memory.cpu) > total(preview_run(str(model), settings).memory.cpu)


def test_a_plan_names_the_pass_for_gradients_and_its_readings(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    sizes = config(nsamples=200, seqlen=128)  # more tokens than the pass takes
    found = {}
    for name, changed in (("max", {"loss_aware": True}), ("plain", {})):
        events: list[Event] = []
        preview_run(str(model), sizes.model_copy(update=changed), report=events.append)
        found[name] = [event.text for event in events if isinstance(event, Noted)]
    added = "the run first takes gradients of 16,384 tokens, so it reads the model two more times"
    assert found["max"] == [*found["plain"], added]


def test_a_plan_shows_the_disk_space_of_gradients(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=192)
    found = preview_run(str(model), config(nsamples=6, seqlen=64, loss_aware=True))
    plain = preview_run(str(model), config(nsamples=6, seqlen=64))
    tokens, layers = 6 * 64, 7
    states, sums = 4 * tokens * 64, 3 * 4 * (tokens * layers + 128**2 + 4 * 64**2)
    gradients = max(6 * states + sums // 3, 5 * states + sums)
    assert found.disk.gradients == gradients
    assert found.disk.needed == plain.disk.needed + gradients
    assert plain.disk.gradients == 0


def test_the_time_of_gradients_counts_three_forwards_and_the_head(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    rates = Rates(*[1.0] * 6)
    seconds = []
    for changes in ({}, {"loss_aware": True}):
        settings = config(nsamples=6, seqlen=64, **changes)
        seconds.append(estimate_time(plan_run(model, settings), settings, rates))
    plain, aware = seconds
    assert aware.forward == 4 * plain.forward + 2 * 512 * 64 * 6 * 64
    assert aware.reading == 3 * plain.reading
    assert aware.hessian > plain.hessian


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_images_need_memory_for_the_part_that_embeds_them(family: str, tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", family, vocab_size=8192)
    settings = config(nsamples=1, batch_size=1, seqlen=32, trust_remote_code=True)
    plan = plan_run(model, settings)
    shapes = {name: tensor.shape for name, tensor in open_checkpoint(model).tensors.items()}
    table = next(name for name in shapes if name.endswith("embed_tokens.weight"))
    blocks = table.replace("embed_tokens.weight", "layers.")
    outside = 0
    for name, shape in shapes.items():
        if not name.startswith((blocks, "lm_head")):
            outside += torch.Size(shape).numel()
    estimate = estimate_memory(plan, settings, images=True)
    terms = {term.what: term.nbytes for term in estimate.accelerator}
    assert terms == {"hidden states": 32 * 64 * 4, "embeddings and vision part": outside * 4}
    assert outside > torch.Size(shapes[table]).numel() + 10_000, "the vision part counts"


def test_a_plan_knows_whether_images_calibrate(tmp_path: Path) -> None:
    model = save_vision_model(tmp_path / "model", "gemma3", vocab_size=8192)
    given = {"nsamples": 1, "batch_size": 1, "seqlen": 32}
    chats = config(dataset=str(save_chats(tmp_path)), **given)
    with_images = preview_run(str(model), chats).memory.accelerator
    assert with_images == estimate_memory(plan_run(model, chats), chats, images=True).accelerator
    words = config(dataset=text_file(), **given)
    on_text = preview_run(str(model), words).memory.accelerator
    assert on_text == estimate_memory(plan_run(model, words), words).accelerator
    assert {term.what for term in with_images} != {term.what for term in on_text}


def test_the_estimate_limits_windows_to_the_models_positions(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    plan = plan_run(model, config())
    limited = QuantizeConfig(bits=4, nsamples=2, batch_size=2, preset="gptq")
    given = config(seqlen=128, nsamples=2, batch_size=2)  # the model has 128 positions
    assert estimate_memory(plan, limited).cpu == estimate_memory(plan, given).cpu
    with pytest.raises(ConfigError) as caught:
        estimate_memory(plan, config(seqlen=129))
    assert caught.value.code == "E_CFG_SEQLEN"


def test_notes_on_limits_agree_with_the_check_of_the_run(tmp_path: Path) -> None:
    plan = plan_run(save_model(tmp_path / "model"), config())
    needed = total(estimate_least_memory(plan, config()).cpu)
    wanted = total(estimate_memory(plan, config()).cpu)
    assert needed < wanted

    def note(max_ram: int) -> list[str]:
        return notes_on_limits(plan, config(max_ram=max_ram), 1)

    check_memory(plan, config(), needed - LIBRARIES_BYTES, None)
    with pytest.raises(ResourceError):
        check_memory(plan, config(), needed - LIBRARIES_BYTES - 1, None)
    (refused,), (slower,) = note(needed - 1), note(needed)
    assert "but a run on the CPU needs about" in refused
    assert "fewer batches will wait inside a block" in slower
    assert note(wanted) == []


def test_known_layers_of_a_plan_do_not_consult_the_rules_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(dynamic={"+:.*up_proj": {"bits": 8}, "-:.*o_proj": {}})
    plan = plan_run(save_model(tmp_path / "model"), settings)
    linears = {layer.name: False for layer in plan.layers}
    monkeypatch.setattr(QuantizeConfig, "choose", None)
    assert refine_plan(plan, settings, linears, {}, []).layers == plan.layers


@pytest.mark.parametrize(
    ("stored", "change", "wanted", "expected"),
    [
        (torch.bfloat16, {}, "auto", "bfloat16"),
        (torch.bfloat16, {"dtype": None, "torch_dtype": "float16"}, "auto", "float16"),
        (torch.bfloat16, {"dtype": None, "torch_dtype": None}, "auto", "bfloat16"),
        (torch.float32, {"dtype": None}, "auto", "float32"),
        (torch.bfloat16, {}, "float32", "float32"),
    ],
)
def test_headers_determine_the_dtype_of_the_forwards(
    stored: torch.dtype, change: dict[str, object], wanted: str, expected: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", dtype=stored)
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    checkpoint = open_checkpoint(model)
    assert forward_dtype(checkpoint, wanted) == expected
    stream = open_stream(checkpoint, device=CPU, dtype=wanted, trust_remote_code=False)
    assert stream.dtype == getattr(torch, expected)


def test_free_space_is_read_at_the_place_of_the_output(tmp_path: Path) -> None:
    plan = plan_run(save_model(tmp_path / "model"), config())
    disk = estimate_disk(plan, config(), tmp_path / "not" / "yet" / "there")
    assert disk.output == plan.layout.nbytes
    assert disk.free is not None
    assert disk.fits


def test_a_plan_needs_only_headers(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    file = model / "model.safetensors"
    checkpoint = open_checkpoint(model)
    start = min(tensor.start for tensor in checkpoint.tensors.values())
    with file.open("r+b") as stream:  # the data is gone, the size is not
        stream.truncate(start)
        stream.truncate(start + checkpoint.nbytes)
    assert len(plan_run(model, config()).quantized) == 21


def test_rows_of_one_kind_of_layer_are_adjacent(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    plan = plan_run(model, config(dynamic={r"+:.*\.0\.mlp\.(down|up)_proj": {"bits": 8}}))
    names = [row.name for row in plan_rows(plan)[0]]
    assert len(names) > len(set(names))
    in_order = [name for name, _ in groupby(names)]
    assert in_order == list(dict.fromkeys(names))


def test_a_plan_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    script = f"""
import sys
from gptq_cli.__main__ import main
sys.argv = ["gptq", "plan", {str(model)!r}, "--bits", "4", "--group-size", "32"]
try:
    main()
finally:
    print(sorted({{"torch", "transformers", "numpy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")
