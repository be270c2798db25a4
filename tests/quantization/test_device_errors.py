"""A lack of memory, a failed GPU and a mistake of the program get different errors."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from gptq_cli.cli.app import report_failure
from gptq_cli.errors import InputError, ResourceError
from gptq_cli.events import Event, LayerStarted, Warned
from gptq_cli.files import file_error
from gptq_cli.runtime.memory import device_errors, gpu_lost, out_of_memory, reason
from gptq_cli.runtime.ranks import _peers
from tests.runs import digest
from tests.tiny import Case

ADVICE = (
    "\nSearch for `cudaError' in https://docs.nvidia.com/cuda/ for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, "
    "so the stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
)
CUDA_FULL = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. "
    "GPU 0 has a total capacity of 79.10 GiB of which 5 MiB is free."
    " Process 1 has 79.09 GiB memory in use. Of the allocated memory 70 GiB is allocated by PyTorch"
)
HOST_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
    "can't allocate memory: you tried to allocate 4000 bytes. "
    "Error code 12 (Cannot allocate memory)"
)
EXHAUSTED = {
    torch.OutOfMemoryError(CUDA_FULL): CUDA_FULL.partition(". Process")[0],
    RuntimeError(HOST_FULL): HOST_FULL.partition("err == 0. ")[2],
    MemoryError(): "the host has no more",
    OSError(errno.ENOMEM, "Cannot allocate memory"): "[Errno 12] Cannot allocate memory",
    torch.AcceleratorError(f"CUDA error: out of memory{ADVICE}"): "CUDA error: out of memory",
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(h)`"): (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasSgemm(h)`"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"): (
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    RuntimeError("Triton Error [CUDA]: out of memory"): "Triton Error [CUDA]: out of memory",
    RuntimeError("can't start new thread"): "can't start new thread",
}
LOST = {
    torch.AcceleratorError(f"CUDA error: {why}{ADVICE}"): f"CUDA error: {why}"
    for why in (
        "an illegal memory access was encountered",
        "uncorrectable ECC error encountered",
        "unspecified launch failure",
        "device-side assert triggered",
    )
} | {
    RuntimeError(f"CUDA error: misaligned address{ADVICE}"): "CUDA error: misaligned address",
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"): (
        "Triton Error [CUDA]: an illegal memory access was encountered"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(h)`"): (
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(h)`"
    ),
}
MISTAKES = [
    torch.AcceleratorError(f"CUDA error: invalid configuration argument{ADVICE}"),
    RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasSgemm(h)`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)"),
    OSError(errno.EIO, "Input/output error"),
    ValueError("CUDA error: out of memory"),
    ValueError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("no kernel image"),
]
UNFIT = {
    torch.AcceleratorError(f"CUDA error: {why}{ADVICE}"): f"CUDA error: {why}"
    for why in (
        "no kernel image is available for execution on the device",
        "invalid device function",
        "CUDA driver version is insufficient for CUDA runtime version",
    )
} | {
    RuntimeError(
        "Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."
    ): ("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain"),
}


@pytest.mark.parametrize("error", EXHAUSTED, ids=str)
def test_every_out_of_memory_error_becomes_e_oom(error: Exception) -> None:
    assert (out_of_memory(error), gpu_lost(error), reason(error)) == (True, False, EXHAUSTED[error])
    with pytest.raises(ResourceError) as caught, device_errors():
        raise error
    assert (caught.value.code, caught.value.exit_code) == ("E_OOM", 5)
    assert str(caught.value) == f"there is not enough memory: {EXHAUSTED[error]}"


@pytest.mark.parametrize("error", LOST, ids=str)
def test_a_failed_gpu_is_reported_with_its_reason(error: Exception) -> None:
    assert (out_of_memory(error), gpu_lost(error)) == (False, True)
    with pytest.raises(ResourceError) as caught, device_errors():
        raise error
    assert (caught.value.code, caught.value.exit_code) == ("E_GPU_LOST", 5)
    assert str(caught.value) == f"the GPU has failed: {LOST[error]}"
    assert (
        caught.value.hint
        == "look at `nvidia-smi`, and for Xid in `dmesg`, then run the same command again"
    )


@pytest.mark.parametrize("error", UNFIT, ids=str)
def test_a_gpu_that_torch_does_not_support_is_an_input_error(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert (out_of_memory(error), gpu_lost(error)) == (False, False)
    with pytest.raises(InputError) as caught, device_errors():
        raise error
    assert (caught.value.code, caught.value.exit_code) == ("E_DEVICE", 3)
    assert (
        str(caught.value)
        == f"torch {torch.__version__} with CUDA 13.0 cannot run on this GPU: {UNFIT[error]}"
    )
    assert caught.value.hint == (
        "install a torch that was built for the GPU and its driver, which `gptq env` shows, "
        "or use --device cpu"
    )


@pytest.mark.parametrize("error", MISTAKES, ids=str)
def test_an_error_of_the_program_stays_a_bug(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, device_errors():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [*EXHAUSTED, *LOST], ids=str)
def test_a_device_error_between_processes_is_no_lost_peer(
    error: Exception,
) -> None:
    with pytest.raises(type(error)) as caught, _peers():
        raise error
    assert caught.value is error


def test_a_failed_gpu_is_reported_briefly_and_the_rerun_resumes(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = []

    def fail(event: Event) -> None:
        events.append(event)
        if isinstance(event, LayerStarted) and event.name.startswith("model.layers.1."):
            raise torch.AcceleratorError(f"CUDA error: unspecified launch failure{ADVICE}")

    with pytest.raises(ResourceError) as caught:
        case.run(tmp_path / "out", report=fail)
    assert report_failure(caught.value, as_json=False) == 5
    assert capsys.readouterr().err.splitlines() == [
        "error[E_GPU_LOST]: the GPU has failed: CUDA error: unspecified launch failure",
        "",
        "hint: look at `nvidia-smi`, and for Xid in `dmesg`, then run the same command again",
    ]
    assert not [
        event for event in events if isinstance(event, Warned) and event.code == "W_OOM_RETRY"
    ]
    assert case.run(tmp_path / "out").resumed_blocks == 1
    assert digest(tmp_path / "out") == case.tree


def test_a_memory_error_of_a_file_is_an_out_of_memory_error() -> None:
    refused = file_error(OSError(errno.ENOMEM, "Cannot allocate memory"), "model.safetensors")
    assert refused is not None
    assert out_of_memory(refused)
    with pytest.raises(ResourceError) as caught, device_errors():
        raise refused
    assert caught.value is refused
    assert not out_of_memory(ResourceError("E_DISK", "full"))
