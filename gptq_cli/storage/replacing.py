"""The one place that decides what may be replaced: a checkpoint with nothing else beside it, or what gptq has written.

What is refused here is never removed either: an old output goes file by file, and what is not of a checkpoint stays.
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

from gptq_cli.errors import ConfigError, ExistsError, GptqError
from gptq_cli.files import file_errors, status_of
from gptq_cli.shell import shell_word
from gptq_cli.storage import durable
from gptq_cli.storage.durable import disk_error, is_occupied
from gptq_cli.storage.manifest import (
    INDEX_NAME,
    MANIFEST,
    MAX_CONFIG_BYTES,
    OF_THE_RUN,
    QUANTIZE_CONFIG,
    REPORT_DATA,
    REPORT_PAGE,
    file_hash,
    read_manifest,
)
from gptq_cli.storage.places import at_and_above, identity, is_inside, is_mount, mounts_below

SHOWN = 3
MARKED_BYTES = 4096  # in which a file says who has written it
WEIGHTS = re.compile(  # model-00001-of-00002.safetensors, consolidated.00.safetensors, gptq_model-4bit-128g.safetensors
    r"((model|pytorch_model|consolidated)(\.(fp16|bf16|fp32))?([.-]\d{2,5}(-of-\d{5})?)?"
    r"|gptq_model-\dbit--?\d+g(-\d{5}-of-\d{5})?)\.(safetensors|bin)"
)
NAMES = {  # of files beside weights, as transformers, the Hub and GPTQ tools write them
    "config.json", "generation_config.json", QUANTIZE_CONFIG, "quant_config.json", "params.json", "recipe.yaml",
    INDEX_NAME, "pytorch_model.bin.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md", ".gitattributes",
    *OF_THE_RUN, f".{REPORT_DATA}.tmp", f".{REPORT_PAGE}.tmp",  # the last two of a report that was killed
}  # fmt: skip
HUB_RECORDS = re.compile(  # of `hf download --local-dir`
    r"\.cache/huggingface/(\.gitignore|CACHEDIR\.TAG|download/.+\.(metadata|lock|incomplete))"
)


def check_output(output: Path, model: Path, *, overwrite: bool, may_be_done: bool = False) -> None:
    """Refuse an output that is the model or that holds something, unless it may be replaced.

    With `may_be_done` an output that gptq has written passes, for `check_replaceable` to look at when it is known
    whether this run would write the same. ConfigError E_OUT_IS_INPUT and E_OUT_MOUNT, ExistsError E_OUT_EXISTS and
    E_OUT_FOREIGN. ResourceError E_DISK for a place that may not even be looked at.
    """
    status_of(output, writing=True)
    _refuse_input(output, model)
    _refuse_place(output)
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
        raise ExistsError("E_OUT_EXISTS", message, hint=way_out(output))
    check_replaceable(output, model)


def check_replaceable(output: Path, model: Path) -> None:
    """Refuse to replace what stands at `output`, as far as it is not gptq's or plainly a checkpoint.

    ConfigError E_OUT_IS_INPUT and E_OUT_MOUNT; ExistsError E_OUT_FOREIGN with up to three of the foreign files.
    """
    _refuse_input(output, model)
    _refuse_place(output)
    if not output.is_dir():
        return
    if (output / ".git").exists():
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{output}` is a repository (it holds .git), which is never replaced",
            hint="choose another -o",
        )  # fmt: skip
    foreign = list(islice(_foreign_files(output, model), SHOWN + 1))
    if foreign:
        names = ", ".join(foreign[:SHOWN]) + (" and more" if len(foreign) > SHOWN else "")
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{output}` holds files that gptq has not written and no checkpoint has: {names}",
            hint="choose another -o, or move these files elsewhere first",
        )  # fmt: skip
    if not os.access(output, os.W_OK | os.X_OK):
        raise disk_error(output, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def way_out(output: Path) -> str:
    """What to do about an output that holds something: --overwrite is named only where it may replace it."""
    if next(_foreign_files(output, None), None) is None and not (output / ".git").exists():
        return "add --overwrite to replace it, or choose another -o"
    return "choose another -o: --overwrite replaces only a checkpoint with nothing else beside it"


def check_file(file: Path, mark: bytes) -> None:
    """ExistsError E_OUT_FOREIGN if `file` is something else than gptq writes there: that has `mark` near its start."""
    if status_of(file, writing=True) is None:
        return
    if not file.is_file():
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{file}` exists and is not a file", hint="choose another name"
        )
    with file_errors(file, writing=False), file.open("rb") as stream:
        head = stream.read(MARKED_BYTES)
    if head and mark not in head:
        message = f"`{file}` exists, and gptq has not written it"
        raise ExistsError(
            "E_OUT_FOREIGN", message, hint="choose another name, or move that file elsewhere first"
        )


def is_an_output(directory: Path) -> bool:
    """True for a directory that gptq has written, or that is plainly a model's."""
    return read_manifest(directory) is not None or _is_checkpoint(directory)


def remove_replaced(directory: Path) -> list[str]:
    """Remove an output that was replaced; a line for each thing that stays of it, with the reason.

    Only files that are gptq's or a checkpoint's are removed, so what somebody has put there meanwhile stays. No mount
    is entered. The manifest, which tells what is gptq's, goes last.
    """
    listed = _listed(read_manifest(directory))
    left = _remove_below(directory, Path(), listed)
    if not left:
        left = _tried(Path(MANIFEST), lambda: _unlink_if_there(directory / MANIFEST))
        left = left or _tried(Path(directory.name), lambda: durable.disk.rmdir(directory))
    return left


def _remove_below(directory: Path, inside: Path, listed: Mapping[str, str]) -> list[str]:
    """Remove what is gptq's in `directory` / `inside`; a line for each thing that stays."""
    paths: list[Path] = []
    left = _tried(inside, lambda: paths.extend(sorted((directory / inside).iterdir())))
    for path in paths:
        name = inside / path.name
        if path.is_dir() and not path.is_symlink():
            left += _remove_folder(directory, name, listed)
        elif name != Path(MANIFEST):
            left += _tried(name, partial(_remove_file, directory, name, listed))
    return left


def _remove_folder(directory: Path, name: Path, listed: Mapping[str, str]) -> list[str]:
    if is_mount(directory / name):
        return [f"{name} is a mount point"]
    left = _remove_below(directory, name, listed)
    return left or _tried(name, lambda: durable.disk.rmdir(directory / name))


def _remove_file(directory: Path, name: Path, listed: Mapping[str, str]) -> None:
    if not _is_ours(directory / name, name, listed):
        raise OSError(errno.EPERM, "gptq has not written it")
    durable.disk.unlink(directory / name)


def _unlink_if_there(file: Path) -> None:
    if file.exists():
        durable.disk.unlink(file)


def _tried(name: Path, action: Callable[[], object]) -> list[str]:
    """Do `action`; if the disk refuses, a line with `name` and the reason."""
    try:
        action()
    except OSError as error:
        return [f"{name}: {error.strerror}"]
    except GptqError as error:  # it cannot be read
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
    name = output.resolve().name
    return model.resolve().parent / (name if name != model.resolve().name else f"{name}-GPTQ")


def _refuse_place(output: Path) -> None:
    """Refuse a directory that is never replaced, whatever it holds, even if it is empty."""
    if not output.is_dir():
        return
    here = identity(output)
    if here in at_and_above(Path.cwd()):
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{output}` is the current directory or above it, and is never replaced",
            hint="choose a new directory: -o ./NAME",
        )  # fmt: skip
    if here in map(identity, _homes()):
        hint = f"choose a directory inside it: -o {shell_word(str(output / 'NAME'))}"
        raise ExistsError(
            "E_OUT_FOREIGN", f"`{output}` is a home directory, and is never replaced", hint=hint
        )
    if is_mount(output):
        hint = f"choose a directory inside it: -o {shell_word(str(output / 'NAME'))}"
        raise ConfigError(
            "E_OUT_MOUNT",
            f"`{output}` is a mount point, which cannot be given to another",
            hint=hint,
        )
    mounts = mounts_below(output)
    if mounts:
        message = f"`{output}` holds a mount point, `{mounts[0]}`, and is never replaced"
        raise ConfigError("E_OUT_MOUNT", message, hint="choose another -o, or unmount it first")


def _homes() -> list[Path]:
    """The home directories of this user and of all others that this machine lists."""
    said = os.environ.get("HOME")
    listed = [entry.pw_dir for entry in pwd.getpwall()]
    return [Path(home) for home in [said, *listed] if home]


def _foreign_files(directory: Path, model: Path | None) -> Iterator[str]:
    """Files below `directory` that replacing it would destroy and that are neither gptq's nor of a checkpoint.

    In an output with a genuine manifest a folder that nobody may change is no reason to refuse: nothing in it can be
    removed, and it is kept. Raises ConfigError E_OUT_IS_INPUT where the model is found inside.
    """
    manifest = read_manifest(directory)
    plain = is_an_output(directory)
    listed = _listed(manifest)
    for name in _files(
        directory, Path(), model and identity(model), skip_fixed=manifest is not None
    ):
        if not plain or not _is_ours(directory / name, name, listed):
            yield name.as_posix()


def _files(directory: Path, inside: Path, model: Any, *, skip_fixed: bool) -> Iterator[Path]:
    """What is below `directory` and is no directory, files first; a directory that cannot be read counts as a file."""
    here = directory / inside
    if model is not None and identity(here) == model:
        raise _contains(directory)
    try:
        paths = sorted(here.iterdir(), key=lambda path: (path.is_dir(), path.name))
    except OSError:
        yield inside
        return
    for path in paths:
        name = inside / path.name
        if path.is_symlink() or not path.is_dir():
            yield name
        elif path.stat().st_dev != directory.stat().st_dev:
            message = f"`{directory}` holds another file system, `{path}`, and is never replaced"
            raise ConfigError("E_OUT_MOUNT", message, hint="choose another -o, or unmount it first")
        elif os.access(path, os.W_OK | os.X_OK) or not skip_fixed:
            yield from _files(directory, name, model, skip_fixed=skip_fixed)


def _is_checkpoint(directory: Path) -> bool:
    """True if there is a config.json of a model, and weights under a usual name."""
    try:
        file = directory / "config.json"
        config = json.loads(file.read_bytes()) if file.stat().st_size <= MAX_CONFIG_BYTES else None
        names = [path.name for path in directory.iterdir()]
    except (OSError, ValueError, RecursionError):
        return False
    is_model = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return is_model and any(WEIGHTS.fullmatch(name) for name in names)


def _is_ours(path: Path, name: Path, listed: Mapping[str, str]) -> bool:
    """True for a regular file with a name that checkpoints have, or that the manifest lists and that is as it says.

    A manifest lists all weights, so that others beside them are somebody else's.
    """
    if path.is_symlink() or not path.is_file():
        return False
    if HUB_RECORDS.fullmatch(name.as_posix()):
        return True
    if len(name.parts) == 1 and name.name in NAMES:
        return True
    if len(name.parts) == 1 and WEIGHTS.fullmatch(name.name):
        return not listed or name.name in listed
    return name.as_posix() in listed and file_hash(path) == listed[name.as_posix()]


def _listed(manifest: Mapping[str, Any] | None) -> dict[str, str]:
    """The hash of each file that a manifest lists."""
    files = manifest.get("files") if manifest else None
    entries = files.items() if isinstance(files, dict) else ()
    return {name: str(entry.get("sha256")) for name, entry in entries if isinstance(entry, dict)}
