"""Each point of the checklist has a check, our output meets it, and it finds a planted defect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.storage.manifest import INDEX_NAME
from tests.checkpoint.test_verify import PLANTED
from tests.conformance.checklist import BY_OTHER_TESTS, BY_VERIFY, CHECKS, NOT_HERE, Pair
from tests.conformance.test_readers import CASES, KEPT
from tests.conformance.written import write, write_mixture

Plant = Callable[[Pair], object]


def test_each_of_fifty_points_has_a_check_or_a_reason() -> None:
    places = [*CHECKS, *BY_VERIFY, *BY_OTHER_TESTS, *NOT_HERE]
    assert sorted(places) == list(range(1, 51))
    assert set(BY_VERIFY.values()) <= set(PLANTED)


@pytest.mark.parametrize("case", ["plain", *CASES])
def test_written_checkpoint_meets_every_point(case: str, tmp_path: Path) -> None:
    # The user's rules with settings stay as they were written; those of one layer split nothing.
    written = write(tmp_path, **CASES.get(case, {"bits": 4, "group_size": 32}))
    pair = Pair(written.source, written.output)
    assert {
        number: list(check(pair)) for number, check in CHECKS.items() if list(check(pair))
    } == {}


@pytest.mark.parametrize("bits", [4, 8])
def test_mixture_of_experts_meets_every_point(bits: int, tmp_path: Path) -> None:
    written = write_mixture(tmp_path, bits=bits, group_size=32)
    pair = Pair(written.source, written.output)
    assert {
        number: list(check(pair)) for number, check in CHECKS.items() if list(check(pair))
    } == {}
    assert verify_checkpoint(written.output, full=True).defects == ()


def config(change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Plant:
    def plant(pair: Pair) -> None:
        content = pair.json(file)
        change(content)
        (pair.output / file).write_text(json.dumps(content))

    return plant


def said(**changes: object) -> Plant:
    return config(lambda content: content["quantization_config"].update(changes))


def unsaid(key: str) -> Plant:
    return config(lambda content: content["quantization_config"].pop(key))


def tensors(
    change: Callable[[dict[str, np.ndarray]], object], metadata: dict[str, str] | None = None
) -> Plant:
    """Changes the tensors of the file that holds the first q_proj."""

    def plant(pair: Pair) -> None:
        for file in pair.output.glob("*.safetensors"):
            found = load_file(file)
            if f"{Q0}.qweight" in found:
                change(found)
                save_file(found, file, metadata=metadata or {"format": "pt"})

    return plant


def index(change: Callable[[dict[str, Any]], object]) -> Plant:
    return config(change, INDEX_NAME)


def file(name: str, content: bytes) -> Plant:
    return lambda pair: (pair.output / name).write_bytes(content)


def moved_scales(pair: Pair) -> None:
    """Puts the scales of one module into the last file."""
    content = pair.json(INDEX_NAME)
    last = sorted(set(content["weight_map"].values()))[-1]
    source = pair.output / content["weight_map"][f"{Q0}.scales"]
    first, second = load_file(source), load_file(pair.output / last)
    second[f"{Q0}.scales"] = first.pop(f"{Q0}.scales")
    content["weight_map"][f"{Q0}.scales"] = last
    save_file(first, source, metadata={"format": "pt"})
    save_file(second, pair.output / last, metadata={"format": "pt"})
    (pair.output / INDEX_NAME).write_text(json.dumps(content))


def renamed(old: str, new: str) -> Plant:
    def plant(pair: Pair) -> None:
        tensors(lambda found: found.update({new: found.pop(old)}))(pair)
        index(lambda content: content["weight_map"].update({new: content["weight_map"].pop(old)}))(
            pair
        )

    return plant


Q0 = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"
FUSED_RULES = {r"-:^(model\.layers\.1\.self_attn)\.(q_proj|k_proj|v_proj)$": {}}
SLIPS: dict[int, Plant] = {
    2: unsaid("sym"),
    4: config(lambda content: content.update(format="gptq_v2"), "quantize_config.json"),
    5: said(meta=None),
    6: config(lambda content: content.update(bits=8), "quantize_config.json"),
    7: said(damp_percent=0),
    8: said(modules_in_block_to_quantize=[["q_proj"]]),
    9: said(dynamic=FUSED_RULES),
    10: unsaid("modules_in_block_to_quantize"),
    11: said(dynamic={"+:.*q_proj": {"bits": 8}}),
    12: unsaid("dynamic"),
    13: said(lm_head=True),
    15: config(lambda content: content.update(rope_theta=1)),
    16: config(lambda content: content.pop("architectures")),
    17: renamed(f"{Q0}.bias", f"{Q0}.weight"),
    18: tensors(
        lambda found: found.update({f"{Q0}.scales": found[f"{Q0}.scales"].astype(np.float32)})
    ),
    19: tensors(lambda found: found.update({f"{Q0}.g_idx": np.zeros(32, np.int32)})),
    22: tensors(lambda found: found.update({f"{Q0}.g_idx": found[f"{Q0}.g_idx"][::-1].copy()})),
    29: tensors(lambda found: found[f"{Q0}.bias"].__setitem__(3, 1)),
    30: tensors(lambda found: found[NORM].__setitem__(3, 1)),
    32: renamed(NORM, "model.layers.0.norm1.weight"),
    34: said(dynamic={r"+:.*experts\.1\.": {"bits": 8}}),
    36: index(lambda content: content["metadata"].update(total_size=1)),
    37: tensors(lambda _: None, {"format": "pt", "made_by": "x"}),
    38: file("consolidated.safetensors", b""),
    39: moved_scales,
    41: file("chat_template.jinja", b"another"),
    43: file(".model.tmp", b""),
    49: said(group_size=48),
    50: tensors(lambda found: found.update({f"{Q0}.scales": found[f"{Q0}.scales"][:, :32].copy()})),
}


@pytest.mark.parametrize("number", CHECKS)
def test_check_of_a_point_finds_its_planted_defect(number: int, tmp_path: Path) -> None:
    mixture = number in (12, 34)
    settings = {"bits": 4, "group_size": 32}
    written = (
        write_mixture(tmp_path, **settings)
        if mixture
        else write(tmp_path, dynamic=KEPT, **settings)
    )
    pair = Pair(written.source, written.output)
    assert list(CHECKS[number](pair)) == []
    SLIPS[number](pair)
    assert list(CHECKS[number](pair)) != []
