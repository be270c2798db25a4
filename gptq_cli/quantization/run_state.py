"""The state of a run, which the parts of the block loop share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.events import Report
from gptq_cli.models.paused_forwards import Prober
from gptq_cli.models.stream import ModelStream
from gptq_cli.planning.run_plan import LayerPlan, RunPlan
from gptq_cli.quantization.resume import FinishedBlocks
from gptq_cli.quantization.run_record import Limits, Record
from gptq_cli.runtime.memory import Memory, PauseBudget
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.solver.quantized_linear import QuantizedLinear

Keep = Callable[[LayerPlan, QuantizedLinear], None]


def keep_nothing(layer: LayerPlan, linear: QuantizedLinear) -> None:
    """Forget a solved layer, which another process writes."""
    del layer, linear


@dataclass(slots=True)
class Run:
    """One run, as one of its processes sees it.

    `batches` holds the token ids [batch, seqlen] of all calibration batches; `ranks` gives this
    process a share of them. `keep` receives each solved layer, `saved` each finished block.
    """

    config: QuantizeConfig
    plan: RunPlan
    stream: ModelStream
    ranks: Ranks
    batches: Sequence[Tensor]
    record: Record
    limits: Limits
    keep: Keep = keep_nothing
    saved: FinishedBlocks = field(init=False)
    budget: PauseBudget = field(init=False)
    layers: dict[str, LayerPlan] = field(init=False)  # those to quantize, by name
    prober: Prober = field(default_factory=Prober)

    @property
    def report(self) -> Report:
        """The listener that receives all events."""
        return self.record

    def __post_init__(self) -> None:
        config, device, processes = self.config, self.stream.device, self.ranks.local_world_size
        memory = Memory(device, config.max_vram_bytes, config.max_ram_bytes, processes)
        self.budget = PauseBudget(memory, self.record)
        self.layers = {layer.name: layer for layer in self.plan.quantized}
