"""What can be refused before torch is loaded: an output in the way, a checkpoint or a plan that cannot work."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, ExistsError
from gptq_cli.pipeline.plan import plan_run


def preflight(model: str, output: Path, config: QuantizeConfig, *, overwrite: bool) -> None:
    """Raise whatever output, headers and rules tell against a run; a Hub id is looked at after its download."""
    directory = Path(model).expanduser()
    check_output(output, directory, overwrite=overwrite)
    if directory.is_dir():
        plan_run(directory, config)


def check_output(output: Path, model: Path, *, overwrite: bool) -> None:
    """Refuse an output that holds something (ExistsError E_OUT_EXISTS) or is the model (ConfigError E_OUT_IS_INPUT)."""
    if model.is_dir() and output.resolve().is_relative_to(model.resolve()):
        raise ConfigError(
            "E_OUT_IS_INPUT", f"`{output}` is the model's own directory or inside it", hint="choose another -o"
        )
    if model.is_dir() and model.resolve().is_relative_to(output.resolve()):
        raise ConfigError("E_OUT_IS_INPUT", f"`{output}` contains the model", hint="choose another -o")
    occupied = output.exists() and not (output.is_dir() and not any(output.iterdir()))
    if occupied and not (overwrite and output.is_dir()):
        hint = "add --overwrite to replace it, or choose another -o" if output.is_dir() else "choose another -o"
        raise ExistsError("E_OUT_EXISTS", f"`{output}` exists and is not an empty directory", hint=hint)
