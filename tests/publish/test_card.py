"""A model card holds any name unchanged, in its YAML and on its page, as Markdown parsers see."""

from __future__ import annotations

import dataclasses

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gptq_cli.publish.card import CardFacts, code, code_block, escaped, model_card

MARKDOWN = MarkdownIt("commonmark").enable("table")  # HTML is let through: it must not be in there
EVIL = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![x](http://t/x.png)",
    "a`b``c",
    "`",
    "a | b",
    "# head",
    "---\nlicense: mit\n---",
    "$x$",
    "&lt;b&gt;",
    "<!-- x -->",
    "\\`",
    "*a* _b_ ~c~",
    "x\n\n- y",
    "<http://a.b>",
    "{{ f }}",
    "```\n# x",
    "a\n````\nb",
]
nasty = st.sampled_from(EVIL) | st.text(max_size=40)
FACTS = CardFacts(
    repo="me/tiny",
    base_model="org/tiny",
    commit=None,
    source_form=None,
    source_card={},
    method={"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "format": "gptq"},
    bits_per_weight=4.5,
    nbytes=123_456_789,
    versions={"gptq_cli": "0.1.0", "torch": "2.13"},
    settings={"nsamples": 4, "seqlen": 64, "seed": 0},
    datasets=("org/text",),
    worst=[
        {
            "name": "model.layers.0.q_proj",
            "bits": 4,
            "relative_error": 1e-3,
            "rtn_relative_error": 2e-3,
        }
    ],
    n_layers=14,
    rtn_sampled=False,
    uncovered=2,
    readers=[("vllm", "yes", ""), ("transformers", "limited", "needs optimum")],
    evaluation=None,
    evaluation_dataset=None,
)


def body(card: str) -> str:
    start, _, rest = card.partition("---\n")
    assert start == ""
    return rest.partition("\n---\n")[2]


def tokens(markdown: str) -> list[Token]:
    return [part for token in MARKDOWN.parse(markdown) for part in (token, *(token.children or ()))]


def shown(value: str) -> str:
    return "".join(
        letter if letter.isprintable() else "\ufffd" for letter in " ".join(value.split())
    )


@settings(deadline=None)
@given(nasty)
def test_text_is_shown_unchanged_and_runs_nothing(value: str) -> None:
    found = tokens(f"x {escaped(value)} x")
    assert {token.type for token in found} <= {
        "paragraph_open",
        "paragraph_close",
        "inline",
        "text",
        "text_special",
    }
    text = "".join(token.content for token in found if token.type.startswith("text"))
    assert text.split() == f"x {shown(value)} x".split()


@settings(deadline=None)
@given(nasty)
def test_a_code_span_keeps_its_text_inside_its_table_cell(value: str) -> None:
    found = tokens(f"| a | b |\n|---|---|\n| {code(value)} | {escaped(value)} |\n")
    cells = [token.type for token in found].count("td_open")
    assert cells == 2
    assert next(token.content for token in found if token.type == "code_inline").strip() == shown(
        value
    )
    assert not {"html_inline", "html_block", "link_open", "image", "em_open"} & {
        token.type for token in found
    }


@settings(deadline=None)
@given(nasty)
def test_text_does_not_end_its_code_block(value: str) -> None:
    found = MARKDOWN.parse(f"{code_block(value, 'yaml')}\n\nafter")
    assert [token.type for token in found] == [
        "fence",
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]
    assert found[0].info == "yaml"


@settings(deadline=None)
@given(nasty, nasty, nasty)
@example(*EVIL[:3])
@example("--- \n--- ", "---", "...")
@example("a\x85b", "a\x85b", "a\x85b")
def test_names_change_neither_metadata_nor_page_layout(
    layer: str, dataset: str, licence: str
) -> None:
    plain = body(model_card(FACTS))
    facts = dataclasses.replace(
        FACTS,
        datasets=(dataset,),
        source_card={"license": licence, "language": [layer], "pipeline_tag": 3, "tags": ["evil"]},
        worst=[{**FACTS.worst[0], "name": layer}],
        settings={**FACTS.settings, "dataset": dataset, "dynamic": {layer: {}}},
        versions={"gptq_cli": dataset, "torch": layer},
    )
    card = model_card(facts)
    metadata = next(yaml.safe_load_all(card))
    assert (metadata["base_model"], metadata["pipeline_tag"]) == ("org/tiny", "text-generation")
    assert metadata.get("license", "") == (licence if licence.isprintable() else "")
    assert "".join(metadata.get("datasets", [""])) == shown(dataset)
    assert metadata["tags"] == ["gptq", "4-bit", "quantized"]
    structure = [token.type for token in MARKDOWN.parse(body(card))]
    assert structure == [token.type for token in MARKDOWN.parse(plain)]
    inline = {token.type for token in tokens(body(card))}
    assert (
        not {"html_inline", "html_block", "link_open", "image", "em_open", "strong_open"} & inline
    )


def test_the_page_shows_readers_experts_and_usage() -> None:
    page = body(model_card(FACTS))
    for words in (
        "vllm serve me/tiny",
        'from_pretrained("me/tiny", device_map="auto")',
        "123 MB, 4.5 bits",
        "Read by vllm.",
        "With limits by transformers: needs optimum.",
        "calibration token | 2 |",
        "gptq quantize org/tiny --config gptq_config.yaml",
        "Of 14 quantized linears",
    ):
        assert words in page
    none = dataclasses.replace(
        FACTS, readers=[("vllm", "no", "why")], worst=[], settings={}, versions={}, uncovered=0
    )
    page = body(model_card(none))
    assert "vllm serve" not in page
    assert "Not by vllm: why." in page
    assert "Worst layers" not in page
    assert "gptq quantize" not in page


def test_the_card_names_the_form_of_the_source() -> None:
    facts = dataclasses.replace(FACTS, source_form="mxfp4 in groups of 32")
    assert "| base model | `org/tiny`, stored as mxfp4 in groups of 32 |" in model_card(facts)
    assert "stored as" not in model_card(FACTS)


def test_the_card_names_merged_adapters() -> None:
    facts = dataclasses.replace(FACTS, settings={**FACTS.settings, "lora": "style:0.8, facts"})
    assert "| merged adapters | `style:0.8, facts` |" in model_card(facts)
    assert "merged adapters" not in model_card(FACTS)


def test_the_card_tells_of_sampled_rows_above_an_intact_table() -> None:
    usual = body(model_card(FACTS))
    page = body(model_card(dataclasses.replace(FACTS, rtn_sampled=True)))
    sentence = " The errors of rounding to nearest were measured on a sample of rows."
    assert sentence not in usual
    assert page.replace(sentence, "") == usual
    tables = [token for token in tokens(page) if token.type == "table_open"]
    assert len(tables) == len([token for token in tokens(usual) if token.type == "table_open"]) > 0
