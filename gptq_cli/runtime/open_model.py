"""The steps with which quantizing and evaluating begin: device, dtype, the model as a stream."""

from __future__ import annotations

from typing import Any

import torch

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.headers import DTYPES_OF_CONFIG
from gptq_cli.checkpoint.reader import open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.events import Report, Warned
from gptq_cli.models.skeleton import build_skeleton, load_config
from gptq_cli.models.stream import ModelStream, ReadAhead
from gptq_cli.runtime.memory import Memory

# torch's dtypes by their names in config.json, and in safetensors headers
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES_OF_CONFIG}
STORED_DTYPES = {header: DTYPES[name] for name, header in DTYPES_OF_CONFIG.items()}
AHEAD_SHARE = 8  # a block that is read ahead may fill an eighth of the host's free memory


def resolve_device(device: str) -> torch.device:
    """Return the device with this name, or InputError E_DEVICE if there is none.

    "auto" is the first CUDA device, or the CPU. A CUDA device gets its number, as tensors on it
    have: `cuda` and `cuda:0` are not equal.
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
            f"no CUDA device {index}: torch {torch.__version__} sees {count}",
            hint="use --device cpu, or look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", index)


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """Return "triton" if it was chosen, else "torch".

    Raise ConfigError E_CFG_CONFLICT for triton without an accelerator.
    """
    if backend != "triton":
        return "torch"
    if device.type == "cpu":
        raise ConfigError(
            "E_CFG_CONFLICT",
            "backend triton needs a GPU, the device is cpu",
            hint="use --backend torch",
        )
    return "triton"


def open_stream(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    backend: str = "torch",
    host: Memory | None = None,
) -> ModelStream:
    """Return the model of `checkpoint`, quantized or not, ready to run block by block on `device`.

    `device` becomes the current one. For an accelerator the next block is read ahead, into a share
    of the memory that is free on `host`.
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
    # With triton the reader decodes on the device itself, so there is nothing to read ahead for.
    if device.type == "cpu" or host is None or backend == "triton":
        return ModelStream(skeleton, reader, device, dequantized)
    return ModelStream(skeleton, ReadAhead(reader, host.free() // AHEAD_SHARE), device, dequantized)


def warn_of(checkpoint: Checkpoint, report: Report) -> None:
    """Report the warnings about a checkpoint before anything is made of it."""
    for code, text in checkpoint.remarks:
        report(Warned(code, text))


def _forward_dtype(dtype: str, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that the model runs in, as `forward_dtype` does.

    If the dtype is "auto", the one in transformers' `config` counts more than config.json itself.
    """
    declared = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if dtype == "auto" and isinstance(declared, torch.dtype):
        return declared
    return DTYPES[forward_dtype(checkpoint, dtype)]
