#!/usr/bin/env python3
"""Write docs/compatibility.md from the results of `make test-engines`.

    python scripts/engine_table.py

The results are docs/benchmarks/engines.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from common import ROOT, argument_parser

from tests.engines.engines import known_words

FIGURES = ROOT / "docs" / "benchmarks" / "engines.json"
DOCUMENT = ROOT / "docs" / "compatibility.md"
SIGNS = {"yes": "●", "no": "○", "wrong": "**✗**", "other": "–"}
TITLES = {
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp",
    "openvino": "OpenVINO",
    "mlx-lm": "MLX-LM",
    "transformers": "transformers",
    "gptqmodel": "GPTQModel",
    "auto-round": "auto-round",
    "sglang": "SGLang",
    "lmdeploy": "LMDeploy",
}
INTRODUCTION = """\
# Compatibility

This page is for users who must load a checkpoint with a certain program. It shows what each program
did with each kind of checkpoint that `gptq` writes.

`make test-engines` runs the programs on a CPU, writes their results to
`docs/benchmarks/engines.json`, and makes this page from them. Each program loads each checkpoint in
an environment of its own. The test compares its logits with those of a float32 model whose weights
were unpacked by code that shares nothing with `gptq`, and what the program did with the verdict of
`gptq plan` and `gptq inspect`. Models are random, with hidden size 256 and two blocks. Unless the
table says something else, they are Llama models in float16, in the format `gptq`, in symmetric
grids of 4 bits with groups of 128 columns, made with the default preset.

* ● = the program loads the checkpoint, names no missing or unexpected tensor, and four fifths of
  its logits have a relative error of less than {float16:g} in float16, {bfloat16:g} in bfloat16,
  {float32:g} in float32; a zero point that is off by one gives 0.07 or more
* ○ = the program refuses the checkpoint
* **✗** = the program loads the checkpoint but computes something else
* – = the program does not run the unquantized model either
* no sign = the checkpoint was not tried with the program
"""
STUBBED = """\
SGLang and LMDeploy need a GPU. Here their own configuration and loader classes read the checkpoints
while their kernels were left out: ● means that the parameters they make fit the checkpoint, not
that a model ran.

transformers refuses asymmetric checkpoints in the format `compressed-tensors`, unless
`CompressedTensorsConfig(dequantize=True)` tells it to decode them. The run tests this, too.
"""
REFUSALS = """\
## What the programs say

The words with which each program refused, and the number of checkpoints of this page that it
refused with them.
"""
END = """\
GPTQ checkpoints of other tools load as far as they have the same settings. The verdicts on further
programs come from their sources: [engines](reference/README.md#engines).
"""


def page(content: Mapping[str, Any]) -> str:
    """Return docs/compatibility.md for the `content` of docs/benchmarks/engines.json."""
    engines = [name for name in TITLES if name in content["engines"]]
    lines = [INTRODUCTION.format(**content["limits"]), *_versions(content["engines"], engines)]
    lines += ["", STUBBED]
    sections: dict[str, list[Mapping[str, Any]]] = {}
    for row in content["cases"]:
        sections.setdefault(row["section"], []).append(row)
    for section, rows in sections.items():
        lines += [f"## {section.capitalize()}", "", *_results(rows, engines), ""]
    lines += [REFUSALS, *_refusals(content["cases"], engines), "", END]
    return "\n".join(lines)


def _versions(about: Mapping[str, Any], engines: Iterable[str]) -> list[str]:
    lines = ["| program | versions | date |", "|---|---|---|"]
    for name in engines:
        versions = [f"{key} {value}" for key, value in about[name]["versions"].items()]
        lines.append(f"| {TITLES[name]} | {', '.join(versions)} | {about[name]['date']} |")
    return lines


def _results(rows: list[Mapping[str, Any]], engines: Iterable[str]) -> list[str]:
    """Return a table of these rows, with a column for each engine that ran on any of them."""
    ran: set[str] = set()
    for row in rows:
        ran |= row["seen"].keys()
    engines = [name for name in engines if name in ran]
    titles = " | ".join(TITLES[name] for name in engines)
    lines = [f"| checkpoint | {titles} |", "|---|" + ":-:|" * len(engines)]
    for row in rows:
        signs = []
        for name in engines:
            seen = row["seen"].get(name, {})
            signs.append(SIGNS.get(seen.get("outcome"), ""))
        lines.append(f"| {row['title']} | {' | '.join(signs)} |")
    return lines


def _refusals(rows: Iterable[Mapping[str, Any]], engines: Iterable[str]) -> list[str]:
    lines = ["| program | words | checkpoints |", "|---|---|--:|"]
    for name in engines:
        counts: dict[str, int] = {}
        for row in rows:
            seen = row["seen"].get(name, {})
            if seen.get("outcome") == "no":
                for words in known_words(name, seen["words"])[:1]:
                    counts[words] = counts.get(words, 0) + 1
        for words, count in counts.items():
            lines.append(f"| {TITLES[name]} | `{words}` | {count} |")
    return lines


def main() -> None:
    argument_parser(__doc__).parse_args()
    content = json.loads(FIGURES.read_text(encoding="utf-8"))
    DOCUMENT.write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    main()
