"""Random damage, from a seed, to configurations, headers, indexes, quantization configs, reports.

An input is damaged as bytes or, if it is JSON, as a value. The program must accept the result or
refuse it with exit code 2 or 3 (`verify`: with a list of defects), within seconds and without any
other exception.
"""

from __future__ import annotations

import json
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptq_cli.checkpoint.headers import read_header
from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.config.resolve import resolve
from gptq_cli.errors import GptqError
from gptq_cli.publish.report import read_evaluation, read_run
from gptq_cli.storage.manifest import INDEX_NAME, REPORT_DATA
from tests.checkpoint.gptq_files import SHARDS, gptq_files

SECONDS = 5
ROOT = Path(__file__).resolve().parents[1]
RECIPES = [file.read_bytes() for file in sorted((ROOT / "configs").glob("*.y*ml"))]
TOKENS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"---\n", b"!!python/object:os.system ", b"&a ", b"*a",
          b"<<: ", b"{", b"}",
    b"[" * 200, b'{"a":' * 200, b"9" * 5000, b"1e999", b".nan", b"NaN", b"-0", b"\t", b"\r\n",
          b'"\\ud800"', b"../",
    b": ", b"? ", b"| \n", b"%YAML 9.9\n", "\u2028".encode(), b"'-:(': {}\n", b"bits: 4\n",
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf"), "",
                  "../x", "C:\\x",
    "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [None], {"": ""}, ["a", 10**9], {"-:(": {}},
                  {"+:.*": {"bits": 9}},
    {"+:.*": None}, [["q_proj", 4]], "gptq_v2", "4", "I32", "F4",
]  # fmt: skip


LAYER: dict[str, Any] = {
    "name": "model.layers.0.mlp.up_proj", "block": 0, "bits": 4, "group_size": 32,
                         "relative_error": 1e-3,
    "rtn_relative_error": 2e-3, "damp_percent": 0.1, "damp_retries": 0, "tokens": 256,
                         "fallback": None,
}  # fmt: skip
REPORT: dict[str, Any] = {
    "report": 1, "version": "0", "command": "gptq quantize m", "name": "out", "model": "m",
                          "commit": None,
    "config": {"bits": 4, "moe_uncovered": "error"},
                          "layers": [LAYER, {**LAYER, "block": 1, "fallback": "tokens"}],
    "experts": [{"name": "model.layers.0.mlp.experts", "tokens": [3, 0]}], "bits_per_weight": 4.5,
                          "tokens": 256,
    "seconds": 3.5, "bytes_before": 1000, "bytes_after": 300, "peak_host_bytes": 5000,
                          "peak_device_bytes": 0,
    "blocks": [{"index": 0, "seconds": 1.5, "host_bytes": 5000, "device_bytes": 0}],
}  # fmt: skip
EVALUATION: dict[str, Any] = {
    "perplexity": 12.5, "baseline_perplexity": 11.5, "kl": 0.01, "top1_agreement": 0.9,
                              "dataset": "wikitext2",
    "windows": 3, "seqlen": 64, "dtype": "float32", "dataset_revision": None,
}  # fmt: skip


class TooSlowError(Exception):
    """An input took more than SECONDS."""


@dataclass
class Tally:
    """The outcomes of the inputs; a failure holds the number that repeats it and the traceback."""

    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """Valid inputs, or a function that makes them in a folder, and a function that reads one.

    `read` returns the outcome of an input that it does not refuse. One of `weight` inputs is tried,
    for `weight` times as long.
    """

    originals: list[bytes] | Callable[[Path], list[bytes]]
    read: Callable[[bytes, Path], str]
    weight: int = 1
    within: bool = (
        False  # damage it as bytes only now and then, since it is refused at once if it is no JSON
    )


def fuzz(subject: Subject, inputs: int, seed: int, folder: Path) -> Tally:
    """The outcomes of `inputs` damaged inputs, by their weight fewer, read in `folder`."""
    tally = Tally()
    originals = (
        subject.originals if isinstance(subject.originals, list) else subject.originals(folder)
    )
    for number in range(inputs // subject.weight):
        choose = random.Random(f"{seed}-{number}")
        damage = _value if subject.within and choose.random() < 0.9 else damaged
        content = damage(choose.choice(originals), choose)
        tally.inputs += 1
        try:
            with time_limit(SECONDS * subject.weight):
                tally.outcomes[subject.read(content, folder)] += 1
        except GptqError as error:
            tally.outcomes[error.code] += 1
            if error.exit_code not in (2, 3):
                tally.failures.append(
                    {"number": number, "what": f"exit code {error.exit_code}: {error}"}
                )
        except BaseException:  # noqa: BLE001
            tally.failures.append({"number": number, "what": traceback.format_exc()[-2000:]})
    return tally


def damaged(content: bytes, choose: random.Random) -> bytes:
    """`content` after one to four changes of bytes or, if it is JSON, of values."""
    for _ in range(choose.randint(1, 4)):
        content = choose.choice((_bytes, _bytes, _value))(content, choose)
    return content


def _bytes(content: bytes, choose: random.Random) -> bytes:
    first, second = sorted(choose.randint(0, len(content)) for _ in range(2))
    short = content[first : min(second, first + 40)]
    flipped = bytes([content[first] ^ (1 << choose.randrange(8))]) if first < len(content) else b""
    return choose.choice([
        content[:first] + flipped + content[first + 1 :],
        content[:first] + choose.choice(TOKENS) + content[first:],
        content[:first] + content[first + len(short) :],
        content[:first] + short + content[first:],
        content[:first],
    ])  # fmt: skip


def _value(content: bytes, choose: random.Random) -> bytes:
    prefix = b""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        prefix, value = content[:8], None
        try:
            value = json.loads(content[8 : 8 + int.from_bytes(prefix, "little")])
        except (ValueError, RecursionError):
            return _bytes(content, choose)
    text = json.dumps(_changed(value, choose)).encode()
    tail = content[8 + int.from_bytes(prefix, "little") :] if prefix else b""
    return (len(text).to_bytes(8, "little") if prefix else b"") + text + tail


def _changed(value: Any, choose: random.Random) -> Any:
    """The value with something odd somewhere in it."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        key = choose.choice(list(value))
        if choose.random() < 0.2:
            value[choose.choice(["", "__metadata__", "\ud800", "a.qweight", key + ".g_idx"])] = (
                value.pop(key)
            )
            return value
        return value | {key: _changed(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.7:
        place = choose.randrange(len(value))
        return [*value[:place], _changed(value[place], choose), *value[place + 1 :]]
    return choose.choice(ODD)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _read_configuration(content: bytes, folder: Path) -> str:
    (folder / "cfg.yaml").write_bytes(content)
    resolve({}, {}, folder / "cfg.yaml")
    return "accepted"


def _read_header(content: bytes, folder: Path) -> str:
    file = folder / "x.safetensors"
    file.write_bytes(content)
    tensors = read_header(file)
    ends = sorted((tensor.start, tensor.end) for tensor in tensors.values())
    assert all(0 <= start <= end <= len(content) for start, end in ends)
    return "accepted"


def _read_index(content: bytes, folder: Path) -> str:
    _checkpoint(folder)
    (folder / "c" / INDEX_NAME).write_bytes(content)
    return f"{len(open_checkpoint(folder / 'c').tensors)} tensors"


def _verify(content: bytes, folder: Path) -> str:
    directory = _checkpoint(folder)
    (directory / "config.json").write_bytes(content)
    try:
        found = verify_checkpoint(directory)
    finally:
        (directory / "config.json").write_bytes(_CONFIG)
    return found.defects[0].code if found.defects else "accepted"


def _read_report(content: bytes, folder: Path) -> str:
    (folder / REPORT_DATA).write_bytes(content)
    found = read_run(folder)
    json.dumps(found, allow_nan=False).encode()
    return "accepted"


def _read_evaluation(content: bytes, folder: Path) -> str:
    (folder / "ppl.json").write_bytes(content)
    json.dumps(read_evaluation(folder / "ppl.json"), allow_nan=False).encode()
    return "accepted"


def _checkpoint(folder: Path) -> Path:
    return folder / "c" if (folder / "c").exists() else gptq_files().write(folder / "c")


def _parts(name: str) -> bytes:
    """A file of a small sound checkpoint."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return (_checkpoint(Path(folder)) / name).read_bytes()


_CONFIG = _parts("config.json")
SUBJECTS = {
    "configurations": Subject(RECIPES, _read_configuration),
    "headers": Subject([_parts(SHARDS[0])], _read_header),
    "indexes": Subject([_parts(INDEX_NAME)], _read_index),
    "quantization configs": Subject([_CONFIG], _verify),
    "reports": Subject([json.dumps(REPORT).encode()], _read_report),
    "evaluations": Subject([json.dumps(EVALUATION).encode()], _read_evaluation),
}
