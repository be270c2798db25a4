"""The tensors of a checkpoint and the place of every byte of an output. Needs no torch.

A weight may be stored as several tensors. A GPTQ linear is four tensors, with the shapes of
AutoGPTQ's QuantLinear (O out_features, I in_features, G groups):

    qweight int32 [I * bits / 32, O]    codes, packed along I
    qzeros  int32 [G, O * bits / 32]    zero points, packed along O
    scales  float16 [G, O]
    g_idx   int32 [I]                   group of each input column

The layout of an output is decided before the first weight is read: shard headers are written first,
then tensors may arrive in any order and go straight to their places.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from gptq_cli.checkpoint.headers import DTYPES, TensorInfo
from gptq_cli.errors import ConfigError, InputError

if TYPE_CHECKING:
    from gptq_cli.solver.quantized_linear import QuantizedLinear

SINGLE_FILE = "model.safetensors"
FP8 = "fp8"
# Methods of quantization whose weights `coded.py` finds.
CODED_METHODS = (
    FP8, "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "mxfp8", "awq",
)  # fmt: skip
AGAIN = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: safetensors dtype name and shape.

    With a `stack` it is item `place` of the first dimension of the tensor of that name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stack: str | None = None
    place: int = 0

    @property
    def stored_name(self) -> str:
        """The name of the tensor in the file."""
        return self.stack or self.name

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].bits * math.prod(self.shape) // 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its complete header, and the offset of each tensor from the file's start.

    The header includes the 8 bytes of its length.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of a checkpoint and the index that names them (None for a single file)."""

    shards: tuple[Shard, ...]
    specs: dict[str, TensorSpec]
    index: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of the shard files, headers included."""
        return sum(shard.size for shard in self.shards)


def plan_layout(units: list[tuple[TensorSpec, ...]], max_shard_bytes: int) -> Layout:
    """Return files of at most `max_shard_bytes` that hold all tensors of `units`.

    A unit, such as the tensors of one linear, is never split, and neither are the units of a stack.
    If a unit is larger than the limit, it gets a file of its own. File names follow the Hugging
    Face convention. ConfigError E_CFG_FORMAT if the items of a stack differ, or some are missing.
    """
    files = _fill_files(_joined(units), max_shard_bytes)
    if len(files) == 1:
        names, index = [SINGLE_FILE], None
    else:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = _index(names, files)
    specs = {}
    for unit in units:
        for spec in unit:
            specs[spec.name] = spec
    return Layout(tuple(map(_shard, names, files)), specs, index)


def _joined(units: list[tuple[TensorSpec, ...]]) -> list[tuple[TensorSpec, ...]]:
    """Return the units, with those of a stack as one unit at the place of its first one."""
    joined: dict[str, tuple[TensorSpec, ...]] = {}
    for unit in units:
        name = unit[0].stored_name
        joined[name] = (*joined.get(name, ()), *unit)
    for unit in joined.values():
        _check_stacks(unit)
    return list(joined.values())


def _check_stacks(unit: Iterable[TensorSpec]) -> None:
    stacks: dict[str, list[TensorSpec]] = defaultdict(list)
    for spec in unit:
        if spec.stack is not None:
            stacks[spec.stack].append(spec)
    for name, items in stacks.items():
        places = sorted(spec.place for spec in items)
        kinds = {(spec.dtype, spec.shape) for spec in items}
        if places != list(range(len(items))) or len(kinds) > 1:
            message = f"`{name}` would hold all experts, but they differ in settings"
            hint = "give all experts of a layer the same settings, or keep all of them"
            raise ConfigError("E_CFG_FORMAT", message, hint=hint)


def _fill_files(
    units: list[tuple[TensorSpec, ...]], max_shard_bytes: int
) -> list[list[TensorSpec]]:
    """Return the tensors of each file."""
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for unit in units:
        size = sum(spec.nbytes for spec in unit)
        if files[-1] and filled + size > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].extend(unit)
        filled += size
    return files


def _shard(file: str, specs: list[TensorSpec]) -> Shard:
    # Wide types come first, as in the safetensors library, so that every tensor is aligned to its
    # own size.
    ordered = sorted(
        specs, key=lambda spec: (-DTYPES[spec.dtype].bits, spec.stored_name, spec.place)
    )
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for spec in ordered:
        relative[spec.name] = position
        start, shape = position, list(spec.shape)
        position += spec.nbytes
        if spec.stack is not None:
            start = relative[spec.name] - spec.place * spec.nbytes
            shape = [spec.place + 1, *shape]  # the last item of a stack has the right one
        entries[spec.stored_name] = {
            "dtype": spec.dtype,
            "shape": shape,
            "data_offsets": [start, position],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + offset for name, offset in relative.items()}
    return Shard(file, len(text).to_bytes(8, "little") + text, offsets, start + position)


def _index(names: list[str], files: list[list[TensorSpec]]) -> str:
    weight_map = {}
    total = 0
    for name, specs in zip(names, files, strict=True):
        for spec in specs:
            weight_map[spec.stored_name] = name
            total += spec.nbytes
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


Pack = Callable[[Any, int], Any]  # numbers [..., N, C] and bits to words [..., N * bits / 32, C]


class Arrays(NamedTuple):
    """What decoding needs of numpy or torch.

    `unpack` turns words [N * bits / 32, C] into numbers [N, C], `signed` reads words of either sign
    as signed ones, and `single` makes float32.
    """

    unpack: Callable[[Any, int], Any]
    signed: Callable[[Any], Any]
    single: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The properties of a linear that decide which parts it has, and their shapes."""

    out_features: int
    in_features: int
    groups: int
    bits: int
    sym: bool = True
    scales: str = "F16"  # the stored dtype of the scales


class Packing:
    """How a format stores one linear: names, dtypes and shapes of its parts, and the coding.

    This class is the packing of `gptq` and `gptq_v2`; the packings of other formats derive from it.
    `format` is the name of the format, `zero_offset` the number that readers add to stored zero
    points. `codes`, `scales` and `g_idx` are the names of the parts with codes, scales, and the
    group of each column. `dtypes` are those that readers accept, by part; the first one is written.
    Without one of the `needed` parts a linear cannot be decoded. No tensor of a plain model has the
    name of one of the `marks`.

    Methods that take or return tensors only transpose them and use the functions given, so that
    they do for arrays of numpy as for tensors of torch.
    """

    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qweight": ("I32",),
        "qzeros": ("I32",),
        "scales": ("F16", "BF16", "F32"),
        "g_idx": ("I32", "I64"),
    }
    needed: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")  # columns may be in order
    marks: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "g_idx")
    codes: ClassVar[str] = "qweight"
    scales: ClassVar[str] = "scales"
    g_idx: ClassVar[str | None] = "g_idx"

    def __init__(self, format: str, zero_offset: int = 0) -> None:
        self.format, self.zero_offset = format, zero_offset

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of all parts."""
        return tuple(self.dtypes)

    def stack_of(self, module: str) -> tuple[str, int] | None:
        """Return the module whose parts hold those of `module`, and the place in them.

        None if the parts of `module` are tensors of their own.
        """
        del module
        return None

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a linear."""
        out_features, in_features, groups = sizes.out_features, sizes.in_features, sizes.groups
        return {
            "qweight": (in_features * sizes.bits // 32, out_features),
            "qzeros": (groups, out_features * sizes.bits // 32),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }

    def dimensions(self, part: str) -> int:
        """Return the number of dimensions of a part."""
        return len(self.shapes(Sizes(1, 1, 1, 1, sym=False))[part])

    def written_dtype(self, part: str, sizes: Sizes) -> str:
        """Return the dtype in which a part is written: scales keep theirs."""
        if part == self.scales:
            return sizes.scales
        return self.dtypes[part][0]

    def sizes_of(self, module: str, parts: Mapping[str, TensorInfo]) -> Sizes | None:
        """Return the sizes that the parts of `module` show; None if their shapes do not fit."""
        del module
        (rows, out_features), (groups, words) = parts["qweight"].shape, parts["qzeros"].shape
        bits = words * 32 // out_features
        if bits == 0:
            return None
        return Sizes(out_features, rows * 32 // bits, groups, bits, scales=parts["scales"].dtype)

    def out_features(self, parts: Mapping[str, TensorInfo]) -> int:
        """Return the outputs that the scales show, 0 if these have no dimension."""
        return [0, *parts["scales"].shape][-1]

    def in_features(self, parts: Mapping[str, TensorInfo], bits: int) -> int:
        """Return the inputs that the codes show, 0 if these have no dimension."""
        return [*parts["qweight"].shape, 0][0] * 32 // bits

    def encode(self, linear: QuantizedLinear, pack: Pack, *, sym: bool) -> dict[str, Any]:
        """Return the tensors of a linear by part; they need not be contiguous.

        `sym` tells whether the settings of the linear say that it is symmetric. Codes, scales and
        zero points may have one more dimension in front, for several linears. Then each tensor has
        it as well, except those that are equal for all.
        """
        del sym
        stored = linear.zeros - self.zero_offset
        return {
            "qweight": pack(linear.codes.mT, linear.bits),
            "qzeros": pack(stored, linear.bits).mT,
            "scales": linear.scales.mT,
            "g_idx": linear.group_of_column.int(),
        }

    def words(self, tensors: Mapping[str, Any], arrays: Arrays) -> Any:
        """Return the codes as words [I * bits / 32, O], whose columns are streams of bits."""
        del arrays
        return tensors["qweight"]

    def stored_scales(self, tensors: Mapping[str, Any]) -> Any:
        """Return the scales [O, G]."""
        return tensors["scales"].T

    def zeros(self, tensors: Mapping[str, Any], bits: int, arrays: Arrays) -> Any:
        """Return the zero points [O, G], None if each is half the number of codes.

        Zero points of v1 wrap at 2**bits, as AutoGPTQ reads them.
        """
        stored = arrays.unpack(tensors["qzeros"].T, bits)
        return (stored + self.zero_offset) & (2**bits - 1)

    def groups(self, tensors: Mapping[str, Any]) -> Any:
        """Return the group of each column [I], None if groups are runs of columns."""
        if self.g_idx is None:
            return None
        return tensors.get(self.g_idx)


GPTQ, GPTQ_V2 = Packing("gptq", 1), Packing("gptq_v2")  # v1 stores zero - 1
PARTS = GPTQ.parts


@dataclass(frozen=True, slots=True)
class PackedModule:
    """A quantized linear as its packed tensors show it; `nbytes` is the size of all of them."""

    name: str
    out_features: int
    in_features: int
    bits: int
    groups: int
    nbytes: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale, -1 for one group a row."""
        return -1 if self.groups == 1 else self.in_features // self.groups

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features


def packed_specs(weight: str, sizes: Sizes, packing: Packing) -> tuple[TensorSpec, ...]:
    """Return the tensors that replace `weight`, a name that ends in ".weight"."""
    module = weight.removesuffix(".weight")
    stacked = packing.stack_of(module)
    specs = []
    for part, shape in packing.shapes(sizes).items():
        spec = TensorSpec(f"{module}.{part}", packing.written_dtype(part, sizes), shape)
        if stacked is not None:
            stack, place = stacked
            spec = replace(spec, stack=f"{stack}.{part}", place=place)
        specs.append(spec)
    return tuple(specs)


def stored_parts(
    module: str, tensors: Mapping[str, TensorInfo], packing: Packing = GPTQ
) -> dict[str, TensorInfo]:
    """Return the packed tensors of `module` that are stored, by part."""
    found = {}
    for part in packing.dtypes:
        tensor = tensors.get(f"{module}.{part}")
        if tensor is not None:
            found[part] = tensor
    return found


def part_names(
    module: str, tensors: Mapping[str, TensorInfo], packing: Packing = GPTQ
) -> tuple[str, ...]:
    """Return the names of the packed tensors of `module` that are stored."""
    return tuple(f"{module}.{part}" for part in stored_parts(module, tensors, packing))


def quantized_names(tensors: Iterable[str], packing: Packing = GPTQ) -> list[str]:
    """Return the names of modules that have a part which only quantized linears have.

    They are in file order.
    """
    found: dict[str, None] = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part in packing.marks:
            found[module] = None
    return list(found)


def packed_modules(
    tensors: Mapping[str, TensorInfo], packing: Packing = GPTQ
) -> tuple[PackedModule, ...]:
    """Return the quantized linears among `tensors`, in file order.

    InputError E_CKPT_INCOMPLETE if a linear lacks a part, or the shapes of its parts do not fit.
    """
    found = []
    for module in quantized_names(tensors, packing):
        parts = stored_parts(module, tensors, packing)
        if packing.codes in parts:
            found.append(packed_module(module, parts, packing))
    return tuple(found)


def packed_module(name: str, parts: Mapping[str, TensorInfo], packing: Packing) -> PackedModule:
    """Return the linear that has these parts; raise the errors of `packed_modules`."""
    missing = ", ".join(part for part in packing.needed if part not in parts)
    if missing:
        message = f"`{name}` has a {packing.codes} but no {missing}"
        raise InputError("E_CKPT_INCOMPLETE", message, hint=AGAIN)
    sizes = sizes_of(name, parts, packing)
    if sizes is None:
        listed = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
        message = f"the parts of `{name}` do not fit each other: {listed}"
        raise InputError("E_CKPT_INCOMPLETE", message, hint=AGAIN)
    nbytes = sum(tensor.nbytes for tensor in parts.values())
    return PackedModule(
        name, sizes.out_features, sizes.in_features, sizes.bits, sizes.groups, nbytes
    )


def sizes_of(module: str, parts: Mapping[str, TensorInfo], packing: Packing) -> Sizes | None:
    """Return the sizes of a linear that has all needed parts; None if their shapes do not fit."""
    for part in packing.needed:
        if len(parts[part].shape) != packing.dimensions(part) or 0 in parts[part].shape:
            return None
    sizes = packing.sizes_of(module, parts)
    if sizes is None:
        return None
    expected = packing.shapes(sizes)
    for part in packing.needed:
        if parts[part].shape != expected[part]:
            return None
    return sizes
