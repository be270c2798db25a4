"""A checkpoint directory as it lies on disk: its config, its tensors, its other files. Reads headers only, no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from gptq_cli.checkpoint.block_float import scales_of
from gptq_cli.checkpoint.headers import TensorInfo, read_header, unique_keys
from gptq_cli.checkpoint.side_files import ADAPTER_CONFIG, CONFIG_NAMES, side_files
from gptq_cli.checkpoint.stamps import Stamp, check_stamps, stamp_of
from gptq_cli.errors import InputError, Problem

INDEX_NAME = "model.safetensors.index.json"
QUANTIZE_CONFIG = "quantize_config.json"
MAX_CONFIG_BYTES, MAX_JSON_BYTES = 5_000_000, 50_000_000
MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose headers agree with each other; `tensors` is in file order.

    `stamps` are those of all its files, from before the first one was read; `remarks` are codes and texts of warnings.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    remarks: tuple[tuple[str, str], ...] = ()

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint that is already quantized; E_CKPT_CONFIG if malformed."""
        found = self.config.get("quantization_config")
        if found is None and (self.directory / QUANTIZE_CONFIG).is_file():
            found = read_json(self.directory / QUANTIZE_CONFIG)
        if found is not None and not isinstance(found, dict):
            hint = "download config.json and quantize_config.json again"
            raise InputError("E_CKPT_CONFIG", f"the quantization of `{self.directory}` is not a JSON object", hint=hint)
        return found

    @property
    def method(self) -> str | None:
        """How weights are stored in other than plain numbers: gptq, awq, fp8, ...; None if they are not."""
        said = self.quantization
        return None if said is None else str(said.get("quant_method", "gptq")).lower()

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
        return [Path(file) for file in side_files(path.relative_to(self.directory) for path in self.stamps)]

    def check_unchanged(self) -> None:
        """InputError E_SOURCE_CHANGED if a file is not the one that was there when the checkpoint was opened."""
        check_stamps(self.stamps)


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    InputError E_CKPT_* when files are missing, torn, pickled, of a kind that is not read here or disagree, with every
    file that is; E_UNSAFE_PATH when a name or a link leads out of the directory.
    """
    if not (directory / "config.json").is_file():
        refuse_other_kinds(str(directory), [path.name for path in directory.iterdir()])
        raise InputError(
            "E_CKPT_CONFIG", f"`{directory}` has no config.json", hint="point to a Hugging Face model directory"
        )
    for name in (*CONFIG_NAMES, INDEX_NAME):
        _refuse_escape(directory, directory / name)
    stamps = _stamps(directory)
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise InputError("E_CKPT_CONFIG", f"`{directory / 'config.json'}` is not a JSON object")
    tensors = _read_tensors(directory)
    remarks = remarks_on_files(str(directory), [path.name for path in stamps if path.parent == directory])
    checkpoint = Checkpoint(directory, config, tensors, _of_the_model(directory, stamps, tensors), remarks)
    for file in checkpoint.other_files():
        _refuse_escape(directory, directory / file)
    checkpoint.scales()  # refuses 8-bit floats that are stored otherwise than they can be read
    return checkpoint


def _stamps(directory: Path) -> dict[Path, Stamp]:
    """Of every file in the directory, by name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path: stamp for path in files if (stamp := stamp_of(path))}


def _of_the_model(
    directory: Path, stamps: Mapping[Path, Stamp], tensors: Mapping[str, TensorInfo]
) -> dict[Path, Stamp]:
    """The stamps of files that are read or copied."""
    used = {tensor.file for tensor in tensors.values()}
    used |= {directory / name for name in (*CONFIG_NAMES, INDEX_NAME)}
    used |= {directory / file for file in side_files(path.relative_to(directory) for path in stamps)}
    return {path: stamp for path, stamp in stamps.items() if path in used}


def remarks_on_files(directory: str, files: Collection[str]) -> tuple[tuple[str, str], ...]:
    """Codes and texts of warnings about the names of what `directory` holds."""
    found = []
    if ADAPTER_CONFIG in files:
        text = f"`{directory}` holds an adapter beside the model ({ADAPTER_CONFIG}): it is not applied and not copied"
        found.append(("W_CKPT_ADAPTER", text))
    return tuple(found)


def read_json(file: Path) -> Any:
    """The parsed content of a JSON file; InputError E_CKPT_CONFIG if it is not readable as JSON, too large or too deep.

    Keys that come twice are refused: readers would take either.
    """
    limit = MAX_CONFIG_BYTES if file.name in CONFIG_NAMES else MAX_JSON_BYTES
    try:
        if file.stat().st_size > limit:
            raise ValueError(f"it is larger than {limit // 10**6} MB")
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        if _depth(content) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(
            "E_CKPT_CONFIG", f"`{file}` cannot be read as JSON: {error}", hint="download or copy the file again"
        ) from None
    return content


def _depth(content: Any) -> int:
    depth, level = 0, [content]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth


def is_safe_path(directory: Path, name: str) -> bool:
    """Whether `name` is a plain file name on every system, and a link of that name stays in `directory`.

    The Hub's cache keeps a snapshot's files as links into the `blobs` beside the snapshots; these are its own.
    """
    windows = PureWindowsPath(name)
    if windows.name != name or name in ("", ".", "..") or len(name) > 255 or not name.isprintable():
        return False
    return _stays_inside(directory, directory / name)


def _stays_inside(directory: Path, file: Path) -> bool:
    root, target = directory.resolve(), file.resolve()
    blobs = root.parent.parent / "blobs"
    return target.is_relative_to(root) or (root.parent.name == "snapshots" and target.is_relative_to(blobs))


def _refuse_escape(directory: Path, file: Path) -> None:
    if not _stays_inside(directory, file):
        raise InputError(
            "E_UNSAFE_PATH", f"`{file}` is a link that leads out of its directory, to `{file.resolve()}`",
            hint="copy the file, or give the directory that it lies in",
        )  # fmt: skip


def _read_tensors(directory: Path) -> dict[str, TensorInfo]:
    if (directory / INDEX_NAME).is_file():
        return _read_sharded(directory)
    files = sorted(directory.glob("*.safetensors"))
    adapter = (directory / "adapter_config.json").is_file() and all("adapter" in file.name for file in files)
    if not files or adapter:
        refuse_other_kinds(str(directory), [path.name for path in directory.iterdir()])
        raise InputError(
            "E_CKPT_MISSING", f"`{directory}` holds no *.safetensors file", hint="download the weights first"
        )
    if len(files) > 1 and not (directory / "model.safetensors").is_file():
        raise InputError(
            "E_CKPT_INDEX", f"`{directory}` holds {len(files)} safetensors files and no {INDEX_NAME}",
            hint=f"download {INDEX_NAME} as well",
        )  # fmt: skip
    file = directory / "model.safetensors" if len(files) > 1 else files[0]
    _refuse_escape(directory, file)
    return read_header(file)


def _read_sharded(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_NAME
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if not is_safe_path(directory, name)]
    for link in sorted(path for path in directory.iterdir() if path.is_symlink() and path.name in unsafe):
        _refuse_escape(directory, link)
    if unsafe:
        raise InputError(
            "E_UNSAFE_PATH", f"`{index}` points outside its directory: {unsafe[0]!r}",
            hint="do not use this checkpoint, or download its index again",
        )  # fmt: skip
    other = [name for name in names if not name.endswith(".safetensors")]
    if other:
        raise InputError("E_CKPT_INDEX", f"`{index}` names a file that is no safetensors file: {other[0]!r}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            "E_CKPT_MISSING", f"`{directory}` lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
            hint="finish the download, for example with `hf download MODEL --local-dir DIR`",
        )  # fmt: skip
    return merge_shards(str(index), weight_map, _read_headers(directory, names))


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(
            "E_CKPT_INDEX", f"`{index}` has no weight_map from tensor names to file names",
            hint="download the index again",
        )  # fmt: skip
    return weight_map


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
) -> dict[str, TensorInfo]:
    """The tensors of all shards, file by file; InputError E_CKPT_INDEX where `weight_map` and headers disagree."""
    hint = "download the index and the shards again, of one revision"
    tensors: dict[str, TensorInfo] = {}
    for file, header in shards.items():
        for name, tensor in header.items():
            if weight_map.get(name) != file:
                claimed = weight_map.get(name, "no shard")
                message = f"`{index}` puts `{name}` into {claimed}, but {file} holds it"
                raise InputError("E_CKPT_INDEX", message, hint=hint)
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        message = f"`{index}` puts `{absent[0]}` into {weight_map[absent[0]]}, which does not hold it"
        raise InputError("E_CKPT_INDEX", message, hint=hint)
    return tensors


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
            "E_CKPT_KIND", f"`{directory}` is a diffusers pipeline, not a language model", hint="name a language model"
        )
    if holds(".gguf", ".onnx"):
        raise InputError(
            "E_CKPT_KIND", f"`{directory}` holds GGUF or ONNX files", hint="use the safetensors checkpoint"
        )
    if holds(".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(
            "E_CKPT_PICKLE", f"`{directory}` holds pickled weights only, which can run code when they are loaded",
            hint="convert the weights to safetensors in a place you trust, or find a safetensors revision",
        )  # fmt: skip
