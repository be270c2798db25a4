"""The distance of an engine from our reader, and what becomes of an engine that fails.

A fake engine is a script in place of the Python of an engine: it gets the driver and the job.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_cli.errors import ConfigError, GateError, InputError, ResourceError
from gptq_cli.evaluation.engine_check import KEPT, PREFIXES, EngineResult, check_engine
from gptq_cli.evaluation.request import EngineRequest
from gptq_cli.events import BlockFinished, EngineSaid, Event, PhaseStarted
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from tests.families import save_model
from tests.runs import quantize

PROMPTS = ["the quick brown fox", "0 1 2", "", "jumps over the lazy dog and then some"]
FAKE = """#!{python}
import json, os, shutil, signal, sys, time
job = json.load(open(sys.argv[2]))
def answer(**values):
    json.dump({{"versions": {{"fake": "1.2"}}, **values}}, open(job["answer"], "w"))
if {installed} and "prefixes" not in job:
    answer()
    sys.exit()
{body}
"""
Fake = Callable[..., str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize a tiny model to 3 bits; beside it are the plain weights that it stands for."""
    folder = tmp_path_factory.mktemp("engine")
    model = save_model(folder / "model", num_hidden_layers=2)
    output, _ = quantize(folder, model, bits=3, nsamples=4)
    dequantize_checkpoint(str(output), folder / "plain", "float32")
    output.rename(folder / "out")
    return folder / "out"


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Return a function that writes an engine with the given body of Python.

    If it is not `installed`, the body answers the question whether it is, too.
    """

    def write(body: str, *, installed: bool = True) -> str:
        script = tmp_path / "engine"
        content = FAKE.format(python=sys.executable, installed=installed, body=body)
        script.write_text(content)
        script.chmod(0o755)
        return str(script)

    return write


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS), encoding="utf-8")
    return str(file)


def checked(model: Path, events: list[Event] | None = None, **options: object) -> EngineResult:
    request = EngineRequest(**({"engine": "vllm", "device": "cpu"} | options))  # type: ignore[arg-type]
    report = (events if events is not None else []).append
    return check_engine(str(model), request, report)


def rows_of(model: Path, file: Path) -> list[np.ndarray]:
    """Save the log-probabilities after each prefix of the prompts by single forwards."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for prompt in filter(None, PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        for end in sorted({-(-len(ids) * part // PREFIXES) for part in range(1, PREFIXES + 1)}):
            with torch.no_grad():
                logits = whole(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
            rows.append(logits.log_softmax(-1).numpy())
    np.save(file, np.stack(rows))
    return rows


COPY = "shutil.copy({file!r}, job['rows']); answer()"


def test_an_engine_with_the_decoded_weights_agrees(
    checkpoint: Path, fake: Fake, prompts: str, tmp_path: Path
) -> None:
    file = tmp_path / "true.npy"
    rows = rows_of(checkpoint.with_name("plain"), file)
    events: list[Event] = []
    engine = fake(COPY.format(file=str(file)))
    result = checked(checkpoint, events, python=engine, prompts=prompts)
    assert abs(result.kl) < 1e-6
    assert (result.top1_agreement, result.positions) == (1.0, len(rows))
    assert [found.prompt for found in result.prompts] == [text for text in PROMPTS if text]
    assert [found.positions for found in result.prompts] == [8, 5, 8]
    assert (result.versions, result.python) == ({"fake": "1.2"}, engine)
    assert PhaseStarted("engine", f"vllm with {engine}") in events
    assert sum(isinstance(event, BlockFinished) for event in events) == 2


def test_an_engine_with_other_weights_has_their_distance(
    checkpoint: Path, fake: Fake, prompts: str, tmp_path: Path
) -> None:
    true = np.stack(rows_of(checkpoint.with_name("plain"), tmp_path / "true.npy")).astype(float)
    lies = np.stack(rows_of(checkpoint.with_name("model"), tmp_path / "lies.npy")).astype(float)
    engine = fake(COPY.format(file=str(tmp_path / "lies.npy")))
    result = checked(checkpoint, python=engine, prompts=prompts)
    kl = (np.exp(true) * (true - lies)).sum(-1)
    assert result.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert result.kl > 1e-3
    assert result.prompts[1].kl == pytest.approx(kl[8:13].mean(), rel=1e-4)
    same = true.argmax(-1) == lies.argmax(-1)
    assert result.top1_agreement == pytest.approx(same.mean())


def test_a_job_names_all_that_an_engine_needs(
    checkpoint: Path, fake: Fake, prompts: str, tmp_path: Path
) -> None:
    copy = str(tmp_path / "job.json")
    engine = fake(
        f"shutil.copy(sys.argv[2], {copy!r}); answer(failed=os.environ['TMPDIR'] + sys.argv[1])"
    )
    with pytest.raises(GateError, match=r"engine_driver\.py"):
        checked(checkpoint, python=engine, prompts=prompts, trust_remote_code=True)
    job = json.loads(Path(copy).read_text())
    rows = job.pop("rows"), job.pop("answer")
    assert not Path(rows[0]).parent.exists()
    lengths = [len(prefix) for prefix in job.pop("prefixes")]
    assert lengths[:8] == [3, 5, 8, 10, 12, 15, 17, 19]
    assert job == {
        "engine": "vllm",
        "checkpoint": str(checkpoint),
        "converter": None,
        "trust_remote_code": True,
        "vocabulary": 512,
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("print('first'); print('a kernel is missing'); sys.exit(3)", "ended with exit code 3"),
        ("print('a kernel is missing', flush=True); os.kill(0, signal.SIGSEGV)", "SIGSEGV"),
        (
            "print('a kernel is missing', flush=True); os.kill(0, signal.SIGILL)",
            "SIGILL, an instruction that this processor does not have",
        ),
        ("print('a kernel is missing', flush=True); os.kill(0, 40)", "signal 40"),
        ("print('a kernel is missing'); answer(failed='KeyError: x\\n more')", "KeyError: x more"),
    ],
)
def test_an_engine_that_fails_shows_its_last_lines(
    body: str, message: str, checkpoint: Path, fake: Fake, prompts: str
) -> None:
    events: list[Event] = []
    with pytest.raises(GateError) as failed:
        checked(checkpoint, events, python=fake(body), prompts=prompts)
    assert (failed.value.code, failed.value.exit_code) == ("E_ENGINE_FAILED", 4)
    assert str(failed.value).startswith(f"vllm could not run `{checkpoint}`: ")
    assert str(failed.value).endswith(message)
    assert failed.value.hint == (
        "gptq inspect shows which engines load the checkpoint, and why others do not"
    )
    assert events[-1] == EngineSaid("vllm", "a kernel is missing")


ROWS = "import numpy; rows = numpy.zeros((21, 512), numpy.float32); "
SAVE = "; numpy.save(job['rows'], rows); answer()"


@pytest.mark.parametrize(
    "body",
    [
        "open(job['answer'], 'w').write('{')",
        "open(job['answer'], 'wb').write(bytes([255, 254]))",
        "open(job['answer'], 'w').write('[]')",
        "open(job['answer'], 'w').write('{}')",
        "answer(failed=5)",
        "answer(versions=[1])",
        "os.mkdir(job['answer'])",
        "os.mkfifo(job['answer'])",
        "answer()",
        "os.mkfifo(job['rows']); answer()",
        ROWS + "rows = rows[1:]" + SAVE,
        ROWS + "rows = rows.astype(int)" + SAVE,
        ROWS + "rows[3, 4] = numpy.nan" + SAVE,
        ROWS + "rows = numpy.array([{}])" + SAVE,
        "open(job['rows'], 'w').write('x'); answer()",
    ],
)
def test_an_unusable_answer_is_a_failure_of_the_engine(
    body: str, checkpoint: Path, fake: Fake, prompts: str
) -> None:
    with pytest.raises(GateError, match="the engine gave an unusable answer: ") as failed:
        checked(checkpoint, python=fake(body), prompts=prompts, timeout=30)
    assert (failed.value.code, failed.value.exit_code) == ("E_ENGINE_FAILED", 4)
    assert "gptq inspect" in str(failed.value.hint)


def test_only_the_end_of_a_long_output_is_kept(checkpoint: Path, fake: Fake, prompts: str) -> None:
    events: list[Event] = []
    body = "sys.stdout.write('y' * 3_000_000 + chr(10) + 'last'); sys.exit(3)"
    with pytest.raises(GateError, match="exit code 3"):
        checked(checkpoint, events, python=fake(body), prompts=prompts)
    said = [event.line for event in events if isinstance(event, EngineSaid)]
    assert said == ["y" * (KEPT - 5), "last"]


def test_an_engine_that_hangs_is_ended_with_its_children(
    checkpoint: Path, fake: Fake, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "pids"
    body = f"child = os.fork(); open({str(mark)!r}, 'a').write(f'{{os.getpid()}} '); signal.pause()"
    wait = subprocess.Popen.wait

    def wait_for_both(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            return wait(process)
        eventually(lambda: mark.exists() and len(mark.read_text().split()) == 2)
        raise subprocess.TimeoutExpired("engine", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_both)
    with pytest.raises(ResourceError, match="vllm gave no result within 0:01:30") as late:
        checked(checkpoint, python=fake(body, installed=False), prompts=prompts, timeout=90)
    assert (late.value.code, late.value.exit_code) == ("E_ENGINE_TIMEOUT", 5)
    assert "--timeout" in str(late.value.hint)
    for pid in mark.read_text().split():
        eventually(lambda pid=pid: has_ended(int(pid)))  # type: ignore[misc]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds; fail if it never does."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, even if it still waits for its parent."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("python", ["fake", "/no/such/python"])
def test_an_engine_that_is_absent_is_named_with_its_remedy(
    python: str, checkpoint: Path, fake: Fake, prompts: str
) -> None:
    reason = f"cannot run `{python}`: No such file or directory"
    if python == "fake":
        python, reason = (
            fake("answer(missing=\"No module named 'vllm'\")", installed=False),
            "No module named 'vllm'",
        )
    events: list[Event] = []
    with pytest.raises(InputError) as refused:
        checked(checkpoint, events, python=python, prompts=prompts)
    assert events == []  # nothing was computed before
    assert (refused.value.code, refused.value.exit_code) == ("E_ENGINE_MISSING", 3)
    assert str(refused.value) == f"vllm cannot be used: {reason}"
    assert "(pip install vllm)" in str(refused.value.hint)
    assert "--python" in str(refused.value.hint)


@pytest.mark.parametrize("absent", ["optimum", "gptqmodel"])
def test_what_transformers_needs_to_read_gptq_is_looked_for_first(
    absent: str, checkpoint: Path, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in {"optimum", "gptqmodel"} - {absent}:
        (tmp_path / f"{module}.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    events: list[Event] = []
    with pytest.raises(InputError) as refused:
        checked(checkpoint, events, engine="transformers", prompts=prompts)
    assert events == []
    assert refused.value.code == "E_ENGINE_MISSING"
    assert str(refused.value) == f"transformers cannot be used: No module named '{absent}'"


def test_mlx_is_told_to_convert_a_gptq_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="mlx does not read GPTQ checkpoints") as refused:
        checked(checkpoint, engine="mlx")
    assert (refused.value.code, refused.value.exit_code) == ("E_ENGINE_FORMAT", 3)
    assert "gptq convert" in str(refused.value.hint)
    assert "--to mlx" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b" \n\n", "E_DATA_EMPTY", "holds no prompt"),
        (b"a\xff", "E_DATA_ENCODING", "is not UTF-8: invalid start byte at offset 1"),
        (None, "E_FILE", "No such file"),
    ],
)
def test_a_wrong_file_of_prompts_is_refused(
    content: bytes | None, code: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        checked(checkpoint, prompts=str(file))
    assert (refused.value.code, refused.value.exit_code) == (code, 3)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("values", "code", "message", "hint"),
    [
        (
            {"engine": "vlm"},
            "E_CFG_RANGE",
            '--engine must be vllm, llama.cpp, mlx or transformers, got "vlm"',
            "did you mean vllm?",
        ),
        (
            {"engine": "llama.cpp"},
            "E_CFG_MISSING",
            "llama.cpp needs its converter to read a checkpoint",
            "give llama.cpp's convert_hf_to_gguf.py with --converter FILE",
        ),
        (
            {"engine": "vllm", "converter": "x"},
            "E_CFG_CONFLICT",
            "a converter has no effect on vllm",
            "omit --converter",
        ),
    ],
)
def test_a_wrong_engine_request_is_refused(
    values: dict[str, str], code: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineRequest(**values)
    assert (refused.value.code, str(refused.value)) == (code, message)
    assert (refused.value.hint, refused.value.exit_code) == (hint, 2)


def test_an_absent_converter_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"there is no file `x\.py`") as refused:
        checked(checkpoint, engine="llama.cpp", converter="x.py")
    assert refused.value.code == "E_ENGINE_MISSING"
