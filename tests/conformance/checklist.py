"""The fifty points that a checkpoint must meet to be loaded everywhere, and where each is checked.

Each function of `CHECKS` complains about a source and the checkpoint made of it. Other points are
checked by `gptq verify` (BY_VERIFY names the defect planted in its tests) or by tests of other
parts, or they do not apply, for the reason given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.storage.manifest import INDEX_NAME
from tests.conformance.readers import Directory, Refused, exllamav2, fused_modules, overridden, vllm

PARTS = ("qweight", "qzeros", "scales", "g_idx")
ENGINE_KEYS = ("bits", "group_size", "desc_act", "sym")


@dataclass(frozen=True, slots=True)
class Pair:
    """A source directory and the checkpoint that was made of it."""

    source: Path
    output: Path

    @property
    def described(self) -> dict[str, Any]:
        return self.json("config.json")["quantization_config"]

    def json(self, name: str, *, of_source: bool = False) -> Any:
        return json.loads(((self.source if of_source else self.output) / name).read_text())

    @property
    def kept(self) -> list[str]:
        """Linears of the blocks that are not packed."""
        read = Directory(self.output)
        return [
            name
            for name in read.linears()
            if f"{name}.weight" in read.tensors and name != "lm_head"
        ]

    def bytes_of(self, directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        tensors = open_checkpoint(directory).tensors.values()
        return {t.name: (t.dtype, t.shape, t.file.read_bytes()[t.start : t.end]) for t in tensors}


def keys_are_there(pair: Pair) -> Iterator[str]:
    yield from (f"no {key}" for key in (*ENGINE_KEYS, "quant_method") if key not in pair.described)


def formats_agree(pair: Pair) -> Iterator[str]:
    for file in (pair.described, pair.json("quantize_config.json")):
        said = {file.get("format"), file.get("checkpoint_format")}
        if len(said) != 1 or not said <= {"gptq", "gptq_v2"}:
            yield f"formats {said}"


def nothing_that_breaks_a_reader(pair: Pair) -> Iterator[str]:
    bad = {"meta", "is_marlin_format", "autoround_version"} & set(pair.described)
    yield from (f"{key} in config.json" for key in bad)
    yield from (f"{key} is null" for key, value in pair.described.items() if value is None)


def both_files_say_the_same(pair: Pair) -> Iterator[str]:
    other = pair.json("quantize_config.json")
    meta = other.pop("meta", None)
    if other != pair.described:
        yield "quantize_config.json differs from config.json"
    if not isinstance(meta, dict) or not all(
        re.fullmatch(r"\w+:[\w.]+", name) for name in meta.get("quantizer", [0])
    ):
        yield "meta has no quantizer name:version"


def damping_is_inside(pair: Pair) -> Iterator[str]:
    if not 0 < pair.described.get("damp_percent", 0.1) < 1:
        yield "damp_percent"


def list_is_exact(pair: Pair) -> Iterator[str]:
    listed = pair.described.get("modules_in_block_to_quantize")
    if listed is not None and {name for stage in listed for name in stage} != set(
        Directory(pair.output).modules()
    ):
        yield "modules_in_block_to_quantize does not name exactly what is packed"


def rules_are_anchored(pair: Pair) -> Iterator[str]:
    rules = pair.described.get("dynamic", {})
    modules, kept = Directory(pair.output).modules(), set(pair.kept)
    for rule in (rule for rule in rules if rule.startswith("-:")):
        if not re.fullmatch(r"-:\^.*\$", rule):
            yield f"{rule} is not anchored"
        yield from (f"{rule} reaches {name}" for name in modules if re.match(rule[2:], name))
    for prefix, shards in fused_modules(sorted({*modules, *kept})):
        if set(shards) <= kept and not any(
            re.match(rule[2:], prefix) for rule in rules if rule.startswith("-:")
        ):
            yield f"no rule reaches {prefix}"


def kept_is_said_twice(pair: Pair) -> Iterator[str]:
    if pair.kept and not {"dynamic", "modules_in_block_to_quantize"} <= set(pair.described):
        yield "something is kept, and only one dialect says so"


def fused_modules_are_alike(pair: Pair) -> Iterator[str]:
    read = Directory(pair.output)
    base = {key: pair.described[key] for key in ENGINE_KEYS}
    for prefix, shards in fused_modules(read.linears()):
        if len({f"{shard}.qweight" in read.tensors for shard in shards}) > 1:
            yield f"{prefix} is packed in part"
        try:
            overridden(read, base, prefix, shards)
        except Refused as error:
            yield str(error)


def the_head_is_as_said(pair: Pair) -> Iterator[str]:
    packed = "lm_head.qweight" in Directory(pair.output).tensors
    if pair.described.get("lm_head") is not packed:
        yield "lm_head"
    if packed and pair.json("config.json").get("tie_word_embeddings") is not False:
        yield "a packed head that is tied"


def configuration_is_the_sources(pair: Pair) -> Iterator[str]:
    free = {"quantization_config", "tie_word_embeddings"}
    source, output = pair.json("config.json", of_source=True), pair.json("config.json")
    if [(k, v) for k, v in source.items() if k not in free] != [
        (k, v) for k, v in output.items() if k not in free
    ]:
        yield "config.json is not the source's"


def class_and_dtype_are_there(pair: Pair) -> Iterator[str]:
    config = pair.json("config.json")
    if "architectures" not in config or not {"torch_dtype", "dtype"} & set(config):
        yield "no architectures or no dtype"


def nothing_else_beside_a_module(pair: Pair) -> Iterator[str]:
    tensors = Directory(pair.output).tensors
    for module in Directory(pair.output).modules():
        found = {
            name.removeprefix(f"{module}.") for name in tensors if name.startswith(f"{module}.")
        }
        if found - {"bias"} != set(PARTS):
            yield f"{module} has {sorted(found)}"


def dtypes_are_the_writers(pair: Pair) -> Iterator[str]:
    expected = dict(zip(PARTS, ("I32", "I32", "F16", "I32"), strict=True))
    for name, tensor in open_checkpoint(pair.output).tensors.items():
        if tensor.dtype != expected.get(name.rpartition(".")[2], tensor.dtype):
            yield f"{name} is {tensor.dtype}"


def shapes_match_the_source(pair: Pair) -> Iterator[str]:
    source, output = open_checkpoint(pair.source).tensors, open_checkpoint(pair.output).tensors
    for module in Directory(pair.output).modules():
        shape = (output[f"{module}.scales"].shape[1], output[f"{module}.g_idx"].shape[0])
        if shape != source[f"{module}.weight"].shape:
            yield f"{module} is {shape}"


def fused_modules_share_an_order(pair: Pair) -> Iterator[str]:
    read = Directory(pair.output)
    for prefix, shards in fused_modules(read.modules()):
        if len({read.tensors[f"{shard}.g_idx"].tobytes() for shard in shards}) > 1:
            yield f"{prefix} has several g_idx"


def biases_are_the_sources(pair: Pair) -> Iterator[str]:
    source, output = pair.bytes_of(pair.source), pair.bytes_of(pair.output)
    names = {name for name in {*source, *output} if name.endswith(".bias")}
    yield from (name for name in names if source.get(name) != output.get(name))


def kept_tensors_are_the_sources(pair: Pair) -> Iterator[str]:
    source, output = pair.bytes_of(pair.source), pair.bytes_of(pair.output)
    packed = {f"{module}.weight" for module in Directory(pair.output).modules()}
    yield from (name for name in set(source) - packed if source[name] != output.get(name))


def names_are_the_sources(pair: Pair) -> Iterator[str]:
    source = {name.removesuffix(".weight") for name in open_checkpoint(pair.source).tensors}
    for name in open_checkpoint(pair.output).tensors:
        module, _, part = name.rpartition(".")
        if (module if part in (*PARTS, "weight") else name) not in source:
            yield f"{name} is new"


def the_index_counts(pair: Pair) -> Iterator[str]:
    files = sorted(path.name for path in pair.output.glob("*.safetensors"))
    if files == ["model.safetensors"]:
        return
    if files != [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]:
        yield f"files are called {files}"
    if pair.json(INDEX_NAME)["metadata"]["total_size"] != open_checkpoint(pair.output).nbytes:
        yield "total_size"


def headers_say_pt(pair: Pair) -> Iterator[str]:
    for file in pair.output.glob("*.safetensors"):
        with safe_open(str(file), "np") as opened:
            if opened.metadata() != {"format": "pt"}:
                yield f"{file.name} has metadata {opened.metadata()}"


def no_other_weights(pair: Pair) -> Iterator[str]:
    index = pair.output / INDEX_NAME
    named = (
        set(pair.json(INDEX_NAME)["weight_map"].values())
        if index.exists()
        else {"model.safetensors"}
    )
    ends = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
    yield from (
        path.name
        for path in pair.output.rglob("*")
        if path.name.endswith(ends) and path.name not in named
    )


def parts_share_a_file(pair: Pair) -> Iterator[str]:
    tensors = open_checkpoint(pair.output).tensors
    for module in Directory(pair.output).modules():
        if len({tensors[f"{module}.{part}"].file for part in PARTS}) > 1:
            yield f"{module} is in several files"


def other_files_are_the_sources(pair: Pair) -> Iterator[str]:
    for file in open_checkpoint(pair.source).other_files():
        copy = pair.output / file
        if not copy.is_file() or copy.read_bytes() != (pair.source / file).read_bytes():
            yield str(file)


def nothing_is_left_over(pair: Pair) -> Iterator[str]:
    yield from (
        path.name
        for path in pair.output.rglob("*")
        if re.search(r"^\.|\.tmp|quant_input|observer", path.name)
    )
    yield from (
        n for n in open_checkpoint(pair.output).tensors if re.search("quant_input|observer", n)
    )


def vllm_reads_it(pair: Pair) -> Iterator[str]:
    if (pair.described["bits"], pair.described["sym"]) in ((4, True), (8, True)):
        try:
            vllm(pair.output)
        except Refused as error:
            yield str(error)


def exllamav2_reads_it(pair: Pair) -> Iterator[str]:
    if pair.described["bits"] == 4 and not any(
        "bits" in rule for rule in pair.described.get("dynamic", {}).values()
    ):
        try:
            exllamav2(pair.output)
        except Refused as error:
            yield str(error)


def routers_are_kept_and_said(pair: Pair) -> Iterator[str]:
    names = [name.rpartition(".")[0] for name in Directory(pair.output).tensors]
    rules = [rule[2:] for rule in pair.described.get("dynamic", {}) if rule.startswith("-:")]
    if any(".experts." in name for name in names):
        for name in {
            name
            for name in names
            if re.search(r"(mlp|block_sparse_moe)\.(shared_expert_)?gate$", name)
        }:
            if f"{name}.weight" not in Directory(pair.output).tensors or not any(
                re.match(r, name) for r in rules
            ):
                yield f"{name} is packed, or no rule keeps it"


def experts_are_alike(pair: Pair) -> Iterator[str]:
    read = Directory(pair.output)
    base = {key: pair.described[key] for key in ENGINE_KEYS}
    layers: dict[str, list[str]] = {}
    for name in read.linears():
        if ".experts." in name:
            layers.setdefault(name.partition(".experts.")[0] + ".experts", []).append(name)
    for prefix, experts in layers.items():
        if {f"{expert}.qweight" in read.tensors for expert in experts} != {True}:
            yield f"{prefix} is packed in part"
        try:
            overridden(read, base, prefix, experts)
        except Refused as error:
            yield str(error)


CHECKS: dict[int, Callable[[Pair], Iterator[str]]] = {
    2: keys_are_there, 4: formats_agree, 5: nothing_that_breaks_a_reader,
                                                      6: both_files_say_the_same,
    7: damping_is_inside, 8: list_is_exact, 9: rules_are_anchored, 10: kept_is_said_twice,
                                                      11: fused_modules_are_alike,
    12: routers_are_kept_and_said, 13: the_head_is_as_said, 15: configuration_is_the_sources,
    16: class_and_dtype_are_there, 17: nothing_else_beside_a_module, 18: dtypes_are_the_writers,
    19: shapes_match_the_source,
    22: fused_modules_share_an_order, 29: biases_are_the_sources, 30: kept_tensors_are_the_sources,
    32: names_are_the_sources, 34: experts_are_alike, 36: the_index_counts, 37: headers_say_pt,
                                                      38: no_other_weights,
    39: parts_share_a_file,
    41: other_files_are_the_sources, 43: nothing_is_left_over, 49: vllm_reads_it,
                                                      50: exllamav2_reads_it,
}  # fmt: skip

BY_VERIFY: dict[int, str] = {
    1: "upper case", 14: "hidden order", 20: "group size 48", 21: "group uneven",
                             23: "one odd zero",
    24: "wrapped zero", 25: "scale too small",
}  # fmt: skip

# Points about engines, packing, sharding and publishing, which the tests of these parts check.
BY_OTHER_TESTS = (3, 26, 27, 28, 31, 33, 40, 42, 44, 45, 46, 47, 48)

NOT_HERE: dict[int, str] = {
    35: "how many devices will share a layer is not known when it is written",
}
