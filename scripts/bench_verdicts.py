#!/usr/bin/env python3
"""Measure what a KL means: quantized outputs beside their original on a text and on two tasks.

    python scripts/bench_verdicts.py ORIGINAL OUTPUT ... --text FILE [--windows 12] [--seqlen 512]
        [--last-words 200] [--continuations 100] [--seed 0] [--dtype auto] [--json FILE]
        [--png FILE]

Each model runs once on the first windows of the text and on the questions of two tasks, which are
made of the text, so nothing is downloaded:

* last words: the last word of a sentence, predicted greedily from the 48 words before it. It must
  be right as a whole. It has 4 letters or more and occurs in these 48 words.
* continuations: the next 32 tokens, about 24 words, after the end of a sentence, against those of
  three other places of the text, from the 48 tokens before. The likeliest counts; chance is 25 %.

Prints a table in Markdown: KL in nats a token, top-1 agreement, perplexity relative to that of the
original, and the accuracy of each task with its 95 % interval (Wilson), and relative to that of the
original. `bench_quality.py --keep DIR` makes outputs.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from common import benchmark_parser, name_of, write_json
from held_out import Quality, compare, forward, windows_of
from text_tasks import Batch, Question, batches_of, continuations, is_right, last_words, wilson
from torch import Tensor

from gptq_cli.calibration.windows import load_encoder
from gptq_cli.errors import __version__
from gptq_cli.evaluation.forward import Forward
from gptq_cli.evaluation.verdict import VERDICTS, verdict_lines

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots

INK = "#1f2328"
COLOURS = {"top-1": "#9aa0a6", "last words": "#2f6fb5", "continuations": "#e8964f"}


@dataclass(frozen=True)
class Task:
    """A task with its questions, and the sequences of their answers."""

    name: str
    questions: list[Question]
    batches: list[Batch]


@dataclass(frozen=True)
class Measured:
    """What all models run on: windows of the text [n, seqlen] each, then the tasks."""

    windows: list[Tensor]
    tasks: list[Task]

    def forward(self, model: Path, dtype: str) -> Forward:
        """Return a model after its last block on everything, so that each block is read once."""
        ids = list(self.windows)
        for task in self.tasks:
            ids += [batch.ids[:, :-1] for batch in task.batches]
        return forward(model, ids, dtype)

    @torch.inference_mode()
    def answers(self, ran: Forward) -> dict[str, list[bool]]:
        """Return for each question of each task whether the model answers it."""
        found, first = {}, len(self.windows)
        with ran.stream.head() as head:
            for task in self.tasks:
                places = range(first, first + len(task.batches))
                hidden = (ran.hidden[place] for place in places)
                found[task.name] = is_right(task.questions, task.batches, head, hidden)
                first += len(task.batches)
        return found


def read(arguments: argparse.Namespace) -> Measured:
    """Return the windows and questions of the text, by the original's tokenizer."""
    text = arguments.text.read_text(encoding="utf-8")
    encoder = load_encoder(arguments.original, trust_remote_code=False)
    tasks = []
    makers = {
        "last words": (last_words, arguments.last_words),
        "continuations": (continuations, arguments.continuations),
    }
    for name, (make, most) in makers.items():
        questions = make(text, encoder, most, arguments.seed)
        if len(questions) < 4:
            raise SystemExit(f"{arguments.text} is too short for the task `{name}`")
        tasks.append(Task(name, questions, batches_of(questions)))
    windows = windows_of(arguments.original, arguments.text, arguments.seqlen, arguments.windows)
    return Measured(windows, tasks)


def accuracy(right: list[bool]) -> dict[str, Any]:
    """Return the share of right answers with its 95 % interval."""
    low, high = wilson(sum(right), len(right))
    share = sum(right) / len(right)
    return {"questions": len(right), "accuracy": share, "low": low, "high": high}


def beside(right: list[bool], of_original: list[bool]) -> dict[str, Any]:
    """Return the accuracy of an output, and how its answers differ from the original's.

    `lost` questions only the original answers, `gained` ones only the output. `relative` is None
    if the original answers none.
    """
    pairs = list(zip(right, of_original, strict=True))
    relative = None
    if any(of_original):
        relative = sum(right) / sum(of_original)
    return accuracy(right) | {
        "relative": relative,
        "lost": pairs.count((False, True)),
        "gained": pairs.count((True, False)),
    }


def row_of(
    output: Path, quality: Quality, answers: dict[str, list[bool]], wanted: dict[str, list[bool]]
) -> dict[str, Any]:
    """Return the figures of an output; `wanted` are the answers of the original."""
    tasks = {name: beside(answers[name], wanted[name]) for name in wanted}
    increase = quality.perplexity / quality.original_perplexity
    return {"output": output.name, **asdict(quality), "perplexity_ratio": increase, "tasks": tasks}


def table(original: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    """Return a table in Markdown with the original first, then the outputs by their KL."""
    heads = ["model", "KL", "top-1", "perplexity ratio", *original, "verdict"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    cells = [interval(found) for found in original.values()]
    lines.append(f"| original | 0 | 100 | 1 | {' | '.join(cells)} | |")
    for row in sorted(rows, key=lambda row: row["kl"]):
        cells = [f"{row['kl']:.4f}", f"{100 * row['top1']:.1f}", f"{row['perplexity_ratio']:.3f}"]
        for found in row["tasks"].values():
            cells.append(f"{interval(found)}{relative(found)}")
        cells.append(verdict(row["kl"]))
        lines.append(f"| {row['output']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(found: dict[str, Any]) -> str:
    share, low, high = (100 * found[name] for name in ("accuracy", "low", "high"))
    return f"{share:.1f} ({low:.0f} to {high:.0f})"


def relative(found: dict[str, Any]) -> str:
    if found["relative"] is None:
        return ""
    return f", {found['relative']:.2f} of the original"


def verdict(kl: float) -> str:
    """Return the words of the command line without its limit: "is close to the original"."""
    return verdict_lines(kl)[0].partition("the model ")[2].partition(":")[0]


def chart(rows: list[dict[str, Any]]) -> Figure:
    """Draw what is left of the original, and its perplexity, against KL."""
    figure, (above, below) = subplots(
        2, sharex=True, figsize=(9, 6.5), layout="constrained", height_ratios=(3, 2)
    )
    rows = sorted(rows, key=lambda row: row["kl"])
    for name, colour in COLOURS.items():
        points = []
        for row in rows:
            left = row["top1"] if name == "top-1" else row["tasks"][name]["relative"]
            if left is not None:
                points.append((row["kl"], left))
        label = name if name == "top-1" else f"{name}, accuracy relative to the original"
        xs, ys = [point[0] for point in points], [point[1] for point in points]
        above.plot(xs, ys, "o-", color=colour, markersize=4, linewidth=0.8, label=label)
    ratios = [row["perplexity_ratio"] for row in rows]
    kls = [row["kl"] for row in rows]
    below.plot(kls, ratios, "o-", color=INK, markersize=4, linewidth=0.8)
    below.set_ylabel("perplexity ratio", fontsize=9)
    below.set_xlabel("KL to the original, nats a token", fontsize=9)
    above.set_ylabel("share of the original", fontsize=9)
    above.set_xscale("log")
    above.legend(fontsize=8, frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        draw_limits(axes)
    return figure


def draw_limits(axes: Axes) -> None:
    """Draw a vertical line at each KL at which the verdict changes."""
    for limit in VERDICTS:
        axes.axvline(limit, color=INK, linewidth=0.6, linestyle=":")
        top = axes.get_xaxis_transform()
        axes.text(limit, 1.0, f" {limit}", transform=top, fontsize=7, color=INK, va="top")


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the inputs and versions of a run."""
    return {
        "original": arguments.original.name,
        "text": name_of(arguments.text),
        "windows": arguments.windows,
        "seqlen": arguments.seqlen,
        "last_words": arguments.last_words,
        "continuations": arguments.continuations,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "python": platform.python_version(),
        "gptq_cli": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("original", type=Path)
    parser.add_argument("outputs", type=Path, nargs="+", metavar="OUTPUT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--last-words", type=int, default=200, help="the most questions of it")
    parser.add_argument("--continuations", type=int, default=100, help="the most questions of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the forwards; default: the model's own")
    parser.add_argument("--png", type=Path, help="write the chart to this file")
    arguments = parser.parse_args()
    measured = read(arguments)
    original = measured.forward(arguments.original, arguments.dtype)
    wanted = measured.answers(original)
    of_original = {name: accuracy(right) for name, right in wanted.items()}
    rows = []
    for output in arguments.outputs:
        started = time.process_time()
        ran = measured.forward(output, arguments.dtype)
        quality = compare(original, ran, measured.windows)
        row = row_of(output, quality, measured.answers(ran), wanted)
        rows.append(row | {"processor_seconds": time.process_time() - started})
        content = {"run": conditions(arguments), "original": of_original, "rows": rows}
        write_json(arguments.json, content)
        print(f"{output.name}: KL {row['kl']:.4f}", flush=True)
    print("\n" + table(of_original, rows))
    if arguments.png:
        chart(rows).savefig(arguments.png, dpi=110)


if __name__ == "__main__":
    main()
