"""The `quantization_config` of the output, in the words that every reader understands.

Sources: transformers `GPTQConfig`, GPTQModel `QuantizeConfig`, vLLM `AutoGPTQConfig`, llama.cpp's converter (2026).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from gptq_cli.config.rules import FUSED_ALIASES, expert_part, keeps
from gptq_cli.config.schema import QuantizeConfig

# Fields of this tool alone: they shape codes and scales, and no reader needs or knows them.
UNKNOWN_TO_READERS = {"signed_scales", "scale_search", "refine_sweeps", "asymmetric_calibration", "damp_mode"}


def describe(config: QuantizeConfig, quantized: Iterable[str], kept: Iterable[str]) -> dict[str, Any]:
    """The dict for config.json. `quantized` and `kept` are full names of linears; kept ones lie inside the blocks.

    When a linear of a block is kept, both dialects say so: transformers reads `modules_in_block_to_quantize`, GPTQModel
    and SGLang read `dynamic`. Mixtures say it in `dynamic` alone: transformers 5 cannot load quantized experts at all,
    and the list would hold tens of thousands of names. No value is null, `desc_act` is true and `static_groups` false
    if any g_idx is not trivial, `format` and `checkpoint_format` agree: each of these was seen to break a reader.
    """
    quantized, kept = list(quantized), list(kept)
    chosen = [choice for name in quantized if (choice := config.for_layer(name))]
    ordered = any(choice.desc_act and not choice.static_groups for choice in chosen)
    described: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": ordered,
        "sym": config.sym,
        "checkpoint_format": config.format,
        "format": config.format,
        "lm_head": "lm_head" in quantized,
        "true_sequential": config.true_sequential,
        "static_groups": config.static_groups and not ordered,
        "act_group_aware": config.act_group_aware and not ordered,
        "damp_percent": config.damp_percent,
        "pack_dtype": "int32",
    }
    overrides = {
        rule: {key: value for key, value in values.items() if key not in UNKNOWN_TO_READERS}
        for rule, values in config.dynamic.items()
        if not keeps(rule)
    }
    mixtures = {part[0] for name in quantized if (part := expert_part(name))}
    # Engines ask for the settings of all experts of a layer by the name that these share.
    whole = {part[0]: None for name in kept if (part := expert_part(name)) and part[0] not in mixtures}
    if kept or overrides:
        described["dynamic"] = {rule: {} for rule in skip_rules([*kept, *whole])} | overrides
    if kept and not mixtures:
        described["modules_in_block_to_quantize"] = [quantized]
    return described


def skip_rules(kept: Iterable[str]) -> list[str]:
    """Anchored `-:` rules that match exactly `kept` (and the fused names that stand for them), one a parent module."""
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in kept:
        parent, _, leaf = name.rpartition(".")
        leaves[parent].add(leaf)
    parents: dict[frozenset[str], list[str]] = defaultdict(list)
    for parent, names in leaves.items():
        parents[frozenset(names | {alias for parts, alias in FUSED_ALIASES.items() if parts <= names})].append(parent)
    return [
        f"-:^({'|'.join(map(re.escape, where))})\\.({'|'.join(map(re.escape, sorted(names)))})$"
        for names, where in parents.items()
    ]
