"""Weights that are stored in floats of 8 or 4 bits, in bytes, or by AWQ, as headers show them.

Each comes with scales (O out_features, I in_features, G groups of a row):

    fp8     X.weight F8_E4M3 [O, I]; scales of the whole, of each row, of groups or of blocks
    mxfp8   the same with groups of 32, whose scales are powers of two
    mxfp4   X.weight_packed U8 or X.weight I8 [O, I / 2], or X_blocks U8 [E, O, I / 32, 16] of
            experts that gpt-oss holds as X [E, I, O]; groups of 32, scales powers of two
    nvfp4   X.weight_packed or X.weight U8 [O, I / 2]; groups of 16, scales F8_E4M3, and one scale
            of them all that divides (weight_global_scale) or multiplies (weight_scale_2)
    int8    X.weight I8 [O, I], with zero points if it is asymmetric
    packed  the parts of compressed-tensors, if it quantizes activations or other weights as well
    awq     X.qweight I32 [I, O / 8], X.qzeros I32 [G, O / 8], X.scales [G, O]

Sources: transformers 5.23 `integrations/{finegrained_fp8,mxfp4,fbgemm_fp8}.py`, compressed-tensors
0.20.1 `compressors`, modelopt 0.47 `torch/export` and `qtensor`, AutoAWQ 0.2.9 `packing_utils.py`.
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gptq_cli.checkpoint.headers import DTYPES_OF_CONFIG, FEW_BITS, TensorInfo
from gptq_cli.checkpoint.layout import AGAIN, CODED_METHODS, FP8, packed_module, stored_parts
from gptq_cli.errors import InputError

if TYPE_CHECKING:
    from gptq_cli.checkpoint.compressed_tensors import GroupedConfig

Kind = Literal["fp8", "fp4", "stacked fp4", "int8", "packed", "awq"]
Block = tuple[int, int]  # rows and columns that share a scale

INTEGERS = ("int8", "packed", "awq")
SCALES = ("weight_scale_inv", "weight_scale", "scale")  # names of scales beside X.weight
POWERS = ("U8", "F8_E8M0")  # dtypes whose scales are powers of two
FLOATS = ("F32", "BF16", "F16")
MX_GROUP, NV_GROUP = 32, 16
AWQ_OUTPUTS = 8  # of 4 bits in a word
VALUES = 32  # packed together by compressed-tensors
# Scales of activations and of the key-value cache, which mean nothing beside plain weights.
OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale",
    "output_scale", "output_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale",
    "k_zero_point", "v_zero_point", "kv_cache_scaling_factor",
)  # fmt: skip
# Parts of a linear that change its weight in ways that are not read.
CHANGING = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "bitmask", "compressed")
OTHER_FORM = (
    "use a float16 or bfloat16 version of the model: `gptq explain E_CKPT_FP8` lists the forms "
    "that are read"
)


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight in codes, and the tensor `plain` that it stands for, at the place of its codes.

    `parts` are names of stored tensors: "codes", "scales", and if there are any "zeros", and
    "divisor" or "factor" of all scales. `form` describes the form in words; `bits` are those of
    packed codes.
    """

    plain: TensorInfo
    kind: Kind
    parts: Mapping[str, str]
    block: Block
    form: str
    bits: int = 0

    @property
    def rounded(self) -> bool:
        """Whether integers were rounded from a better model, and would be rounded again."""
        return self.kind in INTEGERS


class Stored(Protocol):
    """What a checkpoint tells about its weights, which `Checkpoint` describes."""

    @property
    def directory(self) -> Path:
        """The directory, for messages."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The stored tensors by name, in file order."""

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config`, None if there is none."""

    @property
    def method(self) -> str | None:
        """How weights are quantized, None if they are plain numbers."""

    @property
    def named_dtype(self) -> str | None:
        """The dtype that config.json names, None if it names none."""


def coded_weights(checkpoint: Stored) -> dict[str, Coded]:
    """Return the weights in codes by their plain names, in file order.

    InputError E_CKPT_FP8 for floats of few bits in another form, and for weights that another part
    changes; E_CKPT_INCOMPLETE for a weight without scales, or without zero points that its settings
    ask for, E_CKPT_SHAPE if the parts do not fit.
    """
    found: dict[str, Coded] = {}
    if checkpoint.method in CODED_METHODS:
        finder = _Finder(checkpoint)
        for name in checkpoint.tensors:
            coded = finder.find(name)
            if coded is not None:
                found[coded.plain.name] = coded
    if found:
        _refuse_changed(checkpoint, found.values())
    used = _part_names(found.values())
    for tensor in checkpoint.tensors.values():
        if tensor.dtype.startswith(FEW_BITS) and tensor.name not in used:
            raise _unreadable(checkpoint, tensor)
    return found


def _part_names(weights: Iterable[Coded]) -> set[str]:
    names: set[str] = set()
    for coded in weights:
        names.update(coded.parts.values())
    return names


def _refuse_changed(checkpoint: Stored, weights: Iterable[Coded]) -> None:
    """Raise InputError E_CKPT_FP8 if another part or a transform changes one of the weights."""
    stored = checkpoint.quantization or {}
    for key in ("transform_config", "sparsity_config"):
        settings = stored.get(key) or {}
        if settings and settings.get("format") != "dense":
            message = f"`{checkpoint.directory}` is quantized with {key}, which is not read here"
            raise InputError("E_CKPT_FP8", message, hint=OTHER_FORM)
    for coded in weights:
        module = coded.plain.name.removesuffix(".weight")
        for part in CHANGING:
            if f"{module}.{part}" in checkpoint.tensors:
                message = f"`{module}` has a {part}, which is not read here"
                raise InputError("E_CKPT_FP8", message, hint=OTHER_FORM)


def _unreadable(checkpoint: Stored, weight: TensorInfo) -> InputError:
    message = f"`{checkpoint.directory}` holds {weight.dtype} weights, first `{weight.name}`"
    return InputError("E_CKPT_FP8", f"{message}, in a form that is not read here", hint=OTHER_FORM)


def plain_tensors(
    checkpoint: Stored, weights: Mapping[str, Coded]
) -> tuple[dict[str, TensorInfo], list[str]]:
    """Return the tensors of the plain model in file order, and names of those that are left out.

    Each weight stands at the place of its codes. Left out are scales of activations.
    """
    by_codes = {coded.parts["codes"]: coded for coded in weights.values()}
    hidden = _part_names(weights.values())
    tensors: dict[str, TensorInfo] = {}
    left_out = []
    for name, tensor in checkpoint.tensors.items():
        if name in by_codes:
            plain = by_codes[name].plain
            tensors[plain.name] = plain
        elif name in hidden:
            continue
        elif name.rpartition(".")[2] in OF_ACTIVATIONS:
            left_out.append(name)
        else:
            tensors[name] = tensor
    return tensors, left_out


# ---------------------------------------------------------------- one weight


class _Finder:
    """Finds the weight whose codes a tensor holds."""

    def __init__(self, checkpoint: Stored) -> None:
        self._checkpoint, self._tensors = checkpoint, checkpoint.tensors
        self._dtype = DTYPES_OF_CONFIG.get(checkpoint.named_dtype or "", "BF16")
        self._block = _declared_block(checkpoint.quantization or {})
        self._is_awq = checkpoint.method == "awq"
        self._packed: GroupedConfig | None = None
        self._asymmetric: dict[str, bool] = {}
        if checkpoint.method == "compressed-tensors":
            from gptq_cli.checkpoint.compressed_tensors import (
                asymmetric_targets,
                settings_of_source,
            )

            self._packed = settings_of_source(checkpoint.quantization or {})
            self._asymmetric = asymmetric_targets(checkpoint.quantization or {})

    def find(self, name: str) -> Coded | None:
        """Return the weight, None if the tensor holds no codes."""
        tensor = self._tensors[name]
        module, _, part = name.rpartition(".")
        if self._is_awq:
            return self._awq(module, tensor) if part == "qweight" else None
        stem, _, kind = name.rpartition("_")
        if kind == "blocks" and f"{stem}_scales" in self._tensors:
            return self._stacked(tensor)
        if part == "weight_packed":
            return self._packed_codes(module, tensor)
        if part == "weight" and len(tensor.shape) == 2:
            return self._weight(module, tensor)
        return None

    def _packed_codes(self, module: str, tensor: TensorInfo) -> Coded | None:
        if tensor.dtype == "U8":
            return self._fp4(module, tensor)
        if self._packed is None:
            return None
        from gptq_cli.checkpoint.compressed_tensors import CompressedTensorsPacking

        packing = CompressedTensorsPacking(self._packed.settings)
        stored = stored_parts(module, self._tensors, packing)
        found = packed_module(module, stored, packing)
        sizes = {"weight_packed": found.in_features, "weight_zero_point": found.out_features}
        for part, info in stored.items():
            if sizes.get(part, 0) % VALUES:
                raise _misfit(info, f"{sizes[part]} features are not read, only multiples of 32")
        if "weight_zero_point" not in stored:
            self._refuse_lost_zeros(module)
        parts = {part: info.name for part, info in stored.items() if part != "weight_packed"}
        parts["scales"] = parts.pop("weight_scale")
        shape = (found.out_features, found.in_features)
        form = f"pack-quantized, {found.bits} bits group_size {found.group_size}"
        block = (1, found.in_features // found.groups)
        coded = self._coded(tensor, shape, "packed", parts, block, form, f"{module}.weight")
        return replace(coded, bits=found.bits)

    def _weight(self, module: str, tensor: TensorInfo) -> Coded | None:
        """Return the weight for a matrix with the name of a weight, None if it holds no codes."""
        if tensor.dtype == "F8_E4M3":
            return self._fp8(module, tensor)
        if tensor.dtype == "U8":
            return self._fp4(module, tensor)
        if tensor.dtype != "I8":
            return None
        scales = self._scales(module, tensor)
        if scales.dtype in POWERS:
            return self._fp4(module, tensor)
        return self._int8(module, tensor, scales)

    def _scales(self, module: str, weight: TensorInfo) -> TensorInfo:
        """Return the scales of a weight, with at least one dimension."""
        for part in SCALES:
            scales = self._tensors.get(f"{module}.{part}")
            if scales is not None:
                return replace(scales, shape=scales.shape or (1,))
        usual = SCALES[1]
        if self._checkpoint.method == FP8:
            usual = SCALES[0]
        message = f"`{weight.name}` is stored as {weight.dtype}, but its scales `{module}.{usual}`"
        raise InputError("E_CKPT_INCOMPLETE", f"{message} are missing", hint=AGAIN)

    def _coded(
        self,
        codes: TensorInfo,
        shape: tuple[int, ...],
        kind: Kind,
        parts: Mapping[str, str],
        block: Block,
        form: str,
        name: str = "",
    ) -> Coded:
        plain = replace(codes, name=name or codes.name, dtype=self._dtype, shape=shape)
        return Coded(plain, kind, {"codes": codes.name, **parts}, block, form)

    def _fp8(self, module: str, weight: TensorInfo) -> Coded:
        scales = self._scales(module, weight)
        if scales.dtype not in (*FLOATS, *POWERS):
            raise _misfit(scales, f"`{weight.name}` asks for floats or exponents")
        block = self._block_of_floats(weight, scales)
        form = f"fp8 {_words(block, weight.shape)}"
        if scales.dtype in POWERS and block == (1, MX_GROUP):
            form = f"mx{form}"
        return self._coded(weight, weight.shape, "fp8", {"scales": scales.name}, block, form)

    def _block_of_floats(self, weight: TensorInfo, scales: TensorInfo) -> Block:
        """Return the rows and columns that share a scale, those of the settings if they fit."""
        declared = self._block
        if declared is not None and scales.shape == _grid(weight.shape, declared):
            return declared
        block = _block_of(weight.shape, scales)
        if block is not None:
            return block
        if declared is None:
            raise _unreadable(self._checkpoint, weight)
        expected = list(_grid(weight.shape, declared))
        asked = f"blocks of {declared[0]}x{declared[1]} in {list(weight.shape)} ask for {expected}"
        raise _misfit(scales, asked)

    def _int8(self, module: str, weight: TensorInfo, scales: TensorInfo) -> Coded:
        block = _block_of(weight.shape, scales)
        if scales.dtype not in FLOATS or block is None:
            raise _misfit(scales, f"`{weight.name}` {list(weight.shape)} asks for floats of rows")
        parts = {"scales": scales.name}
        zeros = self._tensors.get(f"{module}.weight_zero_point")
        if zeros is None:
            self._refuse_lost_zeros(module)
        else:
            if zeros.shape != self._tensors[scales.name].shape:
                raise _misfit(zeros, f"its scales have the shape {list(scales.shape)}")
            parts["zeros"] = zeros.name
        form = f"int8 {_words(block, weight.shape)}"
        return self._coded(weight, weight.shape, "int8", parts, block, form)

    def _refuse_lost_zeros(self, module: str) -> None:
        """Raise InputError E_CKPT_INCOMPLETE for integers whose settings ask for zero points."""
        if not self._asymmetric:
            return
        from gptq_cli.checkpoint.compressed_tensors import deciding_target

        target = deciding_target(self._asymmetric, module)
        if target is not None and self._asymmetric[target]:
            zeros = f"`{module}.weight_zero_point`"
            message = f"`{module}` is asymmetric by config.json, but its zero points {zeros}"
            raise InputError("E_CKPT_INCOMPLETE", f"{message} are missing", hint=AGAIN)

    def _fp4(self, module: str, codes: TensorInfo) -> Coded:
        scales = self._scales(module, codes)
        if len(codes.shape) != 2:
            raise _misfit(codes, "it must have two dimensions")
        parts = {"scales": scales.name}
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        group, form = MX_GROUP, f"mxfp4 in groups of {MX_GROUP}"
        if scales.dtype == "F8_E4M3":
            group, form = NV_GROUP, f"nvfp4 in groups of {NV_GROUP}"
            parts |= self._scale_of_scales(module)
        elif scales.dtype not in POWERS:
            raise _unreadable(self._checkpoint, codes)
        if columns % group or scales.shape != (rows, columns // group):
            asked = f"{[rows, columns]} asks for {[rows, columns // group]} in groups of {group}"
            raise _misfit(scales, f"`{codes.name}` for {asked}")
        name = f"{module}.weight"
        return self._coded(codes, (rows, columns), "fp4", parts, (1, group), form, name)

    def _scale_of_scales(self, module: str) -> dict[str, str]:
        """Return the name of the one number that changes all scales of a weight."""
        for part, role in (("weight_global_scale", "divisor"), ("weight_scale_2", "factor")):
            tensor = self._tensors.get(f"{module}.{part}")
            if tensor is not None:
                if tensor.dtype != "F32" or tensor.shape not in ((), (1,)):
                    raise _misfit(tensor, "it must be one F32 number")
                return {role: tensor.name}
        missing = f"`{module}.weight_global_scale` or `{module}.weight_scale_2`"
        message = f"`{module}` is stored as nvfp4, but {missing} is missing"
        raise InputError("E_CKPT_INCOMPLETE", message, hint=AGAIN)

    def _stacked(self, blocks: TensorInfo) -> Coded:
        name = blocks.name.removesuffix("_blocks")
        scales = self._tensors[f"{name}_scales"]
        fits = len(blocks.shape) == 4 and blocks.shape[3] == MX_GROUP // 2
        if not fits or blocks.dtype != "U8" or scales.dtype not in POWERS:
            raise _unreadable(self._checkpoint, blocks)
        if scales.shape != blocks.shape[:3]:
            raise _misfit(scales, f"`{blocks.name}` asks for {list(blocks.shape[:3])}")
        experts, rows, groups, _ = blocks.shape
        shape = (experts, groups * MX_GROUP, rows)
        form = f"mxfp4 in groups of {MX_GROUP}"
        parts = {"scales": scales.name}
        return self._coded(blocks, shape, "stacked fp4", parts, (1, MX_GROUP), form, name)

    def _awq(self, module: str, codes: TensorInfo) -> Coded:
        zeros, scales = self._part(module, "qzeros"), self._part(module, "scales")
        in_features, words = [*codes.shape, 0, 0][:2]
        out_features, groups = AWQ_OUTPUTS * words, [*scales.shape, 0][0]
        fits = (
            scales.dtype in FLOATS
            and scales.shape == (groups, out_features)
            and zeros.shape == (groups, words)
            and groups > 0
            and in_features % groups == 0
        )
        version = (self._checkpoint.quantization or {}).get("version", "gemm")
        if not fits or str(version).lower() != "gemm":
            message = f"`{module}` is packed by AWQ in another way than version gemm with 4 bits"
            hint = "start from the full-precision model it was made from"
            raise InputError("E_CKPT_QUANTIZED", message, hint=hint)
        group = in_features // groups
        parts = {"scales": scales.name, "zeros": zeros.name}
        shape, form = (out_features, in_features), f"awq, 4 bits group_size {group}"
        return self._coded(codes, shape, "awq", parts, (1, group), form, f"{module}.weight")

    def _part(self, module: str, part: str) -> TensorInfo:
        tensor = self._tensors.get(f"{module}.{part}")
        if tensor is None:
            message = f"`{module}` has a qweight but no {part}"
            raise InputError("E_CKPT_INCOMPLETE", message, hint=AGAIN)
        return tensor


def _declared_block(stored: Mapping[str, Any]) -> Block | None:
    """Return the rows and columns that share a scale by the settings, None if they name none."""
    sizes = [stored.get("weight_block_size")]
    groups = stored.get("config_groups")
    if isinstance(groups, dict):
        sizes += map(_block_of_group, groups.values())
    for size in sizes:
        if isinstance(size, list) and len(size) == 2:
            rows, columns = size
            if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
                return rows, columns
    return None


def _block_of_group(group: object) -> Any:
    """Return what an entry of `config_groups` states as the block of its weights, else None."""
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        return None
    weights = group["weights"]
    if weights.get("strategy") != "block":
        return None
    return weights.get("block_structure")


def _block_of(shape: tuple[int, ...], scales: TensorInfo) -> Block | None:
    """Return the rows and columns of a weight that share one of its scales.

    The scales are those of the whole, of each row, or of groups of each row; None if they are not.
    """
    rows, columns = shape
    if scales.shape in ((1,), (1, 1)):
        return rows, columns
    if scales.shape == (rows,):
        return 1, columns
    if len(scales.shape) == 2 and scales.shape[0] == rows:
        groups = scales.shape[1]
        if groups and columns % groups == 0:
            return 1, columns // groups
    return None


def _grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Return the rows and columns of the scales of a weight of this shape."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _misfit(tensor: TensorInfo, asked: str) -> InputError:
    message = f"`{tensor.name}` is {tensor.dtype} {list(tensor.shape)}, but {asked}"
    return InputError("E_CKPT_SHAPE", message, hint=AGAIN)


def _words(block: Block, shape: tuple[int, ...]) -> str:
    if block == shape:
        return "with one scale"
    if block == (1, shape[1]):
        return "with a scale for each row"
    if block[0] == 1:
        return f"in groups of {block[1]}"
    return f"in blocks of {block[0]}x{block[1]}"
