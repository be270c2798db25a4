"""The configuration of a run: every field with its type, its default, what it accepts and what it means.

Names, meanings and defaults are those of Optimum's GPTQQuantizer; `dynamic` is GPTQModel's. A resolved configuration
is valid input again and gives an equal one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from gptq_cli.config.engines import TARGETS
from gptq_cli.config.finding import Finding, KeyPath, name_of
from gptq_cli.config.layer import DampMode, FaultPolicy, LayerConfig, OnFault, ScaleSearch, Uncovered
from gptq_cli.config.presets import DEFAULT_PRESET, PRESETS
from gptq_cli.config.rules import LayerChoice, first_match, is_listed, keeps, pattern_of

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, slots=True)
class Accepts:
    """The words of an error message for what a field accepts."""

    text: str


def size_in_bytes(size: int | str) -> int:
    """Bytes in "5GB", "500 MiB" or a plain number; ValueError when it is not a positive size."""
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,9})?) ?([A-Za-z]*)", str(size))
    if not match or match[2].upper() not in SIZE_UNITS:
        raise ValueError(f"not a size: {size!r}")
    n_bytes = int(Decimal(match[1]) * SIZE_UNITS[match[2].upper()])
    if n_bytes <= 0:
        raise ValueError(f"not a positive size: {size!r}")
    return n_bytes


def _group_size(columns: int) -> int:
    if columns == 0 or columns < -1:
        raise ValueError("group_size")
    return columns


def _size(size: int | str) -> int | str:
    size_in_bytes(size)
    return size


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise ValueError("preset")
    return name


def _target(name: str | None) -> str | None:
    if name not in (None, *TARGETS):
        raise ValueError("target")
    return name


def _rule(rule: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of what later versions of Python read otherwise, such as [[a]
            re.compile(pattern_of(rule))
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise PydanticCustomError("regex", "{reason}", {"reason": str(error)}) from None
    return rule


TRUTH = Accepts("true or false")
Bits = Annotated[Literal[2, 3, 4, 8], Accepts("2, 3, 4 or 8")]
GroupSize = Annotated[
    int, AfterValidator(_group_size), Accepts("a positive number of columns, or -1 for one group per row")
]
DampPercent = Annotated[float, Field(gt=0, lt=1), Accepts("a number strictly between 0 and 1")]
Damping = Annotated[DampMode, Accepts("mean or diagonal")]
Search = Annotated[ScaleSearch, Accepts("none, mse or activation")]
Strength = Annotated[float, Field(ge=0, le=1), Accepts("a number from 0 to 1")]
Sweeps = Annotated[int, Field(ge=0), Accepts("a whole number of 0 or more")]
Size = Annotated[int | str, AfterValidator(_size), Accepts("a size such as 5GB or 500MiB, or a number of bytes")]
Flag = Annotated[bool, TRUTH]
Count = Annotated[int, Field(gt=0), Accepts("a whole number of 1 or more")]
Text = Annotated[str, Field(min_length=1), Accepts("a text that is not empty")]
Name = Annotated[Text | None, Accepts("a name or null")]
Rule = Annotated[str, AfterValidator(_rule)]


class LayerOverrides(TypedDict, total=False):
    """What a `+:` rule of `dynamic` may change."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    bits: Bits
    group_size: GroupSize
    sym: Flag
    desc_act: Flag
    act_group_aware: Flag
    static_groups: Flag
    signed_scales: Flag
    scale_search: Search
    refine_sweeps: Sweeps
    asymmetric_calibration: Strength
    damp_mode: Damping
    damp_percent: DampPercent


class QuantizeConfig(BaseModel):
    """Everything that decides about a run, resolved; construct it from what was said, the rest is derived."""

    model_config = STRICT

    bits: Bits = Field(description="bits per weight")
    group_size: GroupSize = Field(128, description="input columns that share one scale")
    sym: Flag = Field(True, description="symmetric grid; false stores a zero point per group")
    desc_act: Flag = Field(False, description="quantize columns in order of falling activation, groups follow (g_idx)")
    act_group_aware: Flag = Field(True, description="activation order that keeps groups whole (GAR)")
    static_groups: Flag = Field(False, description="fix all scales first; columns in activation order, trivial g_idx")
    true_sequential: Flag = Field(True, description="layers of a block see inputs of already quantized layers")
    signed_scales: Flag = Field(False, description="symmetric scales may be negative: the larger end gets a level more")
    scale_search: Search = Field(
        "none", description="shrink scales to least |error|^2.4 (mse) or error^2 weighted by input energy (activation)"
    )
    refine_sweeps: Sweeps = Field(0, description="rounds of fitting scales, then codes, after a layer is solved")
    asymmetric_calibration: Strength = Field(
        0.0, description="how far weights follow the unquantized model's inputs, 0 to 1; above 0 each block runs twice"
    )
    damp_mode: Damping = Field(
        "mean", description="damp every column alike, or each by its own energy (diagonal), more when tokens are few"
    )
    damp_percent: DampPercent = Field(
        0.1, description="damping, as a share of the Hessian's mean diagonal; with damp_mode diagonal the least share"
    )
    modules_in_block_to_quantize: Annotated[
        list[Annotated[list[Text], Field(min_length=1)]] | None,
        Field(min_length=1),
        Accepts("a list of lists of module names, like [[self_attn.q_proj], [mlp.down_proj]]"),
    ] = Field(None, description="the only linears of a block to quantize")
    dynamic: Annotated[
        dict[Rule, LayerOverrides], Accepts("a mapping from `+:regex` or `-:regex` to a mapping of settings")
    ] = Field({}, description="rules for single layers")
    lm_head: Flag = Field(False, description="quantize the output head too")
    allow_requantize: Flag = Field(
        False, description="take a GPTQ checkpoint as the source and round its weights a second time"
    )
    target: Annotated[str | None, AfterValidator(_target), Accepts(", ".join(TARGETS) + " or null")] = Field(
        None, description="engine that must load the result, or the run is refused before any work"
    )
    moe_uncovered: Annotated[Uncovered, Accepts("error, rtn or all-tokens")] = Field(
        "error",
        description="an expert without calibration tokens: stop, round it to nearest, or calibrate it on all tokens",
    )
    on_numeric_fault: Annotated[OnFault, Accepts("error or rtn")] = Field(
        "error",
        description="a layer whose inputs are not finite or whose Hessian has no factor: stop, or round it to nearest",
    )
    max_fallbacks: Annotated[int | None, Field(ge=0), Accepts("a whole number of 0 or more, or null")] = Field(
        None, description="stop when more layers than this had to be rounded to nearest; null: any number"
    )
    dataset: Annotated[
        str | list[str] | None, Field(min_length=1), Accepts("a dataset name, a path, or a list of texts")
    ] = Field(None, description="calibration text; null means wikitext2")
    dataset_config: Name = Field(None, description="configuration of a Hub dataset")
    dataset_split: Name = Field(None, description="split of a Hub dataset")
    text_column: Text = Field("text", description="column that holds the text")
    seqlen: Count = Field(2048, description="tokens per window, at most the model's positions")
    nsamples: Count = Field(128, description="calibration windows")
    batch_size: Count = Field(8, description="windows per forward pass")
    seed: Annotated[int, Field(ge=0, lt=2**63), Accepts("a whole number of 0 or more")] = Field(
        0, description="chooses the calibration windows"
    )
    format: Annotated[Literal["gptq", "gptq_v2"], Accepts("gptq or gptq_v2")] = Field(
        "gptq", description="checkpoint format"
    )
    max_shard_size: Size = Field("5GB", description="largest safetensors file written")
    max_vram: Size | None = Field(None, description="device memory that may be used; null: what is free")
    max_ram: Size | None = Field(None, description="host memory that may be used; null: what is free")
    backend: Annotated[Literal["auto", "torch", "triton"] | None, Accepts("auto, torch, triton or null")] = Field(
        None, description="kernel that runs quantized linears when evaluating"
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$"), Accepts("auto, cpu, cuda or cuda:N")] = (
        Field("auto", description="device that does the work")
    )
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], Accepts("auto, bfloat16, float16 or float32")
    ] = Field("auto", description="dtype of the forward passes")
    trust_remote_code: Flag = Field(False, description="run Python code that comes with the model")
    preset: Annotated[str, AfterValidator(_preset), Accepts(" or ".join(PRESETS))] = Field(
        DEFAULT_PRESET, description="named starting point for the fields left open"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return fill(values)[0] if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _agree(self) -> QuantizeConfig:
        for finding in conflicts(self.__dict__):
            subject = " and ".join(map(name_of, finding.paths))
            raise PydanticCustomError("conflict", "{message}", {"message": f"{subject} {finding.predicate}"})
        return self

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
        return LayerConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            desc_act=self.desc_act,
            act_group_aware=self.act_group_aware,
            static_groups=self.static_groups,
            signed_scales=self.signed_scales,
            scale_search=self.scale_search,
            refine_sweeps=self.refine_sweeps,
            asymmetric_calibration=self.asymmetric_calibration,
            damp_mode=self.damp_mode,
            damp_percent=self.damp_percent,
        )

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


def _override(base: LayerConfig, overrides: LayerOverrides) -> LayerConfig:
    settings: dict[str, Any] = {key: value for key, value, _ in _implied(overrides)}
    settings.update(overrides)
    return replace(base, **settings)


def fill(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """`values` with preset and derived defaults filled in, and for each key filled the reason.

    A null stands for "not said". Values of a wrong type are passed on as they are, for the schema to refuse.
    """
    said = {key: value for key, value in values.items() if value is not None or key not in QuantizeConfig.model_fields}
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
    return [rule for rule in dynamic.values() if isinstance(rule, dict)] if isinstance(dynamic, dict) else []


def conflicts(values: Mapping[str, Any]) -> list[Finding]:
    """Fields that contradict each other in filled `values`; fields of a wrong type are left to the schema."""
    findings = []
    if values.get("desc_act") is True and values.get("act_group_aware") is True:
        findings.append(_both_orders(("desc_act",), ("act_group_aware",)))
    if values.get("signed_scales") is True and values.get("sym") is False:
        findings.append(_signed_asymmetry(("signed_scales",), ("sym",)))
    batch, samples = values.get("batch_size"), values.get("nsamples", QuantizeConfig.model_fields["nsamples"].default)
    if type(batch) is int and type(samples) is int and batch > samples > 0:
        paths = (("batch_size",), ("nsamples",))
        hint = f"set batch_size to {samples} or less"
        findings.append(Finding(paths, "E_CFG_RANGE", f"disagree: a batch of {batch} from {samples} samples", hint))
    dynamic = values.get("dynamic")
    for rule, overrides in dynamic.items() if isinstance(dynamic, dict) else ():
        if isinstance(rule, str) and isinstance(overrides, dict):
            findings += _rule_conflicts(rule, overrides, values)
    return findings


def _rule_conflicts(rule: str, overrides: dict[str, Any], values: Mapping[str, Any]) -> list[Finding]:
    path = ("dynamic", rule)
    if keeps(rule):
        hint = f"write {{}}, or use '+:{pattern_of(rule)}' to quantize the layer with other settings"
        says = "keeps its layers in full precision and takes no settings"
        return [Finding((path,), "E_CFG_CONFLICT", says, hint)] if overrides else []
    findings = []
    if _effective(rule, "desc_act", values) is True and overrides.get("act_group_aware") is True:
        findings.append(_both_orders(_said_at(rule, "desc_act", values), (*path, "act_group_aware")))
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
    return Finding(paths, "E_CFG_CONFLICT", "exclude each other: only a symmetric grid has signed scales", hint)
