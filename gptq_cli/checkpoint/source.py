"""A checkpoint directory as it lies on disk: its config, its tensors, its other files. Reads headers only, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.headers import TensorInfo, read_header
from gptq_cli.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".tflite")
SKIPPED_FOLDERS = {"original", "onnx", "runs"}  # weights in other formats and training logs


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose headers agree with each other; `tensors` is in file order."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a checkpoint that is already quantized."""
        found = self.config.get("quantization_config")
        if found is None and (self.directory / "quantize_config.json").is_file():
            found = read_json(self.directory / "quantize_config.json")
        return found

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def other_files(self) -> list[Path]:
        """Files beside the weights (tokenizer, generation config, licence, code), relative to the directory, sorted."""
        return sorted(path.relative_to(self.directory) for path in self.directory.rglob("*") if self._is_other(path))

    def _is_other(self, path: Path) -> bool:
        relative = path.relative_to(self.directory)
        hidden = any(part.startswith(".") for part in relative.parts)
        skipped = relative.parts[0] in SKIPPED_FOLDERS or path.name.endswith(".index.json")
        own = relative.as_posix() in ("config.json", "quantize_config.json")
        return path.is_file() and not (hidden or skipped or own or path.suffix in WEIGHT_SUFFIXES)


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`; InputError E_CKPT_* when files are missing, torn, pickled or disagree."""
    if not (directory / "config.json").is_file():
        refuse_other_kinds(str(directory), [path.name for path in directory.glob("*")])
        raise InputError(
            "E_CKPT_CONFIG", f"`{directory}` has no config.json", hint="point to a Hugging Face model directory"
        )
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise InputError("E_CKPT_CONFIG", f"`{directory / 'config.json'}` is not a JSON object")
    return Checkpoint(directory, config, _read_tensors(directory))


def read_json(file: Path) -> Any:
    """The parsed content of a JSON file; InputError E_CKPT_CONFIG if it is not readable as JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError("E_CKPT_CONFIG", f"`{file}` cannot be read as JSON: {error}") from None


def _read_tensors(directory: Path) -> dict[str, TensorInfo]:
    if (directory / INDEX_NAME).is_file():
        return _read_sharded(directory)
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        refuse_other_kinds(str(directory), [path.name for path in directory.glob("*")])
        raise InputError(
            "E_CKPT_MISSING", f"`{directory}` holds no *.safetensors file", hint="download the weights first"
        )
    if len(files) > 1 and not (directory / "model.safetensors").is_file():
        raise InputError(
            "E_CKPT_INDEX", f"`{directory}` holds {len(files)} safetensors files and no {INDEX_NAME}",
            hint=f"download {INDEX_NAME} as well",
        )  # fmt: skip
    return read_header(directory / "model.safetensors" if len(files) > 1 else files[0])


def _read_sharded(directory: Path) -> dict[str, TensorInfo]:
    index = directory / INDEX_NAME
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError("E_CKPT_INDEX", f"`{index}` has no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    unsafe = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if unsafe:
        raise InputError("E_CKPT_UNSAFE", f"`{index}` points outside its directory: {unsafe[0]!r}")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            "E_CKPT_MISSING", f"`{directory}` lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}",
            hint="finish the download, for example with `hf download MODEL --local-dir DIR`",
        )  # fmt: skip
    return merge_shards(str(index), weight_map, {name: read_header(directory / name) for name in names})


def merge_shards(
    index: str, weight_map: dict[str, str], shards: dict[str, dict[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all shards, file by file; InputError E_CKPT_INDEX where `weight_map` and headers disagree."""
    tensors: dict[str, TensorInfo] = {}
    for file, header in shards.items():
        for name, tensor in header.items():
            if weight_map.get(name) != file:
                claimed = weight_map.get(name, "no shard")
                raise InputError("E_CKPT_INDEX", f"`{index}` puts `{name}` into {claimed}, but {file} holds it")
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InputError(
            "E_CKPT_INDEX", f"`{index}` puts `{absent[0]}` into {weight_map[absent[0]]}, which does not hold it"
        )
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
    if holds(".gguf", ".onnx"):
        raise InputError(
            "E_CKPT_KIND", f"`{directory}` holds GGUF or ONNX files", hint="use the safetensors checkpoint"
        )
    if holds(".bin", ".pt", ".pth", ".ckpt"):
        raise InputError(
            "E_CKPT_PICKLE", f"`{directory}` holds pickled weights only, which can run code when they are loaded",
            hint="convert the weights to safetensors in a place you trust, or find a safetensors revision",
        )  # fmt: skip
