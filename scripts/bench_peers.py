#!/usr/bin/env python3
"""Whole quantization runs side by side, each in a process of its own: this tool, GPTQModel, llm-compressor, auto-round.

    python scripts/bench_peers.py --gptqmodel PYTHON --llmcompressor PYTHON --autoround PYTHON [--runs 3] [--json FILE]
    python scripts/bench_peers.py ... --model DIR --calibration FILE --evaluation FILE --bits 4 --group-size 64

The tools take turns. All calibrate on the same token windows. Without --model a random Llama (4 blocks, hidden 1024) is
timed; with --model and --evaluation the outputs are also compared with the original by one reader, `gptq eval-ppl` in
float32. Wall and CPU seconds and the peak resident size are those of the whole process, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RANDOM_MODEL = """
from pathlib import Path
import torch
from tests.families import save_model
shape = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, head_dim=64)
save_model(Path({directory!r}), dtype=torch.bfloat16, num_key_value_heads=8, max_position_embeddings=2048, **shape)
"""
WORDS = "the model reads some words and then some other words, 1 2 3 or 4 of them; it does not mind which. "


@dataclass(frozen=True)
class Tool:
    """`command` quantizes into the directory that replaces OUT."""

    name: str
    command: list[str]


def run(tool: Tool, output: Path, log: Path) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak resident bytes of one run; SystemExit with the log when it fails."""
    shutil.rmtree(output, ignore_errors=True)
    command = [str(output) if word == "OUT" else word for word in tool.command]
    with log.open("w") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=log.parent, stdout=stream, stderr=stream
        )  # some leave logs
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{tool.name} failed:\n{log.read_text()[-3000:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "wall_s": time.perf_counter() - started,
        "cpu_s": cpu,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def tools(arguments: argparse.Namespace, model: Path, text: Path, ids: Path) -> list[Tool]:
    bits, group_size = str(arguments.bits), str(arguments.group_size)
    ours = [
        sys.executable,
        "-m",
        "gptq_cli",
        "quantize",
        str(model),
        "-o",
        "OUT",
        "--quiet",
        "--device",
        "cpu",
    ]
    ours += ["--bits", bits, "--group-size", group_size, "--dataset", str(text)]
    ours += ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
    found = [
        Tool(f"gptq_cli {preset}", [*ours, "--preset", preset]) for preset in arguments.presets
    ]
    for name in ("gptqmodel", "llmcompressor", "autoround"):
        if python := getattr(arguments, name):
            runner = ROOT / "scripts" / "peers" / f"run_{name}.py"
            found.append(
                Tool(name, [python, str(runner), str(model), "OUT", str(ids), bits, group_size])
            )
    return found


def windows(arguments: argparse.Namespace, model: Path, text: Path) -> list[list[int]]:
    """The calibration windows that `gptq quantize` draws from `text`."""
    from gptq_cli.calibration.corpus import DatasetSource, load_documents
    from gptq_cli.calibration.windows import calibration_windows, load_encoder

    encoder = load_encoder(model, trust_remote_code=False)
    documents = load_documents(DatasetSource(dataset=str(text)))
    drawn = calibration_windows(
        documents,
        encoder,
        seqlen=arguments.seqlen,
        nsamples=arguments.nsamples,
        seed=0,
        bos_token_id=encoder.bos_token_id,
    )
    rows: list[list[int]] = drawn.ids.tolist()
    return rows


def quality(output: Path, model: Path, text: Path, seqlen: int) -> dict[str, float | None]:
    from gptq_cli.evaluation.perplexity import evaluate_perplexity
    from gptq_cli.evaluation.request import EvalRequest

    request = EvalRequest(
        dataset=str(text), seqlen=seqlen, dtype="float32", baseline=str(model), batch_size=8
    )
    result = evaluate_perplexity(str(output), request)
    return {
        "perplexity": result.perplexity,
        "kl": result.kl,
        "top1_agreement": result.top1_agreement,
    }


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {
        "arguments": {k: str(v) for k, v in vars(arguments).items() if "python" not in str(v)}
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, text, ids = (
            arguments.model or work / "model",
            arguments.calibration or work / "text.txt",
            work / "ids.json",
        )
        if arguments.model is None:
            subprocess.run(
                [sys.executable, "-c", RANDOM_MODEL.format(directory=str(model))],
                cwd=ROOT,
                check=True,
            )
            text.write_text(WORDS * 4000)
        ids.write_text(json.dumps(windows(arguments, model, text)))
        competitors = tools(arguments, model, text, ids)
        runs: dict[str, list[dict[str, float]]] = {tool.name: [] for tool in competitors}
        for _ in range(arguments.runs):
            for tool in competitors:
                runs[tool.name].append(run(tool, work / tool.name.replace(" ", "-"), work / "log"))
        report["runs"] = runs
        if arguments.evaluation:
            report["quality"] = {
                tool.name: quality(
                    work / tool.name.replace(" ", "-"),
                    model,
                    arguments.evaluation,
                    arguments.seqlen,
                )
                for tool in competitors
            }
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gptqmodel", metavar="PYTHON", help="python of an environment with gptqmodel"
    )
    parser.add_argument(
        "--llmcompressor", metavar="PYTHON", help="python of an environment with llmcompressor"
    )
    parser.add_argument(
        "--autoround", metavar="PYTHON", help="python of an environment with auto-round"
    )
    parser.add_argument("--presets", nargs="+", default=["gptq"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--evaluation", type=Path, help="text file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def show(report: dict[str, Any]) -> None:
    print(
        f"{'':22s} {'wall s':>8s} {'cpu s':>8s} {'peak MB':>8s} {'KL':>10s}   medians of {report['arguments']['runs']}"
    )
    for name, rows in report["runs"].items():
        wall, cpu, peak = (
            statistics.median(row[key] for row in rows) for key in ("wall_s", "cpu_s", "peak_bytes")
        )
        kl = report.get("quality", {}).get(name, {}).get("kl")
        print(
            f"{name:22s} {wall:8.1f} {cpu:8.1f} {peak / 1e6:8.0f} {'' if kl is None else format(kl, '10.5f'):>10s}"
        )


if __name__ == "__main__":
    main()
