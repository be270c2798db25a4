"""Whether a GPTQ checkpoint, ours or another tool's, is whole and means the same to every reader. Needs no torch.

What is asked: headers against index against files; what the configuration says against what is stored; for each
quantized module its tensors, shapes, zero points, groups and scales; with `full` every byte. A property that only some
engine cannot serve is no defect: that is `config/engines.py`. Source: what readers of the format require.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gptq_cli.checkpoint.defect import Defect, Effect, convert_command
from gptq_cli.checkpoint.file_checks import check_files
from gptq_cli.checkpoint.hashes import check_manifest
from gptq_cli.checkpoint.hashing import side_by_side
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.module_checks import PARTS, check_module, check_values
from gptq_cli.checkpoint.raw import INTEGERS, count_not_finite, read_chunks
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.stored import (
    FORMATS,
    Settings,
    StoredConfig,
    other_packing,
    said_format,
    stored_config,
)
from gptq_cli.errors import InputError
from gptq_cli.files import UNREADABLE

HEAD = "lm_head"
CORRECT = "correct it in config.json and quantize_config.json"
_NUMBER = re.compile(r"\.\d+(?=\.)")
_IN_LIST = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.")


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, and what is wrong with it; `bits` are those that occur, `nbytes` those of the tensors."""

    defects: tuple[Defect, ...]
    modules: int
    tensors: int
    nbytes: int
    bits: tuple[int, ...]
    format: str
    full: bool
    hashed: int

    @property
    def ok(self) -> bool:
        return not self.defects


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found of a checkpoint that calls itself GPTQ; `config` None if its settings are not usable."""

    config: StoredConfig | None
    modules: tuple[str, ...]
    defects: tuple[Defect, ...]


def verify_checkpoint(directory: Path, *, full: bool = False) -> Verification:
    """Every defect of the GPTQ checkpoint in `directory`.

    Headers, configuration, g_idx, qzeros and scales are read; with `full` also every other number, which must be
    finite, and every file that `gptq_manifest.json` lists, whose hash must agree. A few tensors are in memory.
    InputError E_CKPT_KIND if there is no quantized tensor and no configuration that promises one, E_CKPT_QUANTIZED for
    one that calls itself something else than GPTQ, E_SOURCE_CHANGED for files that change meanwhile.
    """
    try:
        checkpoint = open_checkpoint(directory)
    except InputError as error:
        if error.code == UNREADABLE:
            raise  # nobody knows whether it is defective
        refused = tuple(Defect(problem.code, problem.message) for problem in error.problems)
        return Verification(refused, 0, 0, 0, (), "", full, 0)
    if checkpoint.quantization is None and not packed_modules(checkpoint.tensors):
        hint = "name a GPTQ checkpoint, for example one that `gptq quantize` wrote"
        raise InputError("E_CKPT_KIND", f"`{directory}` is not quantized", hint=hint)
    found = examine(checkpoint)
    defects, config, modules = list(found.defects), found.config, found.modules
    if full:
        defects += [defect for tensor in _kept(checkpoint, modules) for defect in _check_finite(tensor)]
    hashed, torn = check_manifest(directory, full=full)
    checkpoint.check_unchanged()
    settings = [config.settings(module) for module in modules] if config else []
    return Verification(
        defects=(*defects, *torn),
        modules=len(modules),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        bits=tuple(sorted({setting.bits for setting in settings})),
        format=config.format if config else "",
        full=full,
        hashed=hashed,
    )


def examine(checkpoint: Checkpoint, *, numbers: bool = True) -> Examined:
    """What is wrong with settings, files and packed linears; without `numbers` only headers are read.

    InputError E_CKPT_QUANTIZED as `format_of` says, but a defect for one that calls itself gptq and is not.
    """
    modules = packed_modules(checkpoint.tensors)
    packing = other_packing(checkpoint)
    calls_itself_gptq = said_format(checkpoint.quantization or {}) in FORMATS
    if packing and checkpoint.method == "gptq" and calls_itself_gptq:
        message = f"calls itself gptq, but its linears are packed for {packing}"
        hint = "use a full-precision, gptq or gptq_v2 checkpoint of the model"
        found = Defect("E_CKPT_QUANTIZED", message, "config.json", None, hint)
        return Examined(None, (), (found,))
    config, defects = stored_config(checkpoint)
    # A model may be loaded all the same, but no tool that writes whole checkpoints makes such an index.
    odd_index = [text for code, text in checkpoint.remarks if code == "W_CKPT_INDEX"]
    defects += [Defect("E_CKPT_INDEX", text, effect="form") for text in odd_index]
    defects += check_files(checkpoint)
    if config is not None:
        # Rules are matched here and not beside each other: only the main thread can give up
        # a pattern without a process.
        settings = {module: config.settings(module) for module in modules}
        defects += _against_config(checkpoint, config, modules)
        check = partial(_module, checkpoint, config, numbers=numbers)
        for of_module in side_by_side(lambda name: list(check(name, settings[name])), modules):
            defects += of_module
    return Examined(config, tuple(modules), tuple(defects))


def packed_modules(tensors: Iterable[str]) -> list[str]:
    """Names of modules that have any of qweight, qzeros and g_idx, in file order."""
    found = {name.rpartition(".")[0]: None for name in tensors if name.rpartition(".")[2] in PARTS - {"scales"}}
    return list(found)


def _module(
    checkpoint: Checkpoint, config: StoredConfig, module: str, settings: Settings, *, numbers: bool
) -> Iterator[Defect]:
    stored = {part: tensor for part in PARTS if (tensor := checkpoint.tensors.get(f"{module}.{part}"))}
    bias = checkpoint.tensors.get(f"{module}.bias")
    defects = list(check_module(module, stored, bias, settings, config.format))
    yield from defects
    if numbers and not any(defect.effect == "numbers" for defect in defects):
        yield from check_values(stored, settings, config.format)


def _against_config(checkpoint: Checkpoint, config: StoredConfig, modules: list[str]) -> Iterator[Defect]:
    """What the rules say is quantized and is not, the reverse, and what is stored twice or not at all."""
    tensors = checkpoint.tensors
    if not modules:
        message = "the configuration says gptq, and no tensor is quantized"
        hint = "download the checkpoint again, or remove a quantization_config that is not its own"
        yield Defect("E_CKPT_RULES", message, "config.json", None, hint)
    for module in modules:
        if rule := config.skip_rule(module):
            yield _unruly(f"`{module}` is quantized, and rule '{rule}' says that it is not", module)
        if not config.is_listed(module) and module != HEAD:
            yield _unruly(f"`{module}` is quantized, and modules_in_block_to_quantize does not name it", module)
        if (plain := tensors.get(f"{module}.weight")) is not None:
            hint = "remove one of the two from the file: readers take one or the other"
            yield Defect("E_CKPT_RULES", "stored beside its packed form", plain.file.name, plain.name, hint)
    for item in config.listed or ():
        if modules and not any(module.endswith(item) for module in modules):
            yield _unruly(f"modules_in_block_to_quantize names `{item}`, and nothing of that name is quantized", item)
    yield from _check_head(checkpoint, config, HEAD in modules)
    yield from _check_siblings(checkpoint, config, modules)
    yield from _check_blocks(checkpoint, modules)


def _check_head(checkpoint: Checkpoint, config: StoredConfig, quantized: bool) -> Iterator[Defect]:
    hint = f"{convert_command(checkpoint.directory, config.format)} corrects it"
    if config.lm_head and not quantized:
        yield _unruly(f"lm_head is true, and there is no {HEAD}.qweight", HEAD, hint, "form")
    if quantized and not config.lm_head:
        yield _unruly(f"{HEAD} is quantized, and lm_head is not true", HEAD, hint, "form")
    if quantized and checkpoint.config.get("tie_word_embeddings"):
        hint = "set tie_word_embeddings to false in config.json if the head is one of its own"
        message = f"{HEAD} is quantized, and tie_word_embeddings lets readers take the embeddings for it"
        yield _unruly(message, HEAD, hint, "numbers")


def _check_siblings(checkpoint: Checkpoint, config: StoredConfig, modules: list[str]) -> Iterator[Defect]:
    """Linears that are packed in other blocks and plain in this one, without a rule that says so."""
    kinds, packed = {_NUMBER.sub(".N", module) for module in modules}, set(modules)
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(tensor.shape) != 2 or _NUMBER.sub(".N", module) not in kinds or module in packed:
            continue
        unsaid = config.skip_rule(module) is None and (config.listed is None or config.is_listed(module))
        if unsaid and not _is_beyond(checkpoint, module):
            message = "not quantized as the same module of other blocks is, and no rule says so"
            hint = "say so in config.json: as a `-:` rule of dynamic, and by modules_in_block_to_quantize"
            yield Defect("E_CKPT_RULES", message, tensor.file.name, name, hint, "readers")


def _check_blocks(checkpoint: Checkpoint, modules: list[str]) -> Iterator[Defect]:
    """Blocks that are missing as a whole, in the list that most quantized modules are in."""
    lists = Counter(match["list"] for module in modules if (match := _IN_LIST.match(module)))
    if not lists:
        return
    (name, _), *_ = lists.most_common(1)
    found = [match for tensor in checkpoint.tensors if (match := _IN_LIST.match(tensor)) and match["list"] == name]
    present = {int(match["index"]) for match in found}
    expected = max(max(present) + 1, checkpoint.n_blocks or 0)
    for index in sorted(set(range(min(expected, 10_000))) - present):
        yield Defect("E_CKPT_INCOMPLETE", f"no tensor of `{name}.{index}`", None, f"{name}.{index}")


def _is_beyond(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a block lies behind the model's last one, as layers that predict several tokens do."""
    match, n_blocks = _IN_LIST.match(module), checkpoint.n_blocks
    return match is not None and n_blocks is not None and int(match["index"]) >= n_blocks


def _kept(checkpoint: Checkpoint, modules: Iterable[str]) -> Iterator[TensorInfo]:
    """Tensors whose numbers the quick checks have not read."""
    small = {f"{module}.{part}" for module in modules for part in PARTS - {"qweight"}}
    return (tensor for name, tensor in checkpoint.tensors.items() if name not in small)


def _check_finite(tensor: TensorInfo) -> Iterator[Defect]:
    if tensor.name.endswith(".qweight"):
        if (
            tensor.dtype == "I32"
            and tensor.nbytes
            and not any(chunk.any() for chunk in read_chunks(tensor, INTEGERS["I32"]))
        ):
            message = "holds nothing but zeros, as a file that was never written does"
            yield Defect("E_CKPT_CORRUPT", message, tensor.file.name, tensor.name)
    elif count := count_not_finite(tensor):
        yield Defect("E_CKPT_NONFINITE", f"holds NaN or infinity, {count} times", tensor.file.name, tensor.name)


def _unruly(message: str, module: str, hint: str = CORRECT, effect: Effect = "readers") -> Defect:
    return Defect("E_CKPT_RULES", message, "config.json", module, hint, effect)
