"""Listens to a run's events on their way to whoever shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gptq_cli.pipeline.events import BlockFinished, Event, ExpertsCovered, LayerReport, LayerSolved, Report, Resumed


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
