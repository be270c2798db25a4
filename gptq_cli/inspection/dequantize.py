"""Turn a quantized checkpoint back into plain weights, one linear at a time."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from gptq_cli.checkpoint.decoded import declared_dtype, is_stored_transposed
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import PackedModule, TensorSpec
from gptq_cli.checkpoint.quantization_config import packing_of, without_quantization
from gptq_cli.checkpoint.reader import SAFETENSORS_DTYPE, DequantizingReader
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.checkpoint.writer import CheckpointWriter, copy_side_files
from gptq_cli.errors import InputError
from gptq_cli.events import LayerStarted, PhaseStarted, Report, ignore
from gptq_cli.inspection.rewriting import Rewritten, fresh, open_source, publish, write_tensors
from gptq_cli.runtime.open_model import DTYPES, STORED_DTYPES, warn_of
from gptq_cli.storage.durable import write_json
from gptq_cli.storage.manifest import RUN_FILES

FLOATS = set(STORED_DTYPES)
CPU = torch.device("cpu")


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
    does not fit the dtype.
    """
    source, modules, _ = open_source(model, output, report, overwrite=overwrite)
    warn_of(source, report)
    wanted = STORED_DTYPES[declared_dtype(source)] if dtype == "auto" else DTYPES[dtype]
    plain = _PlainWeights(source, modules, wanted, cast=dtype != "auto")
    with fresh(output, report) as work:
        report(PhaseStarted("dequantize", f"{len(modules)} layers to {_name_of(wanted)}"))
        written = write_tensors(
            work.stage, plain.units(), lambda writer: plain.write(writer, report)
        )
        copy_side_files(source, work.stage, without=RUN_FILES)
        config = without_quantization(source.config)
        if dtype != "auto" and "torch_dtype" in config:
            config["torch_dtype"] = dtype
        elif dtype != "auto":
            config["dtype"] = dtype
        write_json(work.stage / "config.json", config)
        publish(work, source, overwrite=overwrite, command="dequantize", dtype=dtype)
    return Rewritten(output, len(modules), source.nbytes, written)


class _PlainWeights:
    """The tensors of a quantized checkpoint as floats.

    With `cast` the tensors that are not quantized get `dtype` as well.
    """

    def __init__(
        self,
        source: Checkpoint,
        modules: Iterable[PackedModule],
        dtype: torch.dtype,
        *,
        cast: bool,
    ) -> None:
        self._source, self._dtype, self._cast = source, dtype, cast
        self._modules = {module.name: module for module in modules}
        self._packing = packing_of(source)
        self._reader = DequantizingReader(source, CPU, "torch")

    def units(self) -> list[tuple[TensorSpec, ...]]:
        """Return the tensors to write, in file order."""
        specs = map(self.spec, self._source.tensors.values())
        return [(spec,) for spec in specs if spec is not None]

    def spec(self, tensor: TensorInfo) -> TensorSpec | None:
        """Return the tensor to write for a stored one.

        The weight of a packed linear takes the place of its codes; the other parts give None.
        """
        name, _, part = tensor.name.rpartition(".")
        if name in self._modules and part in self._packing.dtypes:
            if part != self._packing.codes:
                return None
            return self._weight_spec(self._modules[name])
        dtype = tensor.dtype
        if self._cast and dtype in FLOATS:
            dtype = SAFETENSORS_DTYPE[self._dtype]
        return TensorSpec(tensor.name, dtype, tensor.shape)

    def _weight_spec(self, module: PackedModule) -> TensorSpec:
        shape = (module.out_features, module.in_features)
        if is_stored_transposed(self._source.config, module.name):
            shape = shape[::-1]
        return TensorSpec(f"{module.name}.weight", SAFETENSORS_DTYPE[self._dtype], shape)

    def write(self, writer: CheckpointWriter, report: Report) -> None:
        """Write all tensors in file order; tensors that keep their dtype are copied."""
        for name, tensor in self._source.tensors.items():
            planned = self.spec(tensor)
            if planned is None:
                continue
            if (planned.name, planned.dtype) == (name, tensor.dtype):
                writer.copy(tensor)
                continue
            report(LayerStarted(planned.name))
            weight = self._reader.read(planned.name).to(self._dtype)
            if not bool(weight.isfinite().all()):
                raise _not_finite(planned.name, self._dtype)
            module = planned.name.removesuffix(".weight")
            if module in self._modules and is_stored_transposed(self._source.config, module):
                weight = weight.T
            writer.write(planned.name, weight)


def _not_finite(name: str, dtype: torch.dtype) -> InputError:
    message = f"`{name}` has values that are not finite as {_name_of(dtype)}"
    hint = "choose --dtype bfloat16 or float32; if that fails too, the checkpoint is damaged"
    return InputError("E_CKPT_NONFINITE", message, hint=hint)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
