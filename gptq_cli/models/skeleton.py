"""The transformers model without its weights: modules on the `meta` device, small computed buffers real.

Names: the checkpoint's own names are the truth; transformers' conversion mapping tells which parameter each one fills.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_cli.config.leftovers import misfit
from gptq_cli.errors import InputError
from gptq_cli.models.experts import find_stacks, separate
from gptq_cli.models.names import Fusion, Sources, match_names
from gptq_cli.models.remote_code import remote_code_refusal

MAX_BUFFER_BYTES = 2**32  # of buffers that are computed: rotary frequencies, masks of old models
MAX_OTHER_SHARE = 0.5  # of the blocks' parameters: matrices that no linear layer holds
TOLD_OTHER_SHARE = 0.1
STACKED = ": stacked matrices that are not of experts as transformers describes them"
SILENT = (
    r"rotary_emb\.inv_freq",
    r"(^|\.)position_ids$",
)  # buffers that older versions have stored
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A causal language model on meta; `sources` tell for each parameter which checkpoint tensor fills it.

    `unused` are tensors that fill none and that transformers would warn of.
    """

    model: PreTrainedModel
    sources: Sources
    blocks_name: str
    blocks: nn.ModuleList
    unused: tuple[str, ...] = ()


def load_config(directory: Path, *, trust_remote_code: bool) -> Any:
    """transformers' config of the model in `directory`; InputError E_REMOTE_CODE or E_ARCH when it has none."""
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
    """Take from `config` and its parts the names of code, about which transformers would ask the user at the terminal.

    It has known classes for them: `load_config` refuses others.
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
) -> Skeleton:
    """The model of `config` with every parameter on meta in `dtype` and its computed buffers on `device`.

    `names` are the checkpoint's tensor names, `listed` those of its index that no shard holds. InputError E_ARCH if the
    model cannot be built or has no repeated blocks, E_CKPT_INCOMPLETE if a parameter has no tensor.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
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


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's blocks: of the outermost lists of modules with linear layers, the one that is nested least.

    Among equals the one with most parameters; a model of several parts says itself which one is the decoder.
    """
    lists = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    found = {
        name: blocks
        for name, blocks in lists.items()
        if any(is_linear(module) for module in blocks.modules())
        and not any(name.startswith(f"{other}.") for other in lists)
    }
    inside = set(model.get_decoder().modules()) if isinstance(model, PreTrainedModel) else set()
    found = {name: blocks for name, blocks in found.items() if blocks in inside} or found
    if not found:
        raise InputError(
            "E_ARCH", f"{type(model).__name__} has no repeated blocks with linear layers"
        )
    return min(found.items(), key=lambda item: (item[0].count("."), -_size(item[1])))


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by a matrix that GPTQ can quantize."""
    return isinstance(module, nn.Linear | Conv1D)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight of a linear is stored [I, O], as GPT-2's Conv1D does, and not [O, I]."""
    return isinstance(module, Conv1D)


def outside_linears(name: str, blocks: nn.ModuleList) -> str | None:
    """A sentence if a part of `blocks` that shows is in matrices of no linear layer, such as stacked ones.

    They stay as they are. InputError E_ARCH if it is most of the weights: the model would hardly get smaller.
    """
    others = {
        f"{name}.{path}.{leaf}": parameter
        for path, module in blocks.named_modules()
        if not is_linear(module) and not isinstance(module, _CONVOLUTIONS)
        for leaf, parameter in module.named_parameters(recurse=False)
        if _dimensions(parameter) > 1
    }
    size = _size(blocks)
    if not size:
        hint = "check hidden_size and the other sizes in config.json"
        raise InputError(
            "E_CKPT_CONFIG", "config.json describes a model whose blocks have no weights", hint=hint
        )
    share = sum(parameter.numel() for parameter in others.values()) / size
    if share <= TOLD_OTHER_SHARE:
        return None
    largest, parameter = max(others.items(), key=lambda item: item[1].numel())
    says = f"{share:.0%} of the blocks' weights are in no linear layer, first of all `{largest}` {list(parameter.shape)}"
    if share > MAX_OTHER_SHARE:
        raise InputError("E_ARCH", says + (STACKED if _dimensions(parameter) > 2 else ""))
    return says


def _check_single(model: PreTrainedModel, blocks_name: str, sources: Sources) -> None:
    """InputError E_ARCH for a linear of the blocks that several tensors are fused into."""
    for key, source in sources.names.items():
        fused = sources.derived.get(source)
        owner = model.get_submodule(key.rpartition(".")[0])
        if isinstance(fused, Fusion) and key.startswith(f"{blocks_name}.") and is_linear(owner):
            first = next(iter(fused.names.values()))[0]
            raise InputError(
                "E_ARCH",
                f"`{first}` is fused with other tensors into `{key}`, which is not supported",
            )


def _dimensions(tensor: Tensor) -> int:
    return sum(size > 1 for size in tensor.shape)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _unused(model: PreTrainedModel, sources: Sources, names: Iterable[str]) -> tuple[str, ...]:
    """Those of `names` that fill no parameter, but what transformers leaves out without a word, too."""
    used = {stored for name in sources.names.values() for stored in sources.stored(name)}
    silent = [*(model._keys_to_ignore_on_load_unexpected or ()), *SILENT]
    return tuple(
        name
        for name in names
        if name not in used and not any(re.search(key, name) for key in silent)
    )


def _fill_tied(
    model: PreTrainedModel, names: dict[str, str], left: Sequence[str], listed: Collection[str]
) -> None:
    """Add sources of tied parameters to `names`; InputError E_CKPT_INCOMPLETE if a parameter has none."""
    targets = model.state_dict()
    tied = {
        target: source
        for pair in model.all_tied_weights_keys.items()
        for target, source in (pair, pair[::-1])
    }
    for key in set(targets) - set(names):
        if tied.get(key) in names:
            names[key] = names[tied[key]]
    absent = sorted(set(targets) - set(names))
    if absent:
        text = model.config.get_text_config()
        config = {
            "architectures": model.config.architectures,
            "tie_word_embeddings": getattr(
                text, "tie_word_embeddings", model.config.tie_word_embeddings
            ),
        }
        raise misfit(absent, left, config, listed)


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where parameter or buffer `name` of `module` is."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that a family keeps in float32 in 16-bit models, as transformers' loading does."""
    half = dtype in (torch.float16, torch.bfloat16)
    kept = set(model._keep_in_fp32_modules_strict or ()) if half else set()
    kept |= set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    for name, parameter in list(model.named_parameters()):
        if kept & {name, *name.split(".")}:
            place(model, name, parameter.float())


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, embedding scales) by the model's own code."""
    restored: list[tuple[str, nn.Module, str]] = []
    _check_buffers(model)
    for path, module in model.named_modules():
        for leaf in module._non_persistent_buffers_set:
            buffer = module._buffers.get(leaf)
            if buffer is not None:
                mark = torch.nan if buffer.is_floating_point() else 0
                module._buffers[leaf] = torch.full_like(buffer, mark, device=device)
                restored.append((f"{path}.{leaf}", module, leaf))
    with torch.device(device):
        model.initialize_weights()  # parameters are on meta: only the buffers are really written
    for name, module, leaf in restored:
        if module._buffers[leaf].isnan().any():  # type: ignore[union-attr]
            raise InputError(
                "E_ARCH", f"{type(model).__name__} does not say how to compute its buffer `{name}`"
            )


def _check_buffers(model: PreTrainedModel) -> None:
    """InputError E_ARCH if the sizes in config.json would fill the memory with buffers that are computed."""
    stored = model.state_dict()
    computed = [
        (buffer.nbytes, name, buffer)
        for name, buffer in model.named_buffers()
        if name not in stored
    ]
    total = sum(nbytes for nbytes, _, _ in computed)
    if total > MAX_BUFFER_BYTES:
        _, name, largest = max(computed)
        says = f"config.json asks for {total / 1e9:.0f} GB of buffers, such as `{name}` {list(largest.shape)}"
        hint = "compare max_position_embeddings, n_positions and head_dim in config.json with those of the original"
        raise InputError("E_ARCH", says, hint=hint)


def _unknown(directory: Path, error: Exception) -> InputError:
    if refused := remote_code_refusal(error, directory):
        return refused
    text = str(error).strip().split("\n")[0]
    newer = "a newer transformers may know it: pip install --upgrade transformers"
    hint = newer if "does not recognize" in text else None
    text = text.partition(" This could be because")[0]
    return InputError(
        "E_ARCH", f"transformers cannot build the model in `{directory}`: {text}", hint=hint
    )
