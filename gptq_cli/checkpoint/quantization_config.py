"""`quantization_config`: read in any tool's spelling, written in the words that every reader
understands. Needs no torch.

Sources: transformers `GPTQConfig`, GPTQModel `QuantizeConfig`, vLLM `AutoGPTQConfig` and
`gptq_utils`, auto-round, llama.cpp's converter (2026).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from gptq_cli.checkpoint.source import Checkpoint, read_json
from gptq_cli.config.layer import BITS, FORMATS, LayerConfig
from gptq_cli.config.rules import FUSED_ALIASES, expert_part, first_match, flaw_of, keeps
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.strict_yaml import load
from gptq_cli.errors import ConfigError, InputError
from gptq_cli.files import UNREADABLE, file_errors, is_file
from gptq_cli.storage.manifest import CONFIG_FILE, QUANTIZE_CONFIG

# "numbers": the weights that are decoded may not be those that were meant.
# "readers": they are, but some readers fail or take something else; only the owner of the checkpoint can decide.
# "form": likewise, but the meaning is plain, and `gptq convert` writes it as all readers take it.
Effect = Literal["numbers", "readers", "form"]


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing that is wrong with a checkpoint; `tensor` may be a module, None where a file or all is meant."""

    code: str
    message: str
    file: str | None = None
    tensor: str | None = None
    hint: str | None = None
    effect: Effect = "numbers"

    @property
    def place(self) -> str:
        return ": ".join(part for part in (self.file, self.tensor) if part)

    def __str__(self) -> str:
        return (
            f"{self.code} {self.place}: {self.message}"
            if self.place
            else f"{self.code} {self.message}"
        )


def convert_command(directory: Path, format: str) -> str:
    """The command that writes the checkpoint in `directory` anew, in the form that all readers take."""
    return f"gptq convert {quote(str(directory))} --to {format} -o OUT"


# Fields of this tool alone: they shape codes and scales, and no reader needs or knows them.
UNKNOWN_TO_READERS = {
    "signed_scales",
    "scale_search",
    "refine_sweeps",
    "asymmetric_calibration",
    "damp_mode",
}

STORED_OFFSET = {"gptq": 1, "gptq_v2": 0}  # v1 files store zero - 1 and readers add it back
# The tensors of a linear by which other ways to pack it are known, where there is no qweight.
OTHER_PACKINGS = {
    ("B", "s"): "Marlin",
    ("q_weight", "q_scale"): "EXL2",
    ("trellis",): "EXL3",
    ("weight_packed",): "compressed-tensors",
    ("weight", "absmax"): "bitsandbytes",
    ("W_q",): "HQQ",
}
AWQ_OUTPUTS = 8  # of 4 bits in a word
# Keys that make a reader of config.json refuse, or look for something that is not there.
UNPORTABLE = {
    "meta",
    "is_marlin_format",
    "autoround_version",
    "model_name_or_path",
    "model_file_base_name",
}


def describe(
    config: QuantizeConfig, quantized: Mapping[str, LayerConfig], kept: Iterable[str]
) -> dict[str, Any]:
    """Return the dict for config.json.

    `quantized` has the settings of linears by their full names; `kept` are full names of linears of
    the blocks.

    When a linear of a block is kept, both dialects say so: transformers reads `modules_in_block_to_quantize`, GPTQModel
    and SGLang read `dynamic`. Mixtures say it in `dynamic` alone: transformers 5 cannot load quantized experts at all,
    and the list would hold tens of thousands of names. No value is null, `desc_act` is true and `static_groups` false
    if any g_idx is not trivial, `format` and `checkpoint_format` agree: each of these was seen to break a reader.
    """
    kept = list(kept)
    ordered = not all(settings.has_trivial_g_idx for settings in quantized.values())
    described: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": ordered,
        "sym": config.sym,
        "checkpoint_format": config.format,
        "format": config.format,
        "lm_head": "lm_head" in quantized,
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups and not ordered,
        "act_group_aware": config.act_group_aware and not ordered,
        "damp_percent": config.damp_percent,
        "pack_dtype": "int32",
    }
    overrides = {
        rule: {key: value for key, value in values.items() if key not in UNKNOWN_TO_READERS}
        for rule, values in config.dynamic.items()
        if not keeps(rule)
    }
    mixtures = {part[0] for name in quantized if (part := expert_part(name))}
    # Engines ask for the settings of all experts of a layer by the name that these share.
    whole = {
        part[0]: None for name in kept if (part := expert_part(name)) and part[0] not in mixtures
    }
    if kept or overrides:
        described["dynamic"] = {rule: {} for rule in skip_rules([*kept, *whole])} | overrides
    if kept and not mixtures:
        described["modules_in_block_to_quantize"] = [list(quantized)]
    return described


def skip_rules(kept: Iterable[str]) -> list[str]:
    """Anchored `-:` rules that match exactly `kept` (and the fused names that stand for them), one a parent module."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in kept:
        parent, _, leaf = name.rpartition(".")
        leaves[parent].add(leaf)
    parents: dict[frozenset[str], list[str]] = defaultdict(list)
    for parent, names in leaves.items():
        parents[
            frozenset(names | {alias for parts, alias in FUSED_ALIASES.items() if parts <= names})
        ].append(parent)
    return [
        f"-:^({'|'.join(map(re.escape, where))})\\.({'|'.join(map(re.escape, sorted(names)))})$"
        for names, where in parents.items()
    ]


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
        return Settings(
            **{name: changes.get(name, getattr(self.base, name)) for name in Settings.__slots__}
        )

    def skip_rule(self, module: str) -> str | None:
        """The `-:` rule that says to leave `module` as it is."""
        return first_match([rule for rule in self.dynamic if keeps(rule)], module)

    def is_listed(self, module: str) -> bool:
        """Whether `modules_in_block_to_quantize`, where there is one, names the module, by a suffix as Optimum does."""
        return self.listed is None or module.endswith(self.listed)


def format_of(checkpoint: Checkpoint) -> str:
    """The version of the format, "gptq" or "gptq_v2"; InputError E_CKPT_QUANTIZED for what is not read here."""
    said = checkpoint.quantization or {}
    method, format = checkpoint.method or "gptq", said_format(said)
    packing = said.get("pack_dtype") or "int32"
    if method != "gptq" or format not in FORMATS or packing != "int32":
        what = f"{method} ({format}, {packing})" if method == "gptq" else method
        raise _not_read(checkpoint, f"is quantized as {what}")
    if other := other_packing(checkpoint):
        raise _not_read(
            checkpoint, f"calls itself {format}, but its linears are packed for {other}"
        )
    return str(format)


def said_format(said: Mapping[str, Any]) -> Any:
    """The format that most readers take from a `quantization_config`: that of the first tools had no name yet."""
    return said.get("checkpoint_format") or said.get("format") or "gptq"


def other_packing(checkpoint: Checkpoint) -> str | None:
    """What the linears of a checkpoint are packed for that calls itself gptq; None if for nothing else."""
    if (checkpoint.quantization or {}).get("is_marlin_format"):
        return "Marlin"
    parts = {name.rpartition(".")[2] for name in checkpoint.tensors}
    if "qweight" not in parts:
        return next((packing for own, packing in OTHER_PACKINGS.items() if set(own) <= parts), None)
    return "AWQ" if any(map(_is_awq, _pairs(checkpoint))) else None


def _pairs(checkpoint: Checkpoint) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of qweight and scales of each packed linear."""
    tensors = checkpoint.tensors
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name.removesuffix('.qweight')}.scales")
        if name.endswith(".qweight") and scales is not None:
            yield tensor.shape, scales.shape


def _is_awq(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    """AWQ packs eight outputs into a word [I, O / 8], GPTQ inputs [I * bits / 32, O]."""
    qweight, scales = shapes
    return len(qweight) == len(scales) == 2 and scales[1] == AWQ_OUTPUTS * qweight[1]


def _not_read(checkpoint: Checkpoint, what: str) -> InputError:
    hint = "use a full-precision, gptq or gptq_v2 checkpoint of the model"
    return InputError(
        "E_CKPT_QUANTIZED", f"`{checkpoint.directory}` {what}, which is not read here", hint=hint
    )


def stored_config(checkpoint: Checkpoint) -> tuple[StoredConfig | None, list[Defect]]:
    """The configuration of a quantized checkpoint, None if it is not usable, and what is wrong with it.

    InputError E_CKPT_QUANTIZED as `format_of` says.
    """
    format = format_of(checkpoint)
    said = checkpoint.quantization
    if said is None:
        message = f"neither config.json nor {QUANTIZE_CONFIG} says how the linears are packed"
        return None, [
            _wrong(message, f"put the {QUANTIZE_CONFIG} of the checkpoint beside its weights")
        ]
    if unusable := [*_wrong_values(said), *_wrong_rules(said)]:
        hint = f"correct it in config.json and {QUANTIZE_CONFIG}, as the tool that wrote the weights was told"
        return None, [_wrong(text, hint) for text in unusable]
    command = convert_command(checkpoint.directory, format)
    wrong = [
        _wrong(text, f"{command} writes what all readers take", "form")
        for text in _lenient(checkpoint, said)
    ]
    wrong += [_of_format(checkpoint, text, said) for text in _formats(checkpoint, said)]
    listed = said.get("modules_in_block_to_quantize")
    return StoredConfig(
        base=Settings(said["bits"], said["group_size"], said["sym"], said["desc_act"]),
        format=format,
        lm_head=bool(said.get("lm_head")),
        dynamic={rule: values or {} for rule, values in (said.get("dynamic") or {}).items()},
        listed=tuple(flat(listed)) or None if listed is not None else None,
    ), wrong


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of a quantization, neither for itself nor for a model inside it."""
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    for key, value in kept.items():
        if isinstance(value, dict) and "quantization_config" in value:
            kept[key] = without_quantization(value)
    return kept


def with_quantization(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `settings` as its only quantization, at the place of the old one."""
    return dict(config) | without_quantization(config) | {"quantization_config": dict(settings)}


def as_all_take_it(said: Mapping[str, Any], format: str, *, lm_head: bool) -> dict[str, Any]:
    """A usable `quantization_config` for config.json, in `format`, without what some reader stumbles over.

    Readers refuse null values, a flat list of modules, a damp_percent of 0, `meta`, and
    act_group_aware beside desc_act; `autoround_version` and the name of a file lead them astray.
    """
    found = {
        key: value for key, value in said.items() if value is not None and key not in UNPORTABLE
    }
    found |= {
        "quant_method": "gptq",
        "checkpoint_format": format,
        "format": format,
        "lm_head": lm_head,
    }
    if "dynamic" in found:
        found["dynamic"] = {rule: values or {} for rule, values in found["dynamic"].items()}
    listed = found.get("modules_in_block_to_quantize")
    if listed and not all(isinstance(item, list) for item in listed):
        found["modules_in_block_to_quantize"] = [flat(listed)]
    damp = found.get("damp_percent", 1)
    if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 < damp < 1:
        found.pop("damp_percent", None)
    if said["desc_act"]:
        found |= {"act_group_aware": False} if "act_group_aware" in found else {}
    return found


def _wrong(text: str, hint: str, effect: Effect = "numbers") -> Defect:
    return Defect("E_CKPT_CONFIG", text, "config.json", None, hint, effect)


def _lenient(checkpoint: Checkpoint, said: Mapping[str, Any]) -> list[str]:
    """What some readers take and others do not see."""
    found = []
    if "quantization_config" not in checkpoint.config:
        place = f"{QUANTIZE_CONFIG} alone"
        if "quantization_config" in checkpoint.text_config:
            place = "text_config"
        found.append(
            f"has no quantization_config, which stands in {place}: transformers would not see it"
        )
    elif checkpoint.text_config.get("quantization_config", said) != said:
        found.append("text_config has another quantization_config: readers take one or the other")
    if said.get("quant_method") != "gptq":
        told = (
            f"quant_method is {said['quant_method']!r}"
            if "quant_method" in said
            else "quant_method is missing"
        )
        found.append(f"{told}: transformers knows only 'gptq' and would skip it")
    return [*found, *_disagreements(checkpoint, said)]


def _formats(checkpoint: Checkpoint, said: Mapping[str, Any]) -> Iterator[str]:
    """Where one reader would take zero points for those of another format than the next one does."""
    format = said_format(said)
    if any(said.get(key, format) != format for key in ("format", "checkpoint_format")):
        told = f"format is {said.get('format')!r} and checkpoint_format {said.get('checkpoint_format')!r}"
        yield f"{told}: readers take one or the other"
    elif format != "gptq" and "checkpoint_format" not in said:
        yield f"checkpoint_format is missing, and llama.cpp would not take format {format!r} for it"
    other = _other_settings(checkpoint)
    if isinstance(other, dict) and (second := said_format(other)) != format:
        yield f"the format is {format!r} in config.json and {second!r} in {QUANTIZE_CONFIG}"


def _of_format(checkpoint: Checkpoint, text: str, said: Mapping[str, Any]) -> Defect:
    """Symmetric zero points tell themselves which format they are of; nothing tells for asymmetric ones."""
    overrides = [values for values in (said.get("dynamic") or {}).values() if values]
    if all(values.get("sym", True) for values in [said, *overrides]):
        hint = f"{convert_command(checkpoint.directory, 'gptq')} writes what all readers take"
        return _wrong(text, hint, "form")
    both = f"config.json and {QUANTIZE_CONFIG}"
    return _wrong(text, f"set checkpoint_format and format to the one that is meant in {both}")


def _wrong_values(said: Mapping[str, Any]) -> list[str]:
    accepted: dict[str, Callable[[Any], bool]] = {
        "bits": lambda value: type(value) is int and value in BITS,
        "group_size": lambda value: type(value) is int and (value == -1 or value > 0),
        "sym": lambda value: isinstance(value, bool),
        "desc_act": lambda value: isinstance(value, bool),
    }
    absent = [
        f"{key} is missing, and readers' defaults for it differ"
        for key in accepted
        if key not in said
    ]
    overrides = (said.get("dynamic") or {}).items() if isinstance(said.get("dynamic"), dict) else ()
    places = [
        ("", said),
        *((f"rule {rule!r}: ", values) for rule, values in overrides if isinstance(values, dict)),
    ]
    return absent + [
        f"{where}{key} is {values[key]!r}"
        for where, values in places
        for key, fits in accepted.items()
        if key in values and not fits(values[key])
    ]


def _wrong_rules(said: Mapping[str, Any]) -> list[str]:
    dynamic, listed = said.get("dynamic") or {}, said.get("modules_in_block_to_quantize") or []
    wrong = []
    if not isinstance(dynamic, dict) or not all(
        isinstance(values, dict | None) for values in dynamic.values()
    ):
        wrong.append("dynamic is not a mapping from rules to settings")
    for rule in dynamic if isinstance(dynamic, dict) else ():
        if reason := flaw_of(rule):
            wrong.append(f"rule {rule!r} is not a regular expression: {reason}")
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in flat(listed)):
        wrong.append("modules_in_block_to_quantize is not a list of lists of names")
    return wrong


def flat(listed: Iterable[Any]) -> list[Any]:
    """The names in `modules_in_block_to_quantize`, a list of lists or, by auto-round, of names."""
    return [name for item in listed for name in (item if isinstance(item, list) else [item])]


def _other_settings(checkpoint: Checkpoint) -> Any:
    """What quantize_config.json says, None if there is none; an InputError if it cannot be read."""
    file = checkpoint.directory / QUANTIZE_CONFIG
    try:
        return read_json(file) if is_file(file) else None
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return error


def _disagreements(checkpoint: Checkpoint, said: Mapping[str, Any]) -> list[str]:
    """Where config.json and quantize_config.json differ: some readers take the first, some the second."""
    other = _other_settings(checkpoint)
    if other is None:
        return []
    if not isinstance(other, dict):
        return [
            str(other)
            if isinstance(other, InputError)
            else f"{QUANTIZE_CONFIG} is not a JSON object"
        ]
    keys = ("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic")
    return [
        f"{key} is {said[key]!r} in config.json and {other[key]!r} in {QUANTIZE_CONFIG}"
        for key in keys
        if key in said and key in other and said[key] != other[key]
    ]


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
