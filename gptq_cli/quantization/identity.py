"""The identity of a run: everything that the bytes of its output depend on, as plain JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_cli.checkpoint.headers import scan_weights
from gptq_cli.checkpoint.model_files import index_file
from gptq_cli.checkpoint.source import Checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError, __version__
from gptq_cli.files import file_errors, is_file
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.storage.manifest import file_hashes

# A release that writes other bytes, or saves its work in another form, counts this up.
REVISION = 5

Identity = dict[str, Any]


def identify(
    source: Checkpoint,
    commit: str | None,
    config: QuantizeConfig,
    device: torch.device,
    calibration_sha256: str,
    *,
    hashed: bool = True,
) -> Identity:
    """Return the identity of a run; the paths of model and output are not part of it.

    The weights of a commit of the Hub are known by its hash; those of a directory are read and
    hashed. If not `hashed`, another process on this machine does this, and the identity has no
    "source". Raises InputError E_CKPT_NONFINITE for weights that are not finite, E_SOURCE_CHANGED
    for files that have changed.
    """
    known = {
        "versions": {
            "gptq_cli": __version__,
            "revision": REVISION,
            "torch": str(torch.__version__),  # which is a class of its own
            "transformers": transformers.__version__,
        },
        "device": _device(device),
        "config": _settings(config),
        "calibration_sha256": calibration_sha256,
    }
    if not hashed:
        return known
    files = _files(source, commit)
    source.check_unchanged()
    return known | {"source": {"commit": commit, "files": files}}


def check_agreement(team: Ranks, identity: Identity) -> None:
    """Raise InputError E_RANK_MISMATCH if a process would not do the same as the first one."""
    first, *others = team.all_gather([identity])
    for rank, other in enumerate(others, 1):
        different = differences({key: first[key] for key in other}, other)
        if different:
            raise InputError(
                "E_RANK_MISMATCH",
                f"process {rank} differs from process 0: {'; '.join(different)}",
                hint="run on equal devices and versions, with equal copies of the model",
            )


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the fields in which `wanted` differs from `known`, one line for each.

    Settings come first, because a user can change them; hashes, device and versions follow.
    """
    old, new = dict(_flat(known)), dict(_flat(wanted))
    names = sorted(old.keys() | new.keys())
    names.sort(key=lambda name: not name.startswith("config."))
    lines = []
    for name in names:
        if old.get(name) != new.get(name):
            lines.append(f"{name} was {_word(old, name)}, is {_word(new, name)}")
    return lines


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name, cuda = torch.cuda.get_device_name(device), torch.version.cuda
        precision = torch.get_float32_matmul_precision()
        return {
            "type": "cuda",
            "name": name,
            "capability": f"{major}.{minor}",
            "cuda": cuda,
            "matmul": precision,
        }
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    # Sums over rows are split among threads, so their number changes the last bits.
    return {"type": device.type, "name": kind, "threads": torch.get_num_threads()}


def _settings(config: QuantizeConfig) -> dict[str, Any]:
    """Return the settings that change the bytes of a finished layer."""
    without_effect = {"max_ram", "max_vram", "target", "on_numeric_fault", "max_fallbacks"}
    without_effect.add("device")  # the identity has a field for it
    settings = config.model_dump(mode="json", exclude=without_effect)
    if isinstance(config.dataset, list):
        settings["dataset"] = f"{len(config.dataset)} texts, sha256 {_text_hash(config.dataset)}"
    return settings


def _text_hash(texts: list[str]) -> str:
    return sha256(json.dumps(texts).encode()).hexdigest()


def _files(source: Checkpoint, commit: str | None) -> dict[str, Any]:
    """Return the hash of each file that is read; of a commit's shards, the hash of the header.

    Every weight is read here. Raises InputError E_CKPT_NONFINITE if one is not finite.
    """
    header_bytes: dict[Path, int] = {}
    for tensor in source.tensors.values():
        header_bytes[tensor.file] = min(tensor.start, header_bytes.get(tensor.file, tensor.start))
    beside = [source.directory / "config.json", index_file(source.directory)]
    beside += [source.directory / file for file in source.other_files()]
    hashed = [path for path in beside if is_file(path)]
    hashes = dict(zip(hashed, file_hashes(hashed), strict=True))
    hashes |= scan_weights(source.tensors.values(), hashed=commit is None)
    known = {}
    for path, found in hashes.items():
        known[path.relative_to(source.directory).as_posix()] = found
    if commit:
        for path, n_bytes in header_bytes.items():
            known[path.name] = _header(path, n_bytes)
    return known


def _header(path: Path, n_bytes: int) -> str:
    with file_errors(path, writing=False), path.open("rb") as stream:
        return f"{path.stat().st_size} bytes, header {sha256(stream.read(n_bytes)).hexdigest()}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _word(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "missing"
    return json.dumps(values[name], ensure_ascii=False)
