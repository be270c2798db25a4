"""What config.json asks transformers for, looked at before it is obeyed: code from the Hub, or more than is stored."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.errors import InputError

DECODER_BLOCKS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MOST_TURNS = 16  # of a model that runs the same blocks several times and counts them as often
USUAL_PARTS = 1024  # of a list in another part of a model, which a checkpoint may lack
MAX_LABELS = 10**6
_IMPLEMENTATION = re.compile(r"_?\w+_implementation(_internal)?")
_KERNEL_SWITCHES = ("use_kernels", "kernel_config")
_BLOCKS = re.compile(r"(\w+_)?(layers?|blocks|depth|stages)")
_EXPERTS = re.compile(r"(\w+_)?experts")
_PER_BLOCK = re.compile(r"\w+_(types|pattern)")  # a kind for each block, listed, counted or spelled
_LABELS = re.compile(r"(\w+_)?labels")
_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def check_claims(source: Checkpoint) -> None:
    """Refuse a config that transformers would obey at the cost of others' code, or of memory without end.

    InputError E_REMOTE_CODE if it names a kernel of the Hub, E_CKPT_INCOMPLETE if it speaks of many more blocks
    than the tensors are of, E_CKPT_CONFIG if it counts other parts that no tensor is of.
    """
    for place, value in _named(source.config):
        _refuse_kernel(source.directory, place, value)
    longest = _longest_list(source.tensors)
    for key in DECODER_BLOCKS:
        said = source.text_config.get(key)
        if type(said) is int and said > longest * MOST_TURNS:
            raise InputError(
                "E_CKPT_INCOMPLETE", f"config.json says {key} {said}, but the tensors are of {longest} blocks",
                hint="download config.json and the weights again, of one revision",
            )  # fmt: skip
    _refuse_kinds(source.config, longest)
    most = {_BLOCKS: max(longest, USUAL_PARTS), _LABELS: MAX_LABELS}
    most[_EXPERTS] = max(longest, _largest_stack(source.tensors.values()), USUAL_PARTS)
    for place, value in _named(source.config):
        for pattern, limit in most.items():
            if type(value) is int and value > limit and pattern.fullmatch(place.rpartition(".")[2]):
                raise InputError(
                    "E_CKPT_CONFIG", f"config.json says {place} {value}, and no tensors are of so many",
                    hint="download config.json again",
                )  # fmt: skip


def _refuse_kinds(config: Mapping[str, Any], longest: int) -> None:
    """InputError E_CKPT_CONFIG for kinds of many more blocks than the `longest` list of tensors has."""
    for place, value in _named(config):
        if not _PER_BLOCK.fullmatch(place.rpartition(".")[2]):
            continue
        count = _blocks_of(value)
        if count > max(longest * MOST_TURNS, USUAL_PARTS):
            message = (
                f"config.json gives {place} for {count} blocks, but the tensors are of {longest}"
            )
            raise InputError("E_CKPT_CONFIG", message, hint="download config.json again")


def _blocks_of(kinds: Any) -> int:
    """Return for how many blocks a config gives kinds: an entry or a letter for each, or numbers that count them."""
    if isinstance(kinds, str):
        return len(kinds)
    if type(kinds) is int:
        return kinds
    if not isinstance(kinds, list):
        return 0
    return max([len(kinds), *map(_blocks_of, kinds)])


def _refuse_kernel(directory: Path, place: str, value: Any) -> None:
    """InputError E_REMOTE_CODE for what transformers would load from the Hub to compute with."""
    key = place.rpartition(".")[2]
    if key in _KERNEL_SWITCHES and value:
        asked = f"`{key}`"
    elif _IMPLEMENTATION.fullmatch(key) and (
        words := [word for word in _texts(value) if _is_of_hub(word)]
    ):
        asked = f"`{words[0]}`"
    else:
        return
    raise InputError(
        "E_REMOTE_CODE", f"config.json of `{directory}` says {place}: {asked}, for which code would come from the Hub",
        hint=f"take `{place}` out of config.json: transformers then uses what is installed",
    )  # fmt: skip


def _is_of_hub(word: str) -> bool:
    """Whether transformers may look for an implementation on the Hub: a repository, or a package that is not here."""
    return "/" in word or ("flash_attention" in word and find_spec("flash_attn") is None)


def _texts(value: Any) -> list[str]:
    parts = value.values() if isinstance(value, Mapping) else [value]
    return [part for part in parts if isinstance(part, str)]


def _named(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested objects with its place, such as `text_config.num_hidden_layers`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{place}{key}", item
            yield from _named(item, f"{place}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _named(item, place)


def _longest_list(names: Iterable[str]) -> int:
    """The number of parts in the longest numbered list that `names` are of."""
    lists: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in _NUMBERED.finditer(name):
            lists[name[: match.start(1)]].add(match[1])
    return max(map(len, lists.values()), default=0)


def _largest_stack(tensors: Iterable[TensorInfo]) -> int:
    return max(
        (tensor.shape[0] for tensor in tensors if len(tensor.shape) > 2 and tensor.nbytes),
        default=0,
    )
