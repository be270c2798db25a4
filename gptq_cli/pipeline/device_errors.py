"""What ends a run from outside: memory that is used up, a GPU that fails. Told apart from mistakes of this program."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gptq_cli.errors import GptqError, InputError, ResourceError

# A handle of cuBLAS or cuSOLVER that cannot be created is what a full GPU looks like to them; a thread that cannot be
# started, what a full control group looks like to Python.
_EXHAUSTED = (
    "out of memory",
    "DefaultCPUAllocator",
    "_STATUS_ALLOC_FAILED",
    "`cublasCreate",
    "`cusolverDnCreate",
    "can't start new thread",
)
_OF_THE_GPU = ("CUDA error: ", "Triton Error [CUDA]: ")
_ASKED_WRONGLY = (
    "invalid argument",
    "invalid configuration argument",
    "_STATUS_INVALID_VALUE",
    "_STATUS_NOT_SUPPORTED",
    "_STATUS_ARCH_MISMATCH",
)
_NO_CODE_FOR_IT = (  # what is installed was not built for this GPU, or for a newer driver than it has
    "no kernel image",
    "invalid device function",
    "driver version is insufficient",
    "unsupported toolchain",
)


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn exhausted memory of device or host into ResourceError E_OOM with flags that help, a failed GPU into
    ResourceError E_GPU_LOST, one that nothing installed was built for into InputError E_DEVICE."""
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        if out_of_memory(error):
            hint = "use --batch-size 1, a smaller --seqlen, or --device cpu, with --resume never if blocks are finished"
            raise ResourceError("E_OOM", f"there is not enough memory: {reason(error)}", hint=hint) from error
        if _unfit(error):
            built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
            hint = (
                "install a torch that was built for the GPU and its driver, which `gptq env` shows, or use --device cpu"
            )
            raise InputError("E_DEVICE", f"{built} cannot run on this GPU: {reason(error)}", hint=hint) from error
        if gpu_lost(error):
            hint = "look at `nvidia-smi`, and for Xid in `dmesg`, then run the same command again"
            raise ResourceError("E_GPU_LOST", f"the GPU has failed: {reason(error)}", hint=hint) from error
        raise


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that there is no more memory, of a device or the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ResourceError):  # of a file that could not be mapped
        return error.code == "E_OOM"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _EXHAUSTED)


def gpu_lost(error: BaseException) -> bool:
    """Whether `error` says that the GPU does not work any more for this process; not that it was asked wrongly."""
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    return _of_the_gpu(error) and not any(sign in str(error) for sign in (*_ASKED_WRONGLY, *_NO_CODE_FOR_IT))


def _unfit(error: BaseException) -> bool:
    return _of_the_gpu(error) and any(sign in str(error) for sign in _NO_CODE_FOR_IT)


def _of_the_gpu(error: BaseException) -> bool:
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OF_THE_GPU)
    return said or isinstance(error, torch.AcceleratorError)


def reason(error: BaseException) -> str:
    """What `error` says, without advice and places in the source of others."""
    line = (str(error).splitlines() or [""])[0]
    line = line[max(0, line.find("DefaultCPUAllocator")) :]
    return ". ".join(line.split(". ")[:3]).rstrip(". ") or "the host has no more"
