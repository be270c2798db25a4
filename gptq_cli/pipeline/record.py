"""Listens to a run's events on their way to whoever shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptq_cli.pipeline.events import BlockFinished, Event, ExpertsCovered, LayerReport, LayerSolved, Report, Resumed


class Record:
    """Passes every event on and keeps what a result is made of, such as layer reports and memory peaks in bytes."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.layers: list[LayerReport] = []
        self.experts: list[ExpertsCovered] = []
        self.host_bytes = 0
        self.device_bytes = 0
        self.resumed_blocks = 0
        self.already_done = False

    def take_over(self, manifest: Mapping[str, Any]) -> None:
        """What an earlier call, which has finished the output of `manifest`, has recorded."""
        self.already_done = True
        self.layers = [LayerReport(**layer, seconds=0.0) for layer in manifest["layers"]]
        self.experts = [ExpertsCovered(**layer) for layer in manifest["experts"]]

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerSolved):
            self.layers.append(event.report)
        elif isinstance(event, ExpertsCovered):
            self.experts.append(event)
        elif isinstance(event, BlockFinished):
            self.host_bytes = max(self.host_bytes, event.host_bytes)
            self.device_bytes = max(self.device_bytes, event.device_bytes)
        elif isinstance(event, Resumed):
            self.resumed_blocks = event.index
            self.layers += event.layers
            self.experts += event.experts
        self._report(event)
