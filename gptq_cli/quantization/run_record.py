"""The record of a run, which its result is made of, and the two limits that end one.

The limits are how many layers may be rounded to nearest, and how much time the run has.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError, GateError, PausedError
from gptq_cli.events import (
    BlockFinished,
    Event,
    ExpertsCovered,
    LayerReport,
    LayerSolved,
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

    def for_manifest(self) -> dict[str, Any]:
        """Return what the manifest keeps of layers and experts; seconds differ from run to run and are left out."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            del layer["seconds"]
        return {"layers": layers, "experts": [asdict(covered) for covered in self.experts]}

    def take_over(self, manifest: Mapping[str, Any]) -> None:
        """What an earlier call, which has finished the output of `manifest`, has recorded."""
        self.already_done = True
        self._add(
            [LayerReport(**layer, seconds=0.0) for layer in manifest.get("layers", ())],
            [ExpertsCovered(**layer) for layer in manifest.get("experts", ())],
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

    def _add(
        self, layers: Iterable[LayerReport] = (), experts: Iterable[ExpertsCovered] = ()
    ) -> None:
        self._layers |= {layer.name: layer for layer in layers}
        self._experts |= {covered.name: covered for covered in experts}


class Limits:
    """The limits of a run: the block loop asks before each block and layer, and after each layer.

    `max_seconds` None means that there is all the time.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        max_seconds: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._now = config, now
        self._rounded: set[str] = set()  # names, since a layer may be solved again
        self._longest = 0.0
        self._seconds = math.inf
        if max_seconds is not None:
            self._seconds = max_seconds
        self._end = now() + self._seconds

    def check_time_for_block(self) -> None:
        """PausedError E_PAUSED if a block that takes as long as the longest so far would not end in time."""
        self._check_time(self._longest)

    def check_time(self) -> None:
        """PausedError E_PAUSED if the time is over."""
        self._check_time(0.0)

    def add_block(self, seconds: float) -> None:
        """Note how long a block took."""
        self._longest = max(self._longest, seconds)

    def check_fallbacks(self, layers: Iterable[LayerReport]) -> None:
        """Count which of `layers` were rounded to nearest; GateError E_NUM_FALLBACKS if these are too many.

        Layers of finished blocks count as well, whatever was asked for when they were solved.
        """
        allowed = self._config.max_fallbacks
        for layer in layers:
            if not layer.fallback:
                continue
            self._rounded.add(layer.name)
            if layer.fallback in ("inputs", "hessian") and self._config.on_numeric_fault == "error":
                says = f"`{layer.name}` was rounded to nearest by an earlier call; --on-numeric-fault is error now"
                raise GateError(
                    "E_NUM_FALLBACKS", says, hint="say --on-numeric-fault rtn, or --resume never"
                )
            if allowed is not None and len(self._rounded) > allowed:
                count = f"{len(self._rounded)} layers had to be rounded to nearest, the last `{layer.name}`"
                message = f"{count}; --max-fallbacks allows {allowed}"
                raise GateError(
                    "E_NUM_FALLBACKS",
                    message,
                    hint="use more or other calibration text, or allow more",
                )

    def _check_time(self, needed: float) -> None:
        if self._now() + needed > self._end:
            raise PausedError(
                "E_PAUSED",
                f"the {self._seconds:g} s of --max-runtime do not suffice for what is left",
                hint="run the same command again to resume; the block that was at work starts over",
            )


def seconds(duration: str | None) -> float | None:
    """Seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else."""
    if duration is None:
        return None
    match = re.fullmatch(r"(?=.)(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", duration)
    found = (
        sum(unit * int(part or 0) for unit, part in zip((3600, 60, 1), match.groups(), strict=True))
        if match
        else 0
    )
    if not found:
        message = f"--max-runtime must be a time such as 3h30m, 90m or 45s, got {duration!r}"
        raise ConfigError(
            "E_CFG_RANGE", message, hint="say hours with h, minutes with m, seconds with s"
        )
    return found
