"""The record of a run, for its result, and the two limits that end a run.

The limits are the number of layers that may be rounded to nearest, and the time.
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
    """Passes every event on and keeps the parts of a result: layer reports, memory peaks in bytes.

    If a block is repeated, its layers are kept once.
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
        """The reports of layers, in the order in which the layers were first solved."""
        return list(self._layers.values())

    @property
    def experts(self) -> list[ExpertsCovered]:
        """The coverage of each layer of experts, in the same order."""
        return list(self._experts.values())

    def for_manifest(self) -> dict[str, Any]:
        """Return layers and experts for the manifest, without the seconds, which vary."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            del layer["seconds"]
        return {"layers": layers, "experts": [asdict(covered) for covered in self.experts]}

    def take_over(self, manifest: Mapping[str, Any]) -> None:
        """Take the record of the earlier call that finished the output of `manifest`."""
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

    If `max_seconds` is None, the time is not limited.
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
        """Raise PausedError E_PAUSED if a block as long as the longest so far would be late."""
        self._check_time(self._longest)

    def check_time(self) -> None:
        """Raise PausedError E_PAUSED if the time is over."""
        self._check_time(0.0)

    def add_block(self, seconds: float) -> None:
        """Note how long a block took."""
        self._longest = max(self._longest, seconds)

    def check_fallbacks(self, layers: Iterable[LayerReport]) -> None:
        """Count the `layers` that were rounded to nearest.

        Layers of resumed blocks count as well, although their run may have had other limits.
        Raises GateError E_NUM_FALLBACKS if there are too many.
        """
        allowed = self._config.max_fallbacks
        for layer in layers:
            if not layer.fallback:
                continue
            self._rounded.add(layer.name)
            if layer.fallback in ("inputs", "hessian") and self._config.on_numeric_fault == "error":
                text = f"an earlier call rounded `{layer.name}` to nearest"
                raise GateError(
                    "E_NUM_FALLBACKS",
                    f"{text}, but --on-numeric-fault is error now",
                    hint="use --on-numeric-fault rtn, or --resume never",
                )
            if allowed is not None and len(self._rounded) > allowed:
                count = f"{len(self._rounded)} layers had to be rounded to nearest"
                raise GateError(
                    "E_NUM_FALLBACKS",
                    f"{count}, the last `{layer.name}`, but --max-fallbacks allows {allowed}",
                    hint="use more or other calibration text, or allow more",
                )

    def _check_time(self, needed: float) -> None:
        if self._now() + needed > self._end:
            raise PausedError(
                "E_PAUSED",
                f"the next block would not finish within --max-runtime ({self._seconds:g} s)",
                hint="run the same command to resume; the current block starts over",
            )


def seconds(duration: str | None) -> float | None:
    """Return the seconds of "3h30m", "90m" or "45s"; ConfigError E_CFG_RANGE for anything else."""
    if duration is None:
        return None
    total = 0
    match = re.fullmatch(r"(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", duration)
    if match is not None:
        hours, minutes, rest = match.groups(default="0")
        total = 3600 * int(hours) + 60 * int(minutes) + int(rest)
    if not total:
        raise ConfigError(
            "E_CFG_RANGE",
            f"--max-runtime must be a time such as 3h30m, 90m or 45s, got {duration!r}",
            hint="write hours with h, minutes with m, seconds with s",
        )
    return total
