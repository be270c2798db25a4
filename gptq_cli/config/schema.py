"""The configuration of a run: every field with its type, its default, what it accepts and what it means.

Names, meanings and defaults are those of Optimum's GPTQQuantizer; `dynamic` is GPTQModel's. A resolved configuration
is valid input again and gives an equal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from gptq_cli.config.check import findings_of, refusal
from gptq_cli.config.fields import (
    STRICT,
    Accepts,
    Bits,
    Count,
    Damping,
    DampPercent,
    Experts,
    Fault,
    Flag,
    GroupSize,
    LayerOverrides,
    Name,
    Option,
    Panel,
    Preset,
    Rule,
    Search,
    Size,
    Strength,
    Sweeps,
    Target,
    Text,
    size_in_bytes,
)
from gptq_cli.config.finding import Finding, KeyPath, name_of
from gptq_cli.config.layer import DEFAULT_PRESET, PRESETS, FaultPolicy, LayerConfig
from gptq_cli.config.rules import LayerChoice, first_match, is_listed, keeps, pattern_of
from gptq_cli.config.serving_table import TARGETS
from gptq_cli.errors import ConfigError


class QuantizeConfig(BaseModel):
    """Everything that decides about a run, resolved; construct it from what was said, the rest is derived.

    ConfigError, with every problem at once, if that cannot be.

    >>> from gptq_cli import QuantizeConfig
    >>> config = QuantizeConfig(bits=4, sym=False, dynamic={"-:.*down_proj": {}})
    >>> config.group_size, config.format, config.preset
    (128, 'gptq_v2', 'balanced')
    >>> QuantizeConfig(bits=5, group_sise=64)
    Traceback (most recent call last):
        ...
    gptq_cli.errors.ConfigError: bits must be 2, 3, 4 or 8, got 5; group_sise is not a known key
    """

    model_config = STRICT

    bits: Annotated[Bits, Option(Panel.ALGORITHM, ("--bits", "-b"))] = Field(
        description="bits per weight"
    )
    group_size: Annotated[
        GroupSize, Option(Panel.ALGORITHM, ("--group-size", "-g"), note=", -1 for one group a row")
    ] = Field(default=128, description="input columns that share one scale")
    sym: Annotated[Flag, Option(Panel.SWITCHES, ("--sym/--asym",))] = Field(
        default=True, description="symmetric grid; false stores a zero point per group"
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
    signed_scales: Annotated[Flag, Option(Panel.SWITCHES)] = Field(
        default=False,
        description="symmetric scales may be negative: the larger end gets a level more",
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
    asymmetric_calibration: Annotated[Strength, Option(Panel.ALGORITHM, metavar="0..1")] = Field(
        default=0.0,
        description="how far weights follow the unquantized model's inputs, 0 to 1; above 0 each block runs twice",
    )
    damp_mode: Annotated[Damping, Option(Panel.ALGORITHM)] = Field(
        default="mean",
        description="damp every column alike, or each by its own energy (diagonal), more when tokens are few",
    )
    damp_percent: Annotated[DampPercent, Option(Panel.ALGORITHM)] = Field(
        default=0.1,
        description="damping, as a share of the Hessian's mean diagonal; with damp_mode diagonal the least share",
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
    lm_head: Annotated[Flag, Option(Panel.LAYERS)] = Field(
        default=False, description="quantize the output head too"
    )
    allow_requantize: Annotated[Flag, Option(Panel.LAYERS, ("--allow-requantize",))] = Field(
        default=False,
        description="take a GPTQ checkpoint as the source and round its weights a second time",
    )
    target: Annotated[
        Target, Option(Panel.LAYERS, metavar="ENGINE", note=f": {', '.join(TARGETS)}")
    ] = Field(
        default=None,
        description="engine that must load the result, or the run is refused before any work",
    )
    moe_uncovered: Annotated[Experts, Option(Panel.LAYERS)] = Field(
        default="error",
        description="an expert without calibration tokens: stop, round it to nearest, or calibrate it on all tokens",
    )
    on_numeric_fault: Annotated[Fault, Option(Panel.LAYERS)] = Field(
        default="error",
        description="a layer whose inputs are not finite or whose Hessian has no factor: stop, or round it to nearest",
    )
    max_fallbacks: Annotated[
        int | None,
        Field(ge=0),
        Accepts("a whole number of 0 or more, or null"),
        Option(Panel.LAYERS, metavar="N"),
    ] = Field(
        default=None,
        description="stop when more layers than this had to be rounded to nearest; null: any number",
    )
    dataset: Annotated[
        str | list[str] | None,
        Field(min_length=1),
        Accepts("a dataset name, a path, or a list of texts"),
        Option(Panel.TEXT, note="; given twice or more: the texts themselves"),
    ] = Field(
        default=None,
        description="calibration text: wikitext2 (also if null), c4, a Hub id, a file or a folder",
    )
    dataset_config: Annotated[Name, Option(Panel.TEXT)] = Field(
        default=None, description="configuration of a Hub dataset"
    )
    dataset_split: Annotated[Name, Option(Panel.TEXT)] = Field(
        default=None, description="split of a Hub dataset"
    )
    text_column: Annotated[Text, Option(Panel.TEXT)] = Field(
        default="text", description="column that holds the text"
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
    format: Annotated[
        Literal["gptq", "gptq_v2"], Accepts("gptq or gptq_v2"), Option(Panel.OUTPUT)
    ] = Field(default="gptq", description="checkpoint format")
    max_shard_size: Annotated[Size, Option(Panel.OUTPUT, metavar="SIZE")] = Field(
        default="5GB", description="largest safetensors file written"
    )
    max_vram: Annotated[
        Size | None,
        Accepts("a size such as 24GB, a number of bytes, or null"),
        Option(Panel.RUN, metavar="SIZE"),
    ] = Field(default=None, description="device memory that may be used; null: what is free")
    max_ram: Annotated[
        Size | None,
        Accepts("a size such as 64GB, a number of bytes, or null"),
        Option(Panel.RUN, metavar="SIZE"),
    ] = Field(default=None, description="host memory that may be used; null: what is free")
    backend: Annotated[
        Literal["auto", "torch", "triton"] | None,
        Accepts("auto, torch, triton or null"),
        Option(Panel.RUN),
    ] = Field(default=None, description="kernel that runs quantized linears when evaluating")
    device: Annotated[
        str,
        Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$"),
        Accepts("auto, cpu, cuda or cuda:N"),
        Option(Panel.RUN, metavar="auto|cpu|cuda:N"),
    ] = Field(default="auto", description="device that does the work")
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Accepts("auto, bfloat16, float16 or float32"),
        Option(Panel.RUN),
    ] = Field(default="auto", description="dtype of the forward passes")
    trust_remote_code: Annotated[Flag, Option(Panel.RUN, ("--trust-remote-code",))] = Field(
        default=False, description="run Python code that comes with the model"
    )
    preset: Annotated[Preset, Option(Panel.ALGORITHM, metavar="NAME")] = Field(
        default=DEFAULT_PRESET, description="named starting point for the fields left open"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return fill(values)[0] if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _agree(self) -> QuantizeConfig:
        for finding in conflicts(self.__dict__):
            subject = " and ".join(map(name_of, finding.paths))
            raise PydanticCustomError(
                "conflict", "{message}", {"message": f"{subject} {finding.predicate}"}
            )
        return self

    @model_validator(mode="wrap")  # the last one, which sees what all others raise
    @classmethod
    def _refuse(
        cls, values: Any, handler: ModelWrapValidatorHandler[QuantizeConfig]
    ) -> QuantizeConfig:
        """Whatever is wrong is a ConfigError in the words of a person."""
        try:
            return handler(values)
        except ValidationError as error:
            raise refusal(findings_of(error, values, cls) or conflicts(fill(values)[0])) from error

    @property
    def max_shard_bytes(self) -> int:
        """Largest size of one safetensors file in bytes."""
        return size_in_bytes(self.max_shard_size)

    @property
    def max_vram_bytes(self) -> int | None:
        """Device memory that may be used, in bytes; None if all that is free."""
        return None if self.max_vram is None else size_in_bytes(self.max_vram)

    @property
    def max_ram_bytes(self) -> int | None:
        """Host memory that may be used, in bytes; None if all that is free."""
        return None if self.max_ram is None else size_in_bytes(self.max_ram)

    @property
    def fault_policy(self) -> FaultPolicy:
        """What becomes of layers that cannot be calibrated."""
        return FaultPolicy(self.on_numeric_fault, self.moe_uncovered)

    @property
    def base(self) -> LayerConfig:
        """Settings of a layer that no `dynamic` rule matches."""
        return LayerConfig(**{name: getattr(self, name) for name in LayerConfig.__slots__})

    def choose(self, name: str) -> LayerChoice:
        """What `dynamic` decides about the layer with the full module name `name`, and why."""
        rule = first_match(self.dynamic, name)
        if rule is None:
            return LayerChoice(self.base, "default")
        if keeps(rule):
            return LayerChoice(None, f"rule '{rule}': kept")
        return LayerChoice(self.changed_by(rule), f"rule '{rule}'")

    def changed_by(self, rule: str) -> LayerConfig:
        """Settings of a layer that the `+:` rule of `dynamic` decides about."""
        return _override(self.base, self.dynamic[rule])

    def for_layer(self, name: str) -> LayerConfig | None:
        """Settings of the layer with the full module name `name`; None when a `-:` rule keeps it as it is."""
        return self.choose(name).config

    def reaches(self, name_in_block: str) -> bool:
        """Whether `modules_in_block_to_quantize` leaves this linear of a block to be quantized."""
        return is_listed(self.modules_in_block_to_quantize, name_in_block)


FIELDS = tuple(QuantizeConfig.model_fields)


def field_findings(values: Mapping[str, Any]) -> list[Finding]:
    """Everything that the schema has against single `values`; not what is missing, nor conflicts between them."""
    try:
        QuantizeConfig.model_validate(dict(values))
    except ConfigError as refused:
        if not isinstance(refused.__cause__, ValidationError):
            raise
        found = findings_of(refused.__cause__, values, QuantizeConfig)
        return [finding for finding in found if finding.code != "E_CFG_MISSING"]
    return []


def _override(base: LayerConfig, overrides: LayerOverrides) -> LayerConfig:
    settings: dict[str, Any] = {key: value for key, value, _ in _implied(overrides)}
    settings.update(overrides)
    return replace(base, **settings)


def fill(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`values` with preset and derived defaults filled in, and for each key filled the reason.

    A null stands for "not said". Values of a wrong type are passed on as they are, for the schema to refuse.
    """
    said = {
        key: value
        for key, value in values.items()
        if value is not None or key not in QuantizeConfig.model_fields
    }
    why: dict[str, str] = {}

    def default(key: str, value: object, reason: str) -> None:
        if key not in said:
            said[key], why[key] = value, reason

    for key, value, reason in _implied(said):
        default(key, value, reason)
    preset = said.get("preset", DEFAULT_PRESET)
    for key, value in PRESETS.get(preset, {}).items() if isinstance(preset, str) else ():
        default(key, value, f"preset {preset}")
    if said.get("sym") is False or any(rule.get("sym") is False for rule in _override_rules(said)):
        default("format", "gptq_v2", "because sym is false")
    n_samples = said.get("nsamples")
    if type(n_samples) is int and 0 < n_samples < QuantizeConfig.model_fields["batch_size"].default:
        default("batch_size", n_samples, "because there are no more samples")
    return said, why


def _implied(said: Mapping[str, Any]) -> Iterator[tuple[str, object, str]]:
    """What some of `said` means for other fields, whatever a preset has for them."""
    if said.get("sym") is False:
        yield "signed_scales", False, "because sym is false"
    if said.get("desc_act") is True:
        yield "act_group_aware", False, "because desc_act is true"
        yield "static_groups", False, "because desc_act is true"


def _override_rules(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    dynamic = values.get("dynamic")
    return (
        [rule for rule in dynamic.values() if isinstance(rule, dict)]
        if isinstance(dynamic, dict)
        else []
    )


def conflicts(values: Mapping[str, Any]) -> list[Finding]:
    """Fields that contradict each other in filled `values`; fields of a wrong type are left to the schema."""
    findings = []
    if values.get("desc_act") is True and values.get("act_group_aware") is True:
        findings.append(_both_orders(("desc_act",), ("act_group_aware",)))
    if values.get("signed_scales") is True and values.get("sym") is False:
        findings.append(_signed_asymmetry(("signed_scales",), ("sym",)))
    batch, samples = (
        values.get("batch_size"),
        values.get("nsamples", QuantizeConfig.model_fields["nsamples"].default),
    )
    if type(batch) is int and type(samples) is int and batch > samples > 0:
        paths = (("batch_size",), ("nsamples",))
        hint = f"set batch_size to {samples} or less"
        findings.append(
            Finding(
                paths, "E_CFG_RANGE", f"disagree: a batch of {batch} from {samples} samples", hint
            )
        )
    dynamic = values.get("dynamic")
    for rule, overrides in dynamic.items() if isinstance(dynamic, dict) else ():
        if isinstance(rule, str) and isinstance(overrides, dict):
            findings += _rule_conflicts(rule, overrides, values)
    return findings


def _rule_conflicts(
    rule: str, overrides: dict[str, Any], values: Mapping[str, Any]
) -> list[Finding]:
    path = ("dynamic", rule)
    if keeps(rule):
        hint = (
            f"write {{}}, or use '+:{pattern_of(rule)}' to quantize the layer with other settings"
        )
        says = "keeps its layers in full precision and takes no settings"
        return [Finding((path,), "E_CFG_CONFLICT", says, hint)] if overrides else []
    findings = []
    if _effective(rule, "desc_act", values) is True and overrides.get("act_group_aware") is True:
        findings.append(
            _both_orders(_said_at(rule, "desc_act", values), (*path, "act_group_aware"))
        )
    if overrides.get("signed_scales") is True and _effective(rule, "sym", values) is False:
        findings.append(_signed_asymmetry((*path, "signed_scales"), _said_at(rule, "sym", values)))
    return findings


def _effective(rule: str, key: str, values: Mapping[str, Any]) -> object:
    return values["dynamic"][rule].get(key, values.get(key))


def _said_at(rule: str, key: str, values: Mapping[str, Any]) -> KeyPath:
    return ("dynamic", rule, key) if key in values["dynamic"][rule] else (key,)


def _both_orders(*paths: KeyPath) -> Finding:
    hint = "set act_group_aware to false, or leave it out: desc_act turns it off"
    return Finding(paths, "E_CFG_CONFLICT", "are both true and exclude each other", hint)


def _signed_asymmetry(*paths: KeyPath) -> Finding:
    hint = "set signed_scales to false, or leave it out: an asymmetric grid has no larger end"
    return Finding(
        paths, "E_CFG_CONFLICT", "exclude each other: only a symmetric grid has signed scales", hint
    )


DEFAULTS = QuantizeConfig(bits=4)  # with what the default preset fills in
