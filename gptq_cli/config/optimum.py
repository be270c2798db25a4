"""The dict that Optimum's GPTQQuantizer and transformers' GPTQConfig write, taken as it is and without loss.

A foreign field is renamed when we have the same thing under another name, noted when it cannot change our result, and
refused when its value asks for something that we would not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptq_cli.config.finding import Finding, KeyPath, shown

RENAMED = {"checkpoint_format": "format", "model_seqlen": "seqlen"}

# field -> why no value of it can change the result
WITHOUT_EFFECT = {
    "meta": "it says which tool wrote the dict",
    "pad_token_id": "calibration windows are full, nothing is padded",
    "max_input_length": "it sizes a buffer of a kernel that is not used here",
    "cache_block_outputs": "block outputs are always kept for the next block",
    "module_name_preceding_first_block": "the model's own forward runs what comes before the blocks",
}

# field -> (the only value we can honour besides null, what happens here instead)
ONLY = {
    "quant_method": ("gptq", "this tool writes GPTQ"),
    "pack_dtype": ("int32", "codes are packed into int32 words"),
    "tokenizer": (None, "calibration uses the tokenizer that comes with the model"),
    "block_name_to_quantize": (None, "the blocks are found by running the model"),
}
SILENT_DEFAULTS = {"cache_block_outputs": True}


@dataclass(frozen=True, slots=True)
class Adopted:
    """Values under our names, the path each renamed one came from, and what to say about the rest."""

    values: dict[str, Any]
    renamed: dict[KeyPath, KeyPath] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adopt(values: Mapping[str, Any]) -> Adopted:
    """`values` with the fields of Optimum 2.3 and transformers 5 translated, noted or refused."""
    adopted = Adopted({})
    for key, value in values.items():
        if key in RENAMED:
            _rename(adopted, values, key, value)
        elif key in WITHOUT_EFFECT:
            if value not in (None, {}, [], SILENT_DEFAULTS.get(key)):
                adopted.notes.append(f"{key} has no effect: {WITHOUT_EFFECT[key]}")
        elif key in ONLY:
            _insist(adopted, key, value)
        elif value is not None or key not in adopted.values:
            adopted.values[key] = value
    return adopted


def _rename(adopted: Adopted, values: Mapping[str, Any], key: str, value: Any) -> None:
    ours = RENAMED[key]
    if value is None:
        return
    if values.get(ours) is None:
        adopted.values[ours] = value
        adopted.renamed[(ours,)] = (key,)
    elif values[ours] != value:
        says = f"mean the same and differ: {shown(value)} and {shown(values[ours])}"
        adopted.findings.append(Finding(((key,), (ours,)), "E_CFG_CONFLICT", says, f"keep {ours} only"))


def _insist(adopted: Adopted, key: str, value: Any) -> None:
    only, why = ONLY[key]
    if value is None or value == only:
        return
    accepted = "left out" if only is None else f"{only}"
    hint = f"remove it: {why}"
    adopted.findings.append(Finding(((key,),), "E_CFG_RANGE", f"must be {accepted}, got {shown(value)}", hint))
