"""`gptq push`: upload a verified checkpoint with a model card to the Hub. Needs no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gptq_cli.calibration.corpus import is_path, split_share
from gptq_cli.checkpoint.locate import local_model
from gptq_cli.checkpoint.model_files import CONFIG_NAMES, read_json
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.config.corpora import BUILT_IN, CORPORA
from gptq_cli.config.resolve import resolve
from gptq_cli.config.schema import NO_LORA
from gptq_cli.errors import ConfigError, GateError, counted
from gptq_cli.events import Report, Warned, ignore
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
# Not uploaded: the report, which holds times and paths, and the card of the source.
LOCAL = {REPORT_DATA, REPORT_PAGE, CARD}
WORST = 10
MEASURED = ("bits", "relative_error", "rtn_relative_error")
MAX_CARD_BYTES = 1_000_000
LARGEST_NUMBER = 1e15  # that a card shows
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_YAML_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PushResult:
    """What a push has sent, or would send: the model `card`, and the size of each file in bytes.

    `published` is the state of the repository after the push; None if nothing was sent.
    """

    repo: str
    card: str
    files: dict[str, int]
    private: bool
    published: Published | None

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        if self.published is None:
            return {"repo": self.repo, "files": self.files, "card": self.card}
        return {
            "repo": self.repo,
            "url": self.published.url,
            "commit": self.published.commit,
            "private": self.private,
            "files": self.files,
            "deleted": list(self.published.deleted),
            "already_there": self.published.already_there,
        }


@dataclass(frozen=True, slots=True)
class Upload:
    """The files that a push sends.

    `files` maps paths in the repository to files here, or to their bytes. `check_unchanged` raises
    if a file is no longer the one that was verified.
    """

    repo: str
    card: str
    files: dict[str, Path | bytes]
    check_unchanged: Callable[[], None]

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file in bytes."""
        sizes = {}
        for path, content in self.files.items():
            if isinstance(content, bytes):
                sizes[path] = len(content)
            else:
                sizes[path] = content.stat().st_size
        return sizes

    def result(self, *, public: bool, published: Published | None = None) -> PushResult:
        """Return what was sent, or what would be sent if nothing is `published`."""
        return PushResult(self.repo, self.card, self.sizes, not public, published)


def prepare_push(
    directory: Path,
    repo: str,
    *,
    base_model: str | None = None,
    evaluation: Path | None = None,
    card: Path | None = None,
    report: Report = ignore,
) -> Upload:
    """Return the checkpoint in `directory` as it will be sent to `repo` (NAMESPACE/NAME).

    Writes and sends nothing. The card is made from the checkpoint's own files, or is the file
    `card`. Raises ConfigError E_CFG_RANGE for a name that the Hub would refuse and E_CFG_MISSING if
    the source model is unknown; InputError as opening does, E_REPORT if `evaluation` is not the
    result of an evaluation; GateError E_VERIFY for a checkpoint with defects.
    """
    _check_ids(repo, base_model)
    directory = local_model(directory)
    measured = None
    if evaluation is not None:
        measured = read_evaluation(evaluation)
    checkpoint = open_checkpoint(directory)
    found = inspect_checkpoint(checkpoint)
    if card is None:
        text = _card(checkpoint, found, repo, base_model, measured, report)
    else:
        text = _read_card(card)
    _verify(directory, report)
    return Upload(repo, text, _contents(checkpoint, text), checkpoint.check_unchanged)


def _check_ids(repo: str, base_model: str | None) -> None:
    if "/" not in repo or not _is_id(repo):
        hint = _correction(repo) or "for example me/my-model"
        raise ConfigError("E_CFG_RANGE", f"REPO must be NAMESPACE/NAME, got {repo!r}", hint=hint)
    if base_model is not None and not _is_id(base_model):
        message = f"--base-model must be the id of a Hub model, got {base_model!r}"
        example = "give its name on the Hub, for example Qwen/Qwen3-0.6B"
        raise ConfigError("E_CFG_RANGE", message, hint=_correction(base_model) or example)


def push_upload(
    upload: Upload, *, public: bool, overwrite: bool, progress: bool, report: Report = ignore
) -> PushResult:
    """Send the upload.

    Raises as `publish` does, and InputError E_SOURCE_CHANGED if a file is no longer the one that
    was verified.
    """
    published = publish(
        upload.repo,
        upload.files,
        public=public,
        overwrite=overwrite,
        progress=progress,
        report=report,
        check=upload.check_unchanged,
    )
    return upload.result(public=public, published=published)


def _verify(directory: Path, report: Report) -> None:
    found = verify_checkpoint(directory, full=True, report=report)
    if not found.ok:
        count = counted(len(found.defects), "defect")
        message = f"`{directory}` has {count}, the first: {found.defects[0]}"
        hint = f"see all details: gptq verify {directory} --full"
        raise GateError("E_VERIFY", message, hint=hint)


def _contents(checkpoint: Checkpoint, card: str) -> dict[str, Path | bytes]:
    """Return weights, settings and the files beside them, the card, and the manifest.

    The manifest does not list the card, because people edit the card on the Hub.
    """
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
    """Return the model card; raise ConfigError E_CFG_MISSING if the source model is unknown."""
    manifest = _manifest(checkpoint.directory)
    origin = _mapping(manifest, "origin")
    base = base_model or origin.get("model")
    if not isinstance(base, str) or not _is_id(base):
        hint = "name the source model on the Hub: --base-model Qwen/Qwen3-0.6B"
        message = f"`{checkpoint.directory}` does not say which model on the Hub it was made from"
        raise ConfigError("E_CFG_MISSING", message, hint=hint)
    settings = _settings(checkpoint.directory, report)
    layers = [layer for layer in _rows(manifest, "layers") if _is_measured(layer)]
    return model_card(
        CardFacts(
            repo=repo,
            base_model=base,
            commit=_commit(origin, base),
            source_form=_text(origin.get("source_quantization")),
            source_card=_front_matter(checkpoint.directory / CARD),
            method=_method(found),
            bits_per_weight=found.bits_per_weight or 0.0,
            nbytes=found.nbytes,
            versions=_versions(manifest),
            settings=settings,
            datasets=_hub_datasets(origin.get("dataset")),
            worst=sorted(layers, key=lambda layer: -layer["relative_error"])[:WORST],
            n_layers=len(layers),
            rtn_sampled=any(layer.get("rtn_rows") for layer in layers),
            uncovered=_n_uncovered(manifest),
            readers=_engines(found),
            evaluation=evaluation,
            evaluation_dataset=_evaluation_dataset(evaluation),
        )
    )


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value
    return None


def _commit(origin: Mapping[str, Any], base_model: str) -> str | None:
    """Return the commit of the source model, if the manifest knows it."""
    commit = origin.get("commit")
    if base_model != origin.get("model") or not isinstance(commit, str):
        return None
    if _COMMIT.fullmatch(commit) is None:
        return None
    return commit


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    versions = _mapping(_mapping(manifest, "identity"), "versions")
    return {key: value for key, value in versions.items() if isinstance(value, str)}


def _n_uncovered(manifest: Mapping[str, Any]) -> int:
    """Return the number of experts that no calibration token reached."""
    count = 0
    for layer in _rows(manifest, "experts"):
        uncovered = layer.get("uncovered")
        if isinstance(uncovered, list):
            count += len(uncovered)
    return count


def _engines(found: Inspection) -> list[tuple[str, str, str]]:
    """Return engine, outcome and reason for each engine in the serving table."""
    return [(verdict.engine, verdict.outcome, verdict.reason) for verdict in found.engines]


def _is_id(name: str) -> bool:
    """Return whether both the Hub and its client accept `name` as an id."""
    return bool(_ID.fullmatch(name)) and id_flaw(name) is None


def _correction(name: str) -> str | None:
    """Return a hint if `name` is an address that contains an id."""
    pasted = pasted_id(name)
    if pasted is None or not _is_id(pasted.id):
        return None
    return f"use {pasted.id}"


def _method(found: Inspection) -> dict[str, Any]:
    """Return the settings that most linears have."""
    bits, group_size = 0, 0
    pairs = Counter([(module.bits, module.group_size) for module in found.modules])
    if pairs:
        bits, group_size = pairs.most_common(1)[0][0]
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": found.sym,
        "desc_act": found.desc_act,
        "format": found.format,
    }


def _manifest(directory: Path) -> dict[str, Any]:
    if not is_file(directory / MANIFEST):
        return {}
    return _dict_or_empty(read_json(directory / MANIFEST))


def _mapping(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return _dict_or_empty(content.get(key))


def _dict_or_empty(value: object) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    return {}


def _rows(content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    value = content.get(key)
    if not isinstance(value, list):
        return []
    return [row for row in value if isinstance(row, dict)]


def _is_measured(layer: Mapping[str, Any]) -> bool:
    if not isinstance(layer.get("name"), str):
        return False
    return all(_is_number(layer.get(key)) for key in MEASURED)


def _is_number(value: object) -> bool:
    """Return whether `value` is a number that a card can show; others may have written the JSON."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < LARGEST_NUMBER


def _settings(directory: Path, report: Report) -> dict[str, Any]:
    """Return the configuration of the run; report W_PUSH_PATH if it will publish a local path."""
    if not is_file(directory / CONFIG_FILE):
        return {}
    config = resolve({}, {}, directory / CONFIG_FILE).config
    settings = {}
    for key, value in config.model_dump(mode="json").items():
        if value not in (None, {}):
            settings[key] = value
    if config.dataset is not None:
        settings["dataset"] = _public_datasets(config.dataset, report)
    if config.chat_template is not None:
        settings["chat_template"] = Path(config.chat_template).name
        _warn_of_path("chat template", config.chat_template, report)
    if config.lora is not None and config.lora != NO_LORA:
        settings["lora"] = _public_adapters(config.lora, report)
    return settings


def _warn_of_path(what: str, path: str, report: Report) -> None:
    text = f"{CONFIG_FILE} will publish the local path of the {what}: {path}"
    report(Warned("W_PUSH_PATH", text))


def _public_datasets(datasets: str | list[str], report: Report) -> str:
    """Return the names of datasets, without folders; W_PUSH_PATH for each that has a path."""
    if isinstance(datasets, str):
        datasets = [datasets]
    names = []
    for dataset in datasets:
        path, share = dataset, None
        if not is_path(dataset):
            path, share = split_share(dataset)
        name = path
        if is_path(path):
            name = Path(path).name
            _warn_of_path("dataset", path, report)
        if share is not None:
            name = f"{name}:{share}"
        names.append(name)
    return ", ".join(names)


def _public_adapters(adapters: str | list[str], report: Report) -> str:
    """Return the names of adapters, without folders; W_PUSH_PATH for each."""
    if isinstance(adapters, str):
        adapters = [adapters]
    for adapter in adapters:
        _warn_of_path("adapter", adapter, report)
    return ", ".join(Path(adapter).name for adapter in adapters)


def _front_matter(file: Path) -> dict[str, Any]:
    """Return the metadata in the card of the source; empty if it cannot be read."""
    if not is_file(file) or file.stat().st_size > MAX_CARD_BYTES:
        return {}
    with file_errors(file, writing=False):
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    found = _YAML_BLOCK.search(text)
    if found is None:
        return {}
    try:
        # All values stay texts: `no` is a language here, and 1.10 a version.
        content = yaml.load(found[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return _dict_or_empty(content)


def _read_card(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable_card(file, error.strerror, advice(error, file)) from None
    except UnicodeDecodeError:
        raise _unreadable_card(file, "it is not UTF-8", "save it as UTF-8") from None


def _unreadable_card(file: Path, reason: str | None, hint: str | None) -> ConfigError:
    return ConfigError("E_CFG_FILE", f"cannot read the card `{file}`: {reason}", hint=hint)


def _hub_dataset(name: object) -> str | None:
    """Return the Hub id of a dataset, which may have a registered name; None for local text."""
    if not isinstance(name, str) or name == BUILT_IN:
        return None
    if name in CORPORA:
        name = CORPORA[name].repo
    if not _is_id(name):
        return None
    return name


def _hub_datasets(names: object) -> tuple[str, ...]:
    """Return the Hub ids of one dataset or a list of several, without local text."""
    if not isinstance(names, list):
        names = [names]
    return tuple(filter(None, map(_hub_dataset, names)))


def _evaluation_dataset(evaluation: Mapping[str, Any] | None) -> str | None:
    if evaluation is None or not evaluation.get("dataset_revision"):
        return None  # only datasets of the Hub have a revision
    return _hub_dataset(evaluation.get("dataset"))
