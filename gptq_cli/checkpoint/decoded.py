"""A checkpoint as the plain one that it stands for: weights stored in parts appear as one.

Here is also a fact that no file contains: which models store their linears [I, O]. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptq_cli.checkpoint.headers import DTYPES_OF_CONFIG, TensorInfo
from gptq_cli.checkpoint.layout import CODED_METHODS, PackedModule, packed_modules, part_names
from gptq_cli.checkpoint.quantization_config import format_of, packing_of
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import FORMATS, HEAD
from gptq_cli.errors import InputError

if TYPE_CHECKING:
    from gptq_cli.checkpoint.coded import Coded

FULL_PRECISION = "start from the full-precision model it was made from"
AGAIN = f"{FULL_PRECISION}, or round its weights a second time: --allow-requantize"
ALTERNATIVES = {
    **dict.fromkeys(FORMATS, AGAIN),
    "bitsandbytes": f"{FULL_PRECISION}, or write plain weights with transformers, by "
    "`model.dequantize()` and `model.save_pretrained(DIR)`",
}

# The causal language models of transformers whose blocks are made of Conv1D. A test compares this
# with its sources.
TRANSPOSED = frozenset({"gpt2", "gpt-sw3", "openai-gpt"})


@dataclass(frozen=True, slots=True)
class Plain:
    """Tensors by name in file order, and the stored tensors that each decoded one is made of.

    A decoded weight has the place of its codes and the dtype in which it would be stored. `how`
    describes in a few words how the decoded ones are stored; it is None if there are none. If they
    are `packed`, they are [O, I] in every model; if they are `rounded`, from a better model to
    integers, quantization rounds a second time. `left_out` are stored tensors without a use.
    """

    tensors: dict[str, TensorInfo]
    parts: dict[str, tuple[str, ...]]
    how: str | None = None
    packed: bool = False
    rounded: bool = False
    left_out: tuple[str, ...] = ()

    def is_packed(self, name: str) -> bool:
        """Return whether a weight is decoded from packed codes."""
        return self.packed and name in self.parts


def plain_view(checkpoint: Checkpoint, *, allow_requantize: bool = False) -> Plain:
    """Return the plain tensors that `checkpoint` stands for; a plain one stands for itself.

    Weights in floats of few bits are those of the model itself. InputError E_CKPT_QUANTIZED
    for weights in another form, and for integers unless `allow_requantize`; E_LORA for adapters of
    weights in packed codes. Raises the errors of `Checkpoint.coded`, `packed_modules` and
    `changes_of`, too.
    """
    plain = _plain_view(checkpoint, allow_requantize=allow_requantize)
    if not checkpoint.adapters:
        return plain
    return _merged_view(checkpoint, plain)


def _merged_view(checkpoint: Checkpoint, plain: Plain) -> Plain:
    """Return `plain` with the changed tensors as decoded ones, which are read and not copied."""
    from gptq_cli.checkpoint.adapters import changes_of, unmergeable

    if plain.packed:
        path = str(checkpoint.adapters[0].directory)
        raise unmergeable(path, f"the weights of `{checkpoint.directory}` are {plain.how}")
    parts = dict(plain.parts)
    for name in changes_of(checkpoint, plain.tensors):
        parts.setdefault(name, (name,))
    return replace(plain, parts=parts)


def with_adapters(source: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return `source` as the model into which the adapters `DIR` or `DIR:SCALE` are merged.

    Raises InputError E_LORA for an adapter that is none, or that does not fit the model, and the
    errors of `plain_view` for weights that cannot be decoded.
    """
    from gptq_cli.checkpoint.adapters import changes_of, open_adapters

    adapters = open_adapters(names)
    remarks = source.remarks
    if any(adapter.directory.resolve() == source.directory.resolve() for adapter in adapters):
        remarks = tuple(remark for remark in remarks if remark[0] != "W_CKPT_ADAPTER")
    merged = replace(source, adapters=adapters, remarks=remarks)
    stored = plain_view(source, allow_requantize=True)
    changes_of(merged, stored.tensors)  # raises if an adapter does not fit
    return merged


def _plain_view(checkpoint: Checkpoint, *, allow_requantize: bool) -> Plain:
    coded = checkpoint.coded()
    if coded:
        return _decoded(checkpoint, coded, allow_requantize=allow_requantize)
    if not checkpoint.is_packed:
        return Plain(checkpoint.tensors, {})
    if checkpoint.method in FORMATS and allow_requantize:
        return _unpacked(checkpoint)
    if checkpoint.method in FORMATS:
        format_of(checkpoint)  # raises if the weights cannot be decoded for a second rounding
    elif checkpoint.method in CODED_METHODS:
        raise _nothing_quantized(checkpoint)
    raise _already_quantized(checkpoint, ALTERNATIVES.get(checkpoint.method or "", FULL_PRECISION))


def _already_quantized(checkpoint: Checkpoint, hint: str) -> InputError:
    message = f"`{checkpoint.directory}` is already quantized ({checkpoint.method})"
    return InputError("E_CKPT_QUANTIZED", message, hint=hint)


def _decoded(
    checkpoint: Checkpoint, coded: Mapping[str, Coded], *, allow_requantize: bool
) -> Plain:
    """Return the tensors of a checkpoint with these weights in codes."""
    from gptq_cli.checkpoint.coded import plain_tensors

    rounded = any(weight.rounded for weight in coded.values())
    if rounded and not allow_requantize:
        raise _already_quantized(checkpoint, AGAIN)
    tensors, left_out = plain_tensors(checkpoint, coded)
    parts = {name: tuple(weight.parts.values()) for name, weight in coded.items()}
    forms = dict.fromkeys(weight.form for weight in coded.values())
    return Plain(tensors, parts, ", ".join(forms), rounded=rounded, left_out=tuple(left_out))


def _unpacked(checkpoint: Checkpoint) -> Plain:
    """Return the tensors of a checkpoint in codes with its linears decoded."""
    format, dtype = format_of(checkpoint), declared_dtype(checkpoint)
    packing = packing_of(checkpoint)
    modules = {module.name: module for module in packed_modules(checkpoint.tensors, packing)}
    if not modules:
        raise _nothing_quantized(checkpoint)
    tensors: dict[str, TensorInfo] = {}
    parts: dict[str, tuple[str, ...]] = {}
    for name, tensor in checkpoint.tensors.items():
        owner, _, part = name.rpartition(".")
        module = modules.get(owner)
        if module is None or part not in packing.dtypes:
            tensors[name] = tensor
        elif part == packing.codes:
            weight, shape = f"{owner}.weight", (module.out_features, module.in_features)
            tensors[weight] = replace(tensor, name=weight, dtype=dtype, shape=shape)
            parts[weight] = part_names(owner, checkpoint.tensors, packing)
    how = f"{format}, {_kinds(modules.values())}"
    return Plain(tensors, parts, how, packed=True, rounded=True)


def packed_linears(checkpoint: Checkpoint) -> tuple[PackedModule, ...]:
    """Return the linears of a format of `FORMATS`, in file order.

    None of them is a weight that `Checkpoint.coded` tells. Raises the errors of `packing_of` and
    `packed_modules`.
    """
    if checkpoint.coded():  # the parts of AWQ have the names of GPTQ's
        return ()
    return packed_modules(checkpoint.tensors, packing_of(checkpoint))


def _nothing_quantized(checkpoint: Checkpoint) -> InputError:
    name = checkpoint.directory
    message = f"`{name}` is marked as quantized ({checkpoint.method}), but no linear is"
    hint = (
        "download the checkpoint again, or remove quantization_config from a config.json "
        "that is not its own"
    )
    return InputError("E_CKPT_INCOMPLETE", message, hint=hint)


def _kinds(modules: Iterable[PackedModule]) -> str:
    """Return the combinations of bits and group size that occur, in words."""
    kinds = sorted({(module.bits, module.group_size) for module in modules})
    return ", ".join(f"{bits} bits group_size {size}" for bits, size in kinds)


def declared_dtype(checkpoint: Checkpoint) -> str:
    """Return the stored dtype that config.json names, else that of a tensor that is not packed."""
    if checkpoint.named_dtype is not None:
        return DTYPES_OF_CONFIG[checkpoint.named_dtype]
    for weight in checkpoint.coded().values():
        return weight.plain.dtype
    known = set(DTYPES_OF_CONFIG.values())
    packing = packing_of(checkpoint)
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in known and tensor.name.rpartition(".")[2] not in packing.dtypes:
            return tensor.dtype
    return "BF16"


def forward_dtype(checkpoint: Checkpoint, wanted: str) -> str:
    """Return the name of the dtype that a model runs in.

    That is the `wanted` one. If it is "auto", it is the one that config.json names, else that of
    the first tensor that is stored as plain floats, else float32.
    """
    if wanted != "auto":
        return wanted
    if checkpoint.named_dtype is not None:
        return checkpoint.named_dtype
    for tensor in checkpoint.tensors.values():
        for name, stored in DTYPES_OF_CONFIG.items():
            if tensor.dtype == stored:
                return name
    return "float32"


def stores_transposed(config: Mapping[str, Any]) -> bool:
    """Return whether the model of this config.json stores the linears of its blocks [I, O].

    Quantized linears are [O, I] in every model.
    """
    model_type = config.get("model_type")
    return isinstance(model_type, str) and model_type in TRANSPOSED


def is_stored_transposed(config: Mapping[str, Any], module: str) -> bool:
    """Return whether the model of this config.json stores the linear `module` [I, O].

    The output head does not belong to the blocks.
    """
    return stores_transposed(config) and module != HEAD
