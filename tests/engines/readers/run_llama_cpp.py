"""Convert checkpoints to GGUF with llama.cpp's converter, and run them in a llama.cpp server.

The first argument is the unpacked source archive of llama-cpp-python, which has the converter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from answers import serve

sys.path.insert(0, f"{sys.argv[1]}/vendor/llama.cpp")
import conversion.base
import convert_hf_to_gguf

LETTER = 67  # the token of "a"


def known_to_nobody(self: object, tokenizer: object) -> str:
    """Return a name in place of the converter's table, which knows no tokenizers of ours."""
    del self, tokenizer
    return "default"


conversion.base.TextModel.get_vocab_base_pre = known_to_nobody


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the log-probabilities [B, T, V]; the converter reports no names."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        sys.argv = ["convert", directory, "--outfile", str(file), "--outtype", "f32"]
        convert_hf_to_gguf.main()
        return _log_probabilities(file, ids), []


def _log_probabilities(file: Path, ids: np.ndarray) -> np.ndarray:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx = 256
    settings.n_parallel = 1
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.warmup = False
    server = xllamacpp.Server(settings)
    rows = []
    for row in ids.tolist():
        rows.append([_next_token(server, row[: end + 1]) for end in range(len(row))])
    return np.array(rows, np.float32)


def _next_token(server: Any, prompt: list[int]) -> list[float]:
    """Return the log-probabilities [V] of the token after `prompt`.

    The server lists them as they are before the bias; it lists none beside half a character, so
    the bias makes it choose a whole one.
    """
    request = {"prompt": prompt, "n_predict": 1, "n_probs": 1 << 20}
    request["logit_bias"] = [[LETTER, 1000.0]]
    answer = server.handle_completions(request)
    tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return [token["logprob"] for token in sorted(tokens, key=lambda token: token["id"])]


if __name__ == "__main__":
    serve(run)
