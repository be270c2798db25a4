"""What makes two runs the same: whatever the bytes of the output depend on, as plain JSON."""

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
from gptq_cli.checkpoint.source import Checkpoint, index_file
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import InputError, __version__
from gptq_cli.files import file_errors, is_file
from gptq_cli.runtime.ranks import Ranks
from gptq_cli.storage.manifest import file_hashes

REVISION = 5  # of what is written: a release that writes other bytes, or keeps its work otherwise, counts it up

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
    """Return the identity of a run; paths of model and output are no part of it.

    Weights of a commit of the Hub are known by its hash; those of a directory are read and hashed, unless that is left
    to another process on this machine: then it says nothing of the source. InputError E_CKPT_NONFINITE for weights that
    are not finite, E_SOURCE_CHANGED for files that have changed.
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
    """InputError E_RANK_MISMATCH if the processes of `team` would not do the same as the first one."""
    first, *others = team.all_gather([identity])
    for rank, other in enumerate(others, 1):
        different = differences({key: first[key] for key in other}, other)
        if different:
            raise InputError(
                "E_RANK_MISMATCH", f"process {rank} is not like process 0: {'; '.join(different)}",
                hint="run on equal devices and versions, with equal copies of the model",
            )  # fmt: skip


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """List the fields in which `wanted` differs from `known`, one line for each."""
    old, new = dict(_flat(known)), dict(_flat(wanted))
    names = sorted(old.keys() | new.keys())
    return [
        f"{name} was {_word(old, name)}, is {_word(new, name)}"
        for name in names
        if old.get(name) != new.get(name)
    ]


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
    not_in_output = {
        "max_ram",
        "max_vram",
        "target",
        "on_numeric_fault",
        "max_fallbacks",
    }  # of a layer that is finished
    not_in_output |= {"device"}  # it has a place of its own
    settings = config.model_dump(mode="json", exclude=not_in_output)
    if isinstance(config.dataset, list):
        settings["dataset"] = f"{len(config.dataset)} texts, sha256 {_text_hash(config.dataset)}"
    return settings


def _text_hash(texts: list[str]) -> str:
    return sha256(json.dumps(texts).encode()).hexdigest()


def _files(source: Checkpoint, commit: str | None) -> dict[str, Any]:
    """What is known of each file that is read: a hash of all, or of its header where a commit tells the rest.

    InputError E_CKPT_NONFINITE if a weight is not finite: every byte is read here anyway, or must be for this.
    """
    header_bytes: dict[Path, int] = {}
    for tensor in source.tensors.values():
        header_bytes[tensor.file] = min(tensor.start, header_bytes.get(tensor.file, tensor.start))
    others = [source.directory / file for file in source.other_files()]
    beside = [source.directory / "config.json", index_file(source.directory), *others]
    hashed = [path for path in beside if is_file(path)]
    hashes = dict(zip(hashed, file_hashes(hashed), strict=True)) | scan_weights(
        source.tensors.values(), hashed=commit is None
    )
    known: dict[str, Any] = {
        path.relative_to(source.directory).as_posix(): found for path, found in hashes.items()
    }
    return known | (
        {path.name: _header(path, size) for path, size in header_bytes.items()} if commit else {}
    )


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
    return json.dumps(values[name], ensure_ascii=False) if name in values else "not there"
