"""What a GPTQ checkpoint says about itself: `quantization_config` in any tool's spelling, settings of each module.

Needs no torch. Sources: transformers `GPTQConfig`, GPTQModel `QuantizeConfig`, vLLM `gptq_utils`, auto-round (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gptq_cli.checkpoint.source import QUANTIZE_CONFIG, Checkpoint, read_json
from gptq_cli.config.rules import first_match, flaw_of, keeps
from gptq_cli.errors import InputError
from gptq_cli.files import UNREADABLE, is_file

STORED_OFFSET = {"gptq": 1, "gptq_v2": 0}  # v1 files store zero - 1 and readers add it back
FORMATS = tuple(STORED_OFFSET)
BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class Settings:
    """How one module is stored; `group_size` -1 is one group a row."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """A `quantization_config` whose values are known to be of their types.

    `listed` is `modules_in_block_to_quantize` flattened, None where it is not said.
    """

    base: Settings
    format: str
    lm_head: bool
    dynamic: Mapping[str, Mapping[str, Any]]
    listed: tuple[str, ...] | None

    def settings(self, module: str) -> Settings:
        """The settings of a quantized module: the base, or what the first matching rule changes of it."""
        rule = first_match([rule for rule in self.dynamic if not keeps(rule)], module)
        changes = self.dynamic[rule] if rule else {}
        return Settings(**{name: changes.get(name, getattr(self.base, name)) for name in Settings.__slots__})

    def skip_rule(self, module: str) -> str | None:
        """The `-:` rule that says to leave `module` as it is."""
        return first_match([rule for rule in self.dynamic if keeps(rule)], module)

    def is_listed(self, module: str) -> bool:
        """Whether `modules_in_block_to_quantize`, where there is one, names the module, by a suffix as Optimum does."""
        return self.listed is None or module.endswith(self.listed)


def format_of(checkpoint: Checkpoint) -> str:
    """The version of the format, "gptq" or "gptq_v2"; InputError E_CKPT_QUANTIZED for what is not read here."""
    said = checkpoint.quantization or {}
    method = checkpoint.method or "gptq"
    format = said.get("checkpoint_format") or said.get("format") or "gptq"
    packing = said.get("pack_dtype", "int32")
    if method != "gptq" or format not in FORMATS or packing != "int32":
        what = f"{method} ({format}, {packing})" if method == "gptq" else method
        raise InputError(
            "E_CKPT_QUANTIZED",
            f"`{checkpoint.directory}` is quantized as {what}, which is not read here",
            hint="use a full-precision, gptq or gptq_v2 checkpoint",
        )
    return str(format)


def stored_config(checkpoint: Checkpoint) -> tuple[StoredConfig | None, list[str]]:
    """The configuration of a quantized checkpoint, None if it is not usable, and what is wrong with it.

    InputError E_CKPT_QUANTIZED as `format_of` says.
    """
    format = format_of(checkpoint)
    said = checkpoint.quantization or {}
    wrong = [*_wrong_values(said), *_wrong_rules(said), *_disagreements(checkpoint, said)]
    if said.get("quant_method", "gptq") != "gptq":
        wrong.append(f"quant_method is {said['quant_method']!r}: transformers knows only 'gptq' and would skip it")
    if any(said.get(key, format) != format for key in ("format", "checkpoint_format")):
        told = f"format is {said.get('format')!r} and checkpoint_format {said.get('checkpoint_format')!r}"
        wrong.append(f"{told}: readers take one or the other")
    if _wrong_values(said) or _wrong_rules(said):
        return None, wrong
    listed = said.get("modules_in_block_to_quantize")
    return StoredConfig(
        base=Settings(said["bits"], said["group_size"], said["sym"], said["desc_act"]),
        format=format,
        lm_head=bool(said.get("lm_head")),
        dynamic=said.get("dynamic") or {},
        listed=tuple(_flat(listed)) or None if listed is not None else None,
    ), wrong


def _wrong_values(said: Mapping[str, Any]) -> list[str]:
    accepted: dict[str, Callable[[Any], bool]] = {
        "bits": lambda value: type(value) is int and value in BITS,
        "group_size": lambda value: type(value) is int and (value == -1 or value > 0),
        "sym": lambda value: isinstance(value, bool),
        "desc_act": lambda value: isinstance(value, bool),
    }
    absent = [f"{key} is missing, and readers' defaults for it differ" for key in accepted if key not in said]
    overrides = (said.get("dynamic") or {}).items() if isinstance(said.get("dynamic"), dict) else ()
    places = [("", said), *((f"rule {rule!r}: ", values) for rule, values in overrides if isinstance(values, dict))]
    return absent + [
        f"{where}{key} is {values[key]!r}"
        for where, values in places
        for key, fits in accepted.items()
        if key in values and not fits(values[key])
    ]


def _wrong_rules(said: Mapping[str, Any]) -> list[str]:
    dynamic, listed = said.get("dynamic") or {}, said.get("modules_in_block_to_quantize") or []
    wrong = []
    if not isinstance(dynamic, dict) or not all(isinstance(values, dict | None) for values in dynamic.values()):
        wrong.append("dynamic is not a mapping from rules to settings")
    for rule in dynamic if isinstance(dynamic, dict) else ():
        if reason := flaw_of(rule):
            wrong.append(f"rule {rule!r} is not a regular expression: {reason}")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in _flat(listed)):
        wrong.append("modules_in_block_to_quantize is not a list of lists of names")
    return wrong


def _flat(listed: Iterable[Any]) -> list[Any]:
    return [name for item in listed for name in (item if isinstance(item, list) else [item])]


def _disagreements(checkpoint: Checkpoint, said: Mapping[str, Any]) -> list[str]:
    """Where config.json and quantize_config.json differ: some readers take the first, some the second."""
    file = checkpoint.directory / QUANTIZE_CONFIG
    try:
        other = read_json(file) if is_file(file) else said
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return [str(error)]
    if not isinstance(other, dict):
        return [f"{QUANTIZE_CONFIG} is not a JSON object"]
    keys = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "lm_head", "dynamic")
    return [
        f"{key} is {said[key]!r} in config.json and {other[key]!r} in {QUANTIZE_CONFIG}"
        for key in keys
        if key in said and key in other and said[key] != other[key]
    ]
