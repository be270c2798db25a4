"""Faults of a configuration, a model or a dataset: each function breaks a sound model directory.

A case has the number of its row in the project's catalogue of faults; `tests/test_faults.py` runs
all cases.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.gptq_files import gptq_files

INDEX = "model.safetensors.index.json"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00002-of-00003.safetensors"
ESCAPE = "\x1b[31m[red]evil<b>[/red]"
Arrange = Callable[[Path], list[str]]


@dataclass(frozen=True, slots=True)
class Case:
    """What to run and what it must say; `arrange` gets a folder with `model` and `text.txt` in it.

    `begun`: the fault is met by a run that has begun, whose finished blocks are kept.
    """

    row: int
    name: str
    arrange: Arrange
    code: str
    message: str
    hint: str = ""
    exit_code: int = 3
    begun: bool = False

    def __str__(self) -> str:
        return f"{self.row}-{self.name}"


def run(folder: Path, *more: str) -> list[str]:
    """A quantization that would work."""
    given = {word.partition("=")[0] for word in more}
    defaults = [f"--dataset={folder}/text.txt", "--bits=4", "--group-size=32", "--nsamples=4",
                "--batch-size=1",
                "--seqlen=32", "--device=cpu", f"--output={folder}/out"]  # fmt: skip
    words = [word for word in defaults if word.partition("=")[0] not in given]
    return ["quantize", str(folder / "model"), *words, *more]


def flags(*more: str) -> Arrange:
    return lambda folder: run(folder, *more)


def recipe(text: str | bytes) -> Arrange:
    """A configuration file with this content, checked."""

    def arrange(folder: Path) -> list[str]:
        (folder / "cfg.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["validate-config", str(folder / "cfg.yaml")]

    return arrange


def broken(break_it: Callable[[Path], object], *more: str) -> Arrange:
    """The quantization after `break_it(model directory)`."""

    def arrange(folder: Path) -> list[str]:
        break_it(folder / "model")
        return run(folder, *more)

    return arrange


def dataset(name: str, content: str | bytes, *more: str) -> Arrange:
    def arrange(folder: Path) -> list[str]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return run(folder, f"--dataset={folder / name}", *more)

    return arrange


def config(**changes: object) -> Callable[[Path], object]:
    def break_it(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return break_it


def tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> Callable[[Path], object]:
    """Replaces one tensor of a model of three shards, or takes it out of its shard."""

    def break_it(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        file = model / index["weight_map"][name]
        tensors = load_file(file)
        changed = change(tensors.pop(name).clone())
        if changed is None:
            del index["weight_map"][name]
            (model / INDEX).write_text(json.dumps(index))
        save_file(
            tensors if changed is None else {**tensors, name: changed},
            file,
            metadata={"format": "pt"},
        )

    return break_it


def poisoned(value: torch.Tensor) -> torch.Tensor:
    value.view(-1)[3] = float("nan")
    return value


def replaced(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / name).write_bytes(content)


def mapped(name: str) -> Callable[[Path], object]:
    """Lets the index put a tensor into the file `name`."""

    def break_it(model: Path) -> None:
        index = json.loads((model / INDEX).read_text())
        index["weight_map"]["model.embed_tokens.weight"] = name
        (model / INDEX).write_text(json.dumps(index))

    return break_it


def both(*breaks: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda model: [break_it(model) for break_it in breaks]


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


def only(**files: bytes) -> Callable[[Path], object]:
    """Leaves nothing but `files` beside the configuration."""

    def break_it(model: Path) -> None:
        for path in list(model.iterdir()):
            if path.name != "config.json":
                path.unlink()
        for name, content in files.items():
            (model / name.replace("__", ".")).write_bytes(content)

    return break_it


def linked(name: str) -> Callable[[Path], object]:
    """Moves a file out of the model and links to it."""

    def break_it(model: Path) -> None:
        outside = model.parent / "outside"
        outside.mkdir()
        shutil.move(model / name, outside / name)
        (model / name).symlink_to(outside / name)

    return break_it


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


OWN_CONFIG = {"AutoConfig": "configuration_own.Own"}
OWN_TOKENIZER = (
    b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}'
)

OWN_TOKENIZER_CODE = both(
    replaced("tokenizer_config.json", OWN_TOKENIZER), replaced("tokenization_own.py", b"")
)


def without_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


def evaluated(change: Callable[[Path], object], *more: str) -> Arrange:
    """The perplexity of a quantized checkpoint after `change`."""

    def arrange(folder: Path) -> list[str]:
        directory = gptq_files().write(folder / "quantized")
        change(directory)
        return ["eval-ppl", str(directory), f"--dataset={folder}/text.txt", "--seqlen=32", *more]

    return arrange


def truncated(file: str, n_bytes: int = 1) -> Callable[[Path], object]:
    return lambda model: os.truncate(model / file, (model / file).stat().st_size - n_bytes)


def appended(file: str) -> Callable[[Path], object]:
    return lambda model: (model / file).write_bytes((model / file).read_bytes() + b"x")


def relabelled(directory: Path) -> None:
    content = json.loads((directory / "config.json").read_text())
    content["quantization_config"].update(format="gptq_v2", checkpoint_format="gptq_v2")
    (directory / "config.json").write_text(json.dumps(content))


CONFIGURATION = [
    Case(1, "flag", flags("--bitz=4"), "E_USAGE", "there is no option --bitz", "--bits", 2),
    Case(1, "command", lambda _: ["quantise", "m"], "E_USAGE", "there is no command `quantise`",
         "quantize?", 2),
    Case(2, "key", recipe("bits: 4\ngroup_sise: 8\n"), "E_CFG_UNKNOWN_KEY", "group_sise",
         "group_size", 2),
    Case(3, "type", recipe('bits: 4\nnsamples: "128"\n'), "E_CFG_TYPE", '"128"', "without quotes",
         2),
    *(Case(4, f"bits {bits}", recipe(f"bits: {bits}\n"), code, "bits must be 2, 3, 4, 5, 6, 7 or 8",
          "", 2)
      for bits, code in (("9", "E_CFG_RANGE"), ("0", "E_CFG_RANGE"), ("1.5", "E_CFG_RANGE"))),
    Case(4, "bits of a format", recipe("bits: 5\n"), "E_CFG_FORMAT", "gptq stores 2, 3, 4 or 8",
         "compressed-tensors, mlx or auto-round", 2),
    Case(5, "group 0", recipe("bits: 4\ngroup_size: 0\n"), "E_CFG_RANGE", "got 0", "write -1", 2),
    Case(5, "group -2", recipe("bits: 4\ngroup_size: -2\n"), "E_CFG_RANGE",
         "-1 for one group per row, or auto, got -2", "", 2),
    *(Case(7, f"damp {damp}", recipe(f"bits: 4\ndamp_percent: {damp}\n"), "E_CFG_RANGE",
           "strictly between 0 and 1", "0.01 to 0.1", 2)
      for damp in ("0", "1", ".nan", ".inf", "-0.1")),
    Case(8, "twice", recipe("bits: 4\nbits: 8\n"), "E_CFG_YAML", "given twice, first in",
         "keep one", 2),
    Case(8, "tab", recipe("bits: 4\ndynamic:\n\t'-:a': {}\n"), "E_CFG_YAML", "tab", "spaces", 2),
    Case(8, "indent", recipe("bits: 4\n  seed: 1\n"), "E_CFG_YAML", "cannot stand here",
         "indentation", 2),
    Case(8, "latin1", recipe(b"bits: 4\npreset: gptq # \xe9\n"), "E_CFG_YAML", "0xe9 is not UTF-8",
         "UTF-8", 2),
    Case(8, "bom", recipe(b"\xef\xbb\xbfbits: 4\n"), "E_CFG_YAML", "byte order mark", "without BOM",
         2),
    Case(9, "tag", recipe("bits: !!python/object/apply:os.system ['x']\n"), "E_CFG_YAML",
         "not allowed", "", 2),
    Case(9, "alias", recipe("bits: &a 4\nseed: *a\n"), "E_CFG_YAML", "not allowed", "", 2),
    Case(9, "large", recipe("#" * 1_000_001), "E_CFG_YAML", "larger than 1 MB", "", 2),
    Case(10, "missing", lambda f: ["validate-config", f"{f}/none"], "E_CFG_FILE", "No such file",
         "", 2),
    Case(10, "folder", lambda f: ["validate-config", str(f)], "E_CFG_FILE", "is a directory", "",
         2),
    Case(11, "regex", flags("--dynamic=-:("), "E_CFG_REGEX", "is not a regular expression", ".*",
         2),
    Case(11, "nested", flags("--dynamic=-:[[a]"), "E_CFG_REGEX", "nested set", ".*", 2),
    Case(11, "endless", flags("--dynamic=-:(.|..|...)+(?!.|$)"), "E_CFG_REGEX", "takes more than",
         "repetition", 2),
    Case(11, "no match", flags("--dynamic=-:down_proj"), "E_CFG_NO_MATCH", "matches no layer",
         "mlp[.]down_proj$", 2),
    Case(12, "nothing", flags("--dynamic=-:.*"), "E_CFG_NOTHING_TO_DO", "no layer to quantize", "",
         2),
    Case(13, "conflict", flags("--desc-act", "--act-group-aware"), "E_CFG_CONFLICT",
         "exclude each other",
         "leave out --act-group-aware", 2),
    Case(13, "target", recipe("bits: 4\nsym: false\ntarget: vllm\n"), "E_TARGET",
         "vllm does not load asymmetric grids",
         "--sym", 2),
    Case(14, "seqlen", flags("--seqlen=4096"), "E_CFG_SEQLEN", "the model's 128 positions",
         "--seqlen 128", 2),
    Case(15, "samples", flags("--nsamples=0"), "E_CFG_RANGE",
         "--nsamples must be a whole number of 1 or more", "", 2),
    Case(61, "fallbacks", flags("--max-fallbacks=-1"), "E_CFG_RANGE", "0 or more", "", 2),
    Case(61, "policy", flags("--on-numeric-fault=skip"), "E_CFG_RANGE", "error or rtn", "", 2),
    Case(82, "limit", evaluated(lambda _: None, "--max-ppl=0"), "E_CFG_RANGE", "above 0", "", 2),
    Case(15, "batch", flags("--batch-size=9"), "E_CFG_RANGE", "a batch of 9 from 4 samples",
         "--batch-size 4 or less", 2),
]  # fmt: skip
DATA = [
    Case(17, "file", flags("--dataset=./none.txt"), "E_DATA_NOT_FOUND", "does not exist", "Hub id"),
    Case(17, "kind", dataset("x.doc", "a"), "E_DATA_NOT_FOUND", "not", ".jsonl"),
    Case(18, "short", dataset("x.txt", "a few words"), "E_DATA_SHORT",
         "gives 0 windows of 32 tokens", "give more text"),
    Case(18, "empty", dataset("x.txt", ""), "E_DATA_EMPTY", "empty file", "holds text"),
    Case(18, "no rows", dataset("x.csv", "text\n"), "E_DATA_EMPTY", "has no rows", "holds text"),
    Case(19, "column", dataset("x.jsonl", '{"body": "a", "title": "b"}\n'), "E_DATA_COLUMN",
         "it has `body`, `title`",
         "--text-column"),
    Case(19, "numbers", dataset("x.jsonl", '{"text": 4}\n'), "E_DATA_COLUMN",
         "line 1 holds a number", "fix it"),
    Case(19, "chats", dataset("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}'),
         "E_DATA_TEMPLATE", "the model has no chat template", "--chat-template FILE"),
    Case(19, "no chat", dataset("x.jsonl", '{"messages": [{"role": "user", "content": 1}]}'),
         "E_DATA_CHAT", "message 1 has a number as its content", "write each chat as"),
    Case(19, "no text", dataset("x.jsonl", '{"messages": []}'), "E_DATA_COLUMN",
         "it has `messages`", "a chat is a list of"),
    Case(19, "no template", dataset("x.jsonl", '{"messages": []}', "--chat-template=none.jinja"),
         "E_DATA_TEMPLATE", "`none.jinja` is not a file", "chat_template.jinja"),
    Case(19, "null", dataset("x.jsonl", '{"text": "a"}\n{"text": null}\n'), "E_DATA_COLUMN", "null",
         "fix it"),
    Case(19, "utf-16", dataset("x.TXT", "words".encode("utf-16")), "E_DATA_ENCODING", "is UTF-16",
         "iconv -f utf-16 "),
    Case(19, "nuls", dataset("x.TXT", bytes(99)), "E_DATA_FORMAT", "a NUL byte at offset 0",
         "holds text"),
    Case(20, "script", flags("--dataset=ptb"), "E_DATA_SCRIPT", "loading script", "wikitext2"),
    Case(21, "none", broken(without_tokenizer), "E_TOKENIZER", "has no tokenizer",
         "copy the tokenizer"),
]  # fmt: skip
MODEL = [
    Case(16, "path", lambda _: ["quantize", "./none", "-b", "4"], "E_MODEL_NOT_FOUND",
         "not a directory", "Hub id"),
    Case(23, "shard", broken(lambda m: (m / SHARD).unlink()), "E_CKPT_MISSING",
         "lacks 1 of 3 shards", "hf download"),
    Case(24, "cut", broken(truncated(SHARD)), "E_CKPT_CORRUPT", "bytes, found", "again"),
    Case(24, "cut header", broken(replaced(SHARD, b"\x40")), "E_CKPT_CORRUPT",
         "in a file of 1 bytes", "again"),
    Case(24, "trailing", broken(appended(SHARD)), "E_CKPT_CORRUPT", "expected", "again"),
    Case(25, "claims", broken(mapped(SHARD)), "E_CKPT_INDEX", "holds it", "of one revision"),
    Case(25, "absent", broken(tensor(UP_PROJ, lambda _: None)),
         "E_CKPT_INCOMPLETE",
         "no tensor"),
    Case(25, "key twice", broken(replaced(SHARD, header('{"a":1,"a":2}'))), "E_CKPT_CORRUPT",
         "duplicate key 'a'"),
    Case(26, "tensor", broken(tensor("model.norm.weight", lambda _: None)), "E_CKPT_INCOMPLETE",
         "no tensor for 1 parameters, first `model.norm.weight`", "download"),
    Case(27, "shape", broken(tensor("model.norm.weight", lambda t: t[:-1].clone())), "E_CKPT_SHAPE",
         "norm"),
    Case(27, "config", broken(config(intermediate_size=96)), "E_CKPT_SHAPE", "mlp"),
    Case(28, "nan", broken(tensor(UP_PROJ, poisoned)), "E_CKPT_NONFINITE",
         "`model.layers.1.mlp.up_proj.weight` in model-0000", "download"),
    Case(28, "beyond", broken(tensor(UP_PROJ, lambda t: t * 1e9)), "E_CKPT_NONFINITE",
         "`model.layers.1.mlp.up_proj`", "--dynamic", begun=True),
    *(Case(28, f"kept {name}", broken(tensor(name, poisoned)), "E_CKPT_NONFINITE",
           f"`{name}` in model-0000",
           "download") for name in ("model.norm.weight", "model.embed_tokens.weight")),
    Case(29, "fp8", broken(tensor(UP_PROJ, lambda t: t.to(torch.float8_e4m3fn))), "E_CKPT_FP8",
         "holds F8_E4M3 weights", "float16 or bfloat16 version"),
    *(Case(30, method, broken(config(quantization_config={"quant_method": method})),
           "E_CKPT_QUANTIZED", method,
           "full-precision") for method in ("gptq", "hqq", "compressed-tensors")),
    *(Case(30, f"{method} without",
           broken(config(quantization_config={"quant_method": method}), "--allow-requantize"),
           "E_CKPT_INCOMPLETE", f"is marked as quantized ({method}), but no linear is",
           "quantization_config") for method in ("gptq", "compressed-tensors", "mxfp4", "awq")),
    Case(30, "hqq allowed",
         broken(config(quantization_config={"quant_method": "hqq"}), "--allow-requantize"),
         "E_CKPT_QUANTIZED", "hqq", "full-precision"),
    Case(31, "pickle", broken(only(pytorch_model__bin=b"x")), "E_CKPT_PICKLE",
         "pickled weights only", "safetensors"),
    Case(32, "gguf", broken(only(model__gguf=b"GGUF")), "E_CKPT_KIND", "GGUF", "safetensors"),
    Case(32, "onnx", broken(only(model__onnx=b"x")), "E_CKPT_KIND", "ONNX", "safetensors"),
    Case(32, "adapter", broken(only(adapter_config__json=b"{}",
                                    adapter_model__safetensors=header("{}"))),
         "E_CKPT_KIND", "an adapter, not a model", "merge"),
    Case(34, "unknown", broken(config(model_type="nonsense")), "E_ARCH", "nonsense"),
    Case(35, "code", broken(config(model_type="own", auto_map=OWN_CONFIG)),
         "E_REMOTE_CODE", "needs its own Python code", "--trust-remote-code"),
    Case(35, "named code", broken(both(config(model_type="own", auto_map=OWN_CONFIG),
                                       replaced("configuration_own.py", b""))),
         "E_REMOTE_CODE", "to run: configuration_own.py", "read that code"),
    Case(35, "tokenizer", broken(OWN_TOKENIZER_CODE), "E_REMOTE_CODE", "the tokenizer of",
         "read that code, then add --trust-remote-code"),
    Case(35, "named tokenizer", broken(OWN_TOKENIZER_CODE), "E_REMOTE_CODE",
         "to run: tokenization_own.py", "--trust-remote-code"),
    Case(36, "no json", broken(replaced("config.json", b"{")), "E_CKPT_CONFIG",
         "cannot be read as JSON", "again"),
    Case(36, "no object", broken(replaced("config.json", b"[]")), "E_CKPT_CONFIG",
         "is not a JSON object"),
    Case(36, "quantized", broken(config(quantization_config="gptq")), "E_CKPT_CONFIG",
         "is not a JSON object", "again"),
    Case(36, "more layers", broken(config(num_hidden_layers=9)), "E_CKPT_INCOMPLETE",
         "has no tensor for",
         "download"),
    Case(37, "device", flags("--device=cuda:7"), "E_DEVICE", "no CUDA device 7", "--device cpu"),
    *(Case(71, f"index {name!r}", broken(mapped(name)), "E_UNSAFE_PATH",
           "points outside its directory",
           "do not use this checkpoint")
      for name in ("../x.safetensors", "/etc/x.safetensors", "C:\\x.safetensors",
                   "a\\b.safetensors", "C:x.safetensors",
                   "sub/x.safetensors", "..", "", "a\0.safetensors", "a\x1b.safetensors",
                   "a" * 300)),
    *(Case(71, f"link {name}", broken(linked(name)), "E_UNSAFE_PATH",
           "outside", "") for name in (SHARD, "config.json", INDEX, "tokenizer.json")),
    Case(73, "header", broken(replaced(SHARD, (2**62).to_bytes(8, "little") + b"{}")),
         "E_CKPT_CORRUPT", "a header of"),
    Case(73, "deep header", broken(replaced(SHARD, header(nested(100_000).decode()))),
         "E_CKPT_CORRUPT", "unreadable"),
    Case(73, "deep config", broken(replaced("config.json", nested(65))), "E_CKPT_CONFIG",
         "deeper than 64 levels"),
    Case(73, "deeper config", broken(replaced("config.json", nested(100_000))), "E_CKPT_CONFIG",
         "cannot be read"),
    Case(73, "config", broken(replaced("config.json", b" " * 5_000_001)), "E_CKPT_CONFIG",
         "larger than 5 MB"),
    Case(73, "index", broken(lambda m: os.truncate(m / INDEX, 2**31)), "E_CKPT_CONFIG",
         "larger than 50 MB"),
    Case(74, "overflow", broken(replaced(SHARD, header(
        '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'))),
         "E_CKPT_CORRUPT", "fit bytes"),
    Case(74, "text as size", broken(replaced(SHARD, header(
        '{"a":{"dtype":"F32","shape":["' + "x" * 99 + '",99999],"data_offsets":[0,0]}}'))),
         "E_CKPT_CORRUPT", "sizes"),
    Case(74, "truth as size", broken(replaced(SHARD, header(
        '{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}') + b"x")), "E_CKPT_CORRUPT",
         "sizes"),
    Case(74, "dtype", broken(replaced(SHARD, header(
        '{"a":{"dtype":"F3","shape":[],"data_offsets":[0,0]}}'))),
         "E_CKPT_CORRUPT", "malformed"),
    Case(76, "escapes", broken(replaced(SHARD, header(json.dumps({ESCAPE: 1})))), "E_CKPT_CORRUPT",
         "[red]evil<b>"),
]  # fmt: skip
EVALUATION = [
    Case(
        82,
        "torn",
        evaluated(truncated("model-00001-of-00002.safetensors")),
        "E_CKPT_CORRUPT",
        "found",
        "again",
    ),
    Case(
        82,
        "mislabelled",
        evaluated(relabelled),
        "E_CKPT_ZEROS",
        "as gptq stores them",
        "gptq verify",
    ),
]
CASES = [*CONFIGURATION, *DATA, *MODEL, *EVALUATION]
