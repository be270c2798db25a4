"""Decide which outputs may be replaced: those that gptq wrote, and checkpoints with no other files.

Files that are refused here are never removed either: an old output is removed file by file, and
files that do not belong to a checkpoint are kept.
"""

from __future__ import annotations

import errno
import json
import os
import pwd
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from gptq_cli.errors import ConfigError, ExistsError, GptqError, shell_word
from gptq_cli.files import (
    Identity,
    at_and_above,
    file_errors,
    identity,
    is_inside,
    is_mount,
    mounts_below,
    status_of,
)
from gptq_cli.storage import durable
from gptq_cli.storage.durable import disk_error, is_occupied
from gptq_cli.storage.manifest import (
    INDEX_NAME,
    MANIFEST,
    MAX_CONFIG_BYTES,
    QUANTIZE_CONFIG,
    REPORT_DATA,
    REPORT_PAGE,
    RUN_FILES,
    file_hash,
    read_manifest,
)

SHOWN = 3
MARKED_BYTES = 4096  # the name of the program that wrote a file is among these first bytes
# model-00001-of-00002.safetensors, consolidated.00.safetensors, gptq_model-4bit-128g.safetensors
WEIGHTS = re.compile(
    r"((model|pytorch_model|consolidated)(\.(fp16|bf16|fp32))?([.-]\d{2,5}(-of-\d{5})?)?"
    r"|gptq_model-\dbit--?\d+g(-\d{5}-of-\d{5})?)\.(safetensors|bin)"
)
# Files beside weights, as transformers, the Hub and GPTQ tools call them. The two names with .tmp
# are those of a run that was killed while it wrote its report.
NAMES = {
    "config.json", "generation_config.json", QUANTIZE_CONFIG, "quant_config.json", "params.json",
    "recipe.yaml", INDEX_NAME, "pytorch_model.bin.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
    ".gitattributes", *RUN_FILES, f".{REPORT_DATA}.tmp", f".{REPORT_PAGE}.tmp",
}  # fmt: skip
# `hf download --local-dir` writes these files.
HUB_RECORDS = re.compile(
    r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.+\.(metadata|lock|incomplete))"
)


def check_output(output: Path, model: Path, *, overwrite: bool, may_be_done: bool = False) -> None:
    """Refuse an output that is the model, or that is not empty and may not be replaced.

    With `may_be_done` an output that gptq has written passes; the caller calls `check_replaceable`
    once it knows whether this run would write the same. Raises ConfigError E_OUT_IS_INPUT and
    E_OUT_MOUNT, ExistsError E_OUT_EXISTS and E_OUT_FOREIGN, and ResourceError E_DISK for a path
    that may not even be examined.
    """
    status_of(output, writing=True)
    _refuse_input(output, model)
    _refuse_special_directory(output)
    if not is_occupied(output):
        return
    if not output.is_dir():
        raise ExistsError(
            "E_OUT_EXISTS", f"`{output}` exists and is not a directory", hint="choose another -o"
        )
    if may_be_done and read_manifest(output) is not None:
        return
    if not overwrite:
        message = f"`{output}` exists and is not an empty directory"
        raise ExistsError("E_OUT_EXISTS", message, hint=overwrite_hint(output))
    check_replaceable(output, model)


def check_replaceable(output: Path, model: Path) -> None:
    """Refuse to replace `output` if it holds files that belong neither to gptq nor to a checkpoint.

    Raises ConfigError E_OUT_IS_INPUT and E_OUT_MOUNT; ExistsError E_OUT_FOREIGN with up to three of
    the foreign files; ResourceError E_DISK if the directory may not be changed.
    """
    _refuse_input(output, model)
    _refuse_special_directory(output)
    if not output.is_dir():
        return
    if (output / ".git").exists():
        message = f"`{output}` is a repository (it holds .git), which is never replaced"
        raise ExistsError("E_OUT_FOREIGN", message, hint="choose another -o")
    foreign = list(islice(_foreign_files(output, model), SHOWN + 1))
    if foreign:
        names = ", ".join(foreign[:SHOWN])
        if len(foreign) > SHOWN:
            names += " and more"
        raise ExistsError(
            "E_OUT_FOREIGN",
            f"`{output}` holds files that belong neither to gptq nor to a checkpoint: {names}",
            hint="choose another -o, or move these files elsewhere first",
        )
    if not os.access(output, os.W_OK | os.X_OK):
        raise disk_error(output, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def overwrite_hint(output: Path) -> str:
    """Return the hint for an occupied output; it names --overwrite only if that would work."""
    if next(_foreign_files(output, None), None) is None and not (output / ".git").exists():
        return "add --overwrite to replace it, or choose another -o"
    return "choose another -o: --overwrite replaces only a checkpoint with nothing else beside it"


def check_file(file: Path, mark: bytes) -> None:
    """Raise ExistsError E_OUT_FOREIGN unless `file` is missing, empty or begins with `mark`.

    `mark` may stand anywhere in the first 4096 bytes.
    """
    if status_of(file, writing=True) is None:
        return
    if not file.is_file():
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{file}` exists and is not a file", hint="choose another name"
        )
    with file_errors(file, writing=False), file.open("rb") as stream:
        head = stream.read(MARKED_BYTES)
    if head and mark not in head:
        message = f"`{file}` exists, but gptq has not written it"
        hint = "choose another name, or move that file elsewhere first"
        raise ExistsError("E_OUT_FOREIGN", message, hint=hint)


def is_an_output(directory: Path) -> bool:
    """Return whether gptq has written `directory`, or it is clearly a model."""
    return read_manifest(directory) is not None or _is_checkpoint(directory)


def remove_replaced(directory: Path) -> list[str]:
    """Remove an output that was replaced; return a line with the reason for each file that is kept.

    Only files that belong to gptq or to a checkpoint are removed: files that were added meanwhile
    are kept. No mount is entered. The manifest goes last, because it lists the files of gptq.
    """
    listed = _listed(read_manifest(directory))
    kept = _remove_below(directory, Path(), listed)
    if not kept:
        kept = _attempt(Path(MANIFEST), lambda: _unlink_if_there(directory / MANIFEST))
    if not kept:
        kept = _attempt(Path(directory.name), lambda: durable.disk.rmdir(directory))
    return kept


def _remove_below(directory: Path, inside: Path, listed: Mapping[str, str]) -> list[str]:
    """Remove the files of gptq in `directory` / `inside`; return a line for each kept file."""
    paths: list[Path] = []
    kept = _attempt(inside, lambda: paths.extend(sorted((directory / inside).iterdir())))
    for path in paths:
        name = inside / path.name
        if path.is_dir() and not path.is_symlink():
            kept += _remove_folder(directory, name, listed)
        elif name != Path(MANIFEST):
            kept += _attempt(name, partial(_remove_file, directory, name, listed))
    return kept


def _remove_folder(directory: Path, name: Path, listed: Mapping[str, str]) -> list[str]:
    if is_mount(directory / name):
        return [f"{name} is a mount point"]
    kept = _remove_below(directory, name, listed)
    return kept or _attempt(name, lambda: durable.disk.rmdir(directory / name))


def _remove_file(directory: Path, name: Path, listed: Mapping[str, str]) -> None:
    if not _is_ours(directory / name, name, listed):
        raise OSError(errno.EPERM, "gptq has not written it")
    durable.disk.unlink(directory / name)


def _unlink_if_there(file: Path) -> None:
    if file.exists():
        durable.disk.unlink(file)


def _attempt(name: Path, action: Callable[[], object]) -> list[str]:
    """Call `action`; if the disk refuses, return one line with `name` and the reason."""
    try:
        action()
    except OSError as error:
        return [f"{name}: {error.strerror}"]
    except GptqError as error:  # the file cannot be read, so nobody can tell whose it is
        return [f"{name}: {error}"]
    return []


def _refuse_input(output: Path, model: Path) -> None:
    if not model.is_dir():
        return
    if is_inside(output, model):
        raise ConfigError(
            "E_OUT_IS_INPUT", f"`{output}` is the model's own directory or inside it",
            hint=f"choose another -o: -o {shell_word(str(_beside(model, output)))}",
        )  # fmt: skip
    if is_inside(model, output):
        raise _contains(output)


def _contains(output: Path) -> ConfigError:
    return ConfigError("E_OUT_IS_INPUT", f"`{output}` contains the model", hint="choose another -o")


def _beside(model: Path, output: Path) -> Path:
    """Return a path beside the model with the name of the output, or one like the model's."""
    whole, name = model.resolve(), output.resolve().name
    if name == whole.name:
        name = f"{name}-GPTQ"
    return whole.parent / name


def _refuse_special_directory(output: Path) -> None:
    """Refuse a directory that is never replaced, whatever it holds, even if it is empty."""
    if not output.is_dir():
        return
    inside = f"choose a directory inside it: -o {shell_word(str(output / 'NAME'))}"
    found = identity(output)
    if found in at_and_above(Path.cwd()):
        message = f"`{output}` is the current directory or above it, which is never replaced"
        raise ExistsError("E_OUT_FOREIGN", message, hint="choose a new directory: -o ./NAME")
    if found in map(identity, _homes()):
        message = f"`{output}` is a home directory, which is never replaced"
        raise ExistsError("E_OUT_FOREIGN", message, hint=inside)
    if is_mount(output):
        message = f"`{output}` is a mount point, which cannot be replaced"
        raise ConfigError("E_OUT_MOUNT", message, hint=inside)
    mounts = mounts_below(output)
    if mounts:
        raise _never_replaced(output, f"the mount point `{mounts[0]}`")


def _never_replaced(output: Path, mounted: str) -> ConfigError:
    message = f"`{output}` holds {mounted}, therefore it is never replaced"
    return ConfigError("E_OUT_MOUNT", message, hint="choose another -o, or unmount it first")


def _homes() -> list[Path]:
    """Return the home directories of this user and of all users that this machine lists."""
    listed = [entry.pw_dir for entry in pwd.getpwall()]
    return [Path(home) for home in [os.environ.get("HOME"), *listed] if home]


def _foreign_files(directory: Path, model: Path | None) -> Iterator[str]:
    """Yield the files below `directory` that belong neither to gptq nor to a checkpoint.

    In an output with an intact manifest a read-only folder is no reason to refuse: its content
    cannot be removed, therefore it is kept. Raises ConfigError E_OUT_IS_INPUT if the model is
    inside.
    """
    manifest = read_manifest(directory)
    known = is_an_output(directory)
    listed = _listed(manifest)
    model_identity = None
    if model is not None:
        model_identity = identity(model)
    for name in _files(directory, Path(), model_identity, skip_fixed=manifest is not None):
        if not known or not _is_ours(directory / name, name, listed):
            yield name.as_posix()


def _files(
    directory: Path, inside: Path, model: Identity | None, *, skip_fixed: bool
) -> Iterator[Path]:
    """Yield the names of all files below `directory` / `inside`, those outside folders first.

    A directory that cannot be read counts as a file. With `skip_fixed` read-only folders are
    skipped. Raises ConfigError E_OUT_IS_INPUT for the directory `model`, E_OUT_MOUNT for another
    file system.
    """
    here = directory / inside
    if model is not None and identity(here) == model:
        raise _contains(directory)
    try:
        paths = sorted(here.iterdir(), key=_files_first)
    except OSError:
        yield inside
        return
    for path in paths:
        name = inside / path.name
        if path.is_symlink() or not path.is_dir():
            yield name
            continue
        _refuse_other_file_system(path, directory)
        if os.access(path, os.W_OK | os.X_OK) or not skip_fixed:
            yield from _files(directory, name, model, skip_fixed=skip_fixed)


def _refuse_other_file_system(path: Path, directory: Path) -> None:
    if path.stat().st_dev != directory.stat().st_dev:
        raise _never_replaced(directory, f"the file system `{path}`")


def _files_first(path: Path) -> tuple[bool, str]:
    return path.is_dir(), path.name


def _is_checkpoint(directory: Path) -> bool:
    """Return whether there is a config.json of a model, and weights under a usual name."""
    file = directory / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            return False
        config = json.loads(file.read_bytes())
        names = [path.name for path in directory.iterdir()]
    except (OSError, ValueError, RecursionError):
        return False
    is_model = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return is_model and any(WEIGHTS.fullmatch(name) for name in names)


def _is_ours(path: Path, name: Path, listed: Mapping[str, str]) -> bool:
    """Return whether `path` is a regular file that belongs to a checkpoint or to gptq.

    It has a name that checkpoints use, or the manifest lists it and its hash is right.
    """
    if path.is_symlink() or not path.is_file():
        return False
    if _has_usual_name(name, listed):
        return True
    return name.as_posix() in listed and file_hash(path) == listed[name.as_posix()]


def _has_usual_name(name: Path, listed: Mapping[str, str]) -> bool:
    if len(name.parts) > 1:
        return HUB_RECORDS.fullmatch(name.as_posix()) is not None
    if WEIGHTS.fullmatch(name.name):
        # A manifest lists all weights: other weights beside them were written by somebody else.
        return not listed or name.name in listed
    return name.name in NAMES


def _listed(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the hash of each file that a manifest lists."""
    if manifest is None:
        return {}
    files = manifest.get("files")
    if not isinstance(files, dict):
        return {}
    return {
        name: str(entry.get("sha256")) for name, entry in files.items() if isinstance(entry, dict)
    }
