"""The settings of Python calls as type checkers see them.

A test compares them with the fields of `QuantizeConfig`, `EvalRequest` and `GenerateRequest`,
which check the values.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from gptq_cli.config.fields import LayerOverrides, Unfit
from gptq_cli.config.layer import (
    BitWidth,
    DampMode,
    Format,
    OnFault,
    ScaleSearch,
    Uncovered,
)
from gptq_cli.config.schema import Backend, Dtype


class Settings(TypedDict, total=False):
    """The settings of `quantize`, `plan` and `allocate`."""

    bits: BitWidth | float
    group_size: int | str
    sym: bool
    desc_act: bool
    act_group_aware: bool
    static_groups: bool
    true_sequential: bool
    limit_massive_tokens: bool
    signed_scales: bool
    scale_search: ScaleSearch
    refine_sweeps: int
    asymmetric_calibration: float | Literal["auto"]
    loss_aware: bool
    damp_mode: DampMode
    damp_percent: float
    modules_in_block_to_quantize: list[list[str]] | None
    dynamic: dict[str, LayerOverrides]
    unfit: Unfit
    target_size: int | str | None
    target_kl: float | None
    allow_bits: list[BitWidth] | None
    protect: str | None
    lm_head: bool
    lora: str | list[str] | None
    allow_requantize: bool
    target: str | None
    moe_uncovered: Uncovered
    on_numeric_fault: OnFault
    max_fallbacks: int | None
    dataset: str | list[str] | None
    dataset_config: str | None
    dataset_split: str | None
    text_column: str | list[str] | None
    chat_template: str | None
    pack: bool
    seqlen: int
    nsamples: int
    batch_size: int
    seed: int
    format: Format
    max_shard_size: int | str
    max_vram: int | str | None
    max_ram: int | str | None
    backend: Backend | None
    device: str
    dtype: Dtype
    trust_remote_code: bool
    preset: str


class CompareSettings(TypedDict, total=False):
    """The settings of `compare` with a text."""

    dataset_config: str | None
    dataset_split: str | None
    text_column: str | list[str] | None
    seqlen: int | None
    batch_size: int
    device: str
    dtype: str
    backend: str | None
    revision: str | None
    trust_remote_code: bool
    chat_template: str | None


class EvalSettings(CompareSettings, total=False):
    """The settings of `evaluate_perplexity`."""

    dataset: str | None
    max_windows: int | None
    baseline: str | None


class GenerateSettings(TypedDict, total=False):
    """The settings of `generate`."""

    prompt: str
    raw: bool
    chat_template: str | None
    max_new_tokens: int | None
    temperature: float
    top_p: float | None
    seed: int | None
    device: str
    dtype: str
    revision: str | None
    trust_remote_code: bool
