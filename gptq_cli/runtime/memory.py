"""Memory that the process holds, without the pages of files it has mapped, and how much it may
still take.

Here is also told apart what ends a run from outside, memory that is used up or a GPU that fails,
from mistakes of this program.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptq_cli.config.finding import size
from gptq_cli.errors import GptqError, InputError, ResourceError
from gptq_cli.events import BlockFinished, Report, Warned
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.estimate import Limit

WAITING_SHARE = 0.5  # of the free memory; Hessians, factors and the solver share the rest
MAX_WAITING_THREADS = 1024
CUBLAS_WORKSPACE_BYTES = 32 * 2**20  # of each thread, on the newest devices
MAPPED_BYTES = 2**20
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of the GNU C library
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")

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


def host_bytes() -> int:
    """Resident private memory now (Linux); elsewhere the largest resident size so far."""
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def device_peak_bytes(device: torch.device) -> int:
    """Largest allocation on an accelerator so far; 0 on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def block_finished(index: int, stream: ModelStream, started: float) -> BlockFinished:
    """The event that ends block `index`, begun at `started` (time.perf_counter), with the memory held now."""
    return BlockFinished(
        index=index,
        n_blocks=stream.n_blocks,
        name=stream.block_name(index),
        seconds=time.perf_counter() - started,
        host_bytes=host_bytes(),
        device_bytes=device_peak_bytes(stream.device),
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors on `device` may still take, on the host within the limit of the process's control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if not _MEMORY.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") - host_bytes()
    available = int(_fields(_MEMORY)["MemAvailable:"]) * 1024
    limit = _CONTROL_GROUP / "memory.max"
    if not limit.exists() or limit.read_text().strip() == "max":
        return available
    used = int((_CONTROL_GROUP / "memory.current").read_text())
    reclaimable = int(_fields(_CONTROL_GROUP / "memory.stat")["inactive_file"])
    return min(available, int(limit.read_text()) - used + reclaimable)


def give_back_freed_tensors() -> None:
    """Give back what has been freed so far, and let the C library take tensors of a megabyte or more from the system
    one by one, and give each back when freed; what is smaller comes from one place for all threads from now on.

    By default the GNU C library learns to keep them, in an arena for each thread: batches that wait would hold on to
    what their forwards have freed long ago. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_M_ARENA_MAX, 1)
        library.malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run may take, in bytes; None: whatever is free."""

    device: torch.device
    max_device_bytes: int | None = None
    max_host_bytes: int | None = None
    local_world_size: int = 1  # processes that share the host, this one included
    spared: bool = False  # no hidden states on the device

    def free(self) -> int:
        """Bytes that tensors on the device may still take."""
        return self.free_and_limit()[0]

    def free_and_limit(self) -> tuple[int, Limit | None]:
        """Bytes that tensors on the device may still take, and the user's limit if less is free because of it."""
        on_device = self.device.type == "cuda"
        allowed = self.max_device_bytes if on_device else self.max_host_bytes
        sharers = 1 if on_device else self.local_world_size
        free = free_bytes(self.device) // sharers
        if allowed is None:
            return free, None
        held = torch.cuda.memory_allocated(self.device) if on_device else host_bytes()
        left = max(0, allowed // sharers - held)
        if left >= free:
            return free, None
        return left, Limit("--max-vram" if on_device else "--max-ram", allowed, held, free, sharers)

    def enforce(self) -> None:
        """Have torch refuse to take more of an accelerator than is allowed."""
        if self.device.type == "cuda" and self.max_device_bytes is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, self.max_device_bytes / total), self.device
            )

    def is_over_limit(self) -> bool:
        """True if the process, with its neighbours, holds more host memory than it may."""
        return (
            self.max_host_bytes is not None
            and host_bytes() * self.local_world_size > self.max_host_bytes
        )

    def check_host(self) -> None:
        """ResourceError E_OOM if the process holds more host memory than it may."""
        held = host_bytes() * self.local_world_size
        if self.max_host_bytes is not None and held > self.max_host_bytes:
            allowed = f"max_ram allows {size(self.max_host_bytes)}"
            raise ResourceError(
                "E_OOM", f"the run holds {size(held)} of host memory, {allowed}",
                hint="allow more with --max-ram: finished blocks are kept; a smaller --batch-size, --seqlen or "
                "--nsamples needs less, and begins anew with --resume never",
            )  # fmt: skip


class WaitingRoom:
    """Decides for each block how many batches may wait inside it, and says once when not all of them may."""

    def __init__(self, memory: Memory, report: Report) -> None:
        self.memory, self._report, self._told = memory, report, False
        self._given = self._limit = MAX_WAITING_THREADS
        self._closed = False

    def places(self, n_batches: int, bytes_each: int, streams: int = 1) -> int:
        """How many of `n_batches` fit half of the free memory, and their threads, if each holds `bytes_each` on each
        of its `streams` while it waits."""
        if self._closed:
            self._closed = False
            return 0
        threads_each = streams
        bytes_each = streams * bytes_each
        if self.memory.device.type == "cuda":
            bytes_each += streams * CUBLAS_WORKSPACE_BYTES
        else:
            threads_each *= (
                torch.get_num_threads()
            )  # OpenMP keeps a team of threads for each thread that computes
        free, limit = self.memory.free_and_limit()
        by_memory = int(WAITING_SHARE * free) // bytes_each if bytes_each else n_batches
        places = max(0, min(n_batches, by_memory, MAX_WAITING_THREADS // threads_each, self._limit))
        if places < n_batches and not self._told:
            self._told = True
            needed, threads = n_batches * bytes_each, n_batches * threads_each
            room = (
                f"{size(free)} that {limit.option} leaves" if limit else f"{size(free)} free memory"
            )
            why = f"all would hold {size(needed)} of {room}, and {threads} threads"
            slower = "the block is run again for every stage with the others"
            who = f"{places} of {n_batches} batches wait inside a block"
            self._report(Warned("W_MEM_REPLAY", f"{who}, {slower}: {why}"))
        self._given = places or self._given
        return places

    def shrink_after_oom(self) -> None:
        """Memory has run out: in the next block nobody waits, later at most half as many as last; nor do hidden states
        stay on the device."""
        self.memory = replace(self.memory, spared=True)
        self._limit = min(self._given, self._limit) // 2
        self._closed = self._told = True


def _fields(file: Path) -> dict[str, str]:
    return {line.split()[0]: line.split()[1] for line in file.read_text().splitlines()}


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
            raise ResourceError(
                "E_OOM", f"there is not enough memory: {reason(error)}", hint=hint
            ) from error
        if _unfit(error):
            built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
            hint = "install a torch that was built for the GPU and its driver, which `gptq env` shows, or use --device cpu"
            raise InputError(
                "E_DEVICE", f"{built} cannot run on this GPU: {reason(error)}", hint=hint
            ) from error
        if gpu_lost(error):
            hint = "look at `nvidia-smi`, and for Xid in `dmesg`, then run the same command again"
            raise ResourceError(
                "E_GPU_LOST", f"the GPU has failed: {reason(error)}", hint=hint
            ) from error
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
    return _of_the_gpu(error) and not any(
        sign in str(error) for sign in (*_ASKED_WRONGLY, *_NO_CODE_FOR_IT)
    )


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
