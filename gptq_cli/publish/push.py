"""`gptq push`: a checkpoint that has been verified, with a model card, to a repository of the Hub. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptq_cli.calibration.corpus import CORPORA, is_path
from gptq_cli.checkpoint.locate import local_model
from gptq_cli.checkpoint.side_files import CONFIG_NAMES
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint, read_json
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.config.finding import size
from gptq_cli.config.resolve import resolve
from gptq_cli.config.serving import verdicts
from gptq_cli.errors import ConfigError, GateError
from gptq_cli.events import PhaseStarted, Report, Warned, ignore
from gptq_cli.files import advice, file_errors, is_file
from gptq_cli.hub_errors import id_flaw, pasted_id
from gptq_cli.inspection.summary import Inspection, inspect_checkpoint
from gptq_cli.publish.card import CardFacts, model_card
from gptq_cli.publish.report import read_evaluation
from gptq_cli.publish.upload import Published, publish
from gptq_cli.storage.durable import json_bytes
from gptq_cli.storage.manifest import (
    CONFIG_FILE,
    INDEX_NAME,
    MANIFEST,
    REPORT_DATA,
    REPORT_PAGE,
    sealed,
)

CARD = "README.md"
LOCAL = {
    REPORT_DATA,
    REPORT_PAGE,
    CARD,
}  # about the run, with times and paths; and the card of the source
WORST = 10
JUDGED = ("bits", "relative_error", "rtn_relative_error")
MAX_CARD_BYTES = 1_000_000
MOST = 1e15  # of a number that a card shows
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_YAML_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Upload:
    """What a push sends: the path in the repository of each file, with the file here or its bytes.

    `check_unchanged` raises if they are not the files that were verified.
    """

    repo: str
    card: str
    files: dict[str, Path | bytes]
    check_unchanged: Callable[[], None]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            path: len(content) if isinstance(content, bytes) else content.stat().st_size
            for path, content in self.files.items()
        }


def prepare_push(
    directory: Path,
    repo: str,
    *,
    base_model: str | None = None,
    evaluation: Path | None = None,
    card: Path | None = None,
    report: Report = ignore,
) -> Upload:
    """The checkpoint in `directory` as it will be sent to `repo` (NAMESPACE/NAME); nothing is written or sent.

    The card is made of the checkpoint's own files, or is the file `card`. ConfigError E_CFG_RANGE for a name that the
    Hub would refuse and E_CFG_MISSING if nobody says what the model was made from; InputError as opening does, E_REPORT
    for an evaluation that is none; GateError E_VERIFY for a checkpoint with defects.
    """
    if "/" not in repo or not _is_id(repo):
        hint = _meant(repo) or "for example me/my-model"
        raise ConfigError("E_CFG_RANGE", f"REPO must be NAMESPACE/NAME, got {repo!r}", hint=hint)
    if base_model is not None and not _is_id(base_model):
        hint = (
            _meant(base_model) or "give what it is called on the Hub, for example Qwen/Qwen3-0.6B"
        )
        raise ConfigError(
            "E_CFG_RANGE",
            f"--base-model must be the id of a Hub model, got {base_model!r}",
            hint=hint,
        )
    directory = local_model(directory)
    measured = read_evaluation(evaluation) if evaluation else None
    checkpoint = open_checkpoint(directory)
    found = inspect_checkpoint(checkpoint)
    text = (
        _read_card(card) if card else _card(checkpoint, found, repo, base_model, measured, report)
    )
    report(PhaseStarted("verify", f"{size(found.nbytes)}, every byte"))
    _verify(directory)
    return Upload(repo, text, _contents(checkpoint, text), checkpoint.check_unchanged)


def push_upload(
    upload: Upload, *, public: bool, overwrite: bool, progress: bool, report: Report = ignore
) -> Published:
    """Send it; raises as `publish` does, and InputError E_SOURCE_CHANGED if a file is not the one that was verified."""

    def say(phase: str, detail: str) -> None:
        report(PhaseStarted(phase, detail))

    return publish(
        upload.repo, upload.files, public=public, overwrite=overwrite, progress=progress, say=say,
        check=upload.check_unchanged,
    )  # fmt: skip


def _verify(directory: Path) -> None:
    found = verify_checkpoint(directory, full=True)
    if not found.ok:
        hint = f"all of it: gptq verify {directory} --full"
        count = len(found.defects)
        message = f"`{directory}` has {count} defect{'s' if count > 1 else ''}, the first: {found.defects[0]}"
        raise GateError("E_VERIFY", message, hint=hint)


def _contents(checkpoint: Checkpoint, card: str) -> dict[str, Path | bytes]:
    """Weights, settings and files beside them, the card, and a manifest that leaves the card to its editors."""
    directory = checkpoint.directory
    names = {tensor.file.name for tensor in checkpoint.tensors.values()}
    names |= {name for name in (*CONFIG_NAMES, INDEX_NAME) if is_file(directory / name)}
    names |= {file.as_posix() for file in checkpoint.other_files()} - LOCAL
    files: dict[str, Path | bytes] = {name: directory / name for name in sorted(names)}
    if MANIFEST in files:
        manifest = read_json(directory / MANIFEST)
        _mapping(manifest, "files").pop(CARD, None)
        files[MANIFEST] = json_bytes(sealed(manifest), indent=2)
    return files | {CARD: card.encode()}


def _card(
    checkpoint: Checkpoint,
    found: Inspection,
    repo: str,
    base_model: str | None,
    evaluation: Mapping[str, Any] | None,
    report: Report,
) -> str:
    manifest = _manifest(checkpoint.directory)
    origin = _mapping(manifest, "origin")
    base = base_model or origin.get("model")
    if not isinstance(base, str) or not _is_id(base):
        hint = "name the model on the Hub that it was made from: --base-model Qwen/Qwen3-0.6B"
        message = f"`{checkpoint.directory}` does not say which model on the Hub it was made from"
        raise ConfigError("E_CFG_MISSING", message, hint=hint)
    settings = _settings(checkpoint.directory, report)
    judged = verdicts(found.export) if found.export else ()
    layers = [layer for layer in _rows(manifest, "layers") if _is_judged(layer)]
    commit = origin.get("commit") if base == origin.get("model") else None
    return model_card(
        CardFacts(
            repo=repo,
            base_model=base,
            commit=commit if isinstance(commit, str) and _COMMIT.fullmatch(commit) else None,
            source_card=_front_matter(checkpoint.directory / CARD),
            method=_method(found),
            bits_per_weight=found.bits_per_weight or 0.0,
            nbytes=found.nbytes,
            versions={
                key: value
                for key, value in _mapping(_mapping(manifest, "identity"), "versions").items()
                if isinstance(value, str)
            },
            settings=settings,
            dataset=_hub_dataset(origin.get("dataset")),
            worst=sorted(layers, key=lambda layer: -layer["relative_error"])[:WORST],
            n_layers=len(layers),
            uncovered=sum(_length(layer.get("uncovered")) for layer in _rows(manifest, "experts")),
            readers=[(verdict.engine, verdict.outcome, verdict.reason) for verdict in judged],
            evaluation=evaluation,
            evaluation_dataset=_evaluation_dataset(evaluation),
        )
    )


def _is_id(name: str) -> bool:
    """Whether both the Hub and its client take `name` for an id."""
    return bool(_ID.fullmatch(name)) and id_flaw(name) is None


def _meant(name: str) -> str | None:
    pasted = pasted_id(name)
    return f"use {pasted.id}" if pasted and _is_id(pasted.id) else None


def _method(found: Inspection) -> dict[str, Any]:
    """The settings most linears have."""
    pairs = [(module.bits, module.group_size) for module in found.modules]
    bits, group_size = max(pairs, key=pairs.count) if pairs else (0, 0)
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": found.sym,
        "desc_act": found.desc_act,
        "format": found.format,
    }


def _manifest(directory: Path) -> dict[str, Any]:
    content = read_json(directory / MANIFEST) if is_file(directory / MANIFEST) else {}
    return content if isinstance(content, dict) else {}


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _rows(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = content.get(key)
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _is_judged(layer: Mapping[str, Any]) -> bool:
    return isinstance(layer.get("name"), str) and all(_is_number(layer.get(key)) for key in JUDGED)


def _is_number(value: object) -> bool:
    """Whether `value` is a number that can be shown, and not what JSON of others may hold instead."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def _length(value: object) -> int:
    return len(value) if isinstance(value, list) else 0


def _settings(directory: Path, report: Report) -> dict[str, Any]:
    """The configuration of the run, if it is one of ours; a path in it is told before it is published."""
    if not is_file(directory / CONFIG_FILE):
        return {}
    config = resolve({}, {}, directory / CONFIG_FILE).config
    settings = {
        key: value
        for key, value in config.model_dump(mode="json").items()
        if value not in (None, {})
    }
    if isinstance(config.dataset, list):
        settings["dataset"] = f"{len(config.dataset)} texts"
    elif config.dataset is not None and is_path(config.dataset):
        settings["dataset"] = Path(config.dataset).name
        says = (
            f"{CONFIG_FILE} names the dataset by its path here, and is published: {config.dataset}"
        )
        report(Warned("W_PUSH_PATH", says))
    return settings


def _front_matter(file: Path) -> dict[str, Any]:
    """What the card of the source says to the Hub; nothing if it cannot be read."""
    if not is_file(file) or file.stat().st_size > MAX_CARD_BYTES:
        return {}
    with file_errors(file, writing=False):
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    found = _YAML_BLOCK.search(text)
    try:
        # Texts and nothing else: `no` is a language here, and 1.10 a version.
        content = yaml.load(found[1], Loader=yaml.BaseLoader) if found else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_card(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        hint = advice(error, file) if isinstance(error, OSError) else "save it as UTF-8"
        raise ConfigError(
            "E_CFG_FILE", f"cannot read the card `{file}`: {reason}", hint=hint
        ) from None


def _hub_dataset(name: object) -> str | None:
    """The id of a Hub dataset that a run has read, also of one with a registered name."""
    if not isinstance(name, str):
        return None
    known = CORPORA.get(name)
    repo = known.repo if known else name
    return repo if _is_id(repo) else None


def _evaluation_dataset(evaluation: Mapping[str, Any] | None) -> str | None:
    published = evaluation is not None and evaluation.get("dataset_revision")
    return _hub_dataset(evaluation.get("dataset")) if evaluation is not None and published else None
