"""Which file may be a log: a new or empty one, or a log of ours, in no model, output or work directory."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptq_cli.cli.console import LOG_MARK
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import FIELDS
from gptq_cli.errors import ConfigError, GptqError
from gptq_cli.planning.run_plan import default_name
from gptq_cli.storage.file_identity import identity, is_inside
from gptq_cli.storage.replacing import is_an_output
from gptq_cli.storage.work_directory import WorkDirectory, output_of, read_run

NAMED = (
    "model",
    "baseline",
    "a",
    "b",
    "directory",
    "text",
    "dataset",
)  # what commands read directories from
_FIRST_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z " + LOG_MARK.encode())
HINT = "choose another place for --log-file"


def check_log_file(file: Path, said: Mapping[str, Any]) -> None:
    """ConfigError E_LOG_FILE if a log in `file` would be in what a command with the options `said` reads or writes, or
    if the file is there and is no log of gptq."""
    for place in filter(_may_exist, _named(said)):
        if is_inside(file, place) or _is_same_new(file, place):
            raise _refusal(f"`{file}` is in `{place}`, which this command reads or writes")
    for above in Path(os.path.realpath(file)).parents:
        if is_an_output(above):
            raise _refusal(f"`{file}` is in `{above}`, a checkpoint")
    if not _may_be_log(file):
        raise _refusal(f"`{file}` exists and is not a log of gptq")


def _named(said: Mapping[str, Any]) -> Iterator[Path]:
    """The files and directories that a command reads or writes; an output has its work directory, too."""
    for key in NAMED:
        values = said.get(key)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, str | Path):
                yield Path(value).expanduser()
    for output in _outputs(said):
        yield output
        yield WorkDirectory(output).path
    begun = read_run(said["directory"]) if "directory" in said else None
    model = begun["request"].get("model") if begun else None
    if isinstance(model, str):
        yield Path(model)


def _outputs(said: Mapping[str, Any]) -> Iterator[Path]:
    work = said.get("directory")
    unfinished = output_of(Path(os.path.realpath(work))) if work is not None else None
    if unfinished is not None:
        yield unfinished
    if said.get("output") is not None:
        yield Path(said["output"])
    elif "output" in said and "config" in said:
        settings = {name: said[name] for name in FIELDS if name in said}
        try:
            config = resolve(settings, os.environ, said["config"]).config
        except GptqError:  # the command itself tells what is wrong
            return
        yield Path(default_name(said["model"], config))


def _may_exist(path: Path) -> bool:
    """Return whether the file system can hold the name: run files of strangers may say anything."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _is_same_new(file: Path, place: Path) -> bool:
    """True if both are the same name, which need not exist, in the same directory."""
    one, other = Path(os.path.realpath(file)), Path(os.path.realpath(place))
    return one.name == other.name and identity(one.parent) == identity(other.parent) is not None


def _may_be_log(file: Path) -> bool:
    try:
        found = file.stat()
        if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(
            found.st_mode
        ):  # such as /dev/null: nothing there is lost
            return True
        if not stat.S_ISREG(found.st_mode):
            return False
        with file.open("rb") as stream:
            return found.st_size == 0 or _FIRST_LINE.match(stream.read(80)) is not None
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _refusal(f"cannot read `{file}`: {error.strerror}") from None


def _refusal(message: str) -> ConfigError:
    return ConfigError("E_LOG_FILE", message, hint=HINT)
