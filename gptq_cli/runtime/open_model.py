"""The opened model of a run, and the hidden states of its batches between two blocks.

There is one state for each batch of calibration windows. States lie on the device if they take
little of its memory, else on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gptq_cli.checkpoint.claims import check_claims
from gptq_cli.checkpoint.decoded import forward_dtype
from gptq_cli.checkpoint.headers import DTYPES_OF_CONFIG
from gptq_cli.checkpoint.reader import has_kernel, open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.leftovers import OF_ONE_REVISION
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.events import Report, Warned
from gptq_cli.models.block_calls import State
from gptq_cli.models.names import Sources
from gptq_cli.models.skeleton import build_skeleton, load_config
from gptq_cli.models.stream import ModelStream, ReadAhead
from gptq_cli.planning.estimate import DEVICE_SHARE
from gptq_cli.runtime.memory import Memory, gpu_lost, out_of_memory
from gptq_cli.solver.triton_launch import dequantize_packed

# torch's dtypes by their names in config.json, and in safetensors headers
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES_OF_CONFIG}
STORED_DTYPES = {header: DTYPES[name] for name, header in DTYPES_OF_CONFIG.items()}
AHEAD_SHARE = 8  # a block that is read ahead may fill an eighth of the host's free memory


def resolve_backend(backend: str | None, device: torch.device) -> str | None:
    """Return "triton" or "torch" if it was chosen, else None.

    Raise ConfigError E_CFG_CONFLICT for triton without an accelerator.
    """
    if backend == "triton" and device.type == "cpu":
        raise ConfigError(
            "E_CFG_CONFLICT",
            "backend triton needs a GPU, the device is cpu",
            hint="use --backend torch",
        )
    if backend == "auto":
        return None
    return backend


def decoding_backend(
    checkpoint: Checkpoint, backend: str | None, device: torch.device, report: Report
) -> str:
    """Return what decodes the weights of `checkpoint`: "triton" on the device, "torch" on the host.

    If `backend` is None, it is triton for weights that its kernel decodes, on a device that runs
    it. If the first launch fails, W_NO_KERNELS is reported, and torch decodes.
    """
    if backend is not None:
        return backend
    if device.type == "cpu" or not has_kernel(checkpoint):
        return "torch"
    try:
        _decode_something(device)
    except Exception as error:
        if out_of_memory(error) or gpu_lost(error):
            raise
        from gptq_cli.runtime.kernels import why_no_kernels

        why = f"the kernel that decodes weights cannot run on {device}: {why_no_kernels(error)}"
        report(Warned("W_NO_KERNELS", f"{why}; torch decodes them on the CPU, which is slower"))
        return "torch"
    return "triton"


def _decode_something(device: torch.device) -> None:
    """Launch the kernel that decodes weights on a few of them."""
    torch.cuda.set_device(device)
    words = torch.zeros(4, 32, dtype=torch.int32, device=device)
    zeros = torch.zeros(1, 4, dtype=torch.int32, device=device)
    scales = torch.ones(1, 32, dtype=torch.float16, device=device)
    g_idx = torch.zeros(32, dtype=torch.int32, device=device)
    dequantize_packed(words, zeros, scales, g_idx, bits=4, v2=False, dtype=torch.float32)
    torch.cuda.synchronize(device)


def open_stream(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool,
    backend: str = "torch",
    host: Memory | None = None,
    images: bool = False,
) -> ModelStream:
    """Return the model of `checkpoint`, quantized or not, ready to run block by block on `device`.

    With `images` the model has its vision part. `device` becomes the current one. For an
    accelerator the next block is read ahead, into a share of the memory that is free on `host`.
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
        images=images,
    )
    _refuse_cut_stacks(skeleton.sources, checkpoint)
    dequantized = set(reader.names()) - set(checkpoint.tensors)
    # With triton the reader decodes on the device itself, so there is nothing to read ahead for.
    on_device = backend == "triton" and has_kernel(checkpoint)
    if device.type == "cpu" or host is None or on_device:
        return ModelStream(skeleton, reader, device, dequantized)
    return ModelStream(skeleton, ReadAhead(reader, host.free() // AHEAD_SHARE), device, dequantized)


def _refuse_cut_stacks(sources: Sources, checkpoint: Checkpoint) -> None:
    """Raise InputError E_CKPT_SHAPE for a tensor with fewer experts than the model has."""
    decoded = {name: weight.plain for name, weight in checkpoint.coded().items()}
    stored = {**checkpoint.tensors, **decoded}
    for piece in sources.slices.values():
        stack = stored.get(piece.stack)
        if stack is not None and piece.expert >= stack.shape[0]:
            message = f"`{piece.stack}` holds {stack.shape[0]} experts, but config.json has more"
            raise InputError("E_CKPT_SHAPE", message, hint=OF_ONE_REVISION)


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


class HiddenStates:
    """A list of states, each with the tensors of one batch; an item is given on the device.

    Of `n_all` batches these are the ones from number `first` on; by default they are all batches.
    """

    def __init__(
        self, states: Iterable[State], memory: Memory, first: int = 0, n_all: int | None = None
    ) -> None:
        self._states = list(states)
        self._memory, self._device = memory, memory.device
        if n_all is None:
            n_all = len(self._states)
        self.first_batch, self.n_all = first, n_all
        if self._device.type == "cuda" and not self._may_stay_on_device():
            self._change(lambda tensor: _pinned(tensor.cpu()))

    def _may_stay_on_device(self) -> bool:
        if self._memory.states_on_host:
            return False
        nbytes = self.nbytes
        return nbytes * DEVICE_SHARE <= self._memory.free() + nbytes

    def copy(self) -> HiddenStates:
        """Return the same states for a second stream, which replaces them independently."""
        other = HiddenStates((), self._memory, self.first_batch, self.n_all)
        other._states = list(self._states)
        other._change(self._copied)
        return other

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in tree_leaves(self._states) if tensor is not None)

    @property
    def stored(self) -> tuple[State, ...]:
        """The states where they lie, on the device or the host."""
        return tuple(self._states)

    def restore(self, states: Iterable[State]) -> None:
        """Replace all states; each new one lies where the old one was."""
        for batch, (state, old) in enumerate(zip(states, self._states, strict=True)):
            self._states[batch] = _moved(state, _hidden(old).device)
        if self._device.type == "cuda":
            self._change(_pinned)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, batch: int) -> State:
        return _each(self._states[batch], lambda tensor: tensor.to(self._device, non_blocking=True))

    def __setitem__(self, batch: int, state: State) -> None:
        kept = _hidden(self._states[batch])
        if kept.device == _hidden(state).device:
            self._states[batch] = state
        elif isinstance(state, tuple):
            self._states[batch] = (kept.copy_(state[0]), *_moved(state[1:], kept.device))
        else:
            self._states[batch] = kept.copy_(state)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for batch, state in enumerate(self._states):
            self._states[batch] = _each(state, change)

    def _copied(self, tensor: Tensor) -> Tensor:
        if tensor.device == self._device:
            return tensor
        # `__setitem__` writes into tensors on the host, so each stream needs its own.
        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)


def _pinned(tensor: Tensor) -> Tensor:
    """Return a tensor of the host in memory from which copies to a device need no waiting."""
    if tensor.device.type == "cpu":
        return tensor.pin_memory()
    return tensor


def _hidden(state: State) -> Tensor:
    """Return the hidden states of a state, which may have other tensors beside them."""
    if isinstance(state, tuple):
        hidden: Tensor = state[0]
        return hidden
    return state


def _moved(state: State, device: torch.device) -> State:
    return _each(state, lambda tensor: tensor.to(device))


def _each(state: State, change: Callable[[Tensor], Tensor]) -> State:
    changed: State = tree_map_only(Tensor, change, state)
    return changed
