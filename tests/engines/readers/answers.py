"""The loop of a reader: a job for each line of stdin, an answer for each line of stdout.

A reader is one engine in an environment of its own. A job is a line of JSON: a `checkpoint`
directory, a file of token `ids` (int64 [B, T], .npy) and the name of a new file for the float32
`logits` [B, T, V] (.npy; log-probabilities do as well). The answer is a line of JSON: `error`
(null if the engine loaded the checkpoint and ran it), the `unknown` tensor names, missing and
unexpected ones, if the engine reports them, and whether logits were `computed`. The readers import
nothing of gptq_cli.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[str, np.ndarray], tuple["np.ndarray | None", list[str]]]

# Engines print to stdout whatever they like, some when they are imported, and one that calls exit()
# closes stdin. So a reader imports this module before its engine.
JOBS, ANSWERS = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(run: Run) -> None:
    """Answer each job with what `run` gives for its checkpoint and ids: logits, unknown names."""
    with JOBS, ANSWERS:
        for line in JOBS:
            print(json.dumps(answer(run, json.loads(line))), file=ANSWERS, flush=True)


def answer(run: Run, job: dict[str, str]) -> dict[str, Any]:
    """Return what became of one job; an exit or an exception of the engine is a result too."""
    try:
        logits, unknown = run(job["checkpoint"], np.load(job["ids"]))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the test judges any exception
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}", "unknown": []}
    if logits is not None:
        np.save(job["logits"], logits.astype(np.float32))
    return {"error": None, "unknown": unknown, "computed": logits is not None}
