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

# Nobody imports torch before a weight was read.
PROGRAM = """
import sys
from threading import Event
from gptq_cli.checkpoint import headers

begun, scan = Event(), headers._scan

def noted(*arguments, **named):
    begun.set()
    return scan(*arguments, **named)

class Gate:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            assert begun.wait(60), "torch is imported first"

headers._scan = noted
sys.meta_path.insert(0, Gate())
sys.argv[0] = "gptq"
PLACE
"""
CALLS = {
    "command": "from gptq_cli.__main__ import main; main()",
    "python": "import gptq_cli; m, d, o = sys.argv[2], sys.argv[4], sys.argv[6]; "
    "gptq_cli.quantize(m, output=o, dataset=d, bits=4, group_size=32, nsamples=2, seqlen=16, "
    "batch_size=1, device='cpu')",
}


@pytest.mark.parametrize("way", CALLS)
def test_weights_are_read_before_torch_is_imported(way: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    text = str(config().dataset)
    words = ["quantize", str(model), "--dataset", text, "-o", str(tmp_path / "out"), "--bits", "4"]
    words += ["--group-size", "32", "--nsamples", "2", "--seqlen", "16", "--batch-size", "1"]
    program = PROGRAM.replace("PLACE", CALLS[way])
    command = [sys.executable, "-c", program, *words, "--device", "cpu", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "gptq_manifest.json").exists()


def test_kernels_are_tried_before_the_model_is_opened(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    tried, opened = run.try_kernels, run._open_stream

    def noted_trial(*arguments: object) -> object:
        steps.append("try kernels")
        return tried(*arguments)  # type: ignore[arg-type]

    def noted_opening(*arguments: object) -> object:
        steps.append("open the model")
        return opened(*arguments)  # type: ignore[arg-type]

    def report(event: Event) -> None:
        if isinstance(event, PhaseStarted) and event.name == "source":
            steps.append("identify")

    monkeypatch.setattr(run, "try_kernels", noted_trial)
    monkeypatch.setattr(run, "_open_stream", noted_opening)
    case.run(tmp_path / "out", report=report)
    assert steps == ["try kernels", "open the model", "identify"]
    assert digest(tmp_path / "out") == case.tree
