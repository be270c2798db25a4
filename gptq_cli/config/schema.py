"""The configuration of a run: every field with its type, default, accepted values and meaning.

Names, meanings and defaults are those of Optimum's GPTQQuantizer; `dynamic` is GPTQModel's. A
resolved configuration is valid input again and gives an equal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gptq_cli.config.corpora import ACCEPTED_TEXT, DEFAULT_DATASET
from gptq_cli.config.fields import (
    AUTO,
    STRICT,
    Accepts,
    AverageBits,
    Count,
    Damping,
    DampPercent,
    Divergence,
    Experts,
    Fault,
    Flag,
    FollowStrength,
    GroupSizeOrAuto,
    LayerOverrides,
    Name,
    Option,
    Panel,
    Pattern,
    PresetName,
    Rule,
    Search,
    Size,
    Sweeps,
    Target,
    Text,
    Unfit,
    Widths,
    findings_of,
    refusal,
    size_in_bytes,
)
from gptq_cli.config.layer import (
    BITS,
    DEFAULT_PRESET,
    FORMATS,
    HOLDS,
    PRESETS,
    FaultPolicy,
    Format,
    LayerChoice,
    LayerConfig,
    first_match,
    formats_for,
    is_listed,
    keeps,
    misfits,
    pattern_of,
    preset_advice,
)
from gptq_cli.config.serving import TARGETS
from gptq_cli.errors import ConfigError, Finding, KeyPath, one_of

Backend = Literal["auto", "torch", "triton"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


class QuantizeConfig(BaseModel):
    """All settings of a run, resolved: fields that are not given are derived from those that are.

    Raises ConfigError with every problem at once.

    >>> from gptq_cli import QuantizeConfig
    >>> config = QuantizeConfig(bits=4, sym=False, dynamic={"-:.*down_proj": {}})
    >>> config.group_size, config.format, config.preset
    (128, 'gptq_v2', 'balanced')
    >>> QuantizeConfig(bits=4, lm_head=1, group_sise=64)
    Traceback (most recent call last):
        ...
    gptq_cli.errors.ConfigError: lm_head must be true or false, got 1; group_sise is not a known key
    """

    model_config = STRICT

    bits: Annotated[AverageBits, Option(Panel.ALGORITHM, ("--bits", "-b"), metavar="2..8|3.5")] = (
        Field(
            default=4,
            description="bits per weight; an average gives each layer a width that suits it",
        )
    )
    group_size: Annotated[
        GroupSizeOrAuto,
        Option(
            Panel.ALGORITHM,
            ("--group-size", "-g"),
            metavar="N|auto",
            note=", -1 for one group a row",
        ),
    ] = Field(
        default=128,
        description="input columns that share one scale; auto: the largest of 128, 64, 32 that "
        "fits all layers",
    )
    sym: Annotated[Flag, Option(Panel.SWITCHES, ("--sym/--asym",))] = Field(
        default=True, description="symmetric grid; an asymmetric one stores a zero point per group"
    )
    desc_act: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="quantize columns in order of falling activation, groups follow (g_idx)",
    )
    act_group_aware: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=True, description="activation order that keeps groups whole (GAR)"
    )
    static_groups: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="fix all scales first; columns in activation order, trivial g_idx",
    )
    true_sequential: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=True, description="layers of a block see inputs of already quantized layers"
    )
    limit_massive_tokens: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="count a token for the Hessian at most as 16 median tokens of its batch",
    )
    signed_scales: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="allow negative scales, so that the larger weight's side has the extra level",
    )
    scale_search: Annotated[Search, Option(Panel.ALGORITHM, metavar="HOW", note=", or none")] = (
        Field(
            default="none",
            description="shrink the scale of each group to the least sum of |error|^2.4 (mse)",
        )
    )
    refine_sweeps: Annotated[Sweeps, Option(Panel.ALGORITHM)] = Field(
        default=0, description="rounds of fitting scales and codes after a layer is solved"
    )
    asymmetric_calibration: Annotated[
        FollowStrength, Option(Panel.ALGORITHM, metavar="0..1|auto")
    ] = Field(
        default=0.0,
        description="strength, 0 to 1, of correcting weights for the errors of earlier layers; "
        "auto: as much as both halves of the text support; above 0 each block runs twice",
    )
    loss_aware: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="round layers with the gradients of the model's loss at their outputs, from a "
        "pass before the first block",
    )
    damp_mode: Annotated[Damping, Option(Panel.ALGORITHM)] = Field(
        default="mean",
        description="damp all columns alike (mean), or each in proportion to its own energy "
        "(diagonal), and more if tokens are few",
    )
    damp_percent: Annotated[DampPercent, Option(Panel.ALGORITHM)] = Field(
        default=0.1,
        description="damping as a fraction of the Hessian's mean diagonal; with damp_mode "
        "diagonal, the minimum fraction",
    )
    modules_in_block_to_quantize: Annotated[
        list[Annotated[list[Text], Field(min_length=1)]] | None,
        Field(min_length=1),
        Accepts("a list of lists of module names, like [[self_attn.q_proj], [mlp.down_proj]]"),
    ] = Field(default=None, description="the only linears of a block to quantize")
    dynamic: Annotated[
        dict[Rule, LayerOverrides],
        Accepts("a mapping from `+:regex` or `-:regex` to a mapping of settings"),
        Option(
            Panel.LAYERS,
            metavar="RULE",
            note=": '-:regex' keeps, '+:regex={bits: 8}' changes; repeatable",
        ),
    ] = Field(default={}, description="rules for single layers")
    unfit: Annotated[Unfit, Option(Panel.LAYERS)] = Field(
        default="error",
        description="if a layer cannot be packed: stop, or keep it and quantize the others",
    )
    target_size: Annotated[
        Size | None,
        Accepts("a size such as 4GB, a number of bytes, or null"),
        Option(Panel.ALLOCATION, metavar="SIZE"),
    ] = Field(
        default=None,
        description="largest size of all safetensors files; each layer gets a width that suits it",
    )
    target_kl: Annotated[Divergence, Option(Panel.ALLOCATION, metavar="NATS")] = Field(
        default=None,
        description="write the smallest output with a lower expected KL to the original, in nats",
    )
    allow_bits: Annotated[Widths, Option(Panel.ALLOCATION, metavar="2,3,4,8")] = Field(
        default=None,
        description="widths that layers may get; null: all that format and target take",
    )
    protect: Annotated[Pattern, Option(Panel.ALLOCATION, metavar="REGEX")] = Field(
        default=None, description="layers that get the widest of these widths"
    )
    lm_head: Annotated[Flag, Option(Panel.LAYERS)] = Field(
        default=False, description="quantize the output head too"
    )
    lora: Annotated[
        str | list[Text] | None,
        Field(min_length=1),
        Accepts("the directory of an adapter, a list of these, none, or null"),
        Option(Panel.LAYERS, metavar="DIR", note="; repeatable, with a scale: DIR:0.8"),
    ] = Field(
        default=None,
        description="LoRA adapter of peft that is merged into the model while it is read; none: "
        "leave out one that lies beside the model",
    )
    allow_requantize: Annotated[Flag, Option(Panel.LAYERS, ("--allow-requantize",))] = Field(
        default=False,
        description="take a quantized checkpoint as the source, round its weights a second time",
    )
    target: Annotated[
        Target, Option(Panel.LAYERS, metavar="ENGINE", note=f": {', '.join(TARGETS)}")
    ] = Field(
        default=None,
        description="engine that must load the result; if it cannot, the run is refused at once",
    )
    moe_uncovered: Annotated[Experts, Option(Panel.LAYERS)] = Field(
        default="error",
        description="if an expert has no calibration tokens: stop, round it to nearest, or "
        "calibrate it on all tokens",
    )
    on_numeric_fault: Annotated[Fault, Option(Panel.LAYERS)] = Field(
        default="error",
        description="if the inputs of a layer are not finite or its Hessian has no factor: stop, "
        "or round it to nearest",
    )
    max_fallbacks: Annotated[
        int | None,
        Field(ge=0),
        Accepts("a whole number of 0 or more, or null"),
        Option(Panel.LAYERS, metavar="N"),
    ] = Field(
        default=None,
        description="stop if more layers than this had to be rounded to nearest; null: never",
    )
    dataset: Annotated[
        str | list[str] | None,
        Field(min_length=1),
        Accepts("a dataset name, a path, or a list of these"),
        Option(Panel.TEXT, note="; repeatable, with shares: a.jsonl:0.7 b.txt:0.3"),
    ] = Field(
        default=None,
        description=f"calibration text: {ACCEPTED_TEXT}; null: {DEFAULT_DATASET}",
    )
    dataset_config: Annotated[Name, Option(Panel.TEXT)] = Field(
        default=None, description="configuration of a Hub dataset"
    )
    dataset_split: Annotated[Name, Option(Panel.TEXT)] = Field(
        default=None, description="split of a Hub dataset"
    )
    text_column: Annotated[
        str | list[Text] | None,
        Field(min_length=1),
        Accepts("the name of a column, a list of names, or null"),
        Option(Panel.TEXT, note="; repeatable"),
    ] = Field(
        default=None,
        description="column that holds text or chats, or several columns of text, which are "
        "joined; null: a column `text`, or else the chats or the only text that the rows show",
    )
    chat_template: Annotated[
        Text | None, Accepts("a path or null"), Option(Panel.TEXT, metavar="FILE")
    ] = Field(
        default=None,
        description="Jinja file that makes text of chats; null: the model's own template",
    )
    pack: Annotated[Flag, Option(Panel.TEXT)] = Field(
        default=True,
        description="fill each window with one document after the other; otherwise a window holds "
        "one chat or document, up to seqlen tokens, without padding",
    )
    seqlen: Annotated[Count, Option(Panel.TEXT)] = Field(
        default=2048, description="tokens per window, at most the model's positions"
    )
    nsamples: Annotated[Count, Option(Panel.TEXT)] = Field(
        default=128, description="calibration windows"
    )
    batch_size: Annotated[Count, Option(Panel.TEXT)] = Field(
        default=8, description="windows per forward pass"
    )
    seed: Annotated[
        int, Field(ge=0, lt=2**63), Accepts("a whole number of 0 or more"), Option(Panel.TEXT)
    ] = Field(default=0, description="chooses the calibration windows")
    format: Annotated[Format, Accepts(one_of(FORMATS)), Option(Panel.OUTPUT)] = Field(
        default="gptq", description="checkpoint format"
    )
    max_shard_size: Annotated[Size, Option(Panel.OUTPUT, metavar="SIZE")] = Field(
        default="5GB", description="largest safetensors file written"
    )
    max_vram: Annotated[
        Size | None,
        Accepts("a size such as 24GB, a number of bytes, or null"),
        Option(Panel.RUN, metavar="SIZE"),
    ] = Field(default=None, description="device memory that may be used; null: all that is free")
    max_ram: Annotated[
        Size | None,
        Accepts("a size such as 64GB, a number of bytes, or null"),
        Option(Panel.RUN, metavar="SIZE"),
    ] = Field(default=None, description="host memory that may be used; null: all that is free")
    backend: Annotated[
        Backend | None, Accepts(one_of([*get_args(Backend), "null"])), Option(Panel.RUN)
    ] = Field(
        default=None,
        description="what decodes quantized linears when evaluating; auto or null: triton on a GPU "
        "that runs it, else torch",
    )
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$"),
        Accepts("auto, cpu, cuda or cuda:N"),
        Option(Panel.RUN, metavar="auto|cpu|cuda:N"),
    ] = Field(default="auto", description="device that does the work")
    dtype: Annotated[Dtype, Accepts(one_of(get_args(Dtype))), Option(Panel.RUN)] = Field(
        default="auto", description="dtype of the forward passes"
    )
    trust_remote_code: Annotated[Flag, Option(Panel.RUN, ("--trust-remote-code",))] = Field(
        default=False, description="run Python code that comes with the model"
    )
    preset: Annotated[
        PresetName, Option(Panel.ALGORITHM, metavar="NAME", note=f": {preset_advice()}")
    ] = Field(default=DEFAULT_PRESET, description="starting point for fields that are not given")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            return fill(values)[0]
        return values

    @model_validator(mode="after")
    def _agree(self) -> QuantizeConfig:
        for finding in conflicts(self.__dict__):
            raise PydanticCustomError("conflict", "{message}", {"message": finding.message()})
        return self

    @model_validator(mode="wrap")  # the last one, which sees what all others raise
    @classmethod
    def _refuse(
        cls, values: Any, handler: ModelWrapValidatorHandler[QuantizeConfig]
    ) -> QuantizeConfig:
        """Turn every error of pydantic into a ConfigError in plain words."""
        try:
            return handler(values)
        except ValidationError as error:
            findings = findings_of(error, values, cls) or conflicts(fill(values)[0])
            raise refusal(findings, cls) from error

    @property
    def max_shard_bytes(self) -> int:
        """The largest size of one safetensors file, in bytes."""
        return size_in_bytes(self.max_shard_size)

    @property
    def max_vram_bytes(self) -> int | None:
        """The device memory that may be used, in bytes; None means all that is free."""
        return _bytes_or_none(self.max_vram)

    @property
    def max_ram_bytes(self) -> int | None:
        """The host memory that may be used, in bytes; None means all that is free."""
        return _bytes_or_none(self.max_ram)

    @property
    def allocates(self) -> bool:
        """True if layers get widths by the harm that each does, as `gptq_cli.allocation` does."""
        return _allocates(self.__dict__)

    @property
    def fault_policy(self) -> FaultPolicy:
        """The treatment of layers that cannot be calibrated."""
        return FaultPolicy(self.on_numeric_fault, self.moe_uncovered)

    @property
    def base(self) -> LayerConfig:
        """The settings of a layer that no `dynamic` rule matches."""
        settings = {name: getattr(self, name) for name in LayerConfig.__slots__}
        if self.group_size == AUTO:  # until the shapes of a model tell
            settings["group_size"] = _default("group_size")
        return LayerConfig(**settings)

    def choose(self, name: str) -> LayerChoice:
        """Return the settings of the layer with the full module name `name`, and the reason."""
        rule = first_match(self.dynamic, name)
        if rule is None:
            return LayerChoice(self.base, "default")
        if keeps(rule):
            return LayerChoice(None, f"rule '{rule}': kept")
        return LayerChoice(self.changed_by(rule), f"rule '{rule}'")

    def changed_by(self, rule: str) -> LayerConfig:
        """Return the settings of a layer that the `+:` rule `rule` of `dynamic` matches first."""
        overrides = self.dynamic[rule]
        settings: dict[str, Any] = {key: value for key, value, _ in _implied(overrides)}
        settings.update(overrides)
        return replace(self.base, **settings)

    def for_layer(self, name: str) -> LayerConfig | None:
        """Return the settings of the layer `name`, None if a `-:` rule keeps its full precision."""
        return self.choose(name).config

    def reaches(self, name_in_block: str) -> bool:
        """Return whether `modules_in_block_to_quantize` reaches this linear of a block."""
        return is_listed(self.modules_in_block_to_quantize, name_in_block)


FIELDS = tuple(QuantizeConfig.model_fields)
NO_LORA = "none"  # leaves out the adapter beside the model


def field_findings(values: Mapping[str, Any]) -> list[Finding]:
    """Return the findings about single `values`; conflicts are not reported."""
    try:
        QuantizeConfig.model_validate(dict(values))
    except ConfigError as refused:
        if not isinstance(refused.__cause__, ValidationError):
            raise
        return findings_of(refused.__cause__, values, QuantizeConfig)
    return []


def _bytes_or_none(size: int | str | None) -> int | None:
    return None if size is None else size_in_bytes(size)


def fill(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return `values` with preset and derived defaults, and the reason for each key added.

    A null counts as not given. Values of a wrong type are kept, for the schema to refuse.
    """
    filled = {}
    for key, value in values.items():
        if value is not None or key not in QuantizeConfig.model_fields:
            filled[key] = value
    reasons: dict[str, str] = {}
    for step in (_implied, _from_preset, _derived):  # each sees the values of those before it
        for key, value, reason in list(step(filled)):
            if key not in filled:
                filled[key], reasons[key] = value, reason
    return filled, reasons


Default = tuple[str, object, str]  # a field, its value, the reason


def _implied(given: Mapping[str, Any]) -> Iterator[Default]:
    """Yield the values of other fields that `given` ones decide before any preset."""
    if given.get("sym") is False:
        yield "signed_scales", False, "because sym is false"
    if given.get("desc_act") is True:
        yield "act_group_aware", False, "because desc_act is true"
        yield "static_groups", False, "because desc_act is true"


def _from_preset(given: Mapping[str, Any]) -> Iterator[Default]:
    preset = given.get("preset", DEFAULT_PRESET)
    if isinstance(preset, str) and preset in PRESETS:
        for key, value in PRESETS[preset].settings.items():
            yield key, value, f"preset {preset}"


def _derived(given: Mapping[str, Any]) -> Iterator[Default]:
    symmetries = [given.get("sym")]
    symmetries += [overrides.get("sym") for _, overrides in _rules(given)]
    if any(sym is False for sym in symmetries):
        yield "format", "gptq_v2", "because sym is false"
    for goal in ("target_size", "target_kl"):
        if goal in given:
            yield "bits", BITS[-1], f"because {goal} decides"
    yield "bits", _default("bits"), "default"
    n_samples = given.get("nsamples")
    if type(n_samples) is int and 0 < n_samples < _default("batch_size"):
        yield "batch_size", n_samples, "because there are no more samples"


def _default(field: str) -> Any:
    return QuantizeConfig.model_fields[field].default


def _rules(values: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the rules of `dynamic` and their settings, as far as they have the right types."""
    dynamic = values.get("dynamic")
    if not isinstance(dynamic, dict):
        return []
    found = []
    for rule, overrides in dynamic.items():
        if isinstance(rule, str) and isinstance(overrides, dict):
            found.append((rule, overrides))
    return found


def conflicts(values: Mapping[str, Any]) -> list[Finding]:
    """Return contradictions between fields in filled `values`; the schema refuses wrong types."""
    findings = []
    if values.get("desc_act") is True and values.get("act_group_aware") is True:
        findings.append(_both_orders(("desc_act",), ("act_group_aware",)))
    if values.get("signed_scales") is True and values.get("sym") is False:
        findings.append(_signed_asymmetry(("signed_scales",), ("sym",)))
    if not _allocates(values):  # else `bits` is no width
        findings += _format_conflicts(values)
    findings += _goal_conflicts(values)
    findings += _width_conflicts(values)
    findings += _batch_conflicts(values)
    findings += _adapter_conflicts(values)
    for rule, overrides in _rules(values):
        if keeps(rule):
            findings += _keeping_conflicts(rule, overrides)
        else:
            findings += _override_conflicts(rule, overrides, values)
    return findings


def _format_conflicts(
    values: Mapping[str, Any], rule: str | None = None, overrides: Mapping[str, Any] | None = None
) -> list[Finding]:
    """Return settings that the format cannot store: those of all layers, or those of a rule."""
    changed = overrides or {}
    implied = {key: value for key, value, _ in _implied(changed)}
    effective = {**values, **implied, **changed}
    findings = []
    for key, (reason, hint) in _misfits_of(effective).items():
        path: KeyPath = (key,)
        if rule is not None:
            path = ("dynamic", rule, key)
        if rule is None or key in changed:  # others are reported for all layers
            predicate = f"do not fit: {reason}"
            findings.append(Finding((path, ("format",)), "E_CFG_FORMAT", predicate, hint))
    return findings


def _misfits_of(values: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Return the settings that the format cannot store, with the reason and the way out."""
    format = values.get("format", _default("format"))
    bits, group_size = values.get("bits"), values.get("group_size", _default("group_size"))
    if format not in FORMATS or bits not in BITS or type(group_size) is not int:
        return {}  # the schema refuses these values
    g_idx = values.get("desc_act") is True and values.get("static_groups") is not True
    could = formats_for(bits, group_size, g_idx=g_idx)
    hint = None
    if could:
        hint = f"use --format {one_of(could)}"
    found = {}
    for key, reason in misfits(format, bits, group_size, g_idx=g_idx).items():
        found[key] = reason, hint
        if key == "desc_act":
            found[key] = reason, "use --static-groups or --act-group-aware in its place"
    return found


def _goal_conflicts(values: Mapping[str, Any]) -> list[Finding]:
    """Return the contradictions between the goals of an allocation of bits."""
    goals = {"target_size": None, "target_kl": None, "bits": BITS[-1]}
    paths = tuple((goal,) for goal, default in goals.items() if values.get(goal) != default)
    if len(paths) > 1 and _allocates(values):
        hint = "give one goal: an average of bits, a size or a KL"
        return [Finding(paths, "E_CFG_CONFLICT", "are both goals of an allocation", hint)]
    if values.get("protect") is not None and not _allocates(values):
        hint = "add --allow-bits, or an average such as --bits 3.5"
        predicate = "has no effect if all layers have the same bits"
        return [Finding((("protect",),), "E_CFG_CONFLICT", predicate, hint)]
    return []


def _allocates(values: Mapping[str, Any]) -> bool:
    """Return whether layers get widths by the harm that each does."""
    goals = (values.get("target_size"), values.get("target_kl"), values.get("allow_bits"))
    return values.get("bits") not in BITS or any(goal is not None for goal in goals)


def _width_conflicts(values: Mapping[str, Any]) -> list[Finding]:
    """Return the widths of `allow_bits` that the format cannot store."""
    format = values.get("format", _default("format"))
    allowed = values.get("allow_bits")
    if format not in FORMATS or not isinstance(allowed, list):
        return []
    findings = []
    for width in allowed:
        if width in BITS and width not in HOLDS[format].bits:
            predicate = f"do not fit: {format} stores {one_of(HOLDS[format].bits)} bits"
            paths: tuple[KeyPath, ...] = (("allow_bits",), ("format",))
            findings.append(Finding(paths, "E_CFG_FORMAT", predicate, f"leave out {width}"))
    return findings


def _batch_conflicts(values: Mapping[str, Any]) -> list[Finding]:
    batch, samples = values.get("batch_size"), values.get("nsamples", _default("nsamples"))
    if type(batch) is not int or type(samples) is not int or not batch > samples > 0:
        return []
    paths: tuple[KeyPath, ...] = (("batch_size",), ("nsamples",))
    predicate = f"disagree: a batch of {batch} from {samples} samples"
    return [Finding(paths, "E_CFG_RANGE", predicate, f"set batch_size to {samples} or less")]


def _adapter_conflicts(values: Mapping[str, Any]) -> list[Finding]:
    adapters = values.get("lora")
    if not isinstance(adapters, list) or len(adapters) < 2 or NO_LORA not in adapters:
        return []
    hint = f"leave out `{NO_LORA}`, or all others; ./{NO_LORA} is a directory of this name"
    predicate = f"has `{NO_LORA}` beside other adapters"
    return [Finding((("lora",),), "E_CFG_CONFLICT", predicate, hint)]


def _keeping_conflicts(rule: str, overrides: dict[str, Any]) -> list[Finding]:
    if not overrides:
        return []
    hint = f"write {{}}, or use '+:{pattern_of(rule)}' to quantize the layer with other settings"
    predicate = "keeps its layers in full precision and takes no settings"
    return [Finding((("dynamic", rule),), "E_CFG_CONFLICT", predicate, hint)]


def _override_conflicts(
    rule: str, overrides: dict[str, Any], values: Mapping[str, Any]
) -> list[Finding]:
    findings = []
    path = ("dynamic", rule)

    def where(key: str) -> KeyPath:
        """Return the place that decides about `key` for the layers of the rule."""
        return (*path, key) if key in overrides else (key,)

    effective = {**values, **overrides}
    if effective.get("desc_act") is True and overrides.get("act_group_aware") is True:
        findings.append(_both_orders(where("desc_act"), (*path, "act_group_aware")))
    if overrides.get("signed_scales") is True and effective.get("sym") is False:
        findings.append(_signed_asymmetry((*path, "signed_scales"), where("sym")))
    return findings + _format_conflicts(values, rule, overrides)


def _both_orders(*paths: KeyPath) -> Finding:
    hint = "set act_group_aware to false, or remove it: desc_act turns it off"
    return Finding(paths, "E_CFG_CONFLICT", "are both true and exclude each other", hint)


def _signed_asymmetry(*paths: KeyPath) -> Finding:
    predicate = "conflict: signed scales need a symmetric grid, but sym is false"
    hint = "set signed_scales to false, or remove it: an asymmetric grid has no larger end"
    return Finding(paths, "E_CFG_CONFLICT", predicate, hint)


DEFAULTS = QuantizeConfig()  # with the settings of the default preset
