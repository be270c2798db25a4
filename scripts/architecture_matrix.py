#!/usr/bin/env python3
"""Quantize a tiny random model of every causal architecture of the installed transformers.

    python scripts/architecture_matrix.py [--jobs N] [TYPE ...]

Each type runs in a process of its own, with limits of time and memory; nothing is downloaded.
Prints a line for each type and writes docs/architectures.md and docs/benchmarks/architectures.json.
If only some types are named, the rows of the others stay, provided that the same versions made
them.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path

from common import ROOT, argument_parser, write_json

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers

from tests.architectures import BITS, TOLERANCE, TYPES, Outcome, try_type

SECONDS = 600  # of one phase: building, or quantizing and comparing
BYTES = 100 << 30  # of address space: every tensor that is read maps its file once more
DOCUMENT = ROOT / "docs" / "architectures.md"
FIGURES = ROOT / "docs" / "benchmarks" / "architectures.json"
BUILT = "built"
STATUSES = {
    "worked": "quantized and read back; logits as transformers computes them",
    "refused": "an error with a code and a reason, and no output",
    "wrong": f"logits differ by more than {TOLERANCE:g} of the largest",
    "crashed": "an exception that is no refusal, or no result in time",
    "not built": "transformers cannot build, save, load or run a tiny random model of it here",
}


def attempt(model_type: str) -> Outcome:
    """Return the outcome of one type, tried in a forked process that may fail in any way."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, theirs))
    process.start()
    theirs.close()
    status = "not built"
    try:
        while ours.poll(SECONDS):
            message = ours.recv()
            if message != BUILT:
                outcome: Outcome = message
                return outcome
            status = "crashed"
        return Outcome(model_type, status, f"no result within {SECONDS} s")
    except EOFError:
        process.join()
        return Outcome(model_type, status, f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(model_type: str, connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        connection.send(try_type(model_type, Path(folder), built=lambda: connection.send(BUILT)))


INTRODUCTION = """
This page is for users who want to know whether `gptq` quantizes their type of model. `gptq` has
no table of architectures; it accepts or refuses a model after running it. The table shows the
results for the {count} model types of transformers' mapping for causal language models.

Another 83 types have a class for images and text alone. They are not in the table, because many of
them cannot be built from sizes alone; the script takes their names as arguments. On text, tiny
models of aya_vision, cohere2_vision, cohere_compass, deepseek_vl_hybrid, exaone4_5, internvl,
llava, llava_next, mistral3, paligemma, qwen3_vl and smolvlm worked. aria and qwen3_vl_moe, as
transformers saves them, were refused (E_ARCH): the order of their experts is not supported. Tests
run tiny models of gemma3, llama4, qwen2_5_vl and qwen3_vl on chats with images.

`python scripts/architecture_matrix.py` builds a tiny random model of each type from its config
class, quantizes it to {bits} bits in groups of 32, reads it back, and compares the logits of the
block stream with those of transformers' own forward over the dequantized weights. It ran with
{versions}, on a CPU in float32. Tiny random models test structure, names and formats, but not
quality.

The script keeps three kinds of layers by the rules in the hints of refusals: layers whose shape
cannot be packed at these sizes (small projections), layers that a forward never calls, and layers
that several blocks share. The last column names the rules. Experts that no token reaches are
rounded to nearest.

* difference = largest difference of the logits, relative to the largest logit
* share = quantized part of all weights in numbered modules (blocks, vision towers included)
* layers, kept = number of layers that are quantized, and of layers that are not
"""


def count_statuses(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.status for outcome in outcomes)


def to_markdown(outcomes: Sequence[Outcome], versions: dict[str, str]) -> str:
    """Return docs/architectures.md."""
    counts = count_statuses(outcomes)
    built, worked = len(outcomes) - counts["not built"], counts["worked"]
    made_with = " and ".join(f"{name} {version}" for name, version in versions.items())
    bits = " and to ".join(map(str, BITS))
    introduction = INTRODUCTION.format(count=len(outcomes), versions=made_with, bits=bits)
    lines = ["# Architectures", introduction, "| outcome | types | meaning |", "|---|---|---|"]
    for status, meaning in STATUSES.items():
        lines.append(f"| {status} | {counts[status]} | {meaning} |")
    share = f"{worked / max(1, built):.1%}"
    lines += ["", f"Of the {built} types that can be built {worked} worked: {share}.", ""]
    differences = " | ".join(f"difference, {bits} bits" for bits in BITS)
    lines.append(f"| type | outcome | layers | kept | share | {differences} | why |")
    lines.append("|---|---|---|---|---|" + "---|" * len(BITS) + "---|")
    lines += map(_row, outcomes)
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome) -> str:
    figures = [""] * (3 + len(BITS))
    if outcome.quantized:
        figures = [str(outcome.quantized), str(outcome.kept), f"{outcome.share:.0%}"]
        figures += map(_short, outcome.differences)
    cells = [outcome.model_type, outcome.status, *figures, outcome.why.replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def _short(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def recorded(versions: dict[str, str]) -> dict[str, Outcome]:
    """Return the outcomes of the last run by type, if the same versions made them."""
    if not FIGURES.is_file():
        return {}
    content = json.loads(FIGURES.read_text())
    if (content.get("versions"), content.get("bits")) != (versions, list(BITS)):
        return {}
    return {row["model_type"]: Outcome(**row) for row in content["rows"]}


def write(rows: Sequence[Outcome], versions: dict[str, str]) -> None:
    """Write both documents after each type, so that a run that is cut off has its results."""
    DOCUMENT.write_text(to_markdown(rows, versions))
    content = {"versions": versions, "bits": BITS, "rows": list(map(asdict, rows))}
    write_json(FIGURES, content)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    versions = {
        "transformers": transformers.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    outcomes = recorded(versions)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for last in pool.map(attempt, arguments.types):
            outcomes[last.model_type] = last
            figures = f"{last.quantized:3d} {last.share:5.0%} {last.why}"
            print(f"{last.model_type:24s} {last.status:10s} {figures}", flush=True)
            by_type = sorted(outcomes.values(), key=lambda outcome: outcome.model_type)
            write(by_type, versions)
    print(dict(count_statuses(outcomes.values())))


if __name__ == "__main__":
    main()
