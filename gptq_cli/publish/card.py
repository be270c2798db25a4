"""The model card of a quantized checkpoint: metadata for the Hub, and a page that obeys no text of the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from gptq_cli.config.finding import size
from gptq_cli.config.resolve import printable_yaml

COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
PROTOCOL = ("dataset_config", "dataset_split", "dataset_revision")
PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")  # CommonMark: any of ASCII's may follow a backslash
PLAIN = (
    ",.-+%/()="  # these mean nothing inside a line, and escaped they are hard to read in the source
)


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card is made of. `dataset` and that of `evaluation` are ids of the Hub, None for text of one's own."""

    repo: str
    base_model: str
    commit: str | None
    source_card: Mapping[str, Any]
    method: Mapping[str, Any]
    bits_per_weight: float
    nbytes: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    dataset: str | None
    worst: Sequence[Mapping[str, Any]]
    n_layers: int
    uncovered: int
    readers: Sequence[tuple[str, str, str]]
    evaluation: Mapping[str, Any] | None
    evaluation_dataset: str | None


class Code(str):
    """Text between backticks already."""

    __slots__ = ()


def model_card(facts: CardFacts) -> str:
    """README.md for `facts`: YAML that the Hub reads, and Markdown in which every name is text."""
    body = _template().render(f=facts, name=facts.repo.rpartition("/")[2])
    return str(ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n{body}"))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("gptq_cli.publish", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=escaped,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": code,
        "block": code_block,
        "size": size,
        "settings": printable_yaml,
    }
    return environment.get_template("card.md.j2")


def escaped(value: object) -> str:
    """`value` as Markdown that shows it: one line, no mark-up, no HTML, no link."""
    if isinstance(value, Code):
        return value
    return PUNCTUATION.sub(
        lambda found: found[0] if found[0] in PLAIN else f"\\{found[0]}", _one_line(str(value))
    )


def code(value: object) -> Code:
    """A code span that holds `value`, on one line and in one cell of a table."""
    text = _one_line(str(value)).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return Code(f"{ticks}{pad}{text}{pad}{ticks}")


def code_block(text: str, language: str = "") -> Code:
    """A fenced block that `text` cannot end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = [_one_line(line, keep_blanks=True) for line in text.strip("\n").split("\n")]
    return Code("\n".join([fence + language, *lines, fence]))


def _metadata(facts: CardFacts) -> ModelCardData:
    copied: dict[str, Any] = {
        key: value for key in COPIED if _is_words(value := facts.source_card.get(key))
    }
    results = _results(facts)
    pipeline_tag = copied.pop("pipeline_tag", "text-generation")
    return ModelCardData(
        base_model=facts.base_model,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=["gptq", f"{facts.method['bits']}-bit", "quantized"],
        datasets=[_one_line(facts.dataset)] if facts.dataset else None,
        model_name=facts.repo.rpartition("/")[2] if results else None,
        eval_results=results,
        **copied,
    )


def _results(facts: CardFacts) -> list[EvalResult] | None:
    measured = facts.evaluation
    if measured is None or facts.evaluation_dataset is None:
        return None
    said: dict[str, Any] = {
        key: _one_line(str(measured[key])) for key in PROTOCOL if measured.get(key) is not None
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.evaluation_dataset,
            dataset_name=_one_line(measured["dataset"]),
            **said,
            metric_type="perplexity",
            metric_value=measured["perplexity"],
        )
    ]


def _is_words(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, str) and item.isprintable() and 0 < len(item) <= 500 for item in items
    )


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _one_line(text: str, *, keep_blanks: bool = False) -> str:
    text = text if keep_blanks else " ".join(text.split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
