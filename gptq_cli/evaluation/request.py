"""The requests of evaluations and of `generate`, without torch, so that wrong ones fail at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gptq_cli.arguments import check_arguments
from gptq_cli.config.fields import refusal
from gptq_cli.config.schema import FIELDS, QuantizeConfig, field_findings
from gptq_cli.errors import ConfigError, one_of, shown, suggestion

LEAST_TEMPERATURE = 1e-5  # logits divided by less may exceed float32
CHECKED_ENGINES = ("vllm", "llama.cpp", "mlx", "transformers")


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The text and the protocol of an evaluation; the fields are the options of `gptq eval-ppl`.

    `seqlen` None means 2048, or the model's positions if it has fewer. `backend` None means the one
    in the configuration beside the checkpoint, if it names one, else "auto": Triton decodes on a
    GPU that runs it, torch on the host elsewhere. Raises ConfigError if a value is
    not accepted.

    >>> EvalRequest(dataset="heldout.txt", seqlen=512).batch_size
    1
    >>> EvalRequest(seqlen=0)
    Traceback (most recent call last):
        ...
    gptq_cli.errors.ConfigError: seqlen must be a whole number of 1 or more, got 0
    """

    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_column: str | list[str] | None = None
    seqlen: int | None = None
    batch_size: int = 1
    max_windows: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    baseline: str | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        _check_fields(asdict(self))
        check_arguments(asdict(self), _defaults(type(self)))
        if isinstance(self.dataset, list):
            message = "dataset must be one dataset for an evaluation, got a list"
            raise ConfigError("E_CFG_TYPE", message, hint="evaluate on one dataset after the other")
        _check_count("max_windows", self.max_windows)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt and how a model goes on; the fields are the options of `gptq generate`.

    The chat template, if the model has one, makes a chat of the prompt unless `raw`.
    `max_new_tokens` None means 128, or as many as the positions of the model leave. A `temperature`
    of 0 takes the most likely token each time; above 0, `top_p` and `seed` count as well. Raises
    ConfigError if a value is not accepted.

    >>> GenerateRequest("Why is the sky blue?", max_new_tokens=20).temperature
    0.0
    >>> GenerateRequest("Hello", top_p=0.9)
    Traceback (most recent call last):
        ...
    gptq_cli.errors.ConfigError: top_p has no effect without a temperature above 0
    """

    prompt: str
    raw: bool = False
    chat_template: str | None = None
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_fields(asdict(self))
        check_arguments(asdict(self), _defaults(type(self)))
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            message = (
                f"max_new_tokens must be a whole number of 1 or more, got {self.max_new_tokens}"
            )
            raise ConfigError("E_CFG_RANGE", message)
        _check_temperature(self.temperature)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            message = f"top_p must be a number above 0 and at most 1, got {self.top_p}"
            raise ConfigError("E_CFG_RANGE", message)
        if self.raw and self.chat_template is not None:
            message = "raw and chat_template conflict"
            raise ConfigError("E_CFG_CONFLICT", message, hint="remove one of them")
        if self.temperature == 0:
            _refuse_sampling({"top_p": self.top_p, "seed": self.seed})


def _defaults(kind: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}


def _check_temperature(temperature: float) -> None:
    """Raise ConfigError E_CFG_RANGE for a temperature by which logits cannot be divided."""
    if not 0 <= temperature < math.inf:
        message = f"temperature must be a number of 0 or more, got {temperature}"
        raise ConfigError("E_CFG_RANGE", message)
    if 0 < temperature < LEAST_TEMPERATURE:
        message = f"temperature must be 0 or at least {LEAST_TEMPERATURE}, got {temperature}"
        hint = "use 0, which takes the most likely token each time"
        raise ConfigError("E_CFG_RANGE", message, hint=hint)


def _check_count(name: str, number: int | None) -> None:
    """Raise ConfigError E_CFG_RANGE for a number below 1; None is accepted."""
    if number is not None and number < 1:
        message = f"{name} must be a whole number of 1 or more, got {number}"
        raise ConfigError("E_CFG_RANGE", message)


def _refuse_sampling(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError E_CFG_CONFLICT for settings that need a temperature."""
    for name, value in settings.items():
        if value is not None:
            message = f"{name} has no effect without a temperature above 0"
            raise ConfigError("E_CFG_CONFLICT", message, hint="set temperature to 0.7, or so")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """An engine to check; the fields are the options of `gptq check-engine`.

    `python` None means the Python of this program, `prompts` None a few sentences. `converter` is
    that of llama.cpp. `timeout` is in seconds. Raises ConfigError if a value is not accepted.
    """

    engine: str
    python: str | None = None
    converter: str | None = None
    prompts: str | None = None
    timeout: float = 900.0
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_fields(asdict(self))
        if self.engine not in CHECKED_ENGINES:
            message = f"--engine must be {one_of(CHECKED_ENGINES)}, got {shown(self.engine)}"
            hint = suggestion(self.engine, CHECKED_ENGINES)
            raise ConfigError("E_CFG_RANGE", message, hint=hint)
        if self.engine == "llama.cpp" and self.converter is None:
            raise ConfigError(
                "E_CFG_MISSING",
                "llama.cpp needs its converter to read a checkpoint",
                hint="give llama.cpp's convert_hf_to_gguf.py with --converter FILE",
            )
        if self.engine != "llama.cpp" and self.converter is not None:
            message = f"a converter has no effect on {self.engine}"
            raise ConfigError("E_CFG_CONFLICT", message, hint="omit --converter")


@dataclass(frozen=True, slots=True)
class TaskRequest:
    """The tasks of an evaluation; the fields are the options of `gptq eval`.

    `tasks` are names of lm-eval, or of YAML files in the folder `include_path`. `limit` is the
    number of questions of each task. Raises ConfigError if a value is not accepted.
    """

    tasks: tuple[str, ...]
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    baseline: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _check_fields(asdict(self))
        _check_count("limit", self.limit)
        if not self.tasks or "" in self.tasks:
            message = "tasks must be names with commas between them, such as arc_easy,hellaswag"
            raise ConfigError("E_CFG_RANGE", message)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            message = f"num_fewshot must be a whole number of 0 or more, got {self.num_fewshot}"
            raise ConfigError("E_CFG_RANGE", message)
        if self.include_path is not None and not Path(self.include_path).is_dir():
            message = f"include_path must be a folder of task files, got {self.include_path!r}"
            raise ConfigError("E_CFG_RANGE", message)


def _check_fields(values: Mapping[str, Any]) -> None:
    """Raise ConfigError if a field of the configuration among `values` is not accepted."""
    given = {}
    for key, value in values.items():
        if key in FIELDS and value is not None:
            given[key] = value
    findings = field_findings(given)
    if findings:
        raise refusal(findings, QuantizeConfig)
