"""Runs on a simulated device write the bytes of the CPU; the tests count the waits of the host.

Kernels are absent, because code that is compiled for a GPU cannot be simulated.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gptq_cli.checkpoint import reader
from gptq_cli.checkpoint.layout import GPTQ
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.errors import PausedError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import BlockFinished, Event, LayerReport, PhaseStarted, Warned
from gptq_cli.models import experts
from gptq_cli.preview import preview_run
from gptq_cli.quantization import layers
from gptq_cli.quantization.layers import Inputs
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.runtime import device as device_of_run
from gptq_cli.runtime import memory, open_model
from gptq_cli.runtime.device import LONG_RUN, report_device, report_slow_dtype, resolve_device
from gptq_cli.runtime.memory import Memory
from gptq_cli.runtime.open_model import HiddenStates, open_stream
from gptq_cli.solver import numerics
from gptq_cli.solver.hessian import HessianAccumulator
from tests.families import save_model, text_file
from tests.runs import config, digest, messages
from tests.simulated_gpu import SimulatedGpu, simulated_gpu

pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="torch has a device of its own"
)
BLOCKS, BATCHES = 2, 2  # of the runs below
LINEARS, INPUTS = 7, 4  # of a block of Llama
SETTINGS = {"nsamples": 4, "batch_size": 2, "moe_uncovered": "rtn"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    monkeypatch.setattr(numerics, "KERNEL_DEVICES", set())
    with simulated_gpu() as device:
        yield device


def waits(gpu: SimulatedGpu, *places: str) -> int:
    return sum(count for place, count in gpu.waits.items() if place.startswith(places))


def written(directory: Path) -> str:
    return digest(directory)["model.safetensors"]


@pytest.mark.usefixtures("gpu")
def test_the_present_device_is_named_as_its_tensors_name_it() -> None:
    device = resolve_device("auto")
    assert resolve_device("cuda") == resolve_device("cuda:0") == device
    assert torch.zeros(1, device=device).device == device
    states = HiddenStates([torch.zeros(2, 3, device=device)], Memory(device)).copy()
    assert states.stored[0].device == device


def test_a_model_opens_on_the_device_that_launches_kernels(
    gpu: SimulatedGpu, tmp_path: Path
) -> None:
    model = open_checkpoint(save_model(tmp_path / "model"))
    stream = open_stream(
        model, device=resolve_device("auto"), dtype="float32", trust_remote_code=False
    )
    assert gpu.current == stream.device


def test_later_blocks_copy_from_pinned_memory_without_waiting(
    gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=4, dtype=torch.bfloat16)
    found = []
    for place, share in (("ahead", 8), ("in turn", 2**60)):
        monkeypatch.setattr(open_model, "AHEAD_SHARE", share)
        gpu.waits.clear()
        quantize_checkpoint(
            str(model), tmp_path / place, config(device="cuda", preset="fast", **SETTINGS)
        )
        found.append(waits(gpu, "models.stream._load"))
    tensors_of_a_block = LINEARS + 2
    assert found[1] - found[0] == 3 * tensors_of_a_block
    assert written(tmp_path / "ahead") == written(tmp_path / "in turn")


ALL_STEPS: dict[str, Any] = {"preset": "fast", "refine_sweeps": 1, "scale_search": "mse"}


@pytest.mark.usefixtures("gpu")
def test_every_step_of_solving_writes_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=BLOCKS, dtype=torch.bfloat16)
    settings = ALL_STEPS | SETTINGS
    quantize_checkpoint(str(model), tmp_path / "cpu", config(**settings))
    quantize_checkpoint(str(model), tmp_path / "gpu", config(device="cuda", **settings))
    assert written(tmp_path / "gpu") == written(tmp_path / "cpu")


def test_solving_waits_rarely_and_reads_no_weight_twice(gpu: SimulatedGpu, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=BLOCKS, dtype=torch.bfloat16)
    # With a shift, whose sum has fewer bits on the device, the bytes are not those of the CPU.
    settings = ALL_STEPS | {"asymmetric_calibration": 0.5} | SETTINGS
    quantize_checkpoint(str(model), tmp_path / "gpu", config(device="cuda", **settings))
    factors = ("solver.factor",)
    assert waits(gpu, *factors) == 2 * BLOCKS * INPUTS
    solving = waits(gpu, "solver") - waits(gpu, *factors, "solver.solve._round_one_by_one")
    # of each input: whether scales are within float16, of both ways of rounding, and what the
    # layers decode to; and the errors of all its layers together
    assert solving == BLOCKS * 4 * INPUTS, gpu.waits
    assert waits(gpu, "models.stream.linear_weight") == 0
    assert waits(gpu, "checkpoint") == 4 * BLOCKS * LINEARS
    assert waits(gpu, "planning", "quantization", "runtime") == 0, gpu.waits


@pytest.mark.usefixtures("gpu")
def test_shifts_of_rows_give_nearly_the_same_strengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(
        tmp_path / "model", num_hidden_layers=BLOCKS, intermediate_size=192, dtype=torch.bfloat16
    )
    settings = config(device="cuda", preset="fast", asymmetric_calibration="auto", **SETTINGS)
    of_rows: set[bool] = set()
    of = Inputs.of

    def note(seen: HessianAccumulator) -> Inputs:
        of_rows.add(seen.shifts_of_rows)
        return of(seen)

    monkeypatch.setattr(Inputs, "of", note)
    found = strengths(quantize_checkpoint(str(model), tmp_path / "rows", settings).layers)
    assert of_rows == {False, True}
    of_rows.clear()
    monkeypatch.setattr(layers, "has_shorter_shifts", lambda *_: False)
    expected = strengths(quantize_checkpoint(str(model), tmp_path / "inputs", settings).layers)
    assert of_rows == {False}
    assert max(expected) > 0.1
    assert found == pytest.approx(expected, abs=0.02)


def strengths(reports: Sequence[LayerReport]) -> list[float]:
    """The strengths of the layers with inputs of their own."""
    found = [report for report in reports if report.name.endswith("down_proj")]
    return [report.asymmetric_calibration or 0.0 for report in found]


@pytest.mark.parametrize(
    ("family", "dtype", "each"),
    [("mixtral", torch.bfloat16, 1), ("llama4_text", torch.float32, 2)],
)
def test_the_host_waits_once_or_twice_for_all_experts_of_a_block(
    family: str, dtype: torch.dtype, each: int, gpu: SimulatedGpu, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", family, dtype=dtype)
    quantize_checkpoint(str(model), tmp_path / "cpu", config(preset="fast", **SETTINGS))
    gpu.waits.clear()
    with patch.object(experts, "_grouped_product", wraps=experts._grouped_product) as grouped:
        quantize_checkpoint(
            str(model), tmp_path / "gpu", config(preset="fast", device="cuda", **SETTINGS)
        )
    assert grouped.called == (dtype == torch.bfloat16)
    assert written(tmp_path / "gpu") == written(tmp_path / "cpu")
    # The first block runs twice more, to reveal its result and its stages.
    forwards = BLOCKS * BATCHES + 2
    found = waits(gpu, "models.experts", "models.paused_forwards.__torch_dispatch__")
    assert found == each * (BLOCKS + forwards), gpu.waits


def test_a_run_with_states_on_the_host_resumes_and_evaluates(
    gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished):
            raise PausedError("E_PAUSED", "one block is enough")

    model = str(save_model(tmp_path / "model", num_hidden_layers=BLOCKS))
    settings = config(preset="fast", **SETTINGS)
    quantize_checkpoint(model, tmp_path / "cpu", settings)
    monkeypatch.setattr(open_model, "DEVICE_SHARE", 10**9)
    settings = settings.model_copy(update={"device": "cuda"})
    with pytest.raises(PausedError):
        quantize_checkpoint(model, tmp_path / "gpu", settings, report=stop)
    # Each batch waits for pinned memory before the block and after it.
    assert waits(gpu, "runtime.open_model") >= 2 * BATCHES
    assert quantize_checkpoint(model, tmp_path / "gpu", settings).resumed_blocks == 1
    assert waits(gpu, "runtime.open_model.<lambda>: to the device") == 0, gpu.waits
    assert written(tmp_path / "gpu") == written(tmp_path / "cpu")
    request = EvalRequest(dataset=text_file(), seqlen=64, max_windows=2, baseline=model)
    found, expected = (
        evaluate_perplexity(str(tmp_path / "gpu"), replace(request, device=device))
        for device in ("cuda", "cpu")
    )
    assert (found.perplexity, found.kl) == (expected.perplexity, expected.kl)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("runs", [True, False])
def test_evaluation_decodes_on_the_device_if_its_kernel_runs(
    runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(save_model(tmp_path / "model", num_hidden_layers=BLOCKS))
    quantize_checkpoint(model, tmp_path / "out", config(preset="fast", **SETTINGS))
    devices: list[torch.device] = []

    def decoded(
        qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, **_: object
    ) -> Tensor:
        if not runs:
            raise RuntimeError("Failed to find C compiler")
        devices.append(qweight.device)
        parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales, "g_idx": g_idx}
        return reader.decode(parts, bits, GPTQ).dequantize().contiguous()

    for module in (open_model, reader):
        monkeypatch.setattr(module, "dequantize_packed", decoded)
    request = EvalRequest(dataset=text_file(), seqlen=64, max_windows=2, baseline=model)
    events: list[Event] = []
    found = evaluate_perplexity(
        str(tmp_path / "out"), replace(request, device="cuda"), events.append
    )
    expected = evaluate_perplexity(str(tmp_path / "out"), replace(request, device="cpu"))
    assert (found.perplexity, found.kl) == (expected.perplexity, expected.kl)
    told = [event.message for event in events if isinstance(event, Warned)]
    if runs:
        assert told == []
        assert set(devices) == {torch.device("cuda", 0)}
        assert len(devices) > BLOCKS * LINEARS  # and once to try
    else:
        assert "cannot run on cuda:0: there is no C compiler" in told[0]


def test_oom_on_device_falls_back_to_fewer_paused_batches(
    gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "UNBROKEN", 1000)  # as if far less were needed
    monkeypatch.setattr(memory, "WAITING_SHARE", {"cuda": 1000})
    model = str(save_model(tmp_path / "model", num_hidden_layers=BLOCKS))
    settings = config(preset="fast", device="cuda", nsamples=16, batch_size=2)

    def run(output: str, limit_bytes: int) -> list[str]:
        events: list[Event] = []
        gpu.limit_bytes, gpu.peak_bytes = limit_bytes, 0
        quantize_checkpoint(model, tmp_path / output, settings, report=events.append)
        return [event.code for event in events if isinstance(event, Warned)]

    assert "W_OOM_RETRY" not in run("roomy", 2**60)
    limit = gpu.peak_bytes // 2
    assert "W_OOM_RETRY" in run("tight", limit)
    assert 0 < gpu.peak_bytes <= limit
    assert written(tmp_path / "tight") == written(tmp_path / "roomy")


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_a_gpu_that_torch_cannot_use_is_a_warning(
    asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_of_run, "DEV", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def told() -> list[str]:
        events: list[Event] = []
        report_device(torch.device("cpu"), asked, events.append, 2)
        assert isinstance(events[0], PhaseStarted)
        assert re.fullmatch(r"\d+ threads? of the CPU, one of 2 processes", events[0].detail)
        return [event.code for event in events if isinstance(event, Warned)]

    assert told() == []
    (tmp_path / "nvidiactl").touch()
    assert told() == []
    (tmp_path / "nvidia0").touch()
    expected = {"auto": ["W_DEVICE_UNUSED"], "cpu": []}[asked]
    assert told() == expected
    (tmp_path / "nvidia0").rename(tmp_path / "nvidia-smi")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert told() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert told() == []


@pytest.mark.parametrize(
    ("capability", "machine", "asked", "tokens", "warns"),
    [
        ("AVX2", "x86_64", "auto", LONG_RUN, True),
        ("DEFAULT", "AMD64", "auto", LONG_RUN, True),
        ("AVX512", "x86_64", "auto", LONG_RUN, False),
        ("DEFAULT", "aarch64", "auto", LONG_RUN, False),
        ("AVX2", "x86_64", "bfloat16", LONG_RUN, False),
        ("AVX2", "x86_64", "float32", LONG_RUN, False),
        ("AVX2", "x86_64", "auto", 1, False),
    ],
)
def test_a_cpu_without_instructions_for_16_bits_is_a_warning(
    capability: str,
    machine: str,
    asked: str,
    tokens: int,
    warns: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    model = open_checkpoint(save_model(tmp_path / "model", dtype=torch.bfloat16))
    events: list[Event] = []
    report_slow_dtype(torch.device("cpu"), asked, model, tokens, events.append)
    codes = [event.code for event in events if isinstance(event, Warned)]
    assert codes == ["W_SLOW_DTYPE"] * warns


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda:0", "bfloat16")])
def test_float32_and_a_gpu_are_not_slow(
    device: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    model = open_checkpoint(save_model(tmp_path / "model", dtype=getattr(torch, dtype)))
    events: list[Event] = []
    report_slow_dtype(torch.device(device), "auto", model, LONG_RUN, events.append)
    assert events == []


def test_a_run_an_evaluation_and_an_estimate_of_time_ask_how_fast_16_bits_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(device_of_run, "LONG_RUN", 1)
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    events: list[Event] = []
    settings = config(dtype="auto", device="cpu")
    done = quantize_checkpoint(str(model), tmp_path / "out", settings, report=events.append)
    assert len(messages(events, "W_SLOW_DTYPE")) == 1
    request = EvalRequest(dataset=text_file(), seqlen=16, max_windows=2, device="cpu")
    evaluate_perplexity(str(done.output), request, events.append)
    assert len(messages(events, "W_SLOW_DTYPE")) == 2
    preview_run(str(model), settings, report=events.append)
    assert len(messages(events, "W_SLOW_DTYPE")) == 2
    preview_run(str(model), settings, with_time=True, report=events.append)
    assert len(messages(events, "W_SLOW_DTYPE")) == 3
    assert len(set(messages(events, "W_SLOW_DTYPE"))) == 1
