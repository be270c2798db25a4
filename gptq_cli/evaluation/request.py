"""The request to `evaluate_perplexity`, without torch, so that a wrong one fails at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gptq_cli.config.fields import refusal
from gptq_cli.config.schema import FIELDS, field_findings
from gptq_cli.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """The text and the protocol of an evaluation; the fields are the options of `gptq eval-ppl`.

    `seqlen` None means 2048, or the model's positions if it has fewer. `backend` None means the one
    in the configuration beside the checkpoint, if it names one. Raises ConfigError if a value is
    not accepted.

    >>> EvalRequest(dataset="heldout.txt", seqlen=512).batch_size
    1
    >>> EvalRequest(seqlen=0)
    Traceback (most recent call last):
        ...
    gptq_cli.errors.ConfigError: seqlen must be a whole number of 1 or more, got 0
    """

    dataset: str | list[str] | None = None
    dataset_config: str | None = None
    dataset_split: str | None = None
    text_column: str | None = None
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
        given = {}
        for key, value in asdict(self).items():
            if key in FIELDS and value is not None:
                given[key] = value
        findings = field_findings(given)
        if findings:
            raise refusal(findings)
        if self.max_windows is not None and self.max_windows < 1:
            message = f"max_windows must be a whole number of 1 or more, got {self.max_windows}"
            raise ConfigError("E_CFG_RANGE", message)
