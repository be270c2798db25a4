"""The content of a plan: linears with their settings, where each byte of the output goes, how long
a window of text may be, and the default name of the output. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from gptq_cli.checkpoint.decoded import Plain
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.layout import Layout, TensorSpec, packed_specs
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.layer import LayerConfig
from gptq_cli.config.rules import split_experts
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import ConfigError
from gptq_cli.files import expanded, resolved
from gptq_cli.hub_errors import plain_name

HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One linear layer: `config` None means that it stays as it is, and `why` says for what reason.

    `transposed`: the source stores its weight [I, O], as GPT-2 does; quantized it is [O, I] as every other. `stack` is
    the source tensor that holds `weight` beside those of other experts; a tensor of its own it becomes here.
    """

    name: str
    block: int
    out_features: int
    in_features: int
    config: LayerConfig | None
    why: str
    weight: TensorInfo
    transposed: bool = False
    stack: str | None = None

    @property
    def stored(self) -> tuple[int, int, bool] | None:
        """What readers see of the settings: bits, group_size, sym; None if the layer stays as it is."""
        return (self.config.bits, self.config.group_size, self.config.sym) if self.config else None

    @property
    def groups(self) -> int:
        assert self.config is not None
        return self.in_features // self.config.columns_per_group(self.in_features)

    def packed(self) -> tuple[TensorSpec, ...]:
        """The tensors that replace this layer's weight."""
        assert self.config is not None
        return packed_specs(
            self.weight.name, self.out_features, self.in_features, self.groups, self.config.bits
        )


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Every linear of the blocks (and the head, if it is to be quantized), and where each output byte will go.

    `plain` are the tensors that `source` stands for, which are its own unless it is stored in codes. `unused` are those
    that the model does not ask for, as far as names tell or the model is at hand: they are copied.
    """

    source: Checkpoint
    plain: Plain
    blocks: str
    n_blocks: int
    layers: tuple[LayerPlan, ...]
    layout: Layout
    unused: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is not None)

    @property
    def kept(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.config is None)

    @property
    def n_steps(self) -> int:
        """Blocks, and the head if it is quantized."""
        return self.n_blocks + any(layer.name == HEAD for layer in self.quantized)

    @property
    def asymmetric(self) -> bool:
        """Whether some layer is calibrated on what the unquantized model does as well."""
        return any(
            layer.config and layer.config.asymmetric_calibration > 0 for layer in self.layers
        )

    @property
    def split_experts(self) -> list[str]:
        """Experts of one layer, by the name they share, that readers do not see stored alike."""
        return split_experts({layer.name: layer.stored for layer in self.layers})

    @property
    def copied(self) -> list[TensorInfo]:
        """Tensors that are not quantized: bytes of the source, or weights `decoded` from what it stores."""
        return [tensor for name, tensor in self.plain.tensors.items() if name in self.layout.specs]

    @property
    def decoded(self) -> list[TensorInfo]:
        """Of `copied` those that the source stores in codes, which mean nothing in the output."""
        return [tensor for tensor in self.copied if tensor.name in self.plain.parts]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears, scales and zero points included, per weight."""
        stored = sum(spec.nbytes for layer in self.quantized for spec in layer.packed())
        return 8 * stored / sum(layer.out_features * layer.in_features for layer in self.quantized)


def bounded(config: QuantizeConfig, checkpoint: Checkpoint) -> QuantizeConfig:
    """`config` with windows for which the model has positions; ConfigError as `bounded_seqlen`."""
    seqlen = bounded_seqlen(
        config.seqlen, said="seqlen" in config.model_fields_set, checkpoint=checkpoint
    )
    return config.model_copy(update={"seqlen": seqlen})


def bounded_seqlen(seqlen: int, *, said: bool, checkpoint: Checkpoint) -> int:
    """`seqlen`, or the model's positions if they are fewer; ConfigError E_CFG_SEQLEN if the user said more."""
    declared = checkpoint.text_config
    limit = declared.get("max_position_embeddings") or declared.get("n_positions")
    if not isinstance(limit, int) or seqlen <= limit:
        return seqlen
    if said:
        raise ConfigError(
            "E_CFG_SEQLEN",
            f"seqlen {seqlen} is more than the model's {limit} positions",
            hint=f"use --seqlen {limit}",
        )
    return limit


def default_name(model: str, config: QuantizeConfig) -> str:
    """The output's name as published checkpoints are called: Qwen3-0.6B-GPTQ-Int4-g128."""
    path = expanded(model)
    name = (
        path.name if path.name not in ("", "..") else resolved(path).name
    )  # a link is called as its owner calls it
    name = plain_name(name)
    group = f"g{config.group_size}" if config.group_size > 0 else "channel"
    return f"{name}-GPTQ-Int{config.bits}-{group}"
