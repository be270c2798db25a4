"""Listeners to a run's events: what the result is made of, and two limits that end a run.

The limits: how many layers may be rounded to nearest, and how much time there is.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, GateError, PausedError
from gptq_cli.events import (
    BlockFinished,
    BlockStarted,
    Event,
    ExpertsCovered,
    LayerReport,
    LayerSolved,
    LayerStarted,
    Report,
    Resumed,
)


class Record:
    """Passes every event on and keeps what a result is made of, such as layer reports and memory peaks in bytes.

    A layer that is solved again, as its block is done again, is kept once.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._layers: dict[str, LayerReport] = {}
        self._experts: dict[str, ExpertsCovered] = {}
        self.host_bytes = 0
        self.device_bytes = 0
        self.resumed_blocks = 0
        self.already_done = False

    @property
    def layers(self) -> list[LayerReport]:
        """In the order in which they were first solved."""
        return list(self._layers.values())

    @property
    def experts(self) -> list[ExpertsCovered]:
        """Of each layer of experts, in the same order."""
        return list(self._experts.values())

    def take_over(self, manifest: Mapping[str, Any]) -> None:
        """What an earlier call, which has finished the output of `manifest`, has recorded."""
        self.already_done = True
        self._add(
            [LayerReport(**layer, seconds=0.0) for layer in manifest["layers"]],
            [ExpertsCovered(**layer) for layer in manifest["experts"]],
        )

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerSolved):
            self._add([event.report])
        elif isinstance(event, ExpertsCovered):
            self._add(experts=[event])
        elif isinstance(event, BlockFinished):
            self.host_bytes = max(self.host_bytes, event.host_bytes)
            self.device_bytes = max(self.device_bytes, event.device_bytes)
        elif isinstance(event, Resumed):
            self.resumed_blocks = event.index
            self._add(event.layers, event.experts)
        self._report(event)

    def _add(self, layers: Iterable[LayerReport] = (), experts: Iterable[ExpertsCovered] = ()) -> None:
        self._layers |= {layer.name: layer for layer in layers}
        self._experts |= {covered.name: covered for covered in experts}


class FallbackLimit:
    """Passes events on, and ends the run with GateError E_NUM_FALLBACKS at the first layer too many.

    Layers of finished blocks count, whatever was asked for when they were solved.
    """

    def __init__(self, report: Report, config: QuantizeConfig) -> None:
        self._report, self._config = report, config
        self._rounded: set[str] = set()  # a layer may be solved again

    def __call__(self, event: Event) -> None:
        self._report(event)
        if isinstance(event, LayerSolved):
            self.check([event.report])
        elif isinstance(event, Resumed):
            self.check(event.layers)

    def check(self, layers: Iterable[LayerReport]) -> None:
        """Count what was rounded to nearest of these `layers` too."""
        allowed = self._config.max_fallbacks
        for layer in layers:
            self._rounded |= {layer.name} if layer.fallback else set()
            if layer.fallback in ("inputs", "hessian") and self._config.on_numeric_fault == "error":
                says = f"`{layer.name}` was rounded to nearest by an earlier call; --on-numeric-fault is error now"
                raise GateError("E_NUM_FALLBACKS", says, hint="say --on-numeric-fault rtn, or --resume never")
            if allowed is not None and len(self._rounded) > allowed:
                raise GateError(
                    "E_NUM_FALLBACKS",
                    f"{len(self._rounded)} layers had to be rounded to nearest, the last `{layer.name}`; "
                    f"--max-fallbacks allows {allowed}",
                    hint="use more or other calibration text, or allow more",
                )


class TimeLimit:
    """Passes events on, and ends the run with PausedError E_PAUSED before a block that would not end in time.

    The longest block so far tells how long the next one takes. A block that takes longer than that is given up between
    two layers when `seconds` from now are over.
    """

    def __init__(self, report: Report, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._report, self._now = report, now
        self._seconds, self._end = seconds, now() + seconds
        self._longest = 0.0

    def __call__(self, event: Event) -> None:
        self._report(event)
        if isinstance(event, BlockFinished):
            self._longest = max(self._longest, event.seconds)
        needed = self._longest if isinstance(event, BlockStarted) else 0.0
        if isinstance(event, BlockStarted | LayerStarted) and self._now() + needed > self._end:
            raise PausedError(
                "E_PAUSED", f"the {self._seconds:g} s of --max-runtime do not suffice for what is left",
                hint="run the same command again to go on; a block that was begun is done again",
            )  # fmt: skip


def seconds(duration: str | None) -> float | None:
    """Seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else."""
    if duration is None:
        return None
    match = re.fullmatch(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", duration)
    found = sum(unit * int(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True)) if match else 0
    if not found:
        message = f"--max-runtime must be a time such as 3h30m, 90m or 45s, got {duration!r}"
        raise ConfigError("E_CFG_RANGE", message, hint="say hours with h, minutes with m, seconds with s")
    return found
