"""The model card of a quantized checkpoint: metadata for the Hub, and a page in Markdown.

Names and texts of the run are escaped: they cannot change the page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from gptq_cli.config.resolve import printable_yaml
from gptq_cli.errors import size
from gptq_cli.publish.report_data import printable

COPIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
PROTOCOL = ("dataset_config", "dataset_split", "dataset_revision")
PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")  # CommonMark: any of ASCII's may follow a backslash
# These mean nothing inside a line, and escaped they are hard to read in the source.
PLAIN = ",.-+%/()="
LONGEST_WORD = 500  # letters of a license, language or task in the metadata


@dataclass(frozen=True, slots=True)
class CardFacts:
    """The facts that a card shows.

    `datasets` and `evaluation_dataset` are ids of the Hub, empty for private text. `readers` are
    (engine, outcome, reason). `uncovered` counts experts without a calibration token. `source_form`
    is the form in which the source model stores its weights, None if they are plain.
    """

    repo: str
    base_model: str
    commit: str | None
    source_form: str | None
    source_card: Mapping[str, Any]
    method: Mapping[str, Any]
    bits_per_weight: float
    nbytes: int
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    datasets: tuple[str, ...]
    worst: Sequence[Mapping[str, Any]]
    n_layers: int
    rtn_sampled: bool
    uncovered: int
    readers: Sequence[tuple[str, str, str]]
    evaluation: Mapping[str, Any] | None
    evaluation_dataset: str | None


class Code(str):
    """Text that stands between backticks already, and is not escaped again."""

    __slots__ = ()


def model_card(facts: CardFacts) -> str:
    """Return README.md for `facts`: YAML for the Hub, then Markdown in which every name is text."""
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
    """Return Markdown that shows `value` on one line, without mark-up, HTML or links."""
    if isinstance(value, Code):
        return value
    return PUNCTUATION.sub(_with_backslash, _one_line(str(value)))


def _with_backslash(mark: re.Match[str]) -> str:
    if mark[0] in PLAIN:
        return mark[0]
    return f"\\{mark[0]}"


def code(value: object) -> Code:
    """Return a code span that holds `value`, on one line and in one cell of a table."""
    text = _one_line(str(value)).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    if not text or text.startswith("`") or text.endswith("`"):
        text = f" {text} "
    return Code(f"{ticks}{text}{ticks}")


def code_block(text: str, language: str = "") -> Code:
    """Return a fenced block that `text` cannot end."""
    fence = "`" * max(3, _longest_run(text) + 1)
    lines = map(printable, text.strip("\n").split("\n"))
    return Code("\n".join([fence + language, *lines, fence]))


def _metadata(facts: CardFacts) -> ModelCardData:
    metadata: dict[str, Any] = {
        "base_model": facts.base_model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gptq", f"{facts.method['bits']}-bit", "quantized"],
    }
    for key in COPIED:
        value = facts.source_card.get(key)
        if _is_words(value):
            metadata[key] = value
    if facts.datasets:
        metadata["datasets"] = [_one_line(name) for name in facts.datasets]
    results = _results(facts)
    if results is not None:
        metadata["model_name"] = facts.repo.rpartition("/")[2]
        metadata["eval_results"] = results
    return ModelCardData(**metadata)


def _results(facts: CardFacts) -> list[EvalResult] | None:
    """Return the measured perplexity for the Hub; None if its dataset is not public."""
    measured = facts.evaluation
    if measured is None or facts.evaluation_dataset is None:
        return None
    protocol: dict[str, Any] = {}
    for key in PROTOCOL:
        if measured.get(key) is not None:
            protocol[key] = _one_line(str(measured[key]))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=facts.evaluation_dataset,
            dataset_name=_one_line(measured["dataset"]),
            **protocol,
            metric_type="perplexity",
            metric_value=measured["perplexity"],
        )
    ]


def _is_words(value: object) -> bool:
    """Return whether `value` is a short text, or a list of such texts that is not empty."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_word, value))
    return _is_word(value)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST_WORD


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
