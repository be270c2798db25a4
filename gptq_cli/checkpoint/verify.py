"""The check that a GPTQ checkpoint, ours or another tool's, is whole and means the same to every
reader. Needs no torch.

What is asked: headers against index against files; `gptq_manifest.json` against sizes and SHA-256
of the files; what the configuration says against what is stored; for each quantized module its
tensors, shapes, zero points, groups and scales; with `full` every byte. A property that only some
engine cannot serve is no defect: that is `config/serving_table.py`. Source: what readers of the
format require.

qweight int32 [I * bits / 32, O], qzeros int32 [G, O * bits / 32], scales [G, O], g_idx [I]; w = s (q - z).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Any

import numpy as np

from gptq_cli.checkpoint.headers import (
    INTEGERS,
    Array,
    TensorInfo,
    count_not_finite,
    read_array,
    read_chunks,
    unpack_words,
)
from gptq_cli.checkpoint.quantization_config import (
    STORED_OFFSET,
    Defect,
    Effect,
    Settings,
    StoredConfig,
    convert_command,
    format_of,
    other_packing,
    said_format,
    stored_config,
)
from gptq_cli.checkpoint.source import METHOD as FP8
from gptq_cli.checkpoint.source import (
    Checkpoint,
    index_file,
    is_safe_file,
    open_checkpoint,
    read_json,
)
from gptq_cli.config.layer import FORMATS
from gptq_cli.errors import GateError, InputError
from gptq_cli.files import UNREADABLE, is_file
from gptq_cli.solver.float16 import LARGEST, SMALLEST
from gptq_cli.storage.manifest import (
    INDEX_NAME,
    MANIFEST,
    QUANTIZE_CONFIG,
    REPORT_DATA,
    REPORT_PAGE,
    file_hash,
    is_intact,
    side_by_side,
)

HEAD = "lm_head"
CORRECT = "correct it in config.json and quantize_config.json"
_NUMBER = re.compile(r"\.\d+(?=\.)")
_IN_LIST = re.compile(r"(?P<list>.*?)\.(?P<index>\d+)\.")

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_config.json"

DTYPES = {
    "qweight": ("I32",),
    "qzeros": ("I32",),
    "scales": ("F16", "BF16", "F32"),
    "g_idx": ("I32", "I64"),
}
PARTS = frozenset(DTYPES)
BOTH = f"config.json and {QUANTIZE_CONFIG}"

PAGES = {".md", ".html", ".png", ".log"}  # what people read


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
        defects += [
            defect for tensor in _kept(checkpoint, modules) for defect in _check_finite(tensor)
        ]
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
    found = {
        name.rpartition(".")[0]: None
        for name in tensors
        if name.rpartition(".")[2] in PARTS - {"scales"}
    }
    return list(found)


def _module(
    checkpoint: Checkpoint, config: StoredConfig, module: str, settings: Settings, *, numbers: bool
) -> Iterator[Defect]:
    stored = {
        part: tensor for part in PARTS if (tensor := checkpoint.tensors.get(f"{module}.{part}"))
    }
    bias = checkpoint.tensors.get(f"{module}.bias")
    defects = list(check_module(module, stored, bias, settings, config.format))
    yield from defects
    if numbers and not any(defect.effect == "numbers" for defect in defects):
        yield from check_values(stored, settings, config.format)


def _against_config(
    checkpoint: Checkpoint, config: StoredConfig, modules: list[str]
) -> Iterator[Defect]:
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
            yield _unruly(
                f"`{module}` is quantized, and modules_in_block_to_quantize does not name it",
                module,
            )
        if (plain := tensors.get(f"{module}.weight")) is not None:
            hint = "remove one of the two from the file: readers take one or the other"
            yield Defect(
                "E_CKPT_RULES", "stored beside its packed form", plain.file.name, plain.name, hint
            )
    for item in config.listed or ():
        if modules and not any(module.endswith(item) for module in modules):
            yield _unruly(
                f"modules_in_block_to_quantize names `{item}`, and nothing of that name is quantized",
                item,
            )
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
        message = (
            f"{HEAD} is quantized, and tie_word_embeddings lets readers take the embeddings for it"
        )
        yield _unruly(message, HEAD, hint, "numbers")


def _check_siblings(
    checkpoint: Checkpoint, config: StoredConfig, modules: list[str]
) -> Iterator[Defect]:
    """Linears that are packed in other blocks and plain in this one, without a rule that says so."""
    kinds, packed = {_NUMBER.sub(".N", module) for module in modules}, set(modules)
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        if (
            module == name
            or len(tensor.shape) != 2
            or _NUMBER.sub(".N", module) not in kinds
            or module in packed
        ):
            continue
        unsaid = config.skip_rule(module) is None and (
            config.listed is None or config.is_listed(module)
        )
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
    found = [
        match
        for tensor in checkpoint.tensors
        if (match := _IN_LIST.match(tensor)) and match["list"] == name
    ]
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
        yield Defect(
            "E_CKPT_NONFINITE",
            f"holds NaN or infinity, {count} times",
            tensor.file.name,
            tensor.name,
        )


def _unruly(message: str, module: str, hint: str = CORRECT, effect: Effect = "readers") -> Defect:
    return Defect("E_CKPT_RULES", message, "config.json", module, hint, effect)


def check_written(stage: Path) -> None:
    """GateError E_VERIFY if what was written is not a checkpoint that every reader understands alike."""
    defects = verify_checkpoint(stage).defects
    if defects:
        raise GateError(
            "E_VERIFY", f"what was written has {len(defects)} defects, the first: {defects[0]}",
            hint="this is a fault of gptq: please report it, with the command and the model",
        )  # fmt: skip


def check_files(checkpoint: Checkpoint) -> Iterator[Defect]:
    """Weights under a name that transformers does not know, others beside them, and the settings of an adapter.

    A checkpoint of which only headers were fetched from the Hub has no other files here.
    """
    directory = checkpoint.directory
    if any(tensor.file.parent != directory for tensor in checkpoint.tensors.values()):
        return
    used = sorted({tensor.file.name for tensor in checkpoint.tensors.values()})
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    sharded = (directory / INDEX_NAME).is_file()
    if not sharded and used and WEIGHTS not in used:
        used_names = used[0] if len(used) == 1 else index_file(directory).name
        message = f"transformers looks for {WEIGHTS} or {INDEX_NAME}, and not for this name"
        hint = f"{convert_command(directory, format_of(checkpoint))} gives it that name"
        yield Defect("E_CKPT_MISSING", message, used_names, None, hint, "form")
    for name in present:
        if name not in used and not sharded:
            message = "lies beside the weights, and readers differ in whether they load it"
            yield Defect(
                "E_CKPT_INDEX", message, name, None, "move it out of the directory", "form"
            )
    if (directory / ADAPTER).is_file():
        message = "makes transformers take the directory for an adapter of another model"
        yield Defect("E_CKPT_KIND", message, ADAPTER, None, "move it out of the directory", "form")


def check_module(
    module: str,
    stored: Mapping[str, TensorInfo],
    bias: TensorInfo | None,
    settings: Settings,
    format: str,
) -> Iterator[Defect]:
    """What headers tell: the four tensors are there and have the dtypes and shapes that the settings ask for."""
    for part in sorted(PARTS - set(stored)):
        if part == "g_idx" and "qweight" in stored and not settings.desc_act:
            yield _no_g_idx(module, stored["qweight"], format)
        else:
            yield Defect("E_CKPT_INCOMPLETE", f"no {part}", None, module)
    for part, tensor in stored.items():
        if tensor.dtype not in DTYPES[part]:
            yield _defect(
                "E_CKPT_SHAPE", tensor, f"{tensor.dtype}, not {' or '.join(DTYPES[part])}"
            )
    if PARTS - set(stored) <= {"g_idx"}:
        tensors = {**stored, "bias": bias} if bias else stored
        yield from _check_shapes(module, tensors, settings)


def _no_g_idx(module: str, qweight: TensorInfo, format: str) -> Defect:
    """The columns are in order, but llama.cpp and transformers fail or take what lies in memory for g_idx."""
    command = convert_command(qweight.file.parent, format)
    return Defect("E_CKPT_INCOMPLETE", "no g_idx", None, module, f"{command} writes it", "form")


def _check_shapes(
    module: str, stored: Mapping[str, TensorInfo], settings: Settings
) -> Iterator[Defect]:
    in_features = _in_features(stored, settings)
    out_features = stored["scales"].shape[-1] if stored["scales"].shape else 0
    group_size = in_features if settings.group_size == -1 else settings.group_size
    if (
        in_features == 0
        or out_features == 0
        or in_features % 32
        or out_features % 32
        or in_features % group_size
    ):
        said = f"{in_features} inputs, {out_features} outputs and groups of {group_size}"
        yield Defect(
            "E_CKPT_SHAPE",
            f"{said} cannot be packed into 32-bit words",
            stored["qweight"].file.name,
            module,
        )
        return
    groups = in_features // group_size
    expected = {
        "qweight": (in_features * settings.bits // 32, out_features),
        "qzeros": (groups, out_features * settings.bits // 32),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
        "bias": (out_features,),
    }
    for part, tensor in stored.items():
        if tensor.shape != expected[part]:
            said = f"{settings.bits} bits and groups of {group_size} ask for {list(expected[part])}"
            yield _defect("E_CKPT_SHAPE", tensor, f"has shape {list(tensor.shape)}, {said}")


def _in_features(stored: Mapping[str, TensorInfo], settings: Settings) -> int:
    if "g_idx" in stored:
        return math.prod(stored["g_idx"].shape)
    rows = stored["qweight"].shape[0] if stored["qweight"].shape else 0
    return rows * 32 // settings.bits


def check_values(
    stored: Mapping[str, TensorInfo], settings: Settings, format: str
) -> Iterator[Defect]:
    """What the numbers tell, of a module whose headers are right."""
    if "g_idx" in stored:
        yield from _check_groups(stored["g_idx"], stored["scales"].shape[0], settings)
    yield from _check_zeros(stored["qzeros"], settings, format)
    yield from _check_scales(stored["scales"])
    yield from _check_decoded(stored, settings, format)


def _check_groups(tensor: TensorInfo, groups: int, settings: Settings) -> Iterator[Defect]:
    g_idx = read_array(tensor)
    if g_idx.min() < 0 or g_idx.max() >= groups:
        yield _defect(
            "E_CKPT_GROUPS",
            tensor,
            f"holds {g_idx.min()} to {g_idx.max()}, there are {groups} groups",
        )
        return
    group_size = g_idx.size // groups
    sizes = np.bincount(g_idx, minlength=groups)
    if (sizes != group_size).any():
        odd = int((sizes != group_size).argmax())
        hint = None if settings.desc_act or g_idx.any() else _placeholder(tensor)
        message = f"group {odd} has {sizes[odd]} of the columns, not {group_size}"
        yield _defect("E_CKPT_GROUPS", tensor, message, hint)
    elif not settings.desc_act and (g_idx != np.arange(g_idx.size) // group_size).any():
        hint = f"if it was quantized by descending activation: set desc_act to true in {BOTH}"
        yield _defect(
            "E_CKPT_GROUPS", tensor, "is not in the order of columns, and desc_act is false", hint
        )


def _placeholder(tensor: TensorInfo) -> str:
    command = convert_command(tensor.file.parent, "gptq")
    return f"if the columns are in order: take the g_idx tensors out of the file, and {command} writes right ones"


def _check_zeros(tensor: TensorInfo, settings: Settings, format: str) -> Iterator[Defect]:
    fields = unpack_words(read_array(tensor), settings.bits).astype(np.int32)
    offset, middle, top = STORED_OFFSET[format], 2 ** (settings.bits - 1), 2**settings.bits - 1
    if settings.sym:
        yield from _check_symmetric(tensor, fields, middle, offset)
    elif offset and (wrapped := int((fields == top).sum())):
        message = f"{wrapped} of {fields.size} zero points are 0, which readers of gptq (v1) decode in different ways"
        hint = "quantize the full-precision model again, with --sym or --format gptq_v2"
        yield _defect("E_CKPT_ZEROS", tensor, message, hint)


def _check_symmetric(
    tensor: TensorInfo, fields: Array, middle: int, offset: int
) -> Iterator[Defect]:
    wrong = int((fields != middle - offset).sum())
    if not wrong:
        return
    if (fields == middle - 1 + offset).all():
        held, said = ("gptq_v2", "gptq") if offset else ("gptq", "gptq_v2")
        message = f"holds zero points as {held} stores them, config.json says {said}"
        yield _defect("E_CKPT_ZEROS", tensor, message, _other_format(tensor, held))
    else:
        message = f"{wrong} of {fields.size} zero points are not {middle}, and sym is true"
        hint = f"if it was quantized with asymmetric grids: set sym to false in {BOTH}"
        yield _defect("E_CKPT_ZEROS", tensor, message, hint)


def _other_format(tensor: TensorInfo, held: str) -> str:
    """What the owner does whose file is of format `held` and says otherwise; format gptq has the most readers."""
    remedy = f"set checkpoint_format and format to {held} in {BOTH}"
    command = convert_command(tensor.file.parent, "gptq")
    return remedy if held == "gptq" else f"{remedy}, then {command}"


def _check_scales(tensor: TensorInfo) -> Iterator[Defect]:
    size = np.abs(read_array(tensor).astype(np.float32))
    if not_finite := int((~np.isfinite(size)).sum()):
        yield _defect(
            "E_CKPT_NONFINITE", tensor, f"{not_finite} of {size.size} scales are NaN or infinite"
        )
    if tiny := int((size < SMALLEST).sum()):
        yield _defect("E_CKPT_SCALES", tensor, f"{tiny} of {size.size} scales are zero in float16")
    if huge := int((np.isfinite(size) & (size > LARGEST)).sum()):
        yield _defect("E_CKPT_SCALES", tensor, f"{huge} of {size.size} scales are beyond float16")


def _check_decoded(
    stored: Mapping[str, TensorInfo], settings: Settings, format: str
) -> Iterator[Defect]:
    """Weights beyond float16. Codes [I] are read only of outputs that have a scale large enough for such a weight."""
    scales, top = read_array(stored["scales"]).astype(np.float32), 2**settings.bits - 1
    scales[~(np.abs(scales) <= LARGEST)] = 0  # a defect of their own
    wide = np.flatnonzero((np.abs(scales) > LARGEST / top).any(0))
    columns = np.arange(_in_features(stored, settings))
    g_idx = (
        read_array(stored["g_idx"])
        if "g_idx" in stored
        else columns // (columns.size // len(scales))
    )
    if not wide.size or g_idx.min() < 0 or g_idx.max() >= len(scales):
        return
    zeros = (
        unpack_words(read_array(stored["qzeros"]), settings.bits).astype(np.int32)
        + STORED_OFFSET[format]
    ) & top
    words, beyond = read_array(stored["qweight"]), 0
    for output in wide:
        codes = unpack_words(words[None, :, output], settings.bits)[0].astype(np.int32)
        weights = scales[g_idx, output] * (codes - zeros[g_idx, output])
        beyond += int((np.abs(weights) > LARGEST).sum())
    if beyond:
        qweight, message = stored["qweight"], f"{beyond} of its weights are beyond float16"
        hint = "quantize the full-precision model again, or gptq dequantize with --dtype bfloat16"
        yield Defect("E_CKPT_NONFINITE", message, qweight.file.name, qweight.name, hint, "readers")


def _defect(code: str, tensor: TensorInfo, message: str, hint: str | None = None) -> Defect:
    return Defect(code, message, tensor.file.name, tensor.name, hint)


def check_manifest(directory: Path, *, full: bool) -> tuple[int, list[Defect]]:
    """How many files were hashed, and which differ from what the manifest, if there is one, says of them.

    Without `full` only names and sizes are compared. A file that the manifest does not list is a defect unless no
    reader of models would take notice of it.
    """
    if not is_file(directory / MANIFEST):
        return 0, []
    try:
        content = read_json(directory / MANIFEST)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return 0, [Defect("E_CKPT_HASH", str(error), MANIFEST)]
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return 0, [Defect("E_CKPT_HASH", "has no mapping `files`", MANIFEST)]
    defects = (
        [] if is_intact(content) else [Defect("E_CKPT_HASH", "is not as it was written", MANIFEST)]
    )
    defects += [
        defect
        for name, entry in files.items()
        for defect in _check_file(directory, name, entry, full=full)
    ]
    hint = "move it out of the directory, unless you know why it is there"
    unlisted = [name for name in _files_of(directory) if name not in files and not _is_beside(name)]
    defects += [
        Defect("E_CKPT_HASH", "is not in the manifest", name, None, hint, "readers")
        for name in unlisted
    ]
    return len(files) if full else 0, defects


def _files_of(directory: Path) -> list[str]:
    """Names of all files in `directory` and below, relative to it."""
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(directory).as_posix() for path in paths)


def _is_beside(name: str) -> bool:
    """Whether a file may come to a finished checkpoint: about the run, a page or picture, or hidden, as git's are."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    about_the_run = name in (MANIFEST, REPORT_DATA, REPORT_PAGE)
    return (
        hidden or about_the_run or path.suffix.lower() in PAGES or path.name.startswith("LICENSE")
    )


def _check_file(
    directory: Path, name: str, entry: dict[str, Any], *, full: bool
) -> Iterator[Defect]:
    file = directory / name
    if not is_safe_file(directory, name):
        yield Defect("E_UNSAFE_PATH", f"names a file outside the directory: {name!r}", MANIFEST)
    elif not is_file(file):
        yield Defect("E_CKPT_MISSING", "is in the manifest and not here", name)
    elif file.stat().st_size != entry.get("size"):
        yield Defect(
            "E_CKPT_HASH",
            f"has {file.stat().st_size} bytes, the manifest says {entry.get('size')}",
            name,
        )
    elif full and (found := file_hash(file)) != entry.get("sha256"):
        said = str(entry.get("sha256"))[:12]
        yield Defect(
            "E_CKPT_HASH", f"has SHA-256 {found[:12]}..., the manifest says {said}...", name
        )


def open_decodable(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`, quantized or not; raises as `open_checkpoint` and `refuse_wrong_numbers` do."""
    checkpoint = open_checkpoint(directory)
    refuse_wrong_numbers(checkpoint)
    return checkpoint


def refuse_wrong_numbers(checkpoint: Checkpoint) -> tuple[Defect, ...]:
    """The defects that change no number of a GPTQ checkpoint; nothing for a plain one.

    InputError with the code of the first defect if it would be decoded to other weights than were meant,
    E_CKPT_QUANTIZED if its weights are packed in a way that is not read here.
    """
    packed = packed_modules(checkpoint.tensors)
    if checkpoint.method in (None, FP8) and not packed:
        return ()
    if checkpoint.method not in (None, FP8):
        format_of(checkpoint)
    found = examine(checkpoint)
    for defect in found.defects:
        if defect.effect == "numbers":
            everything = f"all of it: gptq verify {quote(str(checkpoint.directory))}"
            hint = f"{defect.hint}; {everything}" if defect.hint else everything
            where = f"{defect.place}: " if defect.place else ""
            raise InputError(
                defect.code, f"`{checkpoint.directory}`, {where}{defect.message}", hint=hint
            )
    return found.defects
