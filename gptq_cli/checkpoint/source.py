"""A checkpoint directory as it lies on disk: its config, its tensors, its other files.

Reads headers only. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gptq_cli.checkpoint.headers import (
    DTYPES_OF_CONFIG,
    FEW_BITS,
    TensorInfo,
    read_header,
    read_headers,
)
from gptq_cli.checkpoint.layout import CODED_METHODS, FP8, SINGLE_FILE
from gptq_cli.checkpoint.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODELOPT_CONFIG,
    Remark,
    index_file,
    is_safe_path,
    is_skipped,
    names_in,
    read_config,
    read_json,
    refuse_escape,
    refuse_name,
    refuse_other_kinds,
    side_files,
)
from gptq_cli.errors import InputError, cut
from gptq_cli.files import Stamp, check_stamps, files_below, is_file, stamp_of, status_of
from gptq_cli.storage.manifest import INDEX_NAME, QUANTIZE_CONFIG, file_hash

if TYPE_CHECKING:
    from gptq_cli.checkpoint.coded import Coded
    from gptq_cli.checkpoint.download import Download

CODES_OF_BITSANDBYTES = ("U8", "I8")


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter in a directory, of which `scale` times the product is added to the model."""

    directory: Path
    scale: float
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    stamps: Mapping[Path, Stamp]

    def identity(self) -> dict[str, Any]:
        """Return the scale and the hash of each file, whatever the path."""
        files = {path.name: file_hash(path) for path in sorted(self.stamps)}
        return {"scale": self.scale, "files": files}

    def provenance(self) -> dict[str, Any]:
        """Return the name, the scale and the hash of the weights, for the configuration files."""
        sha256 = file_hash(self.directory / ADAPTER_WEIGHTS)
        return {"adapter": self.directory.name, "scale": self.scale, "sha256": sha256}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose headers agree with each other; `tensors` is in file order.

    `absent` are names of its index that no shard holds. `stamps` are those of all its files, taken
    before the first one was read. `remarks` are codes and texts of warnings. `adapters` are merged
    into the weights while they are read. With a `download`, the file of a tensor exists from the
    first `fetch` on, until the download drops it.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    absent: tuple[str, ...] = ()
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    download: Download | None = None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The `quantization_config` of a quantized checkpoint, None for a plain one.

        It may also stand in `text_config` or in a file of its own, where not every reader finds it.
        The value is None for a leftover of bitsandbytes, which quantizes while it loads: the
        weights are plain floats. InputError E_CKPT_CONFIG if it is not an object.
        """
        if is_of_mlx("quantization", self.config.get("quantization")):
            return dict(self.config["quantization"])
        found = self.config.get("quantization_config")
        if found is None:
            found = self.text_config.get("quantization_config")
        for name in (QUANTIZE_CONFIG, MODELOPT_CONFIG):
            if found is None and is_file(self.directory / name):
                found = read_json(self.directory / name)
        if found is not None and not isinstance(found, dict):
            message = f"the quantization of `{self.directory}` is not a JSON object"
            hint = "download config.json and quantize_config.json again"
            raise InputError("E_CKPT_CONFIG", message, hint=hint)
        if is_leftover(found, self.tensors):
            return None
        return found

    @property
    def method(self) -> str | None:
        """How weights are quantized: gptq, awq, fp8, mlx, ...; None if they are plain numbers."""
        if is_of_mlx("quantization", self.config.get("quantization")):
            return "mlx"
        quantization = self.quantization
        if quantization is None:
            return None
        return _method_of(quantization)

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of config.json about the language model, which may be one of several parts."""
        nested = self.config.get("text_config")
        if nested and isinstance(nested, dict):
            return nested
        return self.config

    @property
    def n_blocks(self) -> int | None:
        """Blocks of the language model by config.json; None if it has no such number."""
        number = self.text_config.get("num_hidden_layers")
        if type(number) is int:
            return number
        return None

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def named_dtype(self) -> str | None:
        """The dtype that config.json names, one of DTYPES_OF_CONFIG; None if it names none."""
        for config in (self.text_config, self.config):
            named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
            if named in DTYPES_OF_CONFIG:
                return named
        return None

    @property
    def is_packed(self) -> bool:
        """Whether a method has packed the linears, which is not so for weights of `coded`."""
        return self.method not in (None, FP8) and not self.coded()

    def coded(self) -> dict[str, Coded]:
        """Return the weights in floats of few bits, in bytes or of AWQ, by their plain names.

        Raises the errors of `coded_weights`.
        """
        has_few_bits = any(map(_has_few_bits, self.tensors.values()))
        if self.method not in CODED_METHODS and not has_few_bits:
            return {}
        from gptq_cli.checkpoint.coded import coded_weights

        return coded_weights(self)

    def other_files(self) -> list[Path]:
        """Return files beside the weights (tokenizer, licence, code, ...), sorted.

        Paths are relative to the directory.
        """
        return side_files(self.directory, self.stamps)

    def fetch(self, name: str) -> None:
        """Wait until the file of tensor `name` exists; raise what `Download.wait` raises."""
        if self.download is not None:
            self.download.wait(name)

    def check_unchanged(self) -> None:
        """Raise InputError E_SOURCE_CHANGED if a file changed since the checkpoint was opened."""
        check_stamps(self.stamps)
        for adapter in self.adapters:
            check_stamps(adapter.stamps)


def _has_few_bits(tensor: TensorInfo) -> bool:
    return tensor.dtype.startswith(FEW_BITS)


def is_of_mlx(key: str, value: object) -> bool:
    """Return whether an entry of config.json is the one in which MLX describes a quantization."""
    return (
        key == "quantization" and isinstance(value, dict) and {"bits", "group_size"} <= set(value)
    )


def _method_of(quantization: Mapping[str, Any]) -> str:
    """Return the method of a `quantization_config`; the first tools wrote no `quant_method`."""
    if quantization.get("quant_method"):
        return cut(str(quantization["quant_method"]).lower())
    if "producer" in quantization:
        return "modelopt"
    if any(key.removeprefix("_").startswith(("load_in_", "bnb_")) for key in quantization):
        return "bitsandbytes"
    if "w_bit" in quantization or "zero_point" in quantization:
        return "awq"
    if "config_groups" in quantization:
        return "compressed-tensors"
    return "gptq"


def is_leftover(quantization: object, tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether a `quantization_config` is of bitsandbytes, but no tensor is in its codes."""
    if not isinstance(quantization, dict) or _method_of(quantization) != "bitsandbytes":
        return False
    return not any(tensor.dtype in CODES_OF_BITSANDBYTES for tensor in tensors.values())


# ---------------------------------------------------------------- open


class WeightFiles(Protocol):
    """The files of a checkpoint that may hold weights."""

    def names(self) -> Sequence[str]:
        """Return the names of all files beside config.json."""

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""

    def headers(self, names: Sequence[str]) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of these files; one InputError for all that are torn."""


@dataclass(frozen=True, slots=True)
class LocalFiles:
    """The files of a directory."""

    directory: Path

    def names(self) -> Sequence[str]:
        """Return the names of everything in the directory."""
        return names_in(self.directory)

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return is_file(self.directory / name)

    def headers(self, names: Sequence[str]) -> dict[str, dict[str, TensorInfo]]:
        """Return the tensors of these files; one InputError for all that are torn."""
        return read_headers(names, lambda name: read_header(self.directory / name))


def open_checkpoint(directory: Path, files: WeightFiles | None = None) -> Checkpoint:
    """Return the checkpoint in `directory`; its weights may be in `files` of another place.

    InputError E_CKPT_* if files are missing, torn, pickled, of an unsupported kind, or disagree;
    every torn file is a problem of its own. E_UNSAFE_PATH if a name or a link leads out of the
    directory.
    """
    if not is_file(directory / "config.json"):
        refuse_other_kinds(str(directory), names_in(directory))
        hint = "point to a Hugging Face model directory"
        raise InputError("E_CKPT_CONFIG", f"`{directory}` has no config.json", hint=hint)
    for file in _settings_files(directory):
        refuse_escape(directory, file)
    stamps = _stamps(directory)
    config, repeated = read_config(directory / "config.json")
    stored = _read_tensors(directory, files or LocalFiles(directory))
    if is_of_mlx("quantization", config.get("quantization")):
        from gptq_cli.checkpoint.mlx_experts import unstacked

        stored = stored._replace(tensors=unstacked(stored.tensors))
    has_adapter = directory / ADAPTER_CONFIG in stamps
    config_remarks = remarks_on(str(directory), config, stored.tensors, has_adapter=has_adapter)
    checkpoint = Checkpoint(
        directory,
        config,
        stored.tensors,
        stored.absent,
        _stamps_of_the_model(directory, stamps, stored.tensors),
        (*repeated, *stored.remarks, *config_remarks),
    )
    for other in checkpoint.other_files():
        refuse_escape(directory, directory / other)
        refuse_name(directory, other)
    checkpoint.coded()  # raises for weights in codes that cannot be read
    return checkpoint


def _settings_files(directory: Path) -> list[Path]:
    """Return the configuration files and the index, whether they exist or not."""
    return [
        directory / "config.json",
        directory / QUANTIZE_CONFIG,
        directory / MODELOPT_CONFIG,
        index_file(directory),
    ]


def _stamps(directory: Path) -> dict[Path, Stamp]:
    """Return the stamp of every file in the directory, by name.

    InputError E_FILE if a file of the model cannot be accessed.
    """
    found = files_below(directory, lambda folder: not is_skipped(folder.relative_to(directory)))
    for file in side_files(directory, found):
        status_of(directory / file)
    stamps = {}
    for path in found:
        stamp = stamp_of(path) if path.is_file() else None
        if stamp:
            stamps[path] = stamp
    return stamps


def _stamps_of_the_model(
    directory: Path, stamps: Mapping[Path, Stamp], tensors: Mapping[str, TensorInfo]
) -> dict[Path, Stamp]:
    """Return the stamps of files that are read or copied."""
    used = set(_settings_files(directory))
    for tensor in tensors.values():
        used.add(tensor.file)
    for file in side_files(directory, stamps):
        used.add(directory / file)
    return {path: stamp for path, stamp in stamps.items() if path in used}


def remarks_on(
    directory: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    has_adapter: bool,
) -> list[Remark]:
    """Return warnings about the config and the files of `directory`."""
    found = []
    key = "quantization_config"
    nested = config.get("text_config")
    inner = nested.get(key) if isinstance(nested, dict) else None
    if is_leftover(config.get(key), tensors) or is_leftover(inner, tensors):
        text = f"config.json of `{directory}` names bitsandbytes, but the weights are plain floats"
        found.append(("W_CKPT_CONFIG", f"{text}: they are read as such"))
    if has_adapter:
        text = f"`{directory}` holds an adapter beside the model ({ADAPTER_CONFIG})"
        found.append(("W_CKPT_ADAPTER", f"{text}: it is not applied and not copied"))
    return found


# ---------------------------------------------------------------- tensors


class StoredTensors(NamedTuple):
    """The tensors of a checkpoint, names of its index that no shard holds, and warnings."""

    tensors: dict[str, TensorInfo]
    absent: tuple[str, ...] = ()
    remarks: tuple[Remark, ...] = ()


def _read_tensors(directory: Path, files: WeightFiles) -> StoredTensors:
    if is_file(index_file(directory)):
        return _read_sharded(directory, files)
    name = _only_weight_file(directory, files)
    refuse_escape(directory, directory / name)
    return StoredTensors(files.headers([name])[name])


def _only_weight_file(directory: Path, files: WeightFiles) -> str:
    """Return the name of the file that holds all weights of a checkpoint without an index."""
    names = sorted(name for name in files.names() if name.endswith(".safetensors"))
    is_adapter = is_file(directory / ADAPTER_CONFIG)
    if is_adapter and all("adapter" in name for name in names):
        names = []
    if not names:
        refuse_other_kinds(str(directory), files.names())
        message = f"`{directory}` holds no *.safetensors file"
        raise InputError("E_CKPT_MISSING", message, hint="download the weights first")
    if len(names) == 1:
        return names[0]
    if not files.has(SINGLE_FILE):
        message = f"`{directory}` holds {len(names)} safetensors files, but no {INDEX_NAME}"
        raise InputError("E_CKPT_INDEX", message, hint=f"download {INDEX_NAME} as well")
    return SINGLE_FILE


def _read_sharded(directory: Path, files: WeightFiles) -> StoredTensors:
    index = index_file(directory)
    weight_map, repeated = _weight_map(index)
    names = sorted(set(weight_map.values()))
    _check_shard_names(directory, index, names)
    missing = [name for name in names if not files.has(name)]
    if missing:
        listed = ", ".join(missing[:3])
        raise InputError(
            "E_CKPT_MISSING",
            f"`{directory}` lacks {len(missing)} of {len(names)} shards: {listed}",
            hint="finish the download, for example with `hf download MODEL --local-dir DIR`",
        )
    stored = merge_shards(str(index), weight_map, files.headers(names))
    remarks = [*repeated, *stored.remarks]
    # No reader loads both, and transformers prefers the single file.
    if SINGLE_FILE not in names and files.has(SINGLE_FILE):
        text = f"`{directory}` holds {SINGLE_FILE} as well, which transformers reads instead"
        remarks.append(("W_CKPT_INDEX", f"{text} of the shards of the index"))
    return stored._replace(remarks=tuple(remarks))


def _weight_map(index: Path) -> tuple[dict[str, str], list[Remark]]:
    """Return the name of the file of each tensor, and warnings of keys that occur twice."""
    content, repeated = read_config(index)
    listed = content.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        message = f"`{index}` has no weight_map from tensor names to file names"
        raise InputError("E_CKPT_INDEX", message, hint="download the index again")
    weight_map = {name: file.removeprefix("./") for name, file in listed.items()}
    return weight_map, repeated


def _check_shard_names(directory: Path, index: Path, names: Sequence[str]) -> None:
    """Raise InputError if a shard is not a safetensors file of the directory."""
    present = set(names_in(directory))
    unsafe = [name for name in names if not is_safe_path(directory, name)]
    for name in unsafe:
        if name in present and (directory / name).is_symlink():
            refuse_escape(directory, directory / name)
    if unsafe:
        message = f"`{index}` points outside its directory: {unsafe[0]!r}"
        hint = "do not use this checkpoint, or download its index again"
        raise InputError("E_UNSAFE_PATH", message, hint=hint)
    for name in names:
        if not name.endswith(".safetensors"):
            message = f"`{index}` names a file that is not a safetensors file: {name!r}"
            raise InputError("E_CKPT_INDEX", message)


def merge_shards(
    index: str, weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorInfo]]
) -> StoredTensors:
    """Return the tensors of all shards, file by file, as transformers reads them.

    Tensors that the index does not list are included. InputError E_CKPT_INDEX if a tensor is in
    another shard than the index states, or in two.
    """
    tensors: dict[str, TensorInfo] = {}
    for file, header in shards.items():
        for name, tensor in header.items():
            _check_shard(index, weight_map, file, name, tensors.get(name))
            tensors[name] = tensor
    absent = _missing_in(tensors, weight_map)
    unlisted = _missing_in(weight_map, tensors)
    remarks = []
    if absent:
        text = f"`{index}` lists {_first_of(absent)}, which no shard holds"
        remarks.append(("W_CKPT_INDEX", text))
    if unlisted:
        text = f"`{index}` does not list {_first_of(unlisted)}, which its shards hold"
        remarks.append(("W_CKPT_INDEX", text))
    return StoredTensors(tensors, absent, tuple(remarks))


def _missing_in(present: Mapping[str, object], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in present)


def _check_shard(
    index: str, weight_map: Mapping[str, str], file: str, name: str, earlier: TensorInfo | None
) -> None:
    """Raise InputError if tensor `name` in `file` should be elsewhere; `earlier` is its double."""
    if name in weight_map:
        expected = weight_map[name]
        claim = f"`{index}` puts `{name}` into {expected}"
    elif earlier is not None:
        expected = earlier.file.name
        claim = f"{expected} holds `{name}`"
    else:
        return
    if expected != file:
        hint = "download the index and the shards again, of one revision"
        raise InputError("E_CKPT_INDEX", f"{claim}, but {file} holds it", hint=hint)


def _first_of(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"`{names[0]}`"
    return f"`{names[0]}` and {len(names) - 1} more"
