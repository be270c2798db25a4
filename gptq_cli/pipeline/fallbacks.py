"""How many layers of a run may be rounded to nearest, because nothing useful is known about their inputs."""

from __future__ import annotations

from collections.abc import Iterable

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import GateError
from gptq_cli.pipeline.events import Event, LayerReport, LayerSolved, Report, Resumed


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
