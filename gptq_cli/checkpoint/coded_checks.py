"""Checks of a checkpoint whose weights are in codes: what is lost, and what is not as it is noted.

The parts of each weight were compared when the checkpoint was opened, see `coded.py`. Needs no
torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from gptq_cli.checkpoint.claims import DOWNLOAD_WEIGHTS, check_complete
from gptq_cli.checkpoint.coded import POWERS, Coded, plain_tensors
from gptq_cli.checkpoint.defects import Defect, tensor_defect
from gptq_cli.checkpoint.headers import TensorInfo, count_nan_powers, is_zero, read_array
from gptq_cli.checkpoint.source import Checkpoint

# Parts that mean nothing without a weight.
PARTS = frozenset({
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point",
    "weight_g_idx", "weight_global_scale", "weight_scale_2", "qweight", "qzeros",
})  # fmt: skip
STACKED = {"blocks": "scales", "scales": "blocks"}


def check_coded(
    checkpoint: Checkpoint, weights: Mapping[str, Coded], *, numbers: bool
) -> Iterator[Defect]:
    """Yield what is lost, and with `numbers` noted shapes that are not those of the codes."""
    plain, _ = plain_tensors(checkpoint, weights)
    modules = [name.removesuffix(".weight") for name in weights]
    yield from check_complete(replace(checkpoint, tensors=plain), modules)
    yield from _check_parts(checkpoint.tensors.values(), plain)
    if numbers:
        yield from _check_notes(checkpoint, weights.values())


def _check_parts(
    tensors: Iterable[TensorInfo], plain: Mapping[str, TensorInfo]
) -> Iterator[Defect]:
    """Yield parts that are stored without the codes or the scales that they belong to."""
    for tensor in tensors:
        module, _, part = tensor.name.rpartition(".")
        stem, _, kind = tensor.name.rpartition("_")
        lost = ""
        if part in PARTS and f"{module}.weight" not in plain:
            lost = f"`{module}.weight`"
        elif kind in STACKED and tensor.dtype in POWERS and stem not in plain:
            lost = f"`{stem}_{STACKED[kind]}`"
        if lost:
            message = f"is stored without {lost}"
            yield tensor_defect("E_CKPT_INCOMPLETE", tensor, message, DOWNLOAD_WEIGHTS)


def _check_notes(checkpoint: Checkpoint, weights: Iterable[Coded]) -> Iterator[Defect]:
    """Yield shapes in tensors of compressed-tensors that are not those of the codes."""
    for weight in weights:
        name = weight.parts.get("weight_shape")
        if name is None:
            continue
        note = checkpoint.tensors[name]
        noted, shape = read_array(note).tolist(), list(weight.plain.shape)
        if noted != shape:
            yield tensor_defect("E_CKPT_SHAPE", note, f"holds {noted}, but the codes are {shape}")


def check_scales(checkpoint: Checkpoint, weights: Iterable[Coded]) -> Iterator[Defect]:
    """Yield scales of which none is above zero, and powers of two that are NaN."""
    for weight in weights:
        scales = checkpoint.tensors[weight.parts["scales"]]
        if scales.nbytes and is_zero(scales):
            message = "holds nothing but zeros, as a file that was never written does"
            yield tensor_defect("E_CKPT_CORRUPT", scales, message)
        elif scales.dtype in POWERS:
            count = count_nan_powers(scales)
            if count:
                message = f"holds NaN or infinity, {count} times"
                yield tensor_defect("E_CKPT_NONFINITE", scales, message)
