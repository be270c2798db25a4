"""Which files of a model's directory are the model's beside its weights: a training leaves others there."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePath

CONFIG_NAMES = ("config.json", "quantize_config.json")
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".tflite",
)
ADAPTER_CONFIG = "adapter_config.json"
# Weights in other formats, states of a training and its logs.
SKIPPED_FOLDERS = (
    "original", "onnx", "openvino", "checkpoint-*", "global_step*", "runs", "logs", "tensorboard", "wandb", "mlruns",
    "lightning_logs", "__pycache__",
)  # fmt: skip
SKIPPED_FILES = (
    ADAPTER_CONFIG, "*.index.json", "trainer_state.json", "trainer_log.jsonl", "training_args.*", "all_results.json",
    "train_results.json", "eval_results.json", "test_results.json", "predict_results.json", "training_loss.png",
    "training_eval_loss.png", "events.out.tfevents.*", "zero_to_fp32.py", "latest", "*.distcp", "*.lock", "*.log",
    "*.pyc", "*.tmp", "*.incomplete",
)  # fmt: skip


def side_files(files: Iterable[PurePath]) -> list[PurePath]:
    """Of `files` (relative to the model's directory) those that belong to the model: tokenizer, licence, code, ...

    A folder with weights in it is another model, an adapter or a state of a training: none of its files belongs here.
    """
    files = sorted(files)
    foreign = {
        file.parts[0] for file in files if len(file.parts) > 1 and file.suffix in WEIGHT_SUFFIXES
    }
    return [file for file in files if file.parts[0] not in foreign and _belongs(file)]


def _belongs(file: PurePath) -> bool:
    if file.as_posix() in CONFIG_NAMES or file.suffix in WEIGHT_SUFFIXES:
        return False
    hidden = file.name.startswith(".")
    return not (hidden or is_skipped(file.parent) or _is_like(file.name, SKIPPED_FILES))


def is_skipped(folder: PurePath) -> bool:
    """Whether no file in `folder`, which is relative to the model's directory, belongs to the model."""
    return any(part.startswith(".") or _is_like(part, SKIPPED_FOLDERS) for part in folder.parts)


def _is_like(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
