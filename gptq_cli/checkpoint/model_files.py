"""The files of a model's directory: which belong to the model, safe names, and JSON.

Needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from gptq_cli.checkpoint.headers import unique_keys
from gptq_cli.checkpoint.layout import SINGLE_FILE
from gptq_cli.errors import InputError, shell_word
from gptq_cli.files import MAX_NAME, file_errors, is_file, resolved
from gptq_cli.storage.manifest import INDEX_NAME, MAX_CONFIG_BYTES, MAX_JSON_BYTES, QUANTIZE_CONFIG

Remark = tuple[str, str]  # code and text of a warning

CONFIG_NAMES = ("config.json", QUANTIZE_CONFIG)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODELOPT_CONFIG = "hf_quant_config.json"  # of NVIDIA's quantizer, beside or in place of config.json
SETTINGS_NAMES = (*CONFIG_NAMES, MODELOPT_CONFIG)
INDEX_OF_AUTOGPTQ = "gptq_model-*.safetensors.index.json"
BYTE_ORDER_MARK = "\ufeff"
MAX_DEPTH = 64
MOST_SHOWN = 40  # characters of a value in a message

PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
OTHER_WEIGHTS = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack", ".tflite")
WEIGHT_SUFFIXES = (".safetensors", *OTHER_WEIGHTS)
# Weights in other formats, states of a training and its logs.
SKIPPED_FOLDERS = (
    "original", "onnx", "openvino", "checkpoint-*", "global_step*", "runs", "logs", "tensorboard",
    "wandb", "mlruns", "lightning_logs", "__pycache__",
)  # fmt: skip
SKIPPED_FILES = (
    ADAPTER_CONFIG, "*.index.json", "trainer_state.json", "trainer_log.jsonl", "training_args.*",
    "all_results.json", "train_results.json", "eval_results.json", "test_results.json",
    "predict_results.json", "training_loss.png", "training_eval_loss.png", "events.out.tfevents.*",
    "zero_to_fp32.py", "latest", "*.distcp", "*.lock", "*.log", "*.pyc", "*.tmp", "*.incomplete",
)  # fmt: skip


def side_files(directory: Path, files: Iterable[Path]) -> list[Path]:
    """Return those of `files` that belong to the model, relative to `directory`, sorted.

    These are tokenizer, licence, code and the like; a training writes others beside them. A folder
    with weights in it is another model, an adapter or a state of a training: none of its files
    belongs to this model.
    """
    relative = sorted(file.relative_to(directory) for file in files)
    foreign = set()
    for file in relative:
        if len(file.parts) > 1 and file.suffix in WEIGHT_SUFFIXES:
            foreign.add(file.parts[0])
    return [file for file in relative if file.parts[0] not in foreign and _belongs(file)]


def _belongs(file: PurePath) -> bool:
    if file.as_posix() in SETTINGS_NAMES or file.suffix in WEIGHT_SUFFIXES:
        return False
    if file.name.startswith(".") or _matches(file.name, SKIPPED_FILES):
        return False
    return not is_skipped(file.parent)


def is_skipped(folder: PurePath) -> bool:
    """Return whether no file in `folder`, relative to the model's directory, belongs to it."""
    return any(part.startswith(".") or _matches(part, SKIPPED_FOLDERS) for part in folder.parts)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_other_kinds(directory: str, files: Iterable[str]) -> None:
    """Raise InputError if the names of `files` show that these are not safetensors weights."""
    files = set(files)
    suffixes = {PurePath(file).suffix for file in files}
    code = "E_CKPT_KIND"
    if ADAPTER_CONFIG in files:
        message = "is an adapter, not a model"
        hint = "merge the adapter into its base model first"
    elif "model_index.json" in files:
        message = "is a diffusers pipeline, not a language model"
        hint = "name a language model"
    elif suffixes & {".gguf", ".onnx"}:
        message = "holds GGUF or ONNX files"
        hint = "use the safetensors checkpoint"
    elif suffixes & PICKLES:
        code = "E_CKPT_PICKLE"
        message = "holds pickled weights only, which can run code when they are loaded"
        hint = (
            "convert the weights to safetensors in a place that you trust, "
            "or find a safetensors revision"
        )
    else:
        return
    raise InputError(code, f"`{directory}` {message}", hint=hint)


def index_file(directory: Path) -> Path:
    """Return the path of the index of the shards, which need not exist.

    AutoGPTQ gave it another name, which few readers look for.
    """
    usual = directory / INDEX_NAME
    others = sorted(directory.glob(INDEX_OF_AUTOGPTQ))
    if len(others) != 1 or is_file(usual) or is_file(directory / SINGLE_FILE):
        return usual
    return others[0]


# ---------------------------------------------------------------- names and links


def names_in(directory: Path) -> list[str]:
    with file_errors(directory, writing=False):
        return [path.name for path in directory.iterdir()]


def is_safe_path(directory: Path, name: str) -> bool:
    """Return whether `name` is a plain file name on every system and stays in `directory`.

    The Hub's cache keeps a snapshot's files as links into the `blobs` beside the snapshots. These
    count as inside.
    """
    return _is_plain(name) and _stays_inside(directory, directory / name)


def is_safe_file(directory: Path, name: str) -> bool:
    """Return the same as `is_safe_path` for a file that may lie in folders of `directory`."""
    return all(map(_is_plain, name.split("/"))) and _stays_inside(directory, directory / name)


def _is_plain(name: str) -> bool:
    if name in ("", ".", "..") or PureWindowsPath(name).name != name:
        return False
    return name.isprintable() and len(os.fsencode(name)) <= MAX_NAME


def _stays_inside(directory: Path, file: Path) -> bool:
    root, target = resolved(directory), Path(os.path.realpath(file))
    if target.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and target.is_relative_to(root.parent.parent / "blobs")


def refuse_escape(directory: Path, file: Path) -> None:
    """Raise InputError E_UNSAFE_PATH if `file` is a link that leads out of `directory`."""
    if not _stays_inside(directory, file):
        target = os.path.realpath(file)
        message = f"`{file}` is a link that leads out of its directory, to `{target}`"
        hint = "copy the file, or give the directory that it lies in"
        raise InputError("E_UNSAFE_PATH", message, hint=hint)


def refuse_name(directory: Path, file: Path) -> None:
    """Raise InputError E_UNSAFE_PATH for a file whose name a manifest cannot hold.

    `file` is relative to `directory`.
    """
    if not all(map(_is_plain, file.parts)):
        message = f"`{directory / file}` has a name that not every system accepts or shows"
        hint = (
            "rename it, without backslash, drive and letters that cannot be shown, "
            "or move it elsewhere"
        )
        raise InputError("E_UNSAFE_PATH", message, hint=hint)


# ---------------------------------------------------------------- JSON files


def read_config(file: Path) -> tuple[dict[str, Any], list[Remark]]:
    """Return a JSON object as transformers reads it, and warnings of keys with two values.

    The last value counts. Raises the errors of `read_json`.
    """
    repeated: list[str] = []
    content = read_json(file, repeated)
    if not isinstance(content, dict):
        raise InputError("E_CKPT_CONFIG", f"`{file}` is not a JSON object")
    if not repeated:
        return content, []
    text = f"`{file}` has keys with two values, and the last one counts, as in transformers"
    return content, [("W_CKPT_CONFIG", f"{text}: {'; '.join(repeated[:3])}")]


def read_json(file: Path, repeated: list[str] | None = None) -> Any:
    """Return the parsed content of a JSON file.

    A key that occurs twice is an error, because readers differ in which value they take. With
    `repeated` the last value counts, and each value that it replaces is noted in that list.
    InputError E_CKPT_CONFIG if the file is not valid JSON, too large or nested too deep.
    """
    limit = MAX_CONFIG_BYTES if file.name in CONFIG_NAMES else MAX_JSON_BYTES
    pairs = unique_keys if repeated is None else partial(_last_values, repeated)
    try:
        with file_errors(file, writing=False):
            if file.stat().st_size > limit:
                raise ValueError(f"it is larger than {limit // 10**6} MB")
            text = file.read_bytes().decode("utf-8")
        if text.startswith(BYTE_ORDER_MARK):
            raise _byte_order_mark(file)
        content = json.loads(text, object_pairs_hook=pairs)
        if _depth(content) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    except (ValueError, RecursionError) as error:
        message = f"`{file}` cannot be read as JSON: {error}"
        hint = "download or copy the file again"
        raise InputError("E_CKPT_CONFIG", message, hint=hint) from None
    return content


def _byte_order_mark(file: Path) -> InputError:
    message = f"`{file}` begins with a byte order mark, and transformers cannot read that"
    hint = f"remove the mark: sed -i '1s/^\\xEF\\xBB\\xBF//' {shell_word(str(file))}"
    return InputError("E_CKPT_CONFIG", message, hint=hint)


def _last_values(repeated: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            repeated.append(f"{key} is {_shortened(found[key])}, then {_shortened(value)}")
        found[key] = value
    return found


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[:MOST_SHOWN]}..."


def _depth(content: Any) -> int:
    """Return how many levels of objects and lists JSON data has."""
    depth = 0
    level = [content]
    while True:
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return depth
        depth += 1
        level = []
        for container in containers:
            if isinstance(container, dict):
                level += container.values()
            else:
                level += container
