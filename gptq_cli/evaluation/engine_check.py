"""`gptq check-engine`: does an engine compute with a checkpoint what this reader computes?

The engine runs in a process of its own Python. It and this reader get the same token ids, so the
tokenizer of the engine has no part in the result. This reader computes in float32.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from gptq_cli.calibration.windows import Encoder, load_encoder
from gptq_cli.checkpoint.locate import locate_model
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import open_decodable
from gptq_cli.errors import GateError, InputError, ResourceError, clock, shell_word, to_json
from gptq_cli.evaluation import engine_driver
from gptq_cli.evaluation.forward import distance, run_blocks
from gptq_cli.evaluation.request import EngineRequest
from gptq_cli.events import EngineSaid, PhaseStarted, Report, ignore
from gptq_cli.files import file_errors, is_file
from gptq_cli.planning.run_plan import positions
from gptq_cli.runtime.device import report_device, resolve_device
from gptq_cli.runtime.memory import device_errors
from gptq_cli.runtime.open_model import warn_of

PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "She opened the old door, looked into the dark room and called his name.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "In 1969 two people walked on the Moon for the first time; 12 have done so since.",
)
PREFIXES = 8  # of each prompt, after which the next token is compared
LONGEST = 128  # tokens of a prompt
KEPT = 65_536  # bytes of an engine's output
LONGEST_ANSWER = 1_000_000  # bytes
LAST_LINES = 12  # of an engine that failed
UNUSABLE = "the engine gave an unusable answer"
REASON = 300  # letters of what it raised
INSTALL = {
    "vllm": "pip install vllm",
    "llama.cpp": "pip install xllamacpp",
    "mlx": "pip install mlx-lm",
    "transformers": "pip install transformers optimum gptqmodel",
}


@dataclass(frozen=True, slots=True)
class PromptResult:
    """The distance of an engine from this reader after `positions` prefixes of one prompt.

    `kl` is the mean KL(reader || engine) in nats.
    """

    prompt: str
    tokens: int
    positions: int
    kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True)
class EngineResult:
    """The distance of an engine from this reader.

    `kl` and `top1_agreement` are means over all prefixes. `versions` are those of the packages of
    the engine.
    """

    model: str
    engine: str
    python: str
    versions: dict[str, str]
    positions: int
    kl: float
    top1_agreement: float
    seconds: float
    prompts: tuple[PromptResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values: dict[str, Any] = to_json(self)
        return values


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    ids: list[int]
    ends: list[int]  # lengths of the prefixes

    @property
    def prefixes(self) -> list[list[int]]:
        return [self.ids[:end] for end in self.ends]


def check_engine(model: str, request: EngineRequest, report: Report = ignore) -> EngineResult:
    """Return the distance of an engine from this reader on MODEL, a directory or a Hub id.

    Raises InputError E_ENGINE_MISSING if the engine is not installed, E_ENGINE_FORMAT if it reads
    another format; GateError E_ENGINE_FAILED if it fails, and ResourceError E_ENGINE_TIMEOUT if it
    takes too long.
    """
    started = time.perf_counter()
    device = resolve_device(request.device)
    checkpoint = open_decodable(locate_model(model, request.revision).directory)
    _refuse_other_format(checkpoint, request.engine)
    _refuse_absent_converter(request)
    encoder = load_encoder(checkpoint.directory, trust_remote_code=request.trust_remote_code)
    prompts = _prompts(request, encoder, checkpoint)
    prefixes: list[list[int]] = []
    for prompt in prompts:
        prefixes += prompt.prefixes
    with tempfile.TemporaryDirectory(prefix="gptq-") as folder:
        process = _Engine(request, checkpoint.directory, Path(folder))
        process.refuse_absent(checkpoint.method, report)  # before minutes of work
        report_device(device, request.device, report)
        warn_of(checkpoint, report)
        with torch.inference_mode(), device_errors():
            wanted = _reference(checkpoint, prompts, request, device, report)
        got, versions = process.run(prefixes, wanted[0].shape[-1], report)
    results = _compare(prompts, wanted, got)
    n_positions, total, same = len(prefixes), 0.0, 0.0
    for result in results:
        total += result.kl * result.positions
        same += result.top1_agreement * result.positions
    return EngineResult(
        model=model,
        engine=request.engine,
        python=request.python or sys.executable,
        versions=versions,
        positions=n_positions,
        kl=total / n_positions,
        top1_agreement=same / n_positions,
        seconds=time.perf_counter() - started,
        prompts=tuple(results),
    )


def _refuse_other_format(checkpoint: Checkpoint, engine: str) -> None:
    """Raise InputError E_ENGINE_FORMAT for GPTQ tensors and an engine with a format of its own."""
    if engine != "mlx" or checkpoint.method != "gptq":
        return
    directory = checkpoint.directory
    output = shell_word(f"{directory.name}-mlx")
    raise InputError(
        "E_ENGINE_FORMAT",
        f"mlx does not read GPTQ checkpoints such as `{directory}`, but a format of its own",
        hint=f"convert it first: gptq convert {shell_word(str(directory))} --to mlx -o {output}",
    )


def _refuse_absent_converter(request: EngineRequest) -> None:
    """Raise InputError E_ENGINE_MISSING if the converter of the request is no file."""
    if request.converter is not None and not is_file(request.converter):
        raise InputError(
            "E_ENGINE_MISSING",
            f"{request.engine} cannot be used: there is no file `{request.converter}`",
            hint="give the path of convert_hf_to_gguf.py, which is in llama.cpp's sources",
        )


# ---------------------------------------------------------------- prompts


def _prompts(request: EngineRequest, encoder: Encoder, checkpoint: Checkpoint) -> list[_Prompt]:
    texts: Sequence[str] = PROMPTS
    if request.prompts is not None:
        texts = _lines(Path(request.prompts))
    limit = LONGEST
    declared = positions(checkpoint)
    if declared is not None:
        limit = min(limit, declared - 1)
    found = []
    for text in texts:
        ids = encoder(text, True)[:limit]
        if ids:
            found.append(_Prompt(text, ids, _ends(len(ids))))
    if not found:
        raise InputError("E_DATA_EMPTY", "no prompt holds a token", hint="give other prompts")
    return found


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that hold text; InputError if there are none."""
    with file_errors(file, writing=False):
        content = file.read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        message = f"`{file}` is not UTF-8: {error.reason} at offset {error.start}"
        raise InputError("E_DATA_ENCODING", message, hint="save it as UTF-8") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        hint = "write one prompt on each line"
        raise InputError("E_DATA_EMPTY", f"`{file}` holds no prompt", hint=hint)
    return texts


def _ends(n_tokens: int) -> list[int]:
    """Return the lengths of up to PREFIXES prefixes of a prompt, the whole prompt among them."""
    ends = {math.ceil(n_tokens * part / PREFIXES) for part in range(1, PREFIXES + 1)}
    return sorted(ends)


def _reference(
    checkpoint: Checkpoint,
    prompts: list[_Prompt],
    request: EngineRequest,
    device: torch.device,
    report: Report,
) -> list[Tensor]:
    """Return the logits [prefixes, V] of each prompt, by this reader in float32."""
    batches = [torch.tensor([prompt.ids]) for prompt in prompts]
    run = run_blocks(
        checkpoint,
        batches,
        report,
        device=device,
        dtype="float32",
        trust_remote_code=request.trust_remote_code,
    )
    rows = []
    with run.stream.head() as head:
        for batch, prompt in enumerate(prompts):
            logits = head(batches[batch], run.hidden[batch])[0]
            rows.append(logits[torch.tensor(prompt.ends) - 1].cpu())
    return rows


def _compare(prompts: list[_Prompt], wanted: list[Tensor], got: Tensor) -> list[PromptResult]:
    results = []
    parts = got.split([len(prompt.ends) for prompt in prompts])
    for prompt, rows, others in zip(prompts, wanted, parts, strict=True):
        total, same = distance(rows, others)
        n = len(prompt.ends)
        results.append(PromptResult(prompt.text, len(prompt.ids), n, total / n, same / n))
    return results


# ---------------------------------------------------------------- the process of the engine


class _Engine:
    """The processes of an engine that do its jobs; their files are in `folder`."""

    def __init__(self, request: EngineRequest, checkpoint: Path, folder: Path) -> None:
        self._request, self._checkpoint, self._folder = request, checkpoint, folder
        self._python = request.python or sys.executable
        self._rows, self._answer = folder / "rows.npy", folder / "answer.json"
        self._said: _Tail | None = None

    def refuse_absent(self, method: str | None, report: Report) -> None:
        """Raise InputError E_ENGINE_MISSING if a package is absent that the engine needs.

        `method` is how the checkpoint is quantized.
        """
        job = {"engine": self._request.engine, "method": method, "answer": str(self._answer)}
        self._ask(job, report)

    def run(
        self, prefixes: list[list[int]], vocabulary: int, report: Report
    ) -> tuple[Tensor, dict[str, str]]:
        """Return the log-probabilities [prefixes, vocabulary] and the versions of the engine."""
        report(PhaseStarted("engine", f"{self._request.engine} with {self._python}"))
        answer = self._ask(self._job(prefixes, vocabulary), report)
        try:
            rows = _read_rows(self._rows, len(prefixes), vocabulary)
        except Exception as error:
            raise self._failed(f"{UNUSABLE}: {error}", report) from error
        return rows, answer["versions"]

    def _ask(self, job: dict[str, Any], report: Report) -> dict[str, Any]:
        """Return the answer of a new process to a job; raise what became of it if it has none."""
        file = self._folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        self._answer.unlink(missing_ok=True)
        code = self._wait([self._python, engine_driver.__file__, str(file)], report)
        if not os.path.lexists(self._answer):
            raise self._failed(f"its process ended with {_ending(code)}", report)
        try:
            answer = _read_answer(self._answer)
        except Exception as error:  # whatever an engine wrote
            raise self._failed(f"{UNUSABLE}: {error}", report) from error
        if "missing" in answer:
            raise self._missing(answer["missing"])
        if "failed" in answer:
            raise self._failed(answer["failed"], report)
        return answer

    def _job(self, prefixes: list[list[int]], vocabulary: int) -> dict[str, Any]:
        return {
            "engine": self._request.engine,
            "checkpoint": str(self._checkpoint.absolute()),
            "converter": self._request.converter,
            "trust_remote_code": self._request.trust_remote_code,
            "prefixes": prefixes,
            "vocabulary": vocabulary,
            "rows": str(self._rows),
            "answer": str(self._answer),
        }

    def _wait(self, command: list[str], report: Report) -> int:
        """Return the exit code of the process; end it and its children if it takes too long."""
        # Engines leave files in TMPDIR, and ask the Hub about models that are here.
        variables = {"TMPDIR": str(self._folder), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                env=os.environ | variables,
                start_new_session=True,
            )
        except OSError as error:
            raise self._missing(f"cannot run `{command[0]}`: {error.strerror}") from error
        code = None
        try:
            if process.stdout is not None:
                self._said = _Tail(process.stdout)
            code = process.wait(self._request.timeout)
        except subprocess.TimeoutExpired:
            pass  # reported below, after the end of the process
        finally:
            _end_group(process)
        if code is None:
            self._report_last_lines(report)
            raise ResourceError(
                "E_ENGINE_TIMEOUT",
                f"{self._request.engine} gave no result within {clock(self._request.timeout)}",
                hint="allow more with --timeout, or give fewer prompts with --prompts",
            )
        return code

    def _missing(self, reason: str) -> InputError:
        engine = self._request.engine
        return InputError(
            "E_ENGINE_MISSING",
            f"{engine} cannot be used: {reason}",
            hint=f"install it into an environment of its own ({INSTALL[engine]}), and name the "
            "Python of that environment with --python",
        )

    def _failed(self, reason: str, report: Report) -> GateError:
        self._report_last_lines(report)
        short = " ".join(reason.split())[:REASON]
        return GateError(
            "E_ENGINE_FAILED",
            f"{self._request.engine} could not run `{self._checkpoint}`: {short}",
            hint="gptq inspect shows which engines load the checkpoint, and why others do not",
        )

    def _report_last_lines(self, report: Report) -> None:
        if self._said is None:
            return
        lines = [line for line in self._said.text().splitlines() if line.strip()]
        for line in lines[-LAST_LINES:]:
            report(EngineSaid(self._request.engine, line))


class _Tail:
    """Reads a stream in a thread and keeps its last KEPT bytes, however much it holds."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._kept = b""
        self._thread = Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while piece := stream.read(KEPT):
                self._kept = (self._kept + piece)[-KEPT:]

    def text(self) -> str:
        """Return the end of what was written.

        A process that outlives the engine may hold the stream open: wait for it only briefly.
        """
        self._thread.join(1)
        return self._kept.decode(errors="replace")


def _read_answer(file: Path) -> dict[str, Any]:
    """Return the answer in `file`; raise some error if it is none, because the engine wrote it."""
    _check_regular(file)
    with file.open("rb") as stream:
        content = stream.read(LONGEST_ANSWER)
    answer = json.loads(content)
    if not isinstance(answer, dict) or not isinstance(answer.get("versions"), dict):
        raise ValueError(f"{file.name} holds no versions")
    texts = [*answer["versions"].values(), answer.get("missing", ""), answer.get("failed", "")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{file.name} holds an entry that is not a text")
    return answer


def _read_rows(file: Path, n_prefixes: int, vocabulary: int) -> Tensor:
    """Return the rows in `file`; raise some error if they are not what the driver writes."""
    _check_regular(file)
    stored = np.lib.format.open_memmap(file, mode="r")
    if stored.shape != (n_prefixes, vocabulary) or stored.dtype != np.float32:
        found = f"{stored.dtype} {list(stored.shape)}"
        raise ValueError(f"rows are {found}, not float32 [{n_prefixes}, {vocabulary}]")
    rows = np.array(stored)
    if not np.isfinite(rows).all():
        raise ValueError("rows hold NaN or infinity")
    return torch.from_numpy(rows)


def _check_regular(file: Path) -> None:
    """Raise ValueError for anything but a regular file: to open a pipe could wait for ever."""
    if not file.is_file():
        raise ValueError(f"{file.name} is not a regular file")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process with all processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ending(code: int) -> str:
    if -code == signal.SIGILL:
        return "SIGILL, an instruction that this processor does not have"
    if -code in set(signal.Signals):
        return signal.Signals(-code).name
    if code < 0:  # a real-time signal has no name
        return f"signal {-code}"
    return f"exit code {code}"
