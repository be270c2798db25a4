"""`quantization_config`: read in the spelling of any tool, written so that every reader obeys it.

Sources: transformers `GPTQConfig`, GPTQModel `QuantizeConfig`, vLLM `AutoGPTQConfig` and
`gptq_utils`, auto-round, llama.cpp's converter (2026). Needs no torch.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gptq_cli.checkpoint.defects import Defect, Effect, convert_command
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import GPTQ, GPTQ_V2, Packing, stored_parts
from gptq_cli.checkpoint.model_files import read_json
from gptq_cli.checkpoint.source import Checkpoint, is_of_mlx
from gptq_cli.config.layer import (
    FORMATS,
    GPTQ_FORMATS,
    HEAD,
    HOLDS,
    RUNTIME_HEAD,
    LayerConfig,
    Linears,
    Settings,
    Stored,
    StoredConfig,
    expert_part,
    first_match,
    flaw_of,
    fused_groups,
    keeps,
    list_item,
    runtime_names,
)
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.strict_yaml import load
from gptq_cli.errors import ConfigError, InputError, cut, one_of
from gptq_cli.files import UNREADABLE, file_errors, is_file
from gptq_cli.storage.manifest import CONFIG_FILE, MANIFEST, QUANTIZE_CONFIG

DRAFT = "mtp"  # the name of blocks that predict more than one token
LISTED = "modules_in_block_to_quantize"
BOTH_FILES = f"config.json and {QUANTIZE_CONFIG}"
READABLE = f"use a full-precision checkpoint of the model, or one of {one_of(FORMATS)}"
# Linears packed in another way have no qweight, but tensors with these names.
OTHER_PACKINGS = {
    ("B", "s"): "Marlin",
    ("q_weight", "q_scale"): "EXL2",
    ("trellis",): "EXL3",
    ("weight_packed",): "compressed-tensors",
    ("weight", "absmax"): "bitsandbytes",
    ("W_q",): "HQQ",
}
AWQ_OUTPUTS = 8  # of 4 bits in a word

# Fields of this tool alone: they shape codes and scales, and no reader needs or knows them.
UNKNOWN_TO_READERS = {
    "signed_scales",
    "scale_search",
    "refine_sweeps",
    "asymmetric_calibration",
    "loss_aware",
    "damp_mode",
}
# Keys that make a reader of config.json fail, or look for a file that does not exist.
UNPORTABLE = {
    "meta",
    "is_marlin_format",
    "autoround_version",
    "model_name_or_path",
    "model_file_base_name",
}


# ---------------------------------------------------------------- write


def describe(
    config: QuantizeConfig,
    quantized: Mapping[str, LayerConfig],
    kept: Iterable[str],
    others: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the `quantization_config` of GPTQ for config.json.

    `quantized` has the settings of linears by their full names; `kept` are full names of linears of
    the blocks, and `others` those of tensors that are copied. If a linear of a block is kept, both
    dialects state it: transformers reads `modules_in_block_to_quantize`, GPTQModel and SGLang read
    `dynamic`. For mixtures of experts only `dynamic` does: transformers 5 cannot load quantized
    experts at all, and the list would hold tens of thousands of names.

    No value is null, `desc_act` is true and `static_groups` false if any g_idx is not trivial, and
    `format` and `checkpoint_format` agree: each of these was seen to break a reader.
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
        "lm_head": HEAD in quantized,
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups and not ordered,
        "act_group_aware": config.act_group_aware and not ordered,
        "damp_percent": config.damp_percent,
        "pack_dtype": "int32",
    }
    mixtures = _mixtures(quantized)
    # Engines look up the settings of all experts of a layer by the name that these share.
    skipped = kept + [name for name in _mixtures(kept) if name not in mixtures]
    rules = dict.fromkeys(
        [*skip_rules(skipped, quantized), *_rules_of_drafts(quantized, kept, others)]
    )
    dynamic = _rules(config, rules, quantized, kept)
    if dynamic:
        described["dynamic"] = dynamic
    if kept and not mixtures:
        described[LISTED] = [list(quantized)]
    return described


def _mixtures(names: Iterable[str]) -> list[str]:
    """Return the modules that hold the experts among `names`, each once, in order."""
    found: dict[str, None] = {}
    for name in names:
        part = expert_part(name)
        if part is not None:
            found[part[0]] = None
    return list(found)


def _rules(
    config: QuantizeConfig,
    skipping: Iterable[str],
    quantized: Mapping[str, LayerConfig],
    kept: Iterable[str],
) -> dict[str, dict[str, Any]]:
    """Return the rules `skipping`, those that engines need, then those that change settings.

    Engines ask about names that a user's rule may not match, or not mean.
    """
    changing: dict[str, dict[str, Any]] = {}
    for rule, values in config.dynamic.items():
        if not keeps(rule):
            known = {key: value for key, value in values.items() if key not in UNKNOWN_TO_READERS}
            changing[rule] = known
    found: dict[str, dict[str, Any]] = {rule: {} for rule in skipping}
    if changing:
        stored: dict[str, Stored | None] = dict.fromkeys(kept)
        for name, layer in quantized.items():
            stored[name] = Stored(layer.bits, layer.group_size, layer.sym)
        base = Stored(config.base.bits, config.base.group_size, config.base.sym)
        found |= _rules_by_name(misnamed(stored, base, changing))
    return found | changing


def _rules_by_name(right: Mapping[str, Stored]) -> dict[str, dict[str, Any]]:
    """Return rules that give names their settings, with one pattern for many names."""
    alike: dict[Stored, list[str]] = defaultdict(list)
    for name, settings in right.items():
        alike[settings].append(name)
    rules = {}
    for settings, names in alike.items():
        for pattern in _anchored(names):
            rules[f"+:{pattern}"] = settings._asdict()
    return rules


def misnamed(
    stored: Mapping[str, Stored | None], base: Stored, rules: Mapping[str, Mapping[str, Any]]
) -> dict[str, Stored]:
    """Return the names by which engines ask, and for which rules do not give what is stored.

    `stored` has the settings of linears, None for one that is kept. An engine asks for linears that
    it fuses by the fused name, for the experts of a layer by the name that they share, and with
    names of its own for the parts of some models. Where linears differ, there is no right answer.
    """
    found = {}
    for name, linears in _asked_names(stored).items():
        settings = {stored[linear] for linear in linears}
        right = settings.pop()
        if not settings and right is not None and right != _told(name, base, rules):
            found[name] = right
    return found


def _asked_names(linears: Iterable[str]) -> dict[str, list[str]]:
    """Return the linears that are meant by each name that an engine asks for beside their own."""
    single: list[str] = []
    asked: dict[str, list[str]] = {}
    for name in linears:
        part = expert_part(name)
        if part is None:
            single.append(name)
        else:
            asked.setdefault(part[0], []).append(name)
    asked |= fused_groups(single)
    found: dict[str, list[str]] = {}
    for name, parts in asked.items():
        for runtime in runtime_names(name):
            found[runtime] = parts
    for name in single:
        for runtime in runtime_names(name)[1:]:
            found[runtime] = [name]
            if HEAD in single:
                found[RUNTIME_HEAD] = [HEAD]
    return found


def _told(name: str, base: Stored, rules: Mapping[str, Mapping[str, Any]]) -> Stored | None:
    """Return the settings that rules give for a name, None if they keep it."""
    rule = first_match(rules, name)
    if rule is None:
        return base
    if keeps(rule):
        return None
    changes = {}
    for key, value in rules[rule].items():
        if key in Stored._fields:
            changes[key] = value
    return base._replace(**changes)


def skip_rules(kept: Iterable[str], quantized: Iterable[str] = ()) -> list[str]:
    """Return anchored `-:` rules that match exactly `kept` and the fused names of these linears.

    A group that engines fuse has a name only if none of its linears is `quantized`.
    """
    names = dict.fromkeys(kept)
    for alias, parts in fused_groups([*names, *quantized]).items():
        if names.keys() >= set(parts):
            names[alias] = None
    return [f"-:{pattern}" for pattern in _anchored(names)]


def _anchored(names: Iterable[str]) -> list[str]:
    """Return patterns that match exactly `names`, and those under which vLLM asks for them.

    Parent modules with the same such children share a pattern.
    """
    children: dict[str, set[str]] = defaultdict(set)
    for name in names:
        parent, _, child = name.rpartition(".")
        children[parent].add(child)
    parents: dict[frozenset[str], dict[str, None]] = defaultdict(dict)
    for parent, leaves in children.items():
        parents[frozenset(leaves)] |= dict.fromkeys(runtime_names(parent))
    patterns = []
    for alike, where in parents.items():
        patterns.append(f"^({_any_of(where)})\\.({_any_of(sorted(alike))})$")
    return patterns


def _rules_of_drafts(
    quantized: Iterable[str], kept: Iterable[str], others: Iterable[str]
) -> list[str]:
    """Return `-:` rules for blocks that draft further tokens, which are copied as they are.

    They are called mtp, or are numbered behind the blocks of the model. vLLM builds them without
    quantization if a rule with `mtp` keeps something, and SGLang asks rules for them.
    """
    blocks: dict[str, set[str]] = defaultdict(set)
    for name in (*quantized, *kept):
        if DRAFT in name:
            return []  # the name means something else here
        item = list_item(name)
        if item is not None:
            blocks[item.list_name].add(item.number)
    rules: dict[str, None] = {}
    for name in others:
        item = list_item(name)
        if DRAFT in name:
            rules[f"-:.*{DRAFT}.*"] = None
        elif item and item.list_name in blocks and item.number not in blocks[item.list_name]:
            where = _any_of(runtime_names(f"{item.list_name}.{item.number}"))
            rules[f"-:^({where})\\..*"] = None
    return list(rules)


def describe_linears(linears: Linears, format: str) -> dict[str, Any]:
    """Return the `quantization_config` of a GPTQ checkpoint in `format`, from its linears alone.

    Exact rules state what differs from the settings of most linears.
    """
    base, others = linears.usual()
    rules = _exact_rules(others)
    given = {"bits": base.bits, "group_size": base.group_size, "sym": base.sym, "dynamic": rules}
    config = QuantizeConfig.model_validate({"preset": "gptq", "format": format, **given})
    quantized = {}
    for name, settings in linears.quantized.items():
        quantized[name] = LayerConfig(
            settings.bits, settings.group_size, settings.sym, desc_act=settings.desc_act
        )
    kept = linears.kept_in_blocks()
    outside = [name for name in linears.kept if name not in set(kept)]
    return describe(config, quantized, kept, outside)


def _exact_rules(linears: Mapping[str, Settings]) -> dict[str, dict[str, Any]]:
    """Return `+:` rules that give exactly these linears their settings."""
    by_settings: dict[Settings, list[str]] = defaultdict(list)
    for name, settings in linears.items():
        by_settings[settings].append(name)
    rules: dict[str, dict[str, Any]] = {}
    for settings, names in by_settings.items():
        values = {"bits": settings.bits, "group_size": settings.group_size, "sym": settings.sym}
        for pattern in _anchored(names):
            rules[f"+:{pattern}"] = values
    return rules


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names))


def with_quantization(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with `settings` as its only quantization, at the place of the old one.

    `settings` are one or several keys of config.json.
    """
    plain = without_quantization(config)
    kept = {key: value for key, value in config.items() if key in plain or key in settings}
    return kept | plain | dict(settings)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json without the quantization of the model and of models inside it."""
    kept = {}
    for key, value in config.items():
        if isinstance(value, dict) and "quantization_config" in value:
            kept[key] = without_quantization(value)
        elif key != "quantization_config" and not is_of_mlx(key, value):
            kept[key] = value
    return kept


def portable_settings(stored: Mapping[str, Any], format: str, *, lm_head: bool) -> dict[str, Any]:
    """Return a usable `quantization_config` in `format`, without anything that breaks a reader.

    Readers fail on null values, a flat list of modules, a damp_percent of 0, `meta`, and
    act_group_aware beside desc_act; `autoround_version` and the name of a file mislead them.
    """
    found = _portable_values(stored) | {
        "quant_method": "gptq",
        "checkpoint_format": format,
        "format": format,
        "lm_head": lm_head,
    }
    if "dynamic" in found:
        found["dynamic"] = _without_nulls(found["dynamic"])
    listed = found.get(LISTED) or []
    if not all(isinstance(item, list) for item in listed):
        found[LISTED] = [flat(listed)]
    if not _is_damp_percent(found.get("damp_percent", 1)):
        found.pop("damp_percent", None)
    if stored["desc_act"] and "act_group_aware" in found:
        found["act_group_aware"] = False
    return found


def _portable_values(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in stored.items() if value is not None and key not in UNPORTABLE
    }


def _without_nulls(dynamic: Mapping[str, Any]) -> dict[str, Any]:
    """Return rules with an empty mapping for each that has no settings."""
    return {rule: values or {} for rule, values in dynamic.items()}


def _is_damp_percent(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


# ---------------------------------------------------------------- read


def stored_config(checkpoint: Checkpoint) -> tuple[StoredConfig | None, list[Defect]]:
    """Return the configuration of a quantized checkpoint, None if it is unusable, and its defects.

    InputError E_CKPT_QUANTIZED as in `format_of`.
    """
    format = format_of(checkpoint)
    dialect = dialect_of(format)
    if dialect is not None:
        return dialect.stored_config(checkpoint.quantization or {}, checkpoint.tensors)
    stored = checkpoint.quantization
    if stored is None:
        message = f"neither config.json nor {QUANTIZE_CONFIG} describes how the linears are packed"
        hint = f"put the {QUANTIZE_CONFIG} of the checkpoint beside its weights"
        return None, [_config_defect(message, hint)]
    unusable = [*_wrong_values(stored), *_wrong_rules(stored), *_wrong_list(stored)]
    if unusable:
        hint = f"correct it in {BOTH_FILES}, as it was set in the tool that wrote the weights"
        return None, [_config_defect(message, hint) for message in unusable]
    config = StoredConfig(
        base=Settings(stored["bits"], stored["group_size"], stored["sym"], stored["desc_act"]),
        format=format,
        lm_head=bool(stored.get("lm_head")),
        dynamic=_without_nulls(stored.get("dynamic") or {}),
        listed=tuple(flat(stored.get(LISTED) or [])) or None,
    )
    return config, _defects_of_form(checkpoint, stored, format)


class Dialect(Protocol):
    """The module of a format other than those of GPTQ.

    `stored` is a `quantization_config`, `tensors` are those of the checkpoint.
    """

    def unreadable(self, stored: Mapping[str, Any]) -> str:
        """Return what cannot be read of a quantization so described, "" if all can."""

    def packing_for(self, *, sym: bool) -> Packing:
        """Return how linears are written; `sym` tells whether all of them are symmetric."""

    def packing_of(self, stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Packing:
        """Return how the linears of a readable checkpoint so described are stored."""

    def stored_config(
        self, stored: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
    ) -> tuple[StoredConfig | None, list[Defect]]:
        """Return the configuration of a readable checkpoint, None if unusable, and its defects."""

    def describe(self, linears: Linears) -> dict[str, Any]:
        """Return the entries of config.json for a checkpoint of these linears."""


def dialect_of(format: str | None) -> Dialect | None:
    """Return the module of a format; None for those of GPTQ, and for a name of no format."""
    if format == "compressed-tensors":
        from gptq_cli.checkpoint import compressed_tensors

        return compressed_tensors
    if format == "mlx":
        from gptq_cli.checkpoint import mlx

        return mlx
    if format == "auto-round":
        from gptq_cli.checkpoint import auto_round

        return auto_round
    return None


def packing_for(format: str, *, sym: bool) -> Packing:
    """Return how `format` stores linears; `sym` tells whether all of them are symmetric."""
    dialect = dialect_of(format)
    if dialect is None:
        return {"gptq": GPTQ, "gptq_v2": GPTQ_V2}[format]
    return dialect.packing_for(sym=sym)


def packing_of(checkpoint: Checkpoint) -> Packing:
    """Return how the checkpoint stores its quantized linears, that of `gptq` if it is plain.

    InputError E_CKPT_QUANTIZED as in `format_of`.
    """
    if not checkpoint.is_packed:
        return GPTQ
    format = format_of(checkpoint)
    dialect = dialect_of(format)
    if dialect is None:
        return packing_for(format, sym=True)
    return dialect.packing_of(checkpoint.quantization or {}, checkpoint.tensors)


def format_of(checkpoint: Checkpoint) -> str:
    """Return the format, one of FORMATS.

    InputError E_CKPT_QUANTIZED if the checkpoint is quantized in a way that cannot be read.
    """
    dialect = dialect_of(checkpoint.method)
    if dialect is not None:
        return _other_format(checkpoint, dialect)
    stored = checkpoint.quantization or {}
    method, format = checkpoint.method or "gptq", declared_format(stored)
    packing = stored.get("pack_dtype") or "int32"
    if method != "gptq":
        raise _not_read(checkpoint, f"is quantized as {method}")
    if format not in GPTQ_FORMATS or packing != "int32":
        named = f"{cut(str(format))}, {cut(str(packing))}"
        raise _not_read(checkpoint, f"is quantized as gptq ({named})")
    other = other_packing(checkpoint)
    if other:
        raise _not_read(checkpoint, f"has format {format}, but its linears are packed for {other}")
    return str(format)


def _other_format(checkpoint: Checkpoint, dialect: Dialect) -> str:
    """Return the format of a checkpoint that is not of GPTQ's own formats."""
    format = str(checkpoint.method)
    unreadable = dialect.unreadable(checkpoint.quantization or {})
    if unreadable:
        raise _not_read(checkpoint, f"is quantized as {format} ({unreadable})")
    return format


def _not_read(checkpoint: Checkpoint, reason: str) -> InputError:
    message = f"`{checkpoint.directory}` {reason}, which is not read here"
    return InputError("E_CKPT_QUANTIZED", message, hint=READABLE)


def declared_format(stored: Mapping[str, Any]) -> Any:
    """Return the format that most readers take from a `quantization_config`.

    The format of the first tools had no name yet.
    """
    return stored.get("checkpoint_format") or stored.get("format") or "gptq"


def other_packing(checkpoint: Checkpoint) -> str | None:
    """Return the kernel or tool that linears are packed for if it is not GPTQ, else None."""
    if (checkpoint.quantization or {}).get("is_marlin_format"):
        return "Marlin"
    parts = set()
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        parts.add(part)
        if part == "qweight" and _is_awq(stored_parts(module, checkpoint.tensors)):
            return "AWQ"
    if "qweight" in parts:
        return None
    for names, packing in OTHER_PACKINGS.items():
        if parts.issuperset(names):
            return packing
    return None


def _is_awq(parts: Mapping[str, TensorInfo]) -> bool:
    """Return whether a linear has the codes of AWQ, which packs eight outputs into a word.

    Its qweight is [I, O / 8]; that of GPTQ is [I * bits / 32, O].
    """
    if "scales" not in parts:
        return False
    codes, scales = parts["qweight"].shape, parts["scales"].shape
    return len(codes) == len(scales) == 2 and scales[1] == AWQ_OUTPUTS * codes[1]


def flat(listed: Iterable[Any]) -> list[Any]:
    """Return the names in `modules_in_block_to_quantize`.

    It is a list of lists or, as auto-round writes it, of names.
    """
    names: list[Any] = []
    for item in listed:
        names += item if isinstance(item, list) else [item]
    return names


def recorded_settings(directory: Path) -> dict[str, Any]:
    """Return the content of gptq_config.yaml in `directory`; {} if there is no valid one.

    InputError E_FILE if the file cannot be read.
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


def recorded_notes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the notes of quantization tools about the origin of a checkpoint; {} if it has none.

    They stand in quantize_config.json, which engines do not read, in the settings, or in the
    manifest if the format has no such file. InputError E_FILE if a file cannot be read.
    """
    directory = checkpoint.directory
    places = [valid_json(directory / QUANTIZE_CONFIG), checkpoint.quantization]
    for content in (*places, valid_json(directory / MANIFEST)):
        if isinstance(content, dict) and isinstance(content.get("meta"), dict):
            return dict(content["meta"])
    return {}


def valid_json(file: Path) -> Any:
    """Return the JSON in a file; None if there is none, or a damaged one, which `verify` shows."""
    if not is_file(file):
        return None
    try:
        return read_json(file)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return None


# ---------------------------------------------------------------- defects


def _config_defect(message: str, hint: str, effect: Effect = "numbers") -> Defect:
    return Defect("E_CKPT_CONFIG", message, "config.json", None, hint, effect)


def _defects_of_form(
    checkpoint: Checkpoint, stored: Mapping[str, Any], format: str
) -> list[Defect]:
    """Return defects of usable settings that some readers do not see, or see otherwise."""
    defects = []
    for message in [*_unseen_settings(checkpoint, stored), *_disagreements(checkpoint, stored)]:
        defects.append(_defect_of_form(checkpoint, message, format))
    for message in _ambiguous_formats(checkpoint, stored):
        defects.append(_format_defect(checkpoint, message, stored))
    return defects


def _defect_of_form(checkpoint: Checkpoint, message: str, format: str) -> Defect:
    hint = f"{convert_command(checkpoint.directory, format)} writes a form that all readers accept"
    return _config_defect(message, hint, "form")


def _format_defect(checkpoint: Checkpoint, message: str, stored: Mapping[str, Any]) -> Defect:
    """Return the defect of an ambiguous format.

    Symmetric zero points show which format they are in, but asymmetric ones do not.
    """
    dynamic = stored.get("dynamic") or {}
    for values in [stored, *dynamic.values()]:
        if values and not values.get("sym", True):
            hint = f"set checkpoint_format and format to the one that is meant in {BOTH_FILES}"
            return _config_defect(message, hint)
    return _defect_of_form(checkpoint, message, "gptq")


def _is_bits(value: object) -> bool:
    return type(value) is int and value in HOLDS["gptq"].bits


def _is_group_size(value: object) -> bool:
    return type(value) is int and (value == -1 or value > 0)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


_ACCEPTS = {"bits": _is_bits, "group_size": _is_group_size, "sym": _is_flag, "desc_act": _is_flag}


def _wrong_values(stored: Mapping[str, Any]) -> list[str]:
    """Return errors in the settings of modules: missing keys, and values out of range."""
    wrong = []
    for key in _ACCEPTS:
        if key not in stored:
            wrong.append(f"{key} is missing, and readers' defaults for it differ")
    wrong += _values_out_of_range("", stored)
    dynamic = stored.get("dynamic")
    if isinstance(dynamic, dict):
        for rule, values in dynamic.items():
            if isinstance(values, dict):
                wrong += _values_out_of_range(f"rule {rule!r}: ", values)
    return wrong


def _values_out_of_range(where: str, values: Mapping[str, Any]) -> list[str]:
    wrong = []
    for key, accepts in _ACCEPTS.items():
        if key in values and not accepts(values[key]):
            wrong.append(f"{where}{key} is {values[key]!r}")
    return wrong


def _wrong_rules(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors in `dynamic`."""
    dynamic = stored.get("dynamic") or {}
    rules = dynamic if isinstance(dynamic, dict) else {}
    if rules is not dynamic or not all(isinstance(item, dict | None) for item in rules.values()):
        yield "dynamic is not a mapping from rules to settings"
    for rule in rules:
        reason = flaw_of(rule)
        if reason:
            yield f"rule {rule!r} is not a regular expression: {reason}"


def _wrong_list(stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield errors in `modules_in_block_to_quantize`."""
    listed = stored.get(LISTED) or []
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in flat(listed)):
        yield f"{LISTED} is not a list of lists of names"


def _unseen_settings(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield settings that some readers do not see."""
    if "quantization_config" not in checkpoint.config:
        place = f"{QUANTIZE_CONFIG} alone"
        if "quantization_config" in checkpoint.text_config:
            place = "text_config"
        yield f"has no quantization_config, which stands in {place}: transformers would not see it"
    elif checkpoint.text_config.get("quantization_config", stored) != stored:
        yield "text_config has another quantization_config: readers take one or the other"
    if stored.get("quant_method") != "gptq":
        method = "quant_method is missing"
        if "quant_method" in stored:
            method = f"quant_method is {cut(repr(stored['quant_method']))}"
        yield f"{method}: transformers knows only 'gptq' and would skip it"


def _disagreements(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> list[str]:
    """Return differences of config.json and quantize_config.json; each reader reads one of them."""
    other = _other_settings(checkpoint)
    if other is None:
        return []
    if isinstance(other, InputError):
        return [str(other)]
    if not isinstance(other, dict):
        return [f"{QUANTIZE_CONFIG} is not a JSON object"]
    found = []
    for key in ("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic"):
        if key in stored and key in other and stored[key] != other[key]:
            values = f"{stored[key]!r} in config.json and {other[key]!r} in {QUANTIZE_CONFIG}"
            found.append(f"{key} is {values}")
    return found


def _ambiguous_formats(checkpoint: Checkpoint, stored: Mapping[str, Any]) -> Iterator[str]:
    """Yield formats that make readers decode zero points in different ways."""
    format = declared_format(stored)
    first, second = stored.get("format", format), stored.get("checkpoint_format", format)
    if first != format or second != format:
        first, second = stored.get("format"), stored.get("checkpoint_format")
        yield f"format is {first!r} and checkpoint_format {second!r}: readers take one or the other"
    elif format != "gptq" and "checkpoint_format" not in stored:
        yield f"checkpoint_format is missing, and llama.cpp would not take format {format!r} for it"
    other = _other_settings(checkpoint)
    if isinstance(other, dict):
        second = declared_format(other)
        if second != format:
            yield f"the format is {format!r} in config.json and {second!r} in {QUANTIZE_CONFIG}"


def _other_settings(checkpoint: Checkpoint) -> Any:
    """Return the content of quantize_config.json, None without that file, or its InputError."""
    file = checkpoint.directory / QUANTIZE_CONFIG
    if not is_file(file):
        return None
    try:
        return read_json(file)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return error
