"""How much memory the process holds, without the pages of files it has mapped, reported after each block."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from gptq_cli.models.stream import ModelStream
from gptq_cli.pipeline.events import BlockFinished

_STATUS = Path("/proc/self/status")


def host_bytes() -> int:
    """Resident private memory now (Linux); elsewhere the largest resident size so far."""
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
