"""Check of --log-file: the file must be new, empty or a log of gptq, outside of models, outputs and
work directories.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptq_cli.cli.console import LOG_MARK
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import DEFAULTS, FIELDS
from gptq_cli.errors import ConfigError, GptqError
from gptq_cli.files import identity, is_inside
from gptq_cli.planning.checks import default_output
from gptq_cli.storage.replacing import is_an_output
from gptq_cli.storage.work_directory import WorkDirectory, output_of, read_run, work_of

# options whose values name files and directories that commands read
NAMED = ("model", "baseline", "a", "b", "directory", "text", "dataset")
_FIRST_LINE = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z " + LOG_MARK.encode())
HINT = "choose another place for --log-file"


def check_log_file(file: Path, values: Mapping[str, Any]) -> None:
    """Raise ConfigError E_LOG_FILE if a log in `file` could damage other data.

    That is the case if `file` is in a directory that the command with the options `values` reads
    or writes, or in a checkpoint, or if it exists and is no log of gptq.
    """
    for path in filter(_may_exist, _paths_of_command(values)):
        if is_inside(file, path) or _is_same_new(file, path):
            raise _refusal(f"`{file}` is in `{path}`, which this command reads or writes")
    for above in Path(os.path.realpath(file)).parents:
        if is_an_output(above):
            raise _refusal(f"`{file}` is in `{above}`, a checkpoint")
    if not _may_be_log(file):
        raise _refusal(f"`{file}` exists and is not a log of gptq")


def _paths_of_command(values: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the files and directories that a command reads or writes, and work directories."""
    for key in NAMED:
        named = values.get(key)
        if not isinstance(named, list):
            named = [named]
        for value in named:
            if isinstance(value, str | Path):
                yield Path(value).expanduser()
    for output in _outputs(values):
        yield output
        yield WorkDirectory(output).path
    if "unfinished" in values:
        work = _work_of(values["unfinished"])
        yield work
        yield from _model_of_work(work)


def _work_of(named: Path) -> Path:
    return work_of(Path(os.path.realpath(named)))


def _model_of_work(directory: Path) -> Iterator[Path]:
    """Yield the model of the unfinished run in a work directory, if there is one."""
    run = read_run(directory)
    model = run["request"].get("model") if run else None
    if isinstance(model, str):
        yield Path(model)


def _outputs(values: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the outputs of a command: of `gptq resume`, by --output, or by default."""
    if values.get("unfinished") is not None:
        unfinished = output_of(_work_of(values["unfinished"]))
        if unfinished is not None:
            yield unfinished
    if values.get("output") is not None:
        yield Path(values["output"])
    elif "output" in values and "config" in values:
        yield from _default_output(values)


def _default_output(values: Mapping[str, Any]) -> Iterator[Path]:
    settings = {name: values[name] for name in FIELDS if name in values}
    try:
        config = resolve(settings, os.environ, values["config"]).config
        start = config.model_copy(update={"bits": DEFAULTS.bits})
        yield default_output(values["model"], config, start, values.get("revision"))
    except GptqError:  # the command itself will report it
        return


def _may_exist(path: Path) -> bool:
    """Return whether a file of this name can exist; a foreign run file may name anything."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _is_same_new(file: Path, path: Path) -> bool:
    """Return whether both are the same name, which need not exist, in the same directory."""
    one, other = Path(os.path.realpath(file)), Path(os.path.realpath(path))
    return one.name == other.name and identity(one.parent) == identity(other.parent) is not None


def _may_be_log(file: Path) -> bool:
    try:
        found = file.stat()
        if stat.S_ISFIFO(found.st_mode) or stat.S_ISCHR(found.st_mode):
            return True  # such as /dev/null, where nothing is lost
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
