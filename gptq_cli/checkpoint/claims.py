"""Claims of config.json that are compared with the tensors before anything obeys them.

`check_claims` is about what transformers would build: code from the Hub, or more parts than are
stored. `check_rules` is about what the `quantization_config` says is quantized. Needs no torch.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.defects import Defect, Effect, convert_command, tensor_defect
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Packing
from gptq_cli.checkpoint.quantization_config import LISTED
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import HEAD, StoredConfig, kind_of, list_item
from gptq_cli.errors import InputError

DECODER_BLOCKS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
MOST_TURNS = 16  # of a model that runs the same blocks several times and counts them each time
USUAL_PARTS = 1024  # of a list in another part of a model, which a checkpoint may lack
MAX_LABELS = 10**6
MOST_MISSING = 10_000  # blocks that are looked for
_IMPLEMENTATION = re.compile(r"_?\w+_implementation(_internal)?")
_KERNEL_SWITCHES = ("use_kernels", "kernel_config")
_BLOCKS = re.compile(r"(\w+_)?(layers?|blocks|depth|stages)")
_EXPERTS = re.compile(r"(\w+_)?experts")
_PER_BLOCK = re.compile(r"\w+_(types|pattern)")  # a kind for each block: a list, counts or letters
_OF_BLOCKS = re.compile(r"layer|block")
_LABELS = re.compile(r"(\w+_)?labels")
_INDEX = re.compile(r"(?:^|\.)(\d+)(?=\.)")
_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.")
_STACK = re.compile(r"(.+)\.experts\.[^.]+")
_ROUTERS = ("gate", "router")  # beside the experts; a row for each of them

# What a block holds: modules with "" for a linear, with part and shape for any other tensor, which
# is itself in place of the module if it is neither weight nor bias.
Content = frozenset[tuple[str, str]]

CORRECT = "correct it in config.json and quantize_config.json"
DOWNLOAD_CONFIG = "download config.json again"
DOWNLOAD_WEIGHTS = "download the checkpoint again, or write it again with the tool that wrote it"


def check_claims(source: Checkpoint) -> None:
    """Raise InputError for a config that makes transformers run foreign code or fill the memory.

    E_REMOTE_CODE if it names a kernel of the Hub, E_CKPT_INCOMPLETE if it has many more blocks than
    there are tensors of, E_CKPT_CONFIG if it counts other parts that no tensor is of. E_CKPT_SHAPE
    if a tensor holds another number of experts than their router chooses among.
    """
    for place, value in _values(source.config):
        _refuse_kernel(source.directory, place, value)
    longest = _longest_list(source.tensors)
    for key in DECODER_BLOCKS:
        count = source.text_config.get(key)
        if type(count) is int and count > longest * MOST_TURNS:
            message = (
                f"config.json sets {key} to {count}, but there are tensors of {longest} blocks"
            )
            hint = "download config.json and the weights again, of one revision"
            raise InputError("E_CKPT_INCOMPLETE", message, hint=hint)
    limits = {
        _BLOCKS: max(longest, USUAL_PARTS),
        _LABELS: MAX_LABELS,
        _EXPERTS: max(longest, _largest_stack(source.tensors.values()), USUAL_PARTS),
    }
    for stack, message in _cut_stacks(source):
        raise InputError("E_CKPT_SHAPE", f"`{stack.name}` {message}", hint=DOWNLOAD_WEIGHTS)
    for place, value in _values(source.config):
        _refuse_kinds(place, value, longest)
        _refuse_count(place, value, limits)


def _values(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested objects with its place, such as `text_config.num_layers`."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"{place}{key}", item
            yield from _values(item, f"{place}{key}.")
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, place)


def _key(place: str) -> str:
    return place.rpartition(".")[2]


def _refuse_kernel(directory: Path, place: str, value: Any) -> None:
    """Raise InputError E_REMOTE_CODE for a kernel that transformers would load from the Hub."""
    key = _key(place)
    if key in _KERNEL_SWITCHES and value:
        kernel = key
    elif _IMPLEMENTATION.fullmatch(key):
        kernel = _implementation_on_hub(value)
    else:
        return
    if kernel:
        setting = f"config.json of `{directory}` sets {place}: `{kernel}`"
        message = f"{setting}, for which code would come from the Hub"
        hint = f"remove `{place}` from config.json: transformers then uses an installed one"
        raise InputError("E_REMOTE_CODE", message, hint=hint)


def _implementation_on_hub(value: Any) -> str:
    """Return the first implementation in `value` that may come from the Hub, "" if there is none.

    It is a repository, or a package that is not installed.
    """
    names = value.values() if isinstance(value, Mapping) else [value]
    for name in names:
        if isinstance(name, str) and _is_on_hub(name):
            return name
    return ""


def _is_on_hub(name: str) -> bool:
    return "/" in name or ("flash_attention" in name and find_spec("flash_attn") is None)


def _refuse_kinds(place: str, value: Any, longest: int) -> None:
    """Raise InputError E_CKPT_CONFIG for kinds of many more blocks than the longest list has."""
    if not _PER_BLOCK.fullmatch(_key(place)):
        return
    count = _blocks_of(value)
    if count > max(longest * MOST_TURNS, USUAL_PARTS):
        claim = f"config.json gives {place} for {count} blocks"
        message = f"{claim}, but there are tensors of {longest}"
        raise InputError("E_CKPT_CONFIG", message, hint=DOWNLOAD_CONFIG)


def _blocks_of(kinds: Any) -> int:
    """Return for how many blocks a config gives kinds.

    There is an entry or a letter for each block, or numbers that count them.
    """
    if isinstance(kinds, str):
        return len(kinds)
    if type(kinds) is int:
        return kinds
    if not isinstance(kinds, list):
        return 0
    return max([len(kinds), *map(_blocks_of, kinds)])


def _refuse_count(place: str, value: Any, limits: Mapping[re.Pattern[str], int]) -> None:
    """Raise InputError E_CKPT_CONFIG for a number of parts that is above the limit of its name."""
    if type(value) is not int:
        return
    for pattern, limit in limits.items():
        if value > limit and pattern.fullmatch(_key(place)):
            message = f"config.json sets {place} to {value}, but there are no tensors of so many"
            raise InputError("E_CKPT_CONFIG", message, hint=DOWNLOAD_CONFIG)


def _longest_list(names: Iterable[str]) -> int:
    """Return the number of parts in the longest numbered list of modules."""
    lists: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for match in _INDEX.finditer(name):
            lists[name[: match.start(1)]].add(match[1])
    return max(map(len, lists.values()), default=0)


def _largest_stack(tensors: Iterable[TensorInfo]) -> int:
    """Return the largest first dimension of a tensor that stacks matrices."""
    largest = 0
    for tensor in tensors:
        if len(tensor.shape) > 2 and tensor.nbytes:
            largest = max(largest, tensor.shape[0])
    return largest


# ---------------------------------------------------------------- the rules of a quantization


def check_rules(
    checkpoint: Checkpoint, config: StoredConfig, modules: Sequence[str], packing: Packing
) -> Iterator[Defect]:
    """Yield differences between the rules and the quantized `modules`.

    A module may be quantized although a rule excludes it, or the reverse, and it may be stored
    twice or not at all.
    """
    if not modules:
        message = f"the configuration names {config.format}, but no tensor is quantized"
        hint = "download the checkpoint again, or remove a quantization_config that is not its own"
        yield Defect("E_CKPT_RULES", message, "config.json", None, hint)
    for module in modules:
        yield from _check_module(config, module)
        yield from _check_plain_form(checkpoint, module, packing)
    for name in config.listed or ():
        if modules and not any(module.endswith(name) for module in modules):
            message = f"{LISTED} names `{name}`, but no quantized module has that name"
            yield _rule_defect(message, name)
    yield from _check_head(checkpoint, config, HEAD in modules)
    yield from _check_siblings(checkpoint, config, modules)
    yield from check_complete(checkpoint, modules)


def check_complete(checkpoint: Checkpoint, modules: Sequence[str]) -> Iterator[Defect]:
    """Yield blocks, their parts and experts that other tensors ask for, but that are not stored."""
    blocks = _block_list(modules)
    if blocks is not None:
        yield from _check_blocks(checkpoint, blocks)
        yield from _check_lost_parts(checkpoint, modules, blocks)
    yield from _check_experts(checkpoint)
    for stack, message in _cut_stacks(checkpoint):
        yield tensor_defect("E_CKPT_SHAPE", stack, message, DOWNLOAD_WEIGHTS)


def _rule_defect(
    message: str, module: str, hint: str = CORRECT, effect: Effect = "readers"
) -> Defect:
    return Defect("E_CKPT_RULES", message, "config.json", module, hint, effect)


def _check_module(config: StoredConfig, module: str) -> Iterator[Defect]:
    rule = config.skip_rule(module)
    if rule:
        yield _rule_defect(f"`{module}` is quantized, but rule '{rule}' excludes it", module)
    if not config.is_listed(module) and module != HEAD:
        yield _rule_defect(f"`{module}` is quantized, but {LISTED} does not name it", module)


def _check_plain_form(checkpoint: Checkpoint, module: str, packing: Packing) -> Iterator[Defect]:
    plain = checkpoint.tensors.get(f"{module}.weight")
    if plain is not None and plain.name != f"{module}.{packing.codes}":
        hint = "remove one of the two from the file: readers take one or the other"
        message = "stored beside its packed form"
        yield Defect("E_CKPT_RULES", message, plain.file.name, plain.name, hint)


def _check_head(checkpoint: Checkpoint, config: StoredConfig, quantized: bool) -> Iterator[Defect]:
    if config.lm_head != quantized:
        message = f"{HEAD} is quantized, but lm_head is not true"
        if config.lm_head:
            message = f"lm_head is true, but there is no {HEAD}.qweight"
        hint = f"{convert_command(checkpoint.directory, config.format)} corrects it"
        yield _rule_defect(message, HEAD, hint, "form")
    if quantized and checkpoint.config.get("tie_word_embeddings"):
        claim = f"{HEAD} is quantized, but tie_word_embeddings"
        message = f"{claim} makes readers use the embeddings in its place"
        hint = "set tie_word_embeddings to false in config.json if the head has its own weights"
        yield _rule_defect(message, HEAD, hint, "numbers")


def _check_siblings(
    checkpoint: Checkpoint, config: StoredConfig, modules: Sequence[str]
) -> Iterator[Defect]:
    """Yield linears that are quantized in other blocks but not in this one, without a rule."""
    packed = set(modules)
    kinds = set(map(kind_of, modules))
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        is_linear = module != name and len(tensor.shape) == 2
        if not is_linear or module in packed or kind_of(module) not in kinds:
            continue
        if _is_excluded(config, module) or _is_beyond(checkpoint, module):
            continue
        message = "not quantized as the same module of other blocks is, but no rule excludes it"
        hint = f"exclude it in config.json: by a `-:` rule of dynamic, and by {LISTED}"
        yield Defect("E_CKPT_RULES", message, tensor.file.name, name, hint, "readers")


def _is_excluded(config: StoredConfig, module: str) -> bool:
    if config.skip_rule(module) is not None:
        return True
    return not config.is_listed(module)


def _is_beyond(checkpoint: Checkpoint, module: str) -> bool:
    """Return whether a block comes after the model's last one, to predict several tokens."""
    item, n_blocks = list_item(module), checkpoint.n_blocks
    return item is not None and n_blocks is not None and int(item.number) >= n_blocks


def _numbers_by_list(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the number of each name in the outermost list of modules that it belongs to."""
    found: dict[str, list[int]] = defaultdict(list)
    for name in names:
        item = list_item(name)
        if item:
            found[item.list_name].append(int(item.number))
    return found


def _block_list(modules: Iterable[str]) -> str | None:
    """Return the list that holds most of the quantized modules; None if no list holds any."""
    quantized = _numbers_by_list(modules)
    return max(quantized, key=lambda name: len(quantized[name]), default=None)


def _check_blocks(checkpoint: Checkpoint, blocks: str) -> Iterator[Defect]:
    """Yield blocks without any tensor."""
    present = set(_numbers_by_list(checkpoint.tensors)[blocks])
    expected = min(max(max(present) + 1, checkpoint.n_blocks or 0), MOST_MISSING)
    for index in sorted(set(range(expected)) - present):
        name = f"{blocks}.{index}"
        yield Defect("E_CKPT_INCOMPLETE", f"no tensor of `{name}`", None, name)


def _check_lost_parts(
    checkpoint: Checkpoint, modules: Sequence[str], blocks: str
) -> Iterator[Defect]:
    """Yield what one block lacks, if several others have it and are equal to it otherwise.

    Some architectures have blocks that lack something. There are several of these as a rule, or a
    list of config.json tells them apart, or they are at an end: see `_may_be_structure`.
    """
    contents = _contents(checkpoint, modules, blocks)
    n_blocks = checkpoint.n_blocks or max(contents, default=0) + 1
    kinds = {}
    for index, content in contents.items():
        kinds[index] = (_kind_in_config(checkpoint.text_config, index, n_blocks), content)
    for index, lost in _lost_by_block(kinds).items():
        content = contents[index]
        if index in (0, n_blocks - 1) and _may_be_structure(lost, content):
            continue
        for place in _lost_places(lost, content):
            message = "has no tensor, but the same blocks elsewhere have this part"
            name = f"{blocks}.{index}.{place}"
            yield Defect("E_CKPT_INCOMPLETE", message, None, name, DOWNLOAD_WEIGHTS)


def _lost_by_block(kinds: Mapping[int, tuple[str, Content]]) -> dict[int, Content]:
    """Return what a block alone lacks, by the number of the block.

    It is compared with each block of its kind that holds what several blocks hold, of any kind.
    """
    numbers = Counter(content for _, content in kinds.values())
    usual = [kind for kind in set(kinds.values()) if numbers[kind[1]] > 1]
    lacking = Counter[tuple[str, str]]()
    for _, content in kinds.values():
        lacking.update(_lacked(content, usual))
    found = {}
    for index, (kind, content) in kinds.items():
        lost = _lost_of_block(kind, content, usual)
        if lost and all(lacking[entry] == 1 for entry in lost):
            found[index] = lost
    return found


def _lacked(content: Content, usual: Iterable[tuple[str, Content]]) -> Content:
    """Return what a block lacks beside any of the `usual` ones that have all that it has."""
    lacked: Content = frozenset()
    for _, other in usual:
        if content < other:
            lacked |= other - content
    return lacked


def _lost_of_block(kind: str, content: Content, usual: Iterable[tuple[str, Content]]) -> Content:
    """Return what a block has lost beside a usual one of its kind; empty if nothing.

    A bias alone is not lost: some tools store one for each packed linear. Single experts are left
    to `_check_experts`: they may be pruned.
    """
    held = _without_biases(content)
    for other_kind, other in usual:
        if kind != other_kind or not content < other:
            continue
        lost = other - content
        paths = {path for path, _ in lost}
        if paths.isdisjoint(held) and not _whole_experts(paths, held):
            return lost
    return frozenset()


def _without_biases(content: Content) -> set[str]:
    return {path for path, held in content if not held.startswith("bias")}


def _whole_experts(lost: Iterable[str], held: Iterable[str]) -> bool:
    """Return whether `lost` has whole experts only, of a layer that holds others."""
    experts_held = set(map(_expert_of, held))
    holders_held = {holder for holder, _ in experts_held}
    for path in lost:
        holder, number = _expert_of(path)
        if not number or holder not in holders_held or (holder, number) in experts_held:
            return False
    return True


def _expert_of(path: str) -> tuple[str, str]:
    """Return the holder and the number of the expert that a module is in; "" if in none."""
    match = _EXPERT.match(path)
    if match is None:
        return "", ""
    return match[1], match[2]


def _may_be_structure(lost: Content, content: Content) -> bool:
    """Return whether a first or last block may be built without what it seems to have lost.

    The first may lack a norm (ModernBERT), the last may use keys and values of another block. None
    lacks one linear, or all of its attention or of its MLP.
    """
    linears = {path for path, held in lost if not held}
    if linears and len(lost) == 1:
        return False
    children = {_child(path) for path, _ in lost}
    held = set(map(_child, _without_biases(content)))
    return not children.isdisjoint(held) or children != set(map(_child, linears))


def _child(path: str) -> str:
    return path.partition(".")[0]


def _lost_places(lost: Content, content: Content) -> list[str]:
    """Return the outermost modules of `lost` that hold nothing, in order."""
    held: set[str] = set()
    for path in _without_biases(content):
        held.update(_holders(path))
    found = set()
    for path, _ in lost:
        found.add(next(place for place in _holders(path) if place not in held))
    return sorted(found)


def _holders(path: str) -> list[str]:
    """Return a module with those that hold it, the outermost first."""
    names = path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names) + 1)]


def _contents(checkpoint: Checkpoint, modules: Sequence[str], blocks: str) -> dict[int, Content]:
    """Return what each block of the model holds."""
    packed = set(modules)
    found: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for name, tensor in checkpoint.tensors.items():
        item = list_item(name)
        if item is None or item.list_name != blocks or _is_beyond(checkpoint, name):
            continue
        is_packed = name.rpartition(".")[0] in packed
        found[int(item.number)].add(_held(item.inner, tensor.shape, is_packed=is_packed))
    return {index: frozenset(content) for index, content in found.items()}


def _held(inner: str, shape: Sequence[int], *, is_packed: bool) -> tuple[str, str]:
    """Return what a tensor with the name `inner` is for its block, see `Content`."""
    module, _, part = inner.rpartition(".")
    if is_packed and part != "bias":
        return module, ""
    if part == "weight" and len(shape) == 2:
        return module, ""
    if part in ("weight", "bias"):
        return module, f"{part} {shape}"
    return inner, f"{part} {shape}"


def _kind_in_config(config: Mapping[str, Any], index: int, n_blocks: int) -> str:
    """Return what the lists of config.json with an entry for each block tell about one block."""
    found = []
    for key, value in config.items():
        if isinstance(value, (list, str)):
            found.append(f"{key}: {_told(key, value, index, n_blocks)}")
    return ", ".join(found)


def _told(key: str, value: Sequence[Any], index: int, n_blocks: int) -> str:
    """Return what one list tells about a block; "" if it has nothing to do with blocks.

    Entries are names, letters or settings, or numbers, of which zero alone tells that a block lacks
    something. A list of some blocks, such as `mlp_only_layers`, has the block or not.
    """
    if len(value) >= n_blocks and _PER_BLOCK.fullmatch(key):
        return str(value[index])
    if isinstance(value, str):
        return ""
    if len(value) == n_blocks:
        return _without_numbers(value[index])
    if _OF_BLOCKS.search(key):
        return str(index in value)
    return ""


def _without_numbers(entry: Any) -> str:
    if isinstance(entry, (int, float)):
        return str(bool(entry))
    return str(entry)


def _check_experts(checkpoint: Checkpoint) -> Iterator[Defect]:
    """Yield the experts of a layer if there are fewer of them than its router has rows."""
    experts: dict[str, set[str]] = defaultdict(set)
    for name in checkpoint.tensors:
        match = _EXPERT.match(name)
        if match:
            experts[match[1]].add(match[2])
    for holder, numbers in experts.items():
        for name in _ROUTERS:
            router = checkpoint.tensors.get(f"{holder}.{name}.weight")
            if router is not None and router.shape and router.shape[0] > len(numbers):
                claim = f"there are {len(numbers)} experts"
                message = f"{claim}, but `{router.name}` chooses among {router.shape[0]}"
                place = f"{holder}.experts"
                yield Defect("E_CKPT_INCOMPLETE", message, None, place, DOWNLOAD_WEIGHTS)


def _cut_stacks(checkpoint: Checkpoint) -> Iterator[tuple[TensorInfo, str]]:
    """Yield tensors of experts that are not as many as the router has rows, or config.json says.

    Routers of some models also choose among what is no expert.
    """
    named = _counts_of_experts(checkpoint.config)
    for name, tensor in checkpoint.tensors.items():
        match = _STACK.fullmatch(name)
        if match is None or len(tensor.shape) < 3 or tensor.shape[0] in named:
            continue
        rows = _rows_of_router(checkpoint, match[1])
        if rows not in (None, tensor.shape[0]):
            claim = f"holds {tensor.shape[0]} experts"
            yield tensor, f"{claim}, but the router of `{match[1]}` chooses among {rows}"


def _counts_of_experts(config: Mapping[str, Any]) -> set[int]:
    found = set()
    for place, value in _values(config):
        if type(value) is int and _EXPERTS.fullmatch(_key(place)):
            found.add(value)
    return found


def _rows_of_router(checkpoint: Checkpoint, holder: str) -> int | None:
    for name in _ROUTERS:
        router = checkpoint.tensors.get(f"{holder}.{name}.weight")
        if router is not None and router.shape:
            return router.shape[0]
    return None
