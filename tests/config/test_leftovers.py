"""Names of other tools in a checkpoint: foreign names, wrapped names, reasons of a misfit."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_cli.config.leftovers import foreign_names, misfit, refuse_wrapped
from gptq_cli.errors import InputError

Q, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "lm_head.weight",
)
SHAPES = {
    "model.embed_tokens.weight": (512, 64),
    Q: (128, 64),
    "model.layers.0.self_attn.q_proj.bias": (128,),
    NORM: (64,),
    "model.layers.0.mlp.gate.weight": (8, 64),
    "model.layers.0.mlp.gate.e_score_correction_bias": (8,),
    "model.layers.0.mlp.experts.0.up_proj.weight": (64, 64),
    HEAD: (512, 64),
}
MODULE = Q.removesuffix(".weight")
FOREIGN = {
    f"{MODULE}.lora_A.default.weight": (8, 64),
    f"{MODULE}.lora_B.weight": (128, 8),
    f"{MODULE}.lora_magnitude_vector.default": (128,),
    f"{MODULE}.ia3_l.default": (128, 1),
    f"_orig_mod.{NORM}": (64,),
    "model.layers.0._orig_mod.self_attn.q_proj.weight": (128, 64),
    f"base_model.model.{Q}": (128, 64),
    f"{MODULE}.base_layer.weight": (128, 64),
    "lm_head.modules_to_save.default.weight": (512, 64),
}


def test_foreign_names_are_parts_of_linears_and_wrapped_copies() -> None:
    assert foreign_names(SHAPES) == []
    assert foreign_names(SHAPES | FOREIGN) == list(FOREIGN)


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("_orig_mod.", "model._orig_mod.save_pretrained(DIR)"),
        ("module.", "model.module.save_pretrained(DIR)"),
        ("base_model.model.", "model.merge_and_unload().save_pretrained(DIR)"),
    ],
)
def test_refuse_wrapped_refuses_prefixed_names_with_a_remedy(part: str, remedy: str) -> None:
    refuse_wrapped(SHAPES, own_code=False)
    with pytest.raises(InputError) as caught:
        refuse_wrapped([part + name for name in SHAPES], own_code=False)
    assert (caught.value.code, caught.value.exit_code) == ("E_CKPT_INCOMPLETE", 3)
    assert str(caught.value) == (
        "the checkpoint has no tensor for 8 parameters, first `model.embed_tokens.weight`, "
        f"and 8 tensors that are no parameters, first `{part}model.embed_tokens.weight`: "
        f"its names have `{part}` in them, but those of the model do not"
    )
    assert remedy in (caught.value.hint or "")
    assert "download" not in (caught.value.hint or "")


def test_own_code_may_have_a_module_called_module() -> None:
    refuse_wrapped([f"module.{name}" for name in SHAPES], own_code=True)
    refuse_wrapped([f"module.{name}" for name in SHAPES if name != Q] + [Q], own_code=False)
    with pytest.raises(InputError):
        refuse_wrapped([f"_orig_mod.{name}" for name in SHAPES], own_code=True)


@pytest.mark.parametrize(
    "wrapped", [f"{MODULE}.base_layer.weight", "model.layers.0._orig_mod.self_attn.q_proj.weight"]
)
def test_refuse_wrapped_refuses_a_wrapped_weight_alone(wrapped: str) -> None:
    refuse_wrapped([*SHAPES, wrapped], own_code=False)
    with pytest.raises(
        InputError, match=f"no tensor for 1 parameters, first `{Q}`, and 1 tensors .*`{wrapped}`"
    ):
        refuse_wrapped([*(set(SHAPES) - {Q}), wrapped], own_code=False)


TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
REASONS: list[tuple[list[str], list[str], dict[str, Any], list[str], str | None, str]] = [
    (
        [Q, NORM],
        [f"_orig_mod.{Q}", f"_orig_mod.{NORM}"],
        {},
        [],
        "`_orig_mod.` in them",
        "model._orig_mod.save",
    ),
    (
        [Q, NORM],
        [f"x.y.{Q}", f"x.y.{NORM}", "z"],
        {},
        [],
        "`x.y.` in them",
        "under names without `x.y.`",
    ),
    (
        [Q],
        [f"{MODULE}.base_layer.weight", f"{MODULE}.lora_A.default.weight"],
        {},
        [],
        "`base_layer.` in",
        "merge",
    ),
    (
        [Q],
        [f"base_model.model.{Q}", f"base_model.model.{MODULE}.lora_A.weight"],
        {},
        [],
        "`base_model.model.`",
        "merge",
    ),
    (
        [Q, NORM],
        [Q[6:], NORM[6:]],
        {},
        [],
        "the names of the model begin with `model.`",
        "from one place",
    ),
    (
        [HEAD],
        ["score.weight"],
        UNTIED,
        [],
        "it is a classifier, not a language model",
        "name a language model",
    ),
    (
        [HEAD],
        [],
        UNTIED | {"architectures": ["LlamaForSequenceClassification"]},
        [],
        "a classifier",
        "ForCausalLM",
    ),
    (
        [HEAD],
        [],
        UNTIED,
        [],
        "no output head, and config.json says tie_word_embeddings: false",
        "true into config.json",
    ),
    (
        [HEAD],
        [],
        {"architectures": None},
        [],
        "it has no output head",
        "name the language model and not its base",
    ),
    (
        [NORM],
        [],
        TIED,
        [NORM],
        "the index lists 1 tensors that no shard holds",
        "download the index and the shards",
    ),
    ([NORM], ["encoder.norm"], TIED, [], "config.json is of another model", "from one place"),
    ([NORM], [], TIED, [], None, "download config.json and the weights again, of one revision"),
]


@pytest.mark.parametrize(("absent", "left", "config", "listed", "reason", "hint"), REASONS)
def test_misfit_names_both_sides_and_the_likely_reason(
    absent: list[str],
    left: list[str],
    config: dict[str, Any],
    listed: list[str],
    reason: str | None,
    hint: str,
) -> None:
    error = misfit(absent, left, config, listed)
    assert (error.code, error.exit_code) == ("E_CKPT_INCOMPLETE", 3)
    sides, _, why = str(error).partition(": ")
    assert sides.startswith(
        f"the checkpoint has no tensor for {len(absent)} parameters, first `{absent[0]}`"
    )
    if left:
        assert f"{len(left)} tensors that are no parameters, first `{left[0]}`" in sides
    else:
        assert "tensors that are no parameters" not in sides
    if reason is None:
        assert why == ""
    else:
        assert reason in why
    assert hint in (error.hint or "")
