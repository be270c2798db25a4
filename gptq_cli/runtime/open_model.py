"""What quantizing and evaluating both begin with: a device, a dtype, the model as a stream."""

from __future__ import annotations

from typing import Any

import torch

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.events import Report, Warned
from gptq_cli.models.skeleton import build_skeleton, load_config
from gptq_cli.models.stream import ModelStream, ReadAhead
from gptq_cli.runtime.memory import Memory

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
AHEAD_SHARE = 8  # a block that is read ahead may fill an eighth of the host's free memory
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def resolve_device(device: str) -> torch.device:
    """The device that `device` names ("auto": CUDA if there is one); InputError E_DEVICE if it is not there.

    With its number, as its tensors will give it: `cuda` and `cuda:0` are not equal.
    """
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if not device.startswith("cuda"):
        return torch.device(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(device.partition(":")[2] or 0)
    if index >= count:
        raise InputError(
            "E_DEVICE", f"no CUDA device {index}: torch {torch.__version__} sees {count}",
            hint="use --device cpu, or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return torch.device("cuda", index)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """ "torch" or "triton"; ConfigError E_CFG_CONFLICT for triton without an accelerator."""
    if backend == "triton" and device.type == "cpu":
        raise ConfigError(
            "E_CFG_CONFLICT",
            "backend triton needs a GPU, the device is cpu",
            hint="use --backend torch",
        )
    return "triton" if backend == "triton" else "torch"


def open_stream(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    backend: str = "torch",
    host: Memory | None = None,
) -> ModelStream:
    """The model of `checkpoint`, quantized or not, ready to be run block by block on `device`, the current one then.

    For an accelerator the next block is read ahead, into a share of what is free of `host`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current one, wherever tensors are
    check_claims(checkpoint)
    config = load_config(checkpoint.directory, trust_remote_code=trust_remote_code)
    reader = open_reader(checkpoint, device, backend)
    skeleton = build_skeleton(
        checkpoint.directory,
        config,
        reader.names(),
        _forward_dtype(dtype, config, checkpoint),
        device,
        trust_remote_code=trust_remote_code,
        listed=checkpoint.absent,
    )
    dequantized = set(reader.names()) - set(checkpoint.tensors)
    if (
        device.type == "cpu" or host is None or backend == "triton"
    ):  # which decodes on the device itself
        return ModelStream(skeleton, reader, device, dequantized)
    return ModelStream(skeleton, ReadAhead(reader, host.free() // AHEAD_SHARE), device, dequantized)


def warn_of(checkpoint: Checkpoint, report: Report) -> None:
    """Report what a user should know about a checkpoint before anything is made of it."""
    for code, text in checkpoint.remarks:
        report(Warned(code, text))


def _forward_dtype(dtype: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    if dtype != "auto":
        return DTYPES[dtype]
    declared = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return (
        declared
        if isinstance(declared, torch.dtype)
        else _stored_dtype(list(checkpoint.tensors.values()))
    )


def _stored_dtype(tensors: list[TensorInfo]) -> torch.dtype:
    return next(
        (STORED_DTYPES[t.dtype] for t in tensors if t.dtype in STORED_DTYPES), torch.float32
    )
