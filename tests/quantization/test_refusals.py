"""`quantize_checkpoint` refuses wrong input with a code and a hint, and deletes nothing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from shlex import quote

import pytest
import torch
from torch import nn

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ExistsError, InputError, ResourceError
from gptq_cli.models.skeleton import outside_linears
from gptq_cli.planning.checks import check_memory
from gptq_cli.planning.estimate import Limit, estimate_memory
from gptq_cli.planning.plan import check_shared, plan_run
from gptq_cli.quantization.run import quantize_checkpoint
from tests.families import save_model
from tests.runs import config, digest, messages, quantize, quantize_with_events

ATTENTION = "model.layers[.][0-9]+[.]self_attn"


def test_an_existing_checkpoint_is_replaced_only_on_request(tmp_path: Path) -> None:
    model, output = save_model(tmp_path / "model"), save_model(tmp_path / "out")
    before = digest(output)
    with pytest.raises(ExistsError, match="not an empty directory") as caught:
        quantize_checkpoint(str(model), output, config())
    assert (caught.value.code, caught.value.exit_code) == ("E_OUT_EXISTS", 6)
    assert caught.value.hint == "add --overwrite to replace it, or choose another -o"
    assert digest(output) == before
    quantize_checkpoint(str(model), output, config(), overwrite=True)
    assert verify_checkpoint(output, full=True).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    ("leaves", "rule"),
    [
        ("qv", f"-:({ATTENTION}.q_proj|{ATTENTION}.v_proj)$"),
        ("qkvo", f"-:{ATTENTION}."),
        ("k", f"-:({ATTENTION}.k_proj)$"),
    ],
)
def test_shared_linears_are_refused_with_a_rule_that_keeps_them(
    leaves: str, rule: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model")
    shared = {
        f"model.layers.{block}.self_attn.{leaf}_proj" for block in range(3) for leaf in leaves
    }
    with pytest.raises(InputError) as caught:
        check_shared(plan_run(model, config()), shared)
    assert (caught.value.code, caught.value.exit_code) == ("E_ARCH", 3)
    first = f"model.layers.0.self_attn.{min(leaves)}_proj"
    assert str(caught.value) == (
        f"`{first}` is shared by several blocks, each of which would calibrate it for itself"
    )
    assert caught.value.hint == f"keep all {len(shared)} of them: --dynamic '{rule}'"
    kept = plan_run(model, config(dynamic={rule: {}}))
    check_shared(kept, shared)
    assert {layer.name for layer in kept.kept} == shared


class MatrixBlock(nn.Module):
    """A block with 90 weights in a linear, and a matrix [2, columns] that is no linear."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 10, bias=False)
        self.matrix = nn.Parameter(torch.zeros(2, columns))


@pytest.mark.parametrize(("columns", "share"), [(4, None), (15, "25%")])
def test_a_large_share_of_weights_outside_linears_is_reported(
    columns: int, share: str | None
) -> None:
    blocks = nn.ModuleList([MatrixBlock(columns), MatrixBlock(columns)])
    expected = None
    if share is not None:
        expected = f"{share} of the blocks' weights are in no linear layer, "
        expected += f"first of all `b.0.matrix` [2, {columns}]"
    assert outside_linears("b", blocks) == expected


def test_weights_outside_linears_are_refused_if_most_are_there() -> None:
    blocks = nn.ModuleList([MatrixBlock(100), MatrixBlock(100)])
    with pytest.raises(
        InputError, match=r"69% of the blocks' weights .*`b\.0\.matrix` \[2, 100\]"
    ) as caught:
        outside_linears("b", blocks)
    assert (caught.value.code, caught.value.exit_code) == ("E_ARCH", 3)


def test_an_empty_output_directory_is_used(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    quantize_checkpoint(str(model), tmp_path / "out", config())
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("where", "beside"),
    [("model", "model-GPTQ"), ("model/inside", "inside"), (".", None), ("model/a b", "a b")],
)
def test_an_output_in_or_around_the_model_is_refused(
    where: str, beside: str | None, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "parent" / "model")
    before = digest(model)
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(str(model), tmp_path / "parent" / where, config(), overwrite=True)
    assert caught.value.code == "E_OUT_IS_INPUT"
    hint = "choose another -o"
    if beside:
        hint += f": -o {quote(str(tmp_path / 'parent' / beside))}"
    assert caught.value.hint == hint
    assert digest(model) == before


def test_a_quantized_source_is_refused(tmp_path: Path) -> None:
    output, _ = quantize(tmp_path, save_model(tmp_path / "model"))
    with pytest.raises(InputError, match=r"already quantized \(gptq\)") as caught:
        quantize_checkpoint(str(output), tmp_path / "again", config())
    assert caught.value.code == "E_CKPT_QUANTIZED"


def test_a_long_method_of_a_source_is_cut(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "x" * 60_000}
    (model / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"already quantized \(x{57}\.\.\.\)") as caught:
        quantize_checkpoint(str(model), tmp_path / "again", config())
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_QUANTIZED", 3)
    assert caught.value.hint


def test_an_unfit_group_size_names_every_kind_of_layer(
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model", intermediate_size=96)
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(group_size=64))
    problems = caught.value.problems
    assert [problem.code for problem in problems] == ["E_SHAPE"]
    assert (
        "does not divide the 96 input features: `model.layers.N.mlp.down_proj` (3 layers)"
        in problems[0].message
    )
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(group_size=48))
    problems = caught.value.problems
    counts = [problem.message.rpartition(" ")[0].rpartition(" ")[2] for problem in problems]
    assert counts == ["(15", "(3"]
    named = re.findall(r"`model\.layers\.N\.\w+\.(\w+_proj)`", str(caught.value))
    all_but_down_proj = ["gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert sorted(named) == all_but_down_proj
    assert all((problem.hint or "").endswith("--unfit keep") for problem in problems)
    plan = plan_run(model, config(group_size=48, unfit="keep"))
    assert {layer.name.rpartition(".")[2] for layer in plan.quantized} == {"down_proj"}
    assert not (tmp_path / "out").exists()


def test_the_only_hint_for_an_unfit_width_is_to_keep_the_layer(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=80)
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(group_size=32))
    messages = [problem.message.partition(":")[0] for problem in caught.value.problems]
    assert sorted(messages) == [
        "80 input features are no multiple of 32",
        "80 output features are no multiple of 32",
    ]
    assert all((problem.hint or "").startswith("keep ") for problem in caught.value.problems)


def test_the_hint_for_a_layer_that_does_not_fit_works(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=96)
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(group_size=64))
    assert (caught.value.hint or "").endswith("--unfit keep")
    plan = plan_run(model, config(group_size=64, unfit="keep"))
    assert {layer.name.rpartition(".")[2] for layer in plan.kept} == {"down_proj"}


@pytest.mark.parametrize(
    ("asked", "fits"), [(256, ["64", "-1"]), (48, ["64", "-1"]), (320, ["64", "-1"])]
)
def test_proposed_group_sizes_fit_all_layers(asked: int, fits: list[str], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=320)  # 320 inputs beside 64 and 128
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(group_size=asked))
    (hint,) = {problem.hint or "" for problem in caught.value.problems}
    found = re.search(r"use --group-size auto, which takes (\d+), or --group-size (-1)", hint)
    assert found
    assert list(found.groups()) == fits
    for size in fits:
        assert len(plan_run(model, config(group_size=int(size))).quantized) == 21


def test_the_hint_changes_the_group_size_inside_its_rule(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", intermediate_size=96)
    rule, others = "+:.*(down|up)_proj", {"+:.*v_proj": {"bits": 8}}
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(dynamic={rule: {"group_size": 128}, **others}))
    (hint,) = {problem.hint or "" for problem in caught.value.problems}
    assert hint.startswith(
        f"use a group_size that fits all layers of rule '{rule}', such as 32 or -1; "
        "or keep what does not fit, and what engines fuse with it: --dynamic '-:"
    )
    for size in (32, -1):
        assert plan_run(model, config(dynamic={rule: {"group_size": size}, **others})).quantized


@pytest.mark.parametrize("target", [None, "vllm", "transformers"])
def test_the_hint_keeps_a_layer_with_its_fused_siblings(target: str | None, tmp_path: Path) -> None:
    model = save_model(
        tmp_path / "model", num_key_value_heads=1, head_dim=16, num_attention_heads=4
    )
    with pytest.raises(ConfigError) as caught:  # 16 outputs of k and v
        plan_run(model, config(target=target))
    advice = "keep what does not fit, and what engines fuse with it: "
    option, rule = shlex.split((caught.value.hint or "").removeprefix(advice))
    assert option == "--dynamic"
    plan = plan_run(model, config(target=target, dynamic={rule: {}}))
    assert {layer.name.rpartition(".")[2] for layer in plan.kept} == {"q_proj", "k_proj", "v_proj"}


def test_no_hint_keeps_every_layer(tmp_path: Path) -> None:
    model = save_model(
        tmp_path / "model", hidden_size=48, intermediate_size=80, num_attention_heads=3
    )
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config())
    assert {problem.hint for problem in caught.value.problems} == {None}


@pytest.mark.parametrize("rule", ["-:down_proj", "+:layers.*"])
def test_the_example_in_a_rule_hint_matches(rule: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(dynamic={rule: {}}))
    example = shlex.split((caught.value.hint or "").partition("for example ")[2])
    assert example == ["--dynamic", "-:model[.]layers[.][0-9]+[.]mlp[.]down_proj$"]
    assert len(plan_run(model, config(dynamic={example[1]: {}})).kept) == 3


def test_the_example_in_a_module_hint_is_a_module(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        plan_run(model, config(modules_in_block_to_quantize=[["mlp.down_prj"]]))
    example = (caught.value.hint or "").partition("for example ")[2]
    assert len(plan_run(model, config(modules_in_block_to_quantize=[[example]])).quantized) == 3


def test_a_rule_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"'-:down_proj' matches no layer") as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(dynamic={"-:down_proj": {}}))
    assert caught.value.code == "E_CFG_NO_MATCH"
    assert "start of the full name" in (caught.value.hint or "")


def test_rules_that_keep_every_layer_are_an_error(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(dynamic={"-:.*": {}}))
    assert caught.value.code == "E_CFG_NOTHING_TO_DO"


def test_seqlen_is_bounded_by_the_models_positions(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(
        ConfigError, match="seqlen 256 is more than the model's 128 positions"
    ) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config(seqlen=256))
    assert caught.value.code == "E_CFG_SEQLEN"
    settings = config().model_dump(exclude_unset=True)
    del settings["seqlen"]
    result = quantize_checkpoint(str(model), tmp_path / "out", QuantizeConfig(**settings))
    assert result.config.seqlen == 128


def test_an_absent_cuda_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device 0") as caught:
        quantize_checkpoint(
            str(save_model(tmp_path / "model")), tmp_path / "out", config(device="cuda")
        )
    assert (caught.value.code, caught.value.exit_code) == ("E_DEVICE", 3)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert (caught.value.code, str(caught.value)) == ("E_TOKENIZER", f"`{model}` has no tokenizer")
    assert "tokenizer.json" in (caught.value.hint or "")


def test_a_model_type_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "model_type": "llamma"}))
    with pytest.raises(
        InputError, match="model type `llamma` but Transformers does not recognize"
    ) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert caught.value.code == "E_ARCH"
    hint = "a newer transformers may know it: pip install --upgrade transformers"
    assert caught.value.hint == hint


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=64)
    with pytest.raises(InputError) as caught:
        quantize_checkpoint(str(model), tmp_path / "out", config())
    assert caught.value.code == "E_TOKENIZER"


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory") as caught:
        quantize_checkpoint(str(tmp_path / "nothing"), tmp_path / "out", config())
    assert caught.value.code == "E_MODEL_NOT_FOUND"


def test_raised_damping_is_reported_with_the_value_used(tmp_path: Path) -> None:
    settings = {"damp_percent": 1e-9, "nsamples": 1, "batch_size": 1, "seqlen": 16}
    result, events = quantize_with_events(
        save_model(tmp_path / "model"), tmp_path / "out", preset="gptq", **settings
    )
    raised = [layer for layer in result.layers if layer.damp_retries]
    assert raised
    assert all(
        layer.damp_percent == pytest.approx(1e-9 * 4**layer.damp_retries) for layer in result.layers
    )
    for layer, text in zip(raised, messages(events, "W_NUM_DAMPING"), strict=True):
        assert f"`{layer.name}`: damp_percent was raised to {layer.damp_percent:g}" in text


def test_a_run_that_cannot_fit_in_memory_is_refused_at_once(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ResourceError) as caught:
        quantize(tmp_path, model, max_ram="1MB")
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    assert re.fullmatch(
        r"about \S+ [KM]B of host memory are needed; --max-ram allows 1 MB, "
        r"the run holds \S+ MB already, and \S+ [GT]B are free: hidden states \S+ KB, "
        r"waiting batches \S+ [KM]B, block \S+ KB, solver \S+ [KM]B",
        str(caught.value),
    )
    option, allowed = shlex.split((caught.value.hint or "").removeprefix("allow more: "))
    assert option == "--max-ram"
    quantize(tmp_path, model, max_ram=allowed)


def test_no_hint_proposes_a_limit_above_free_memory(tmp_path: Path) -> None:
    settings = config(preset="balanced")
    plan = plan_run(save_model(tmp_path / "model"), settings)

    def refused(limits: list[Limit]) -> tuple[str, str]:
        with pytest.raises(ResourceError) as caught:
            check_memory(plan, settings, 10_000, None, limits=limits)
        return str(caught.value).partition(": hidden")[0].partition("; ")[2], str(caught.value.hint)

    less = "use a smaller --batch-size, --seqlen or --nsamples"
    assert refused([]) == ("10 KB are free", less)
    start = "--max-ram allows 1.01 MB, the run holds 1 MB already, and"
    few = Limit("--max-ram", 1_010_000, 1_000_000, 20_000)
    assert refused([few]) == (f"{start} 20 KB are free", less)
    many = Limit("--max-ram", 1_010_000, 1_000_000, 10**9)
    more = f"allow more: --max-ram 140MB, or {less}"
    assert refused([many]) == (f"{start} 1 GB are free", more)
    assert Limit("--max-ram", 10, 10**6, 10**9, sharers=2).way_out(10**6) == "--max-ram 260MB"


def test_a_run_refused_for_memory_writes_nothing(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    with pytest.raises(ResourceError):
        quantize(tmp_path, model, max_ram="1MB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_a_run_needs_exactly_the_memory_that_the_plan_counts(preset: str, tmp_path: Path) -> None:
    settings = config(preset=preset, nsamples=64, batch_size=4)
    plan = plan_run(save_model(tmp_path / "model"), settings)
    alone = settings.model_copy(update={"true_sequential": False})
    estimate = estimate_memory(plan, alone)
    on_host = sum(term.nbytes for term in estimate.cpu if term.what != "libraries")
    check_memory(plan, settings, on_host, None)
    with pytest.raises(ResourceError, match="of host memory"):
        check_memory(plan, settings, on_host - 1, None)
    terms = {term.what: term.nbytes for term in estimate.accelerator}
    states = terms.pop("hidden states")
    work = sum(terms.values())
    roomy = max(work, 4 * states)
    check_memory(plan, settings, 0, roomy)  # all on the device
    with pytest.raises(ResourceError, match="of device memory"):
        check_memory(plan, settings, 10**12, work - 1)
    if work < 4 * states:
        check_memory(plan, settings, states, work)
        with pytest.raises(ResourceError, match=r"of host memory are needed.*: hidden states"):
            check_memory(plan, settings, states - 1, work)
