#!/usr/bin/env python3
"""Compare whole runs of gptq_cli, GPTQModel, llm-compressor and auto-round, taking turns.

    python scripts/bench_peers.py --gptqmodel PYTHON --llmcompressor PYTHON --autoround PYTHON
        [--autoround-light PYTHON]
    python scripts/bench_peers.py ... --model DIR --calibration FILE --evaluation FILE --bits 3

Each run is a process of its own, and all calibrate on the same token windows. Without --model a
random Llama (4 blocks, hidden 1024) is timed; with --model and --evaluation the outputs are also
compared with the original by one reader, `gptq eval-ppl` in float32. Prints the medians of wall and
processor seconds and of the peak resident size of whole processes, start-up included, and the KL.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common import ROOT, benchmark_parser, median_of, save_random_model, write_json

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
WORDS = (
    "the model reads some words and then some other words, 1 2 3 or 4 of them; "
    "it does not mind which. "
)


class Peer(NamedTuple):
    """Another tool: its package, and the script in `peers/` with the words after the settings."""

    package: str
    script: str
    words: tuple[str, ...] = ()


PEERS = {
    "gptqmodel": Peer("gptqmodel", "run_gptqmodel.py"),
    "llmcompressor": Peer("llmcompressor", "run_llmcompressor.py"),
    "autoround": Peer("auto-round", "run_autoround.py"),
    "autoround_light": Peer("auto-round", "run_autoround.py", ("light",)),
}


@dataclass(frozen=True)
class Tool:
    """A tool with the command by which it quantizes into the directory that replaces OUT."""

    name: str
    command: list[str]

    def output(self, work: Path) -> Path:
        return work / self.name.replace(" ", "-")

    def run(self, work: Path) -> dict[str, float]:
        """Return wall seconds, CPU seconds and peak resident bytes of one run.

        Exit with the end of the log if the run fails.
        """
        output, log = self.output(work), work / "log"
        shutil.rmtree(output, ignore_errors=True)
        command = list(self.command)
        command[command.index("OUT")] = str(output)
        with log.open("w") as stream:
            started = time.perf_counter()
            # in `work`, because some tools write logs to the current directory
            process = subprocess.Popen(command, cwd=work, stdout=stream, stderr=stream)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{self.name} failed:\n{log.read_text()[-3000:]}")
        return {
            "wall_s": time.perf_counter() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * 1024,
        }


def tools(arguments: argparse.Namespace, model: Path, text: Path, ids: Path) -> list[Tool]:
    """Return gptq_cli with each preset, then the peers that the arguments name."""
    bits, group_size = str(arguments.bits), str(arguments.group_size)
    ours = [sys.executable, "-m", "gptq_cli", "quantize", str(model), "-o", "OUT", "--quiet"]
    ours += ["--device", "cpu", "--bits", bits, "--group-size", group_size, "--dataset", str(text)]
    ours += ["--nsamples", str(arguments.nsamples), "--seqlen", str(arguments.seqlen)]
    found = []
    for preset in arguments.presets:
        found.append(Tool(f"gptq_cli {preset}", [*ours, "--preset", preset]))
    for name, peer in PEERS.items():
        python = getattr(arguments, name)
        if python:
            runner = ROOT / "scripts" / "peers" / peer.script
            words = [python, str(runner), str(model), "OUT", str(ids), bits, group_size]
            found.append(Tool(name, [*words, *peer.words]))
    return found


def windows(arguments: argparse.Namespace, model: Path, text: Path) -> list[list[int]]:
    """Return the calibration windows that `gptq quantize` draws from `text`."""
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
    """Return the distance of an output from the original model on `text`."""
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


def measure(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run the tools in turn; return all figures of all runs, and the quality if asked for."""
    # absolute, because the tools run in `work`
    if arguments.model:
        model, text = arguments.model.resolve(), arguments.calibration.resolve()
    else:
        model, text = work / "model", work / "text.txt"
        save_random_model(model, "llama", dtype="bfloat16", **SHAPE)
        text.write_text(WORDS * 4000)
    ids = work / "ids.json"
    ids.write_text(json.dumps(windows(arguments, model, text)))
    competitors = tools(arguments, model, text, ids)
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(arguments.runs):
        for tool in competitors:
            runs[tool.name].append(tool.run(work))
    found: dict[str, Any] = {"runs": runs}
    if arguments.evaluation:
        found["quality"] = {}
        for tool in competitors:
            judged = quality(tool.output(work), model, arguments.evaluation, arguments.seqlen)
            found["quality"][tool.name] = judged
    return found


def print_medians(report: dict[str, Any]) -> None:
    """Print a row for each tool."""
    heads = f"{'wall s':>8s} {'cpu s':>8s} {'peak MB':>8s} {'KL':>10s}"
    print(f"{'':22s} {heads}   medians of {report['arguments']['runs']}")
    for name, rows in report["runs"].items():
        wall, cpu = median_of(rows, "wall_s"), median_of(rows, "cpu_s")
        peak = median_of(rows, "peak_bytes")
        kl = ""
        if "quality" in report:
            kl = f"{report['quality'][name]['kl']:10.5f}"
        print(f"{name:22s} {wall:8.1f} {cpu:8.1f} {peak / 1e6:8.0f} {kl:>10s}")


def parse() -> argparse.Namespace:
    parser = benchmark_parser(__doc__)
    for name, peer in PEERS.items():
        words = " ".join([f"python of an environment with {peer.package}", *peer.words])
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="PYTHON", help=words)
    parser.add_argument("--presets", nargs="+", default=["gptq"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--calibration", type=Path, help="text file")
    parser.add_argument("--evaluation", type=Path, help="text file")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.calibration is None):
        parser.error("--model and --calibration need each other")
    return arguments


def main() -> None:
    arguments = parse()
    written = {}
    for name, value in vars(arguments).items():
        if "python" not in str(value):  # paths of environments mean nothing elsewhere
            written[name] = str(value)
    with tempfile.TemporaryDirectory() as folder:
        report = {"arguments": written, **measure(arguments, Path(folder))}
    print_medians(report)
    write_json(arguments.json, report)


if __name__ == "__main__":
    main()
