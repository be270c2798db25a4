"""Checkpoints of MLX: codes, scales and biases of each linear, and a `quantization` in config.json.

MLX computes a weight as scales * code + biases, where a bias is -scales * zero point. Groups have
32, 64 or 128 columns, so larger ones and whole rows are stored as several groups with the same
scale. Sources: `mlx_lm/utils.py` of mlx-lm 0.32.2, and `mlx.core.quantize` of mlx 0.32.4. Needs no
torch, except to encode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gptq_cli.checkpoint.defects import Defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Arrays, Pack, Packing, Sizes, quantized_names
from gptq_cli.checkpoint.mlx_experts import stack_of, stored_name
from gptq_cli.config.layer import HEAD, HOLDS, Linears, Settings, StoredConfig

if TYPE_CHECKING:
    from gptq_cli.solver.quantized_linear import QuantizedLinear

FORMAT = "mlx"
GROUP_SIZES = (128, 64, 32)
FLOATS = ("F16", "BF16", "F32")


def columns_of(group_size: int, in_features: int) -> int:
    """Return the columns of a stored group: the most that divide a group of the linear."""
    if group_size == -1:
        group_size = in_features
    for columns in GROUP_SIZES:
        if group_size % columns == 0:
            return columns
    raise ValueError(f"groups of {group_size} columns are no multiple of 32")


class MlxPacking(Packing):
    """The packing of MLX; `settings` returns those of a stored module."""

    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("U32",),
        "scales": FLOATS,
        "biases": FLOATS,
    }
    needed: ClassVar[tuple[str, ...]] = ("weight", "scales", "biases")
    marks: ClassVar[tuple[str, ...]] = ("scales", "biases")
    codes: ClassVar[str] = "weight"
    g_idx: ClassVar[str | None] = None

    def __init__(self, settings: Callable[[str], Settings] | None = None) -> None:
        super().__init__(FORMAT)
        self._settings = settings

    def stack_of(self, module: str) -> tuple[str, int] | None:
        """Return the module that holds all experts of a layer, and the place of this one."""
        return stack_of(module)

    def shapes(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shape of each part of a linear."""
        out_features, in_features = sizes.out_features, sizes.in_features
        groups = max(sizes.groups, 1)
        if in_features >= GROUP_SIZES[-1]:
            groups = in_features // columns_of(in_features // groups, in_features)
        return {
            "weight": (out_features, in_features * sizes.bits // 32),
            "scales": (out_features, groups),
            "biases": (out_features, groups),
        }

    def written_dtype(self, part: str, sizes: Sizes) -> str:
        """Return the dtype in which a part is written.

        The product of a scale and half the number of codes fits the dtype of the scale, but that
        with another zero point has more digits.
        """
        if part == "biases" and not sizes.sym:
            return "F32"
        if part == "weight":
            return "U32"
        return sizes.scales

    def sizes_of(self, module: str, parts: Mapping[str, TensorInfo]) -> Sizes | None:
        """Return the sizes that the parts of `module` show; None if their shapes do not fit."""
        assert self._settings is not None
        settings = self._settings(module)
        (out_features, words), (_, groups) = parts["weight"].shape, parts["scales"].shape
        in_features = words * 32 // settings.bits
        if groups * settings.group_size != in_features:
            return None
        scales = parts["scales"].dtype
        return Sizes(out_features, in_features, groups, settings.bits, settings.sym, scales)

    def out_features(self, parts: Mapping[str, TensorInfo]) -> int:
        """Return the outputs that the codes show, 0 if these have no dimension."""
        return [*parts["weight"].shape, 0][0]

    def in_features(self, parts: Mapping[str, TensorInfo], bits: int) -> int:
        """Return the inputs that the codes show, 0 if these have no dimension."""
        return [0, *parts["weight"].shape][-1] * 32 // bits

    def encode(self, linear: QuantizedLinear, pack: Pack, *, sym: bool) -> dict[str, Any]:
        """Return the tensors of a linear by part."""
        import torch

        in_features, groups = linear.codes.shape[-1], linear.scales.shape[-1]
        group_size = in_features // groups
        copies = group_size // columns_of(group_size, in_features)
        zeros = linear.zeros.float()
        scales = linear.scales.repeat_interleave(copies, -1)
        biases = -(linear.scales.float() * zeros).repeat_interleave(copies, -1)
        if sym:
            biases = biases.to(scales.dtype)
        words = pack(linear.codes.mT, linear.bits).mT.contiguous()
        return {"weight": words.view(torch.uint32), "scales": scales, "biases": biases}

    def words(self, tensors: Mapping[str, Any], arrays: Arrays) -> Any:
        """Return the codes as words [I * bits / 32, O], whose columns are streams of bits."""
        return arrays.signed(tensors["weight"]).T

    def stored_scales(self, tensors: Mapping[str, Any]) -> Any:
        """Return the scales [O, G]."""
        return tensors["scales"]

    def zeros(self, tensors: Mapping[str, Any], bits: int, arrays: Arrays) -> Any:
        """Return the zero points [O, G] in float32: whole numbers, unless another tool wrote it."""
        del bits
        return -arrays.single(tensors["biases"]) / arrays.single(tensors["scales"])


def packing_for(*, sym: bool) -> Packing:
    """Return how linears are written."""
    del sym
    return MlxPacking()


def packing_of(stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Packing:
    """Return how the linears of a readable checkpoint are stored."""
    return MlxPacking(_config(stored, tensors).settings)


def unreadable(stored: Mapping[str, Any]) -> str:
    """Return what cannot be read here, "" if all can."""
    modes = [stored.get("mode")]
    for values in stored.values():
        if isinstance(values, dict):
            modes.append(values.get("mode"))
    for mode in modes:
        if mode not in (None, "affine"):
            return f"mode {mode}"
    return ""


@dataclass(frozen=True, slots=True)
class MlxConfig(StoredConfig):
    """The settings of a checkpoint of MLX.

    `layers` has the settings that differ, or false for a module that is not quantized. `symmetric`
    are modules whose biases have the dtype of their scales.
    """

    layers: Mapping[str, Any]
    symmetric: frozenset[str]

    def settings(self, module: str) -> Settings:
        """Return the settings of a quantized module."""
        changes = self.layers.get(stored_name(module))
        if not isinstance(changes, dict):
            changes = {}
        return Settings(
            changes.get("bits", self.base.bits),
            changes.get("group_size", self.base.group_size),
            sym=module in self.symmetric,
            desc_act=False,
        )

    def skip_rule(self, module: str) -> str | None:
        """Return the entry that excludes `module` from quantization."""
        if self.layers.get(stored_name(module)) is False:
            return f"{module}: false"
        return None


def _config(stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> MlxConfig:
    layers = {name: values for name, values in stored.items() if isinstance(values, dict | bool)}
    names = quantized_names(tensors, MlxPacking())
    symmetric = set()
    for name in names:
        scales, biases = tensors.get(f"{name}.scales"), tensors.get(f"{name}.biases")
        if scales is not None and biases is not None and scales.dtype == biases.dtype:
            symmetric.add(name)
    base = Settings(stored["bits"], stored["group_size"], sym=True, desc_act=False)
    return MlxConfig(base, FORMAT, HEAD in names, {}, None, layers, frozenset(symmetric))


def stored_config(
    stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[StoredConfig | None, list[Defect]]:
    """Return the configuration of a readable checkpoint, None if it is unusable, and defects."""
    wrong = []
    for name, values in [("", stored), *stored.items()]:
        if isinstance(values, dict):
            wrong += _wrong_values(name, values)
    if wrong:
        hint = "correct it in config.json, as it was set in the tool that wrote the weights"
        return None, [Defect("E_CKPT_CONFIG", text, "config.json", hint=hint) for text in wrong]
    return _config(stored, tensors), []


def _wrong_values(name: str, values: Mapping[str, Any]) -> list[str]:
    """Return errors in the settings of one module, or of all if it has no name."""
    wrong = []
    for key, accepted in {"bits": HOLDS[FORMAT].bits, "group_size": GROUP_SIZES}.items():
        value = values.get(key, accepted[0])
        if type(value) is not int or value not in accepted:
            wrong.append(f"quantization {name}: {key} is {value!r}")
    return wrong


def describe(linears: Linears) -> dict[str, Any]:
    """Return the entries of config.json for a checkpoint of these linears."""
    stored = {}
    for name, settings in linears.quantized.items():
        columns = columns_of(settings.group_size, linears.in_features[name])
        stored[name] = Settings(settings.bits, columns, sym=True, desc_act=False)
    base, others = Linears(stored, linears.in_features, ()).usual()
    described: dict[str, Any] = {"group_size": base.group_size, "bits": base.bits}
    for name, settings in others.items():
        described[stored_name(name)] = {"group_size": settings.group_size, "bits": settings.bits}
    for name in linears.kept:
        described[stored_name(name)] = False
    # mlx-lm writes both, and reads the first one.
    return {"quantization": described, "quantization_config": described}
