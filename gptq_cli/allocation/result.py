"""The result of `gptq allocate`, and the configuration file that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_cli.allocation.harms import Harms
from gptq_cli.allocation.run import Entry, MeasuredModel, Place
from gptq_cli.allocation.saved import may_write_measurement
from gptq_cli.allocation.units import Unit
from gptq_cli.config.resolve import shortened_yaml
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import engine_data
from gptq_cli.errors import ConfigError, ExistsError, to_json
from gptq_cli.storage.durable import write_file

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class AllocateResult:
    """The harm of each unit of a model at each width, and the widths that meet the goal.

    A unit is a group of layers that get one width. `frontier` has the allocations of least harm in
    steps of average bits, `uniform` those of one width for all units, by width. Without a goal
    `chosen` is None. `output` is the configuration that was written, if one was.
    """

    measured: MeasuredModel
    frontier: tuple[Entry, ...]
    uniform: Mapping[int, Entry]
    chosen: Entry | None
    output: Path | None

    @property
    def config(self) -> QuantizeConfig | None:
        """The configuration that gives each unit its chosen width; None without a goal."""
        if self.chosen is None:
            return None
        return self.measured.configured(self.chosen.allocation.widths)

    @property
    def widths(self) -> dict[str, int]:
        """The chosen width of each unit by name, empty without a goal."""
        if self.chosen is None:
            return {}
        names = [unit.name for unit in self.measured.units]
        return dict(zip(names, self.chosen.allocation.widths, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        measured = self.measured
        chosen = None
        if self.chosen is not None:
            chosen = _entry_data(self.chosen) | {"widths": self.widths}
        return {
            "output": to_json(self.output),
            "model": measured.model,
            "fused_for": list(measured.fusing),
            "units": list(map(_unit_data, measured.units, measured.harms)),
            "frontier": list(map(_entry_data, self.frontier)),
            "uniform": {str(width): _entry_data(entry) for width, entry in self.uniform.items()},
            "chosen": chosen,
            "config": to_json(self.config),
            "probe_tokens": measured.probe_tokens,
            "seconds": measured.seconds,
            "already_measured": measured.already_done,
        }


def allocated_result(
    measured: MeasuredModel, goal: QuantizeConfig | None, output: Path | None
) -> AllocateResult:
    """Return the allocation for `goal`, None if there is none, and write it to `output`.

    Raises ConfigError E_ALLOC_GOAL if no choice of widths meets the goal.
    """
    chosen = None
    if goal is not None:
        chosen = measured.choose(goal)
    if output is not None and chosen is not None:
        _write(output, measured, chosen)
    return AllocateResult(measured, tuple(measured.frontier()), measured.uniform(), chosen, output)


def check_configuration(output: Path, *, overwrite: bool, has_goal: bool) -> Place:
    """Return the place of the measurement beside the configuration `output` that is to be written.

    Raises ConfigError E_ALLOC_GOAL without a goal and E_CFG_FILE for a file that is not YAML;
    ExistsError E_OUT_EXISTS or E_OUT_FOREIGN if a file would be replaced against the user's will.
    """
    if not has_goal:
        message = f"there is no goal, so `{output}` cannot have a width for each layer"
        hint = "add a goal: --bits 3.5, --target-size 4GB or --target-kl 0.02"
        raise ConfigError("E_ALLOC_GOAL", message, hint=hint)
    if output.suffix not in SUFFIXES:
        message = f"`{output}` must be a YAML file"
        raise ConfigError("E_CFG_FILE", message, hint=f"name it {output.with_suffix('.yaml')}")
    if output.exists() and not overwrite:
        raise ExistsError("E_OUT_EXISTS", f"`{output}` exists", hint="replace it: --overwrite")
    place = Place.beside(output)
    if place.result is not None:
        _check_measurement(place.result, overwrite=overwrite)
    return place


def _check_measurement(file: Path, *, overwrite: bool) -> None:
    """Refuse to write the measurement over a file that is none, whose name nobody has given."""
    if may_write_measurement(file):
        return
    code = "E_OUT_EXISTS"
    if overwrite:
        code = "E_OUT_FOREIGN"
    message = f"`{file}` would hold the measurement, but it exists and is no measurement of gptq"
    raise ExistsError(code, message, hint="choose another -o, or move this file")


def _write(output: Path, measured: MeasuredModel, chosen: Entry) -> None:
    """Write the configuration of the chosen widths."""
    allocation = chosen.allocation
    head = (
        f"# gptq allocate: {allocation.bits:.4g} bits on average, {allocation.nbytes} bytes,\n"
        f"# expected KL {allocation.kl:.3g}; gptq quantize MODEL --config {output.name} uses it\n"
    )
    config = measured.configured(allocation.widths)
    write_file(output, (head + shortened_yaml(config)).encode())


def _unit_data(unit: Unit, harms: Harms) -> dict[str, Any]:
    return {
        "name": unit.name,
        "block": unit.block,
        "layers": list(unit.layers),
        "weights": unit.n_weights,
        "bytes": _by_width(unit.nbytes),
        "harm": _by_width(harms),
    }


def _by_width(values: Mapping[int, Any]) -> dict[str, Any]:
    return {str(width): value for width, value in values.items()}


def _entry_data(entry: Entry) -> dict[str, Any]:
    return entry.to_json() | {"engines": engine_data(entry.engines)}
