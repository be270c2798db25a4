"""The transformers model without its weights: parameters are on `meta`, computed buffers real.

`build_skeleton` builds the model from config.json with transformers' own classes, maps the names of
the checkpoint to its parameters (`names`), and finds the list of its blocks. No table of model
types is involved.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.pytorch_utils import Conv1D

from gptq_cli.config.leftovers import misfit
from gptq_cli.errors import InputError
from gptq_cli.models.experts import find_stacks, separate
from gptq_cli.models.names import Fusion, Sources, match_names
from gptq_cli.models.remote_code import remote_code_refusal

MAX_BUFFER_BYTES = 2**32  # limit for computed buffers: rotary frequencies, masks of old models
# Shares of the blocks' parameters that are matrices of no linear layer:
MAX_OTHER_SHARE = 0.5  # a larger share is refused
TOLD_OTHER_SHARE = 0.1  # a larger share is reported
STACKED = ": stacked matrices that are not of experts as transformers describes them"
# Buffers that older versions of transformers stored:
SILENT = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A causal language model on meta, with the tensor that fills each parameter in `sources`.

    `unused` are the tensors that fill no parameter and that transformers would warn about.
    """

    model: PreTrainedModel
    sources: Sources
    blocks_name: str
    blocks: nn.ModuleList
    unused: tuple[str, ...] = ()


def load_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """Return transformers' config of the model in `directory`.

    Raise InputError E_REMOTE_CODE if it needs code of its own, E_ARCH if transformers has none.
    """
    try:
        config = AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise _unknown(directory, error) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights arrive dequantized
    if not trust_remote_code:
        _forget_code(config)
    return config


def _forget_code(config: PreTrainedConfig) -> None:
    """Remove the names of own code from `config` and its parts.

    transformers would ask the user at the terminal about that code. It is not needed: `load_config`
    accepts only models whose classes transformers has.
    """
    for part in [config, *vars(config).values()]:
        if isinstance(part, PreTrainedConfig):
            vars(part).pop("auto_map", None)
            if part is not config:
                _forget_code(part)


def build_skeleton(
    directory: Path,
    config: Any,
    names: Iterable[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool,
    listed: Collection[str] = (),
    images: bool = False,
) -> Skeleton:
    """Return the model of `config`: parameters on meta in `dtype`, computed buffers on `device`.

    `names` are the tensors of the checkpoint; `listed` are those in its index that no shard holds.
    With `images` it is the model with its vision part, even if transformers has one for text alone.
    Raise InputError E_ARCH if the model cannot be built or has no repeated blocks,
    E_CKPT_INCOMPLETE if a parameter has no tensor.
    """
    try:
        with torch.device("meta"):
            model = _auto_class(config, images=images).from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise _unknown(directory, error) from error
    model.eval().requires_grad_(False)
    _keep_in_float32(model, dtype)
    _restore_buffers(model, device)
    stacks = find_stacks(model)
    names = list(names)
    sources = match_names(model, names, stacks)
    separate(model, stacks)
    unused = _unused(model, sources, names)
    _fill_tied(model, sources.names, unused, listed)
    name, blocks = find_blocks(model)
    _check_single(model, name, sources)
    return Skeleton(model, sources, name, blocks, unused)


def _auto_class(config: Any, *, images: bool) -> Any:
    """Return transformers' class of models for `config`.

    A model with a vision part may have no class for text alone.
    """
    kind = type(config)
    sees = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if sees and (images or kind not in MODEL_FOR_CAUSAL_LM_MAPPING):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the decoder's blocks.

    Of the outermost lists of modules with linear layers it is the least nested one, among equals
    the one with most parameters. If the model has several parts, `get_decoder` selects the part.
    Raise InputError E_ARCH if there is no such list.
    """
    found = _outermost_lists(model)
    if isinstance(model, PreTrainedModel):
        inside = set(model.get_decoder().modules())
        found = {name: blocks for name, blocks in found.items() if blocks in inside} or found
    if not found:
        raise InputError(
            "E_ARCH", f"{type(model).__name__} has no repeated blocks with linear layers"
        )
    return min(found.items(), key=lambda item: (item[0].count("."), -_size(item[1])))


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that hold linear layers and are in no other list, by name."""
    found: dict[str, nn.ModuleList] = {}
    outer = ""  # the list that was entered last; `named_modules` lists its modules right after it
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or (outer and name.startswith(f"{outer}.")):
            continue
        outer = name
        if any(is_linear(part) for part in module.modules()):
            found[name] = module
    return found


def is_linear(module: nn.Module) -> bool:
    """Return whether `module` multiplies by a matrix that GPTQ can quantize."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear stores its weight [I, O], as GPT-2's Conv1D does, and not [O, I]."""
    return isinstance(module, Conv1D)


def outside_linears(name: str, blocks: nn.ModuleList) -> str | None:
    """Return a sentence if a considerable share of `blocks` is in matrices of no linear layer.

    Such matrices (stacked ones, for example) are not quantized. Raise InputError E_ARCH if they are
    most of the weights, since the model would hardly get smaller, and E_CKPT_CONFIG if there are no
    weights at all.
    """
    size = _size(blocks)
    if not size:
        hint = "check hidden_size and the other sizes in config.json"
        raise InputError(
            "E_CKPT_CONFIG", "config.json describes a model whose blocks have no weights", hint=hint
        )
    others = _other_matrices(name, blocks)
    share = sum(parameter.numel() for parameter in others.values()) / size
    if share <= TOLD_OTHER_SHARE:
        return None
    largest, parameter = max(others.items(), key=lambda item: item[1].numel())
    message = (
        f"{share:.0%} of the blocks' weights are in no linear layer, "
        f"first of all `{largest}` {list(parameter.shape)}"
    )
    if share <= MAX_OTHER_SHARE:
        return message
    if _dimensions(parameter) > 2:
        message += STACKED
    raise InputError("E_ARCH", message)


def _other_matrices(name: str, blocks: nn.ModuleList) -> dict[str, Tensor]:
    """Return the matrices of the blocks that belong to no linear layer and no convolution."""
    others: dict[str, Tensor] = {}
    for path, module in blocks.named_modules():
        if is_linear(module) or isinstance(module, _CONVOLUTIONS):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if _dimensions(parameter) > 1:
                others[f"{name}.{path}.{leaf}"] = parameter
    return others


def _check_single(model: PreTrainedModel, blocks_name: str, sources: Sources) -> None:
    """Raise InputError E_ARCH if several tensors are fused into one linear of the blocks."""
    for key, source in sources.names.items():
        fused = sources.derived.get(source)
        if not isinstance(fused, Fusion) or not key.startswith(f"{blocks_name}."):
            continue
        if is_linear(model.get_submodule(key.rpartition(".")[0])):
            raise InputError(
                "E_ARCH",
                f"`{fused.stored[0]}` is fused with other tensors into `{key}`, "
                "which is not supported",
            )


def _dimensions(tensor: Tensor) -> int:
    """Return the number of dimensions that have more than one element."""
    return sum(size > 1 for size in tensor.shape)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _unused(model: PreTrainedModel, sources: Sources, names: Iterable[str]) -> tuple[str, ...]:
    """Return the tensors `names` that fill no parameter.

    Tensors that transformers drops without a warning are left out.
    """
    used: set[str] = set()
    for name in sources.names.values():
        used.update(sources.stored(name))
    silent = [*(model._keys_to_ignore_on_load_unexpected or ()), *SILENT]
    unused = []
    for name in names:
        if name not in used and not any(re.search(pattern, name) for pattern in silent):
            unused.append(name)
    return tuple(unused)


def _fill_tied(
    model: PreTrainedModel, names: dict[str, str], left: Sequence[str], listed: Collection[str]
) -> None:
    """Add sources of tied parameters to `names`; InputError E_CKPT_INCOMPLETE if one has none."""
    targets = model.state_dict().keys()
    tied: dict[str, str] = {}
    for key, other in model.all_tied_weights_keys.items():
        tied[key], tied[other] = other, key
    for key in targets - names.keys():
        if tied.get(key) in names:
            names[key] = names[tied[key]]
    absent = sorted(targets - names.keys())
    if absent:
        text = model.config.get_text_config()
        tie = getattr(text, "tie_word_embeddings", model.config.tie_word_embeddings)
        config = {"architectures": model.config.architectures, "tie_word_embeddings": tie}
        raise misfit(absent, left, config, listed)


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace parameter or buffer `name` of `module` with `tensor`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make the parameters float32 that transformers' loading keeps in float32 in 16-bit models."""
    kept: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        kept.update(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept.update(model._keep_in_fp32_modules or ())
    for name, parameter in list(model.named_parameters()):
        if kept & {name, *name.split(".")}:
            place(model, name, parameter.float())


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores, by the model's own code.

    Examples are rotary frequencies and embedding scales. Raise InputError E_ARCH if that code
    leaves one of them uncomputed.
    """
    restored: list[tuple[str, nn.Module, str]] = []
    _check_buffers(model)
    for path, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                mark = torch.nan if buffer.is_floating_point() else 0
                module._buffers[leaf] = torch.full_like(buffer, mark, device=device)
                restored.append((f"{path}.{leaf}", module, leaf))
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so it is left alone
    with torch.device(device):
        model.initialize_weights()
    for name, module, leaf in restored:
        if module._buffers[leaf].isnan().any():  # type: ignore[union-attr]
            raise InputError(
                "E_ARCH", f"{type(model).__name__} does not say how to compute its buffer `{name}`"
            )


def _check_buffers(model: PreTrainedModel) -> None:
    """Raise InputError E_ARCH if the sizes in config.json ask for huge computed buffers."""
    stored = model.state_dict()
    total, largest, name = 0, 0, ""
    for own_name, buffer in model.named_buffers():
        if own_name not in stored:
            total += buffer.nbytes
            largest, name = max((largest, name), (buffer.nbytes, own_name))
    if total > MAX_BUFFER_BYTES:
        shape = list(model.get_buffer(name).shape)
        raise InputError(
            "E_ARCH",
            f"config.json asks for {total / 1e9:.0f} GB of buffers, such as `{name}` {shape}",
            hint="compare max_position_embeddings, n_positions and head_dim in config.json "
            "with those of the original",
        )


def _unknown(directory: Path, error: Exception) -> InputError:
    """Return the InputError for a model that transformers could not build because of `error`."""
    refused = remote_code_refusal(error, directory)
    if refused is not None:
        return refused
    text = str(error).strip().split("\n")[0]
    hint = None
    if "does not recognize" in text:
        hint = "a newer transformers may know it: pip install --upgrade transformers"
    text = text.partition(" This could be because")[0]
    return InputError(
        "E_ARCH", f"transformers cannot build the model in `{directory}`: {text}", hint=hint
    )
