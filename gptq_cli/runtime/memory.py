"""Memory: the bytes that the process holds, and the bytes that it may still take.

The pages of files that the process has mapped do not count. The last part tells errors that come
from outside, exhausted memory or a failed GPU, from mistakes of this program.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gptq_cli.errors import GptqError, InputError, ResourceError, size
from gptq_cli.events import BlockFinished, Report, Warned
from gptq_cli.planning.estimate import Limit

if TYPE_CHECKING:  # it imports transformers, which takes longer than a run may wait here
    from gptq_cli.models.stream import ModelStream

# Waiting batches may take these shares of the free memory; on the host, others need some as well.
WAITING_SHARE = {"cpu": 0.5, "cuda": 1.0}
UNBROKEN = 0.9  # of what solver and forward leave; the rest is lost in fragments
MAX_WAITING_THREADS = 1024
CUBLAS_WORKSPACE_BYTES = 32 * 2**20  # of each thread, on the newest devices
MAPPED_BYTES = 2**20
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of the GNU C library
_STATUS = Path("/proc/self/status")
_MEMORY = Path("/proc/meminfo")
_CONTROL_GROUP = Path("/sys/fs/cgroup")

# On a full GPU cuBLAS and cuSOLVER cannot create their handles; in a full control group Python
# cannot start a thread.
_EXHAUSTED = (
    "out of memory",
    "DefaultCPUAllocator",
    "_STATUS_ALLOC_FAILED",
    "`cublasCreate",
    "`cusolverDnCreate",
    "can't start new thread",
)
_OF_THE_GPU = ("CUDA error: ", "Triton Error [CUDA]: ")
_MISTAKES = (
    "invalid argument",
    "invalid configuration argument",
    "_STATUS_INVALID_VALUE",
    "_STATUS_NOT_SUPPORTED",
    "_STATUS_ARCH_MISMATCH",
)
# The installed torch was not built for this GPU, or it was built for a newer driver.
_NO_CODE_FOR_GPU = (
    "no kernel image",
    "invalid device function",
    "driver version is insufficient",
    "unsupported toolchain",
)


def host_bytes() -> int:
    """Return resident private memory now (Linux), or elsewhere the largest resident size so far."""
    if _STATUS.exists():
        return int(_fields(_STATUS)["RssAnon:"]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return largest
    return largest * 1024


def device_peak_bytes(device: torch.device) -> int:
    """Return the largest allocation on an accelerator so far; 0 on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 0


def block_finished(index: int, stream: ModelStream, started: float) -> BlockFinished:
    """Return the event that ends block `index`, with the memory held now.

    The block began at `started`, by time.perf_counter.
    """
    return BlockFinished(
        index=index,
        n_blocks=stream.n_blocks,
        name=stream.block_name(index),
        seconds=time.perf_counter() - started,
        host_bytes=host_bytes(),
        device_bytes=device_peak_bytes(stream.device),
    )


def free_bytes(device: torch.device) -> int:
    """Return the bytes that tensors on `device` may still take.

    On the host the limit of the process's control group counts as well.
    """
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
    """Return freed memory to the system, now and from now on.

    The C library is set to take tensors of a megabyte or more from the system one by one, and to
    return each when it is freed; smaller ones come from one arena for all threads. By default the
    GNU C library learns to keep memory, in an arena for each thread, and batches that wait would
    hold the memory that their forwards freed long ago. Other C libraries are not changed.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_M_ARENA_MAX, 1)
        library.malloc_trim(0)


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that a run may take, in bytes; None means all that is free.

    `local_world_size` processes share the host, this one included. With `states_on_host` no hidden
    states stay on the device.
    """

    device: torch.device
    max_device_bytes: int | None = None
    max_host_bytes: int | None = None
    local_world_size: int = 1
    states_on_host: bool = False

    def free(self) -> int:
        """Return the bytes that tensors on the device may still take."""
        return self.free_and_limit()[0]

    def free_and_limit(self) -> tuple[int, Limit | None]:
        """Return the bytes that tensors on the device may still take, and the reason.

        The reason is the user's limit, or None if it allows all that is free.
        """
        option, allowed, sharers = "--max-ram", self.max_host_bytes, self.local_world_size
        if self.device.type == "cuda":
            option, allowed, sharers = "--max-vram", self.max_device_bytes, 1
        free = free_bytes(self.device) // sharers
        if allowed is None:
            return free, None
        held = self._held()
        left = max(0, allowed // sharers - held)
        if left >= free:
            return free, None
        return left, Limit(option, allowed, held, free, sharers)

    def enforce(self) -> None:
        """Make torch refuse to take more of an accelerator than is allowed."""
        if self.device.type == "cuda" and self.max_device_bytes is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(
                min(1.0, self.max_device_bytes / total), self.device
            )

    def is_over_limit(self) -> bool:
        """Return true if all processes together hold more host memory than they may."""
        if self.max_host_bytes is None:
            return False
        return self._held_on_host() > self.max_host_bytes

    def check_host(self) -> None:
        """ResourceError E_OOM if all processes together hold more host memory than they may."""
        held = self._held_on_host()
        if self.max_host_bytes is not None and held > self.max_host_bytes:
            allowed = f"max_ram allows {size(self.max_host_bytes)}"
            raise ResourceError(
                "E_OOM",
                f"the run holds {size(held)} of host memory, {allowed}",
                hint="allow more with --max-ram: finished blocks are kept; "
                "a smaller --batch-size, --seqlen or --nsamples needs less, "
                "but starts over with --resume never",
            )

    def _held(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return host_bytes()

    def _held_on_host(self) -> int:
        return host_bytes() * self.local_world_size


class PauseBudget:
    """Decides for each block how many batches may wait inside it; warns once if not all may.

    The solver, or the sums of batches, take `solving_bytes` while batches wait.
    """

    def __init__(self, memory: Memory, report: Report, solving_bytes: int = 0) -> None:
        self.memory, self._report, self._has_warned = memory, report, False
        self._solving_bytes = solving_bytes
        self._last = self._most = MAX_WAITING_THREADS
        self._skip_next = False

    def n_paused(
        self, n_batches: int, bytes_each: int, streams: int = 1, forward_bytes: int = 0
    ) -> int:
        """Return how many of `n_batches` may wait: as many as the memory and its threads allow.

        Each batch holds `bytes_each` on each of its `streams` while it waits. One forward, which
        takes `forward_bytes`, and the solver must fit beside them.
        """
        if self._skip_next:
            self._skip_next = False
            return 0
        threads_each = streams
        bytes_each = streams * bytes_each
        if self.memory.device.type == "cuda":
            bytes_each += streams * CUBLAS_WORKSPACE_BYTES
        else:  # OpenMP keeps a team of threads for each thread that computes
            threads_each *= torch.get_num_threads()
        free, limit = self.memory.free_and_limit()
        by_threads = MAX_WAITING_THREADS // threads_each
        by_memory = n_batches
        left = max(0, free - self._solving_bytes - forward_bytes)
        room = min(WAITING_SHARE[self.memory.device.type] * free, UNBROKEN * left)
        if bytes_each:
            by_memory = int(room) // bytes_each
        n_paused = max(0, min(n_batches, by_memory, by_threads, self._most))
        if n_paused < n_batches:
            available = f"{size(left)} free"
            if limit is not None:
                available = f"{limit.option} leaves {size(left)}"
            needed = f"{size(n_batches * bytes_each)} and {n_batches * threads_each} threads needed"
            late = f"{n_batches - n_paused} of {n_batches} batches cannot wait inside a block"
            self._warn_once(f"{late} ({needed}, {available})")
        if n_paused:
            self._last = n_paused
        return n_paused

    def _warn_once(self, shortage: str) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        effect = "they run each block once per stage, which is slower"
        self._report(Warned("W_MEM_REPLAY", f"{shortage}: {effect}"))

    def shrink_after_oom(self) -> None:
        """Plan with less memory, because it ran out.

        In the next block no batch waits, in later blocks at most half as many as in the last one,
        and no hidden states stay on the device.
        """
        self.memory = replace(self.memory, states_on_host=True)
        self._most = min(self._last, self._most) // 2
        self._skip_next = self._has_warned = True


def _fields(file: Path) -> dict[str, str]:
    """Return the second word of each line of a file, by the first word."""
    found = {}
    for line in file.read_text().splitlines():
        words = line.split()
        if len(words) > 1:
            found[words[0]] = words[1]
    return found


# ---------------------------------------------------------------- errors from outside


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn errors that come from outside into errors that tell how to go on.

    Exhausted memory of device or host becomes ResourceError E_OOM, a failed GPU ResourceError
    E_GPU_LOST, and a GPU that the installed torch was not built for InputError E_DEVICE.
    """
    try:
        yield
    except GptqError:
        raise
    except Exception as error:
        told = _error_to_tell(error)
        if told is None:
            raise
        raise told from error


def _error_to_tell(error: Exception) -> GptqError | None:
    """Return the error to show instead of `error`; None if `error` is a mistake of the program."""
    if out_of_memory(error):
        return ResourceError(
            "E_OOM",
            f"there is not enough memory: {reason(error)}",
            hint="use --batch-size 1, a smaller --seqlen, or --device cpu, "
            "with --resume never if blocks are finished",
        )
    if _has_no_code(error):
        built = f"torch {torch.__version__} with CUDA {torch.version.cuda}"
        return InputError(
            "E_DEVICE",
            f"{built} cannot run on this GPU: {reason(error)}",
            hint="install a torch that was built for the GPU and its driver, "
            "which `gptq env` shows, or use --device cpu",
        )
    if gpu_lost(error):
        return ResourceError(
            "E_GPU_LOST",
            f"the GPU has failed: {reason(error)}",
            hint="look at `nvidia-smi`, and for Xid in `dmesg`, then run the same command again",
        )
    return None


def out_of_memory(error: BaseException) -> bool:
    """Return true if `error` tells that memory of a device or the host is used up."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ResourceError):  # of a file that could not be mapped
        return error.code == "E_OOM"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _has_any(error, _EXHAUSTED)


def gpu_lost(error: BaseException) -> bool:
    """Return true if `error` tells that this process can no longer use the GPU.

    False for errors of a call that was wrong in itself.
    """
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    return _is_of_gpu(error) and not _has_any(error, (*_MISTAKES, *_NO_CODE_FOR_GPU))


def _has_no_code(error: BaseException) -> bool:
    return _is_of_gpu(error) and _has_any(error, _NO_CODE_FOR_GPU)


def _is_of_gpu(error: BaseException) -> bool:
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and _has_any(error, _OF_THE_GPU)


def _has_any(error: BaseException, signs: Iterable[str]) -> bool:
    text = str(error)
    return any(sign in text for sign in signs)


def reason(error: BaseException) -> str:
    """Return the message of `error`, without advice and without positions in C++ sources."""
    line = (str(error).splitlines() or [""])[0]
    line = line[max(0, line.find("DefaultCPUAllocator")) :]
    return ". ".join(line.split(". ")[:3]).rstrip(". ") or "the host has no more"
