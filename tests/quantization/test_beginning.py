"""What a run does before its first block is begun as early as possible, and side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.events import Event, PhaseStarted
from gptq_cli.quantization import run
from tests.families import save_model
from tests.runs import config, digest
from tests.tiny import Case

# The import of LATE waits until something else has begun.
PROGRAM = """
import sys
from threading import Event

begun = Event()

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "LATE":
            assert begun.wait(60), "LATE is imported first"

FIRST
sys.meta_path.insert(0, Gate())
sys.argv[0] = "gptq"
PLACE
"""
SCAN = """
from gptq_cli.checkpoint import headers

scan = headers._scan

def noted(*arguments, **named):
    begun.set()
    return scan(*arguments, **named)

headers._scan = noted
"""
# The processor passes for a device with kernels, which cannot compile them.
LAUNCH = """
from gptq_cli.runtime import kernels
from gptq_cli.solver import numerics

def launch(*_):
    begun.set()
    raise ValueError("no compiler")

assert "transformers" not in sys.modules
kernels._launch = launch
kernels.has_triton = lambda: True
numerics.KERNEL_DEVICES.add("cpu")
"""
CALLS = {
    "command": "from gptq_cli.__main__ import main; main()",
    "python": "import gptq_cli; m, d, o = sys.argv[2], sys.argv[4], sys.argv[6]; "
    "gptq_cli.quantize(m, output=o, dataset=d, bits=4, group_size=32, preset='gptq', nsamples=2, "
    "seqlen=16, batch_size=1, device='cpu')",
}


def run_gated(way: str, first: str, late: str, tmp_path: Path) -> str:
    """Quantize in a process whose import of `late` waits for `first`; return what it prints."""
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    text = str(config().dataset)
    words = ["quantize", str(model), "--dataset", text, "-o", str(tmp_path / "out"), "--bits", "4"]
    words += ["--group-size", "32", "--preset", "gptq", "--nsamples", "2", "--seqlen", "16"]
    words += ["--batch-size", "1"]
    program = PROGRAM.replace("PLACE", CALLS[way]).replace("FIRST", first).replace("LATE", late)
    command = [sys.executable, "-c", program, *words, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "gptq_manifest.json").exists()
    return done.stderr


@pytest.mark.parametrize("way", CALLS)
def test_weights_are_read_before_torch_is_imported(way: str, tmp_path: Path) -> None:
    run_gated(way, SCAN, "torch", tmp_path)


@pytest.mark.parametrize("way", ["command", pytest.param("python", marks=pytest.mark.slow)])
def test_kernels_compile_while_transformers_is_imported(way: str, tmp_path: Path) -> None:
    shown = run_gated(way, LAUNCH, "transformers", tmp_path)
    if way == "command":
        assert "W_NO_KERNELS" in shown
        assert "ValueError: no compiler" in shown


def test_kernels_are_tried_before_the_model_is_opened(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    tried, settled, opened = run.with_kernels, run.settle_kernels, run._open_stream

    def noted_trial(*arguments: object) -> object:
        steps.append("try kernels")
        return tried(*arguments)  # type: ignore[arg-type]

    def noted_wait(*arguments: object) -> None:
        steps.append("wait for kernels")
        settled(*arguments)  # type: ignore[arg-type]

    def noted_opening(*arguments: object) -> object:
        steps.append("open the model")
        return opened(*arguments)  # type: ignore[arg-type]

    def report(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "source":
            steps.append("identify")

    monkeypatch.setattr(run, "with_kernels", noted_trial)
    monkeypatch.setattr(run, "settle_kernels", noted_wait)
    monkeypatch.setattr(run, "_open_stream", noted_opening)
    case.run(tmp_path / "out", report=report)
    assert steps == ["try kernels", "open the model", "identify", "wait for kernels"]
    assert digest(tmp_path / "out") == case.tree
