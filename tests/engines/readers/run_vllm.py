"""Load checkpoints with vLLM on a CPU, each in a forked process: an engine that died stays so."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection

os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
)

import numpy as np
import torch
from answers import serve

# The results are those of a CPU without AMX: some virtual CPUs have its flags, but end a process
# that uses it.
torch.cpu._is_amx_tile_supported = lambda: False
from vllm import LLM, SamplingParams

SECONDS = 240


class Refused(Exception):
    """What vLLM raised in its process."""


def run(directory: str, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the log-probabilities [B, T, V]; vLLM reports no names."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_child, args=(directory, ids, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(SECONDS):
            raise Refused(f"no result within {SECONDS} s")
        found = ours.recv()
    except EOFError:
        process.join()
        raise Refused(f"the process ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise Refused(found)
    return found, []


def _child(directory: str, ids: np.ndarray, connection: Connection) -> None:
    try:
        connection.send(_log_probabilities(directory, ids))
    except BaseException as error:  # noqa: BLE001 - the test judges any exception
        connection.send(f"{type(error).__name__}: {error}")
    os._exit(0)  # vLLM's own end of a process takes seconds


def _log_probabilities(directory: str, ids: np.ndarray) -> np.ndarray:
    engine = LLM(
        directory,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=ids.shape[1] + 8,
        max_num_seqs=len(ids),
        max_logprobs=-1,
        disable_log_stats=True,
    )
    wanted = SamplingParams(
        max_tokens=1, temperature=0, logprobs=-1, prompt_logprobs=-1, detokenize=False
    )
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    rows = []
    for answer in engine.generate(prompts, wanted, use_tqdm=False):
        positions = [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        rows.append([_by_token(position) for position in positions])
    return np.array(rows, np.float32)


def _by_token(found: dict[int, object]) -> list[float]:
    return [found[token].logprob for token in sorted(found)]


if __name__ == "__main__":
    serve(run)
