"""A checkpoint directory as it lies on disk: its config, its tensors, its other files. Reads
headers only, no torch.

Weights of FP8 checkpoints come with a scale for each block of them: SCALES holds how they are
called.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from gptq_cli.checkpoint.headers import TensorInfo, read_header, unique_keys
from gptq_cli.checkpoint.side_files import ADAPTER_CONFIG, CONFIG_NAMES, is_skipped, side_files
from gptq_cli.errors import InputError, Problem
from gptq_cli.files import MAX_NAME, file_errors, files_below, is_file, resolved, status_of
from gptq_cli.shell import shell_word
from gptq_cli.storage.file_identity import Stamp, check_stamps, stamp_of
from gptq_cli.storage.manifest import INDEX_NAME, MAX_CONFIG_BYTES, MAX_JSON_BYTES, QUANTIZE_CONFIG

INDEX_OF_AUTOGPTQ = "gptq_model-*.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CODES_OF_BITSANDBYTES = ("U8", "I8")
BYTE_ORDER_MARK = "\ufeff"
MAX_DEPTH = 64
MOST_SHOWN = 40  # characters of a value in a message
Remark = tuple[str, str]  # code and text of a warning

METHOD = "fp8"
SCALES = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
FEW_BITS = ("F8_", "F4")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose headers agree with each other; `tensors` is in file order.

    `absent` are names of its index that no shard holds. `stamps` are those of all its files, from before the first one
    was read; `remarks` are codes and texts of warnings.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    absent: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint that is already quantized; E_CKPT_CONFIG if malformed.

        It may stand in `text_config` or in a file of its own, too; not every reader looks there. None for a leftover
        of bitsandbytes, which quantizes while it loads: weights that are plain floats are these.
        """
        found = self.config.get("quantization_config")
        if found is None:
            found = self.text_config.get("quantization_config")
        if found is None and is_file(self.directory / QUANTIZE_CONFIG):
            found = read_json(self.directory / QUANTIZE_CONFIG)
        if found is not None and not isinstance(found, dict):
            hint = "download config.json and quantize_config.json again"
            raise InputError(
                "E_CKPT_CONFIG",
                f"the quantization of `{self.directory}` is not a JSON object",
                hint=hint,
            )
        return None if is_leftover(found, self.tensors) else found

    @property
    def method(self) -> str | None:
        """How weights are stored in other than plain numbers: gptq, awq, fp8, ...; None if they are not."""
        said = self.quantization
        return None if said is None else _method_of(said)

    @property
    def text_config(self) -> dict[str, Any]:
        """What config.json says of the language model, which may be one part of several."""
        nested = self.config.get("text_config")
        return nested if nested and isinstance(nested, dict) else self.config

    @property
    def n_blocks(self) -> int | None:
        """How many blocks config.json says the language model has."""
        said = self.text_config.get("num_hidden_layers")
        return said if type(said) is int else None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def scales(self) -> dict[str, str]:
        """The name of the scales of each weight that is stored in 8-bit floats; InputError as `scales_of` says."""
        return scales_of(self.directory, self.quantization, self.tensors)

    def other_files(self) -> list[Path]:
        """Files beside the weights (tokenizer, generation config, licence, code), relative to the directory, sorted."""
        return [
            Path(file)
            for file in side_files(path.relative_to(self.directory) for path in self.stamps)
        ]

    def check_unchanged(self) -> None:
        """InputError E_SOURCE_CHANGED if a file is not the one that was there when the checkpoint was opened."""
        check_stamps(self.stamps)


def _method_of(said: Mapping[str, Any]) -> str:
    """The method of a `quantization_config`: what the first tools have written has no `quant_method`."""
    if said.get("quant_method"):
        return str(said["quant_method"]).lower()
    if any(key.removeprefix("_").startswith(("load_in_", "bnb_")) for key in said):
        return "bitsandbytes"
    if "w_bit" in said or "zero_point" in said:
        return "awq"
    return "compressed-tensors" if "config_groups" in said else "gptq"


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    InputError E_CKPT_* when files are missing, torn, pickled, of a kind that is not read here or disagree, with every
    file that is; E_UNSAFE_PATH when a name or a link leads out of the directory.
    """
    if not is_file(directory / "config.json"):
        refuse_other_kinds(str(directory), _names(directory))
        raise InputError(
            "E_CKPT_CONFIG",
            f"`{directory}` has no config.json",
            hint="point to a Hugging Face model directory",
        )
    for file in (*(directory / name for name in CONFIG_NAMES), index_file(directory)):
        _refuse_escape(directory, file)
    stamps = _stamps(directory)
    config, twice = read_config(directory / "config.json")
    found = _read_tensors(directory)
    files = [path.name for path in stamps if path.parent == directory]
    remarks = (*twice, *found.remarks, *remarks_on(str(directory), files, config, found.tensors))
    of_the_model = _of_the_model(directory, stamps, found.tensors)
    checkpoint = Checkpoint(directory, config, found.tensors, found.absent, of_the_model, remarks)
    for file in checkpoint.other_files():
        _refuse_escape(directory, directory / file)
        _refuse_name(directory, file)
    checkpoint.scales()  # refuses 8-bit floats that are stored otherwise than they can be read
    return checkpoint


def _stamps(directory: Path) -> dict[Path, Stamp]:
    """Of every file in the directory, by name; InputError E_FILE for one of the model that may not be looked at."""
    found = files_below(directory, lambda folder: not is_skipped(folder.relative_to(directory)))
    for file in side_files(path.relative_to(directory) for path in found):
        status_of(directory / file)
    return {path: stamp for path in found if path.is_file() and (stamp := stamp_of(path))}


def _of_the_model(
    directory: Path, stamps: Mapping[Path, Stamp], tensors: Mapping[str, TensorInfo]
) -> dict[Path, Stamp]:
    """The stamps of files that are read or copied."""
    used = {tensor.file for tensor in tensors.values()}
    used |= {*(directory / name for name in CONFIG_NAMES), index_file(directory)}
    used |= {
        directory / file for file in side_files(path.relative_to(directory) for path in stamps)
    }
    return {path: stamp for path, stamp in stamps.items() if path in used}


def remarks_on(
    directory: str,
    files: Collection[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
) -> list[Remark]:
    """Warnings about what `directory` holds and its config says, beside what its tensors are."""
    found = []
    nested = config.get("text_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    if any(is_leftover(place.get("quantization_config"), tensors) for place in places):
        text = f"config.json of `{directory}` says bitsandbytes, but the weights are plain floats: they are read as such"
        found.append(("W_CKPT_CONFIG", text))
    if ADAPTER_CONFIG in files:
        text = f"`{directory}` holds an adapter beside the model ({ADAPTER_CONFIG}): it is not applied and not copied"
        found.append(("W_CKPT_ADAPTER", text))
    return found


def is_leftover(quantization: object, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a `quantization_config` is of bitsandbytes and no tensor is stored in its codes."""
    if not isinstance(quantization, dict) or _method_of(quantization) != "bitsandbytes":
        return False
    return not any(tensor.dtype in CODES_OF_BITSANDBYTES for tensor in tensors.values())


def read_config(file: Path) -> tuple[dict[str, Any], list[Remark]]:
    """A JSON object as transformers reads it, which takes the last of several values; warnings of such keys."""
    repeated: list[str] = []
    content = read_json(file, repeated)
    if not isinstance(content, dict):
        raise InputError("E_CKPT_CONFIG", f"`{file}` is not a JSON object")
    text = f"`{file}` has keys with two values, and the last one counts, as in transformers: {'; '.join(repeated[:3])}"
    return content, [("W_CKPT_CONFIG", text)] if repeated else []


def read_json(file: Path, repeated: list[str] | None = None) -> Any:
    """The parsed content of a JSON file; InputError E_CKPT_CONFIG if it is not readable as JSON, too large or too deep.

    Keys that come twice are refused, since readers would take either; with `repeated` the last value counts, and a
    value that it takes the place of is noted there.
    """
    limit = MAX_CONFIG_BYTES if file.name in CONFIG_NAMES else MAX_JSON_BYTES
    try:
        with file_errors(file, writing=False):
            if file.stat().st_size > limit:
                raise ValueError(f"it is larger than {limit // 10**6} MB")
            text = file.read_bytes().decode("utf-8")
        if text.startswith(BYTE_ORDER_MARK):
            raise InputError(
                "E_CKPT_CONFIG", f"`{file}` begins with a byte order mark, with which transformers cannot read it",
                hint=f"take the mark away: sed -i '1s/^\\xEF\\xBB\\xBF//' {shell_word(str(file))}",
            )  # fmt: skip
        pairs = unique_keys if repeated is None else partial(_last_values, repeated)
        content = json.loads(text, object_pairs_hook=pairs)
        if _depth(content) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        raise InputError(
            "E_CKPT_CONFIG",
            f"`{file}` cannot be read as JSON: {error}",
            hint="download or copy the file again",
        ) from None
    return content


def _last_values(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            repeated.append(f"{key} is {_short(found[key])}, then {_short(value)}")
        found[key] = value
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _depth(content: Any) -> int:
    depth, level = 0, [content]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            inner for item in level for inner in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _names(directory: Path) -> list[str]:
    with file_errors(directory, writing=False):
        return [path.name for path in directory.iterdir()]


def is_safe_path(directory: Path, name: str) -> bool:
    """Whether `name` is a plain file name on every system, and a link of that name stays in `directory`.

    The Hub's cache keeps a snapshot's files as links into the `blobs` beside the snapshots; these are its own.
    """
    return _is_plain(name) and _stays_inside(directory, directory / name)


def is_safe_file(directory: Path, name: str) -> bool:
    """Whether the same holds for a file that may lie in folders of `directory`."""
    return all(map(_is_plain, name.split("/"))) and _stays_inside(directory, directory / name)


def _is_plain(name: str) -> bool:
    plain = PureWindowsPath(name).name == name and name not in ("", ".", "..")
    return plain and name.isprintable() and len(os.fsencode(name)) <= MAX_NAME


def _stays_inside(directory: Path, file: Path) -> bool:
    root, target = resolved(directory), Path(os.path.realpath(file))
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (
        root.parent.name == "snapshots" and target.is_relative_to(blobs)
    )


def _refuse_escape(directory: Path, file: Path) -> None:
    if not _stays_inside(directory, file):
        raise InputError(
            "E_UNSAFE_PATH", f"`{file}` is a link that leads out of its directory, to `{os.path.realpath(file)}`",
            hint="copy the file, or give the directory that it lies in",
        )  # fmt: skip


def _refuse_name(directory: Path, file: Path) -> None:
    """InputError E_UNSAFE_PATH for a file whose name cannot stand in a manifest; `file` is relative to `directory`."""
    if not all(map(_is_plain, file.parts)):
        raise InputError(
            "E_UNSAFE_PATH", f"`{directory / file}` has a name that not every system takes or shows",
            hint="rename it, without backslash, drive and letters that cannot be shown, or move it elsewhere",
        )  # fmt: skip


class Stored(NamedTuple):
    """The tensors of a checkpoint, names of its index that no shard holds, and warnings."""

    tensors: dict[str, TensorInfo]
    absent: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()


def index_file(directory: Path) -> Path:
    """The index of the shards, if there is one; AutoGPTQ gave it a name that few readers look for."""
    usual = directory / INDEX_NAME
    others = sorted(directory.glob(INDEX_OF_AUTOGPTQ))
    is_other = len(others) == 1 and not is_file(usual) and not is_file(directory / SINGLE_FILE)
    return others[0] if is_other else usual


def _read_tensors(directory: Path) -> Stored:
    if is_file(index_file(directory)):
        return _read_sharded(directory)
    files = sorted(directory / name for name in _names(directory) if name.endswith(".safetensors"))
    adapter = is_file(directory / "adapter_config.json") and all(
        "adapter" in file.name for file in files
    )
    if not files or adapter:
        refuse_other_kinds(str(directory), _names(directory))
        raise InputError(
            "E_CKPT_MISSING",
            f"`{directory}` holds no *.safetensors file",
            hint="download the weights first",
        )
    if len(files) > 1 and not is_file(directory / SINGLE_FILE):
        raise InputError(
            "E_CKPT_INDEX", f"`{directory}` holds {len(files)} safetensors files and no {INDEX_NAME}",
            hint=f"download {INDEX_NAME} as well",
        )  # fmt: skip
    file = directory / SINGLE_FILE if len(files) > 1 else files[0]
    _refuse_escape(directory, file)
    return Stored(read_header(file))


def _read_sharded(directory: Path) -> Stored:
    index = index_file(directory)
    weight_map, twice = _weight_map(index)
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if not is_safe_path(directory, name)]
    links = [directory / name for name in _names(directory) if name in unsafe]
    for link in sorted(path for path in links if path.is_symlink()):
        _refuse_escape(directory, link)
    if unsafe:
        raise InputError(
            "E_UNSAFE_PATH", f"`{index}` points outside its directory: {unsafe[0]!r}",
            hint="do not use this checkpoint, or download its index again",
        )  # fmt: skip
    other = [name for name in names if not name.endswith(".safetensors")]
    if other:
        raise InputError(
            "E_CKPT_INDEX", f"`{index}` names a file that is no safetensors file: {other[0]!r}"
        )
    missing = [name for name in names if not is_file(directory / name)]
    if missing:
        raise InputError(
            "E_CKPT_MISSING", f"`{directory}` lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
            hint="finish the download, for example with `hf download MODEL --local-dir DIR`",
        )  # fmt: skip
    stored = merge_shards(str(index), weight_map, _read_headers(directory, names))
    return stored._replace(remarks=(*twice, *stored.remarks, *_second_weights(directory, names)))


def _second_weights(directory: Path, shards: list[str]) -> list[Remark]:
    if SINGLE_FILE in shards or not (directory / SINGLE_FILE).is_file():
        return []
    text = f"`{directory}` holds {SINGLE_FILE} as well, which transformers reads instead of the shards of the index"
    return [("W_CKPT_INDEX", text)]


def _weight_map(index: Path) -> tuple[dict[str, str], list[Remark]]:
    """Which file holds each tensor, and warnings of keys that come twice."""
    content, twice = read_config(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise InputError(
            "E_CKPT_INDEX", f"`{index}` has no weight_map from tensor names to file names",
            hint="download the index again",
        )  # fmt: skip
    return {name: file.removeprefix("./") for name, file in weight_map.items()}, twice


def _read_headers(directory: Path, names: list[str]) -> dict[str, dict[str, TensorInfo]]:
    shards: dict[str, dict[str, TensorInfo]] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            shards[name] = read_header(directory / name)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError.of(problems)
    return shards


def merge_shards(
    index: str, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorInfo]]
) -> Stored:
    """The tensors of all shards, file by file, as transformers reads them: those that the index does not list as well.

    InputError E_CKPT_INDEX for a tensor in another shard than the index says, or in two.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, header in shards.items():
        for name, tensor in header.items():
            claimed = weight_map.get(name, tensors[name].file.name if name in tensors else file)
            if claimed != file:
                says = (
                    f"`{index}` puts `{name}` into {claimed}"
                    if name in weight_map
                    else f"{claimed} holds `{name}`"
                )
                hint = "download the index and the shards again, of one revision"
                raise InputError("E_CKPT_INDEX", f"{says}, but {file} holds it", hint=hint)
            tensors[name] = tensor
    absent = tuple(name for name in weight_map if name not in tensors)
    unlisted = [name for name in tensors if name not in weight_map]
    remarks = []
    if absent:
        remarks.append(("W_CKPT_INDEX", f"`{index}` lists {_some(absent)}, which no shard holds"))
    if unlisted:
        remarks.append(
            ("W_CKPT_INDEX", f"`{index}` does not list {_some(unlisted)}, which its shards hold")
        )
    return Stored(tensors, absent, tuple(remarks))


def _some(names: Sequence[str]) -> str:
    return f"`{names[0]}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def refuse_other_kinds(directory: str, files: Iterable[str]) -> None:
    """InputError if what `directory` holds is known to be something else than safetensors weights of a model."""
    files = list(files)

    def holds(*endings: str) -> bool:
        return any(file.endswith(endings) for file in files)

    if "adapter_config.json" in files:
        raise InputError(
            "E_CKPT_KIND",
            f"`{directory}` is an adapter, not a model",
            hint="merge the adapter into its base model first",
        )
    if "model_index.json" in files:
        raise InputError(
            "E_CKPT_KIND",
            f"`{directory}` is a diffusers pipeline, not a language model",
            hint="name a language model",
        )
    if holds(".gguf", ".onnx"):
        raise InputError(
            "E_CKPT_KIND",
            f"`{directory}` holds GGUF or ONNX files",
            hint="use the safetensors checkpoint",
        )
    if holds(".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(
            "E_CKPT_PICKLE", f"`{directory}` holds pickled weights only, which can run code when they are loaded",
            hint="convert the weights to safetensors in a place you trust, or find a safetensors revision",
        )  # fmt: skip


def block_size(said: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, as a `quantization_config` says; None if it says something else."""
    size = said.get("weight_block_size")
    is_pair = (
        isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    )
    dynamic = said.get("activation_scheme", "dynamic") == "dynamic"
    return (
        (size[0], size[1])
        if said.get("quant_method") == METHOD and is_pair and dynamic and size
        else None
    )


def scales_of(
    directory: Path, said: Mapping[str, Any] | None, tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """The name of the scales of each weight that is stored in 8-bit floats; `said` is the `quantization_config`.

    InputError E_CKPT_FP8 for floats of 8 or 4 bits that are stored otherwise, E_CKPT_INCOMPLETE for a weight without
    scales, E_CKPT_SHAPE where the two do not fit.
    """
    few = [
        tensor
        for tensor in tensors.values()
        if tensor.dtype.startswith(FEW_BITS) and not _is_scale(tensor, tensors)
    ]
    if not few:
        return {}
    block = block_size(said or {})
    odd = next((t for t in few if block is None or t.dtype != "F8_E4M3" or not _is_matrix(t)), None)
    if odd is not None or block is None:
        odd = odd or few[0]
        raise InputError(
            "E_CKPT_FP8", f"`{directory}` holds {odd.dtype} weights, first `{odd.name}`",
            hint="use a float16 or bfloat16 version of the model: 8-bit floats are read as DeepSeek stores them, with "
            "quant_method fp8, a weight_block_size, and a tensor of scales for each weight",
        )  # fmt: skip
    for weight in few:
        _check_scales(weight, tensors.get(f"{weight.name}{SCALES}"), block)
    return {weight.name: f"{weight.name}{SCALES}" for weight in few}


def _is_scale(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> bool:
    weight = tensors.get(tensor.name.removesuffix(SCALES)) if tensor.name.endswith(SCALES) else None
    return weight is not None and weight.dtype.startswith(FEW_BITS)


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _check_scales(weight: TensorInfo, scales: TensorInfo | None, block: tuple[int, int]) -> None:
    if scales is None:
        raise InputError(
            "E_CKPT_INCOMPLETE", f"`{weight.name}` is stored in 8-bit floats, and its scales `{weight.name}{SCALES}` "
            "are missing", hint="download the checkpoint again",
        )  # fmt: skip
    expected = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    if scales.shape != expected or scales.dtype not in SCALE_DTYPES:
        raise InputError(
            "E_CKPT_SHAPE",
            f"`{scales.name}` is {scales.dtype} {list(scales.shape)}, blocks of {block[0]}x{block[1]} in "
            f"{list(weight.shape)} ask for {list(expected)} floats",
        )
