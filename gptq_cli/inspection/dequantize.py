"""Turn a quantized checkpoint back into plain weights, one linear at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from gptq_cli.checkpoint.decoded import declared_dtype, is_stored_transposed, plain_view
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import TensorSpec
from gptq_cli.checkpoint.quantization_config import without_quantization
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, open_reader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.verify import refuse_damaged
from gptq_cli.checkpoint.writer import CheckpointWriter, copy_side_files
from gptq_cli.errors import InputError, counted
from gptq_cli.events import LayerStarted, PhaseStarted, Report, ignore
from gptq_cli.files import ByteCount
from gptq_cli.inspection.rewriting import Rewritten, fresh, open_source, publish, write_tensors
from gptq_cli.runtime.open_model import DTYPES, STORED_DTYPES, warn_of
from gptq_cli.storage.durable import write_json
from gptq_cli.storage.manifest import RUN_FILES

FLOATS = set(STORED_DTYPES)


def dequantize_checkpoint(
    model: str,
    output: Path,
    dtype: str = "auto",
    *,
    overwrite: bool = False,
    report: Report = ignore,
) -> Rewritten:
    """Write the quantized checkpoint MODEL as plain weights, which load without a quantizer.

    With `dtype` auto, weights get the dtype in config.json, or else that of the tensors beside
    them, and the other tensors are copied byte for byte. Any other `dtype` is given to all floats.
    Raises InputError E_CKPT_QUANTIZED if it cannot be decoded, E_CKPT_NONFINITE if a weight
    does not fit the dtype; GateError E_CKPT_HASH if a file differs from the source's manifest.
    """
    source, _, _ = open_source(model, output, report, overwrite=overwrite)
    warn_of(source, report)
    wanted = STORED_DTYPES[declared_dtype(source)] if dtype == "auto" else DTYPES[dtype]
    weights = _PlainWeights(source, wanted, cast=dtype != "auto")
    n_layers = len(weights.plain.parts)
    refuse_damaged(source.directory, report=report)
    with fresh(output, report) as work:
        layers = counted(n_layers, "layer")
        report(PhaseStarted("dequantize", f"{layers} to {_name_of(wanted)}"))
        write = partial(weights.write, report)
        written = write_tensors(work.stage, weights.units(), write, report)
        copy_side_files(source, work.stage, without=RUN_FILES)
        config = without_quantization(source.config)
        if dtype != "auto" and "torch_dtype" in config:
            config["torch_dtype"] = dtype
        elif dtype != "auto":
            config["dtype"] = dtype
        write_json(work.stage / "config.json", config)
        publish(work, source, {}, report, overwrite=overwrite, command="dequantize", dtype=dtype)
    return Rewritten(output, n_layers, source.nbytes, written)


class _PlainWeights:
    """The tensors of a quantized checkpoint as floats.

    Decoded weights get `dtype`. With `cast` the tensors that are not quantized get it as well.
    """

    def __init__(self, source: Checkpoint, dtype: torch.dtype, *, cast: bool) -> None:
        self._source, self._dtype, self._cast = source, dtype, cast
        self.plain = plain_view(source, allow_requantize=True)
        self._reader = open_reader(source)

    def units(self) -> list[tuple[TensorSpec, ...]]:
        """Return the tensors to write, in file order."""
        return [(self.spec(tensor),) for tensor in self.plain.tensors.values()]

    def spec(self, tensor: TensorInfo) -> TensorSpec:
        """Return the tensor to write for a tensor of the plain model."""
        dtype, shape = tensor.dtype, tensor.shape
        is_decoded = tensor.name in self.plain.parts
        if is_decoded or (self._cast and dtype in FLOATS):
            dtype = SAFETENSORS_DTYPE[self._dtype]
        if self._is_turned(tensor.name):
            shape = shape[::-1]
        return TensorSpec(tensor.name, dtype, shape)

    def _is_turned(self, name: str) -> bool:
        """Return whether a weight is decoded as [O, I], but the model stores it [I, O]."""
        if not self.plain.is_packed(name):
            return False
        return is_stored_transposed(self._source.config, name.removesuffix(".weight"))

    def write(self, report: Report, writer: CheckpointWriter, count: ByteCount) -> None:
        """Write all tensors in file order; tensors that keep their dtype are copied."""
        for name, tensor in self.plain.tensors.items():
            if name not in self.plain.parts and self.spec(tensor).dtype == tensor.dtype:
                writer.copy(tensor, count)
                continue
            report(LayerStarted(name))
            read = self._reader.read(name)
            weight = read.to(self._dtype)
            if not bool(weight.isfinite().all()):
                raise _not_finite(name, self._dtype, is_cast=bool(read.isfinite().all()))
            if self._is_turned(name):
                weight = weight.T
            writer.write(name, weight)
            count.passed(weight.nbytes)


def _not_finite(name: str, dtype: torch.dtype, *, is_cast: bool) -> InputError:
    """Return the error for a tensor; `is_cast` if it is finite in the dtype that it is read in."""
    if is_cast:
        message = f"`{name}` has values that are not finite as {_name_of(dtype)}"
        hint = "choose --dtype bfloat16 or float32"
        return InputError("E_CKPT_NONFINITE", message, hint=hint)
    message = f"`{name}` has values that are not finite: the checkpoint is damaged"
    return InputError("E_CKPT_NONFINITE", message, hint="download or quantize it again")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
