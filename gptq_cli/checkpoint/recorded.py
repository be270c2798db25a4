"""The configuration of a run as it lies in the checkpoint that the run has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptq_cli.config.strict_yaml import load
from gptq_cli.errors import ConfigError
from gptq_cli.files import file_errors, is_file
from gptq_cli.storage.manifest import CONFIG_FILE


def recorded_settings(directory: Path) -> dict[str, Any]:
    """What gptq_config.yaml in `directory` says; nothing if it is not there or no configuration.

    InputError E_FILE if it may not be read.
    """
    file = directory / CONFIG_FILE
    if not is_file(file):
        return {}
    with file_errors(file, writing=False):
        file.open("rb").close()
    try:
        return dict(load(file).values)
    except ConfigError:
        return {}
