"""Units: the groups of linear layers that get one bit width together.

All experts of a block are one unit. If an engine could load the widths but fuses layers (q, k, v;
gate, up), the parts of a fused layer are one unit, since it loads them with one setting only. Every
other quantized linear is a unit of its own. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from gptq_cli.config.layer import expert_part, fused_name, list_item, matches
from gptq_cli.errors import ConfigError
from gptq_cli.planning.run_plan import LayerPlan, RunPlan

BY_DEFAULT = "default"  # why a layer that no rule matches has its settings


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers that get one width, and what each width costs.

    `kind` is the name inside its block, which the units of all blocks share. `nbytes` maps each
    width that the unit may get to its bytes with all that is stored for them. If `ruled`, a rule
    of the user decides about the width.
    """

    name: str
    kind: str
    block: int
    layers: tuple[str, ...]
    n_weights: int
    nbytes: Mapping[int, int]
    ruled: bool = False

    @property
    def widths(self) -> list[int]:
        """The widths that the unit may get, from the narrowest to the widest."""
        return sorted(self.nbytes)


def unit_name(layer: str, *, fused: bool) -> str:
    """Return the name of the unit that holds the linear `layer`.

    >>> unit_name("model.layers.3.self_attn.k_proj", fused=True)
    'model.layers.3.self_attn.qkv_proj'
    >>> unit_name("model.layers.3.self_attn.k_proj", fused=False)
    'model.layers.3.self_attn.k_proj'
    >>> unit_name("model.layers.3.mlp.experts.7.up_proj", fused=False)
    'model.layers.3.mlp.experts'
    """
    part = expert_part(layer)
    if part is not None:
        return part[0]
    if fused:
        return fused_name(layer)
    return layer


def find_units(
    plans: Mapping[int, RunPlan], protect: str | None = None, *, fused: bool
) -> list[Unit]:
    """Return the units of a model in the order of its blocks.

    `plans` has the plan of the model at each width that may be given. If `fused`, the parts of what
    engines fuse are one unit. A unit with a layer whose name matches the regular expression
    `protect` gets the widest of them. Layers that have a rule of their own keep its width, and form
    units apart from the others. Raises ConfigError E_CFG_NO_MATCH if `protect` matches no layer.
    """
    layers: dict[str, list[str]] = {}
    first: dict[str, LayerPlan] = {}
    sizes: dict[str, dict[int, int]] = {}
    for _, plan in sorted(plans.items()):
        for layer in plan.quantized:
            first.setdefault(layer.name, layer)
            assert layer.config is not None
            bits = layer.config.bits
            sizes.setdefault(layer.name, {})[bits] = layer.packed_bytes(plan.packing)
    for name, layer in first.items():
        layers.setdefault(_unit_of(layer, fused=fused), []).append(name)
    if protect is not None:
        _check_matches(protect, first)
    units = []
    for name, members in layers.items():
        units.append(_unit(name, [first[member] for member in members], sizes, protect))
    return units


def _check_matches(protect: str, names: Collection[str]) -> None:
    """Raise ConfigError E_CFG_NO_MATCH if `protect` matches none of `names`."""
    if not any(matches(protect, name) for name in names):
        raise ConfigError(
            "E_CFG_NO_MATCH",
            f"protect: {protect!r} matches no layer",
            hint=f"it must match from the start of a name such as {next(iter(names))}",
        )


def _unit_of(layer: LayerPlan, *, fused: bool) -> str:
    """Return the name of the unit of a layer; layers with rules of their own are apart."""
    name = unit_name(layer.name, fused=fused)
    if layer.why == BY_DEFAULT:
        return name
    assert layer.config is not None
    return f"{name} ({layer.config.bits} bits by a rule)"


def _unit(
    name: str,
    layers: Sequence[LayerPlan],
    sizes: Mapping[str, Mapping[int, int]],
    protect: str | None,
) -> Unit:
    """Return the unit of `layers`; `sizes` has the bytes of each layer by width."""
    names = tuple(layer.name for layer in layers)
    nbytes: Counter[int] = Counter()
    for layer in names:
        nbytes.update(sizes[layer])
    if protect is not None and any(matches(protect, layer) for layer in names):
        widest = max(nbytes)
        nbytes = Counter({widest: nbytes[widest]})
    item = list_item(name)
    kind = name
    if item is not None:
        kind = item.inner
    return Unit(
        name=name,
        kind=kind,
        block=layers[0].block,
        layers=names,
        n_weights=sum(layer.n_weights for layer in layers),
        nbytes=dict(nbytes),
        ruled=layers[0].why != BY_DEFAULT,
    )
