"""The device of a process of a run, and the first launch of kernels; needs no transformers.

So a run can begin this launch, which compiles kernels, before it imports transformers.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError, counted
from gptq_cli.events import PhaseStarted, Report, Warned
from gptq_cli.runtime.memory import device_errors
from gptq_cli.runtime.ranks import SINGLE_PROCESS, Ranks
from gptq_cli.solver import numerics

if TYPE_CHECKING:
    from gptq_cli.runtime.kernels import KernelTrial

DEV = Path("/dev")
# Tokens times bytes of the model: a forward in 16 bits takes about 5 seconds of a slow core
LONG_RUN = 5 * 10**10


@dataclass(frozen=True, slots=True)
class Worker:
    """A process of a run: its ranks, the device that it works on, and the trial of kernels there.

    `trial` is None if it has not begun.
    """

    team: Ranks
    device: torch.device
    trial: KernelTrial | None = None


def cpu_option(devices: Sequence[str]) -> str:
    """Return the option with which the CPU does the work of `devices`, which --devices names."""
    if devices:
        return f"--devices cpu:{len(devices)}"
    return "--device cpu"


def resolve_device(device: str, instead: str = cpu_option([])) -> torch.device:
    """Return the device with this name, or InputError E_DEVICE if there is none.

    The hint of this error names the option `instead`, which uses the CPU. "auto" is the first CUDA
    device, or the CPU. A CUDA device gets its number, as tensors on it have: `cuda` and `cuda:0`
    are not equal.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("cpu")
    if not device.startswith("cuda"):
        return torch.device(device)
    count = 0
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise InputError(
            "E_DEVICE",
            f"no CUDA device {index}: torch {torch.__version__} sees {counted(count, 'GPU')}",
            hint=f"use {instead}, or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", index)


def report_device(device: torch.device, asked: str, report: Report, n_processes: int = 1) -> None:
    """Report the device that does the work, and W_DEVICE_UNUSED for a GPU that torch cannot use.

    `asked` is the device of the configuration: a user who names the CPU gets no warning.
    """
    name = f"{counted(torch.get_num_threads(), 'thread')} of the CPU"
    if device.type == "cuda":
        name = f"{device}, {torch.cuda.get_device_name(device)}"
    if n_processes > 1:
        name += f", one of {n_processes} processes"
    report(PhaseStarted("device", name))
    if device.type == "cpu" and asked == "auto" and _has_nvidia_gpu():
        text = f"torch {torch.__version__} cannot use the NVIDIA GPU of this machine"
        reason = f"its driver may be too old for CUDA {torch.version.cuda}: see nvidia-smi"
        if torch.version.cuda is None:
            reason = "install a torch that is built for CUDA"
        report(Warned("W_DEVICE_UNUSED", f"{text}, so the CPU does the work; {reason}"))


def report_slow_dtype(
    device: torch.device, asked: str, checkpoint: Checkpoint, tokens: int, report: Report
) -> None:
    """Report W_SLOW_DTYPE if the model runs in 16 bits on a CPU that multiplies these slowly.

    Short runs get no warning, nor does a user who has `asked` for a dtype other than "auto".
    """
    if not _is_slow_dtype(device, asked, checkpoint) or tokens * checkpoint.nbytes < LONG_RUN:
        return
    dtype = forward_dtype(checkpoint, asked)
    text = f"this CPU has no instructions for {dtype}, the dtype of the model, so forwards are slow"
    report(Warned("W_SLOW_DTYPE", f"{text}; --dtype float32 is faster, but takes more memory"))


def measuring_dtype(device: torch.device, asked: str, checkpoint: Checkpoint) -> str:
    """Return the dtype in which a measurement by gradients computes, if `asked` is that of the run.

    It is the same, but float32 on a CPU that multiplies 16 bits slowly: a pass in reverse is mostly
    products.
    """
    if _is_slow_dtype(device, asked, checkpoint):
        return "float32"
    return asked


def _is_slow_dtype(device: torch.device, asked: str, checkpoint: Checkpoint) -> bool:
    """Return whether the model runs in 16 bits on a CPU that multiplies these slowly.

    A user who has `asked` for a dtype other than "auto" knows.
    """
    if asked != "auto" or device.type != "cpu" or forward_dtype(checkpoint, asked) == "float32":
        return False
    return _multiplies_16_bits_slowly()


def _multiplies_16_bits_slowly() -> bool:
    """Return whether torch converts numbers of 16 bits one by one, as on x86 without AVX-512."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _has_nvidia_gpu() -> bool:
    """Return whether the driver of NVIDIA is here and the user has not hidden its GPUs."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    return any(DEV.glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None


def with_kernels(worker: Worker | None, config: QuantizeConfig) -> Worker:
    """Return `worker` with the first launch of the solver's kernels begun, unless it has begun.

    None is the only process of a run. On the CPU there is nothing to launch. Raises InputError
    E_DEVICE if the device of that process is not there, ResourceError if no thread can start.
    """
    if worker is None:
        worker = Worker(SINGLE_PROCESS, resolve_device(config.device))
    if worker.trial is not None or worker.device.type not in numerics.KERNEL_DEVICES:
        return worker
    from gptq_cli.runtime.kernels import KernelTrial

    with device_errors():
        return replace(worker, trial=KernelTrial(worker.device, config.base))


def settle_kernels(worker: Worker, report: Report) -> None:
    """Wait for the first launch, if one has begun; report W_NO_KERNELS if kernels cannot run."""
    if worker.trial is not None:
        worker.trial.settle(worker.team, report)
