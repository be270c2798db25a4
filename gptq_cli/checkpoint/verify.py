"""Verification that a GPTQ checkpoint, ours or another tool's, is whole and means the same to all.

The checks compare headers, index and files; `gptq_manifest.json` with sizes and SHA-256 of the
files; the configuration with the tensors (`claims.py`); the parts of each quantized module
(`module_checks.py`); with `full` every byte. If only some engine cannot serve a property, that is
no defect: see `config/serving.py`. Source: the requirements of readers of the format. Needs
no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gptq_cli.checkpoint.claims import check_rules
from gptq_cli.checkpoint.defects import Defect, convert_command, tensor_defect
from gptq_cli.checkpoint.headers import TensorInfo, count_not_finite, is_zero
from gptq_cli.checkpoint.layout import GPTQ, SINGLE_FILE, quantized_names
from gptq_cli.checkpoint.model_files import ADAPTER_CONFIG, index_file, is_safe_file, read_json
from gptq_cli.checkpoint.quantization_config import (
    READABLE,
    declared_format,
    format_of,
    other_packing,
    packing_of,
    stored_config,
)
from gptq_cli.checkpoint.source import Checkpoint, open_checkpoint
from gptq_cli.config.layer import GPTQ_FORMATS, Settings, StoredConfig
from gptq_cli.errors import GateError, InputError, shell_word, size, to_json
from gptq_cli.events import PhaseStarted, Report, ignore
from gptq_cli.files import UNREADABLE, ByteCount, is_file
from gptq_cli.storage.manifest import (
    INDEX_NAME,
    MANIFEST,
    REPORT_DATA,
    REPORT_PAGE,
    file_hashes,
    is_intact,
    side_by_side,
)

PAGES = {".md", ".html", ".png", ".log"}  # files for people


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify_checkpoint`.

    `bits` are the numbers of bits that occur, `nbytes` is the size of all tensors, `hashed` the
    number of files whose hash was compared. `unchecked` is the reason why a full verification could
    not compare the tensors with the parameters of the model; it is empty if it could.
    """

    defects: tuple[Defect, ...]
    modules: int
    tensors: int
    nbytes: int
    bits: tuple[int, ...]
    format: str
    full: bool
    hashed: int
    unchecked: str = ""

    @property
    def ok(self) -> bool:
        """True if there is no defect."""
        return not self.defects

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return to_json(self)


@dataclass(frozen=True, slots=True)
class Examined:
    """The result of `examine`: quantized modules with their settings, and defects.

    `config` is None if the settings of the checkpoint are not usable, and for weights that
    `Checkpoint.coded` tells, whose forms in words are `forms`.
    """

    config: StoredConfig | None
    settings: dict[str, Settings]
    modules: tuple[str, ...]
    defects: tuple[Defect, ...]
    forms: str = ""

    @property
    def bits(self) -> tuple[int, ...]:
        """The numbers of bits that occur, in order."""
        return tuple(sorted({settings.bits for settings in self.settings.values()}))

    @property
    def format(self) -> str:
        return self.config.format if self.config else self.forms


def verify_checkpoint(
    directory: Path, *, full: bool = False, report: Report = ignore
) -> Verification:
    """Return every defect of the quantized checkpoint in `directory`.

    Headers, configuration, g_idx, qzeros and scales are read, but of weights that
    `Checkpoint.coded` tells only headers and noted shapes. With `full` every other number must be
    finite, scales that are powers of two as well, and every file must have the hash that
    `gptq_manifest.json` lists. Memory holds a few tensors at a time. InputError E_CKPT_KIND if
    there is neither a quantized tensor nor a quantization, E_CKPT_QUANTIZED if the checkpoint
    claims another method than GPTQ, E_SOURCE_CHANGED if files change meanwhile.
    """
    try:
        checkpoint = open_checkpoint(directory)
    except InputError as error:
        # A file that cannot be read need not be defective, nor codes of another method.
        if error.code in (UNREADABLE, "E_CKPT_QUANTIZED"):
            raise
        return _not_opened(error, full=full)
    if checkpoint.quantization is None and not quantized_names(checkpoint.tensors):
        hint = "name a GPTQ checkpoint, for example one that `gptq quantize` wrote"
        raise InputError("E_CKPT_KIND", f"`{directory}` is not quantized", hint=hint)
    examined = examine(checkpoint)
    defects = list(examined.defects)
    if full:
        report(PhaseStarted("verify", f"the numbers in {size(checkpoint.nbytes)}"))
        count = ByteCount(report, checkpoint.nbytes)
        defects += _check_unread(checkpoint, examined.modules, count)
    hashed, of_files = check_manifest(directory, full=full, report=report)
    checkpoint.check_unchanged()
    return Verification(
        defects=(*defects, *of_files),
        modules=len(examined.modules),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        bits=examined.bits,
        format=examined.format,
        full=full,
        hashed=hashed,
    )


def _not_opened(error: InputError, *, full: bool) -> Verification:
    """Return the problems of a checkpoint that cannot be opened as its defects."""
    defects = [Defect(found.code, found.message, hint=found.hint) for found in error.problems]
    return Verification(tuple(defects), 0, 0, 0, (), "", full, 0)


def check_written(stage: Path) -> None:
    """Raise GateError E_VERIFY if the written checkpoint in `stage` has a defect."""
    defects = verify_checkpoint(stage).defects
    if defects:
        message = f"the written checkpoint has {len(defects)} defects, the first: {defects[0]}"
        hint = "this is a fault of gptq: please report it, with the command and the model"
        raise GateError("E_VERIFY", message, hint=hint)


def open_decodable(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`, quantized or not.

    Raises the errors of `open_checkpoint` and `refuse_wrong_numbers`.
    """
    checkpoint = open_checkpoint(directory)
    refuse_wrong_numbers(checkpoint)
    return checkpoint


def refuse_wrong_numbers(checkpoint: Checkpoint) -> tuple[Defect, ...]:
    """Return the defects of a quantized checkpoint that change none of its numbers.

    Only headers are read of files that are still to arrive. The result is empty for a plain
    checkpoint. InputError with the code of the first defect that
    changes decoded weights, E_CKPT_QUANTIZED if the weights are packed in an unsupported way.
    """
    if checkpoint.is_packed:
        format_of(checkpoint)
    elif not checkpoint.coded() and not quantized_names(checkpoint.tensors):
        return ()
    examined = examine(checkpoint, numbers=checkpoint.download is None)
    for defect in examined.defects:
        if defect.effect == "numbers":
            raise _wrong_numbers(checkpoint.directory, defect)
    return examined.defects


def _wrong_numbers(directory: Path, defect: Defect) -> InputError:
    message = f"`{directory}`, {defect.message}"
    if defect.place:
        message = f"`{directory}`, {defect.place}: {defect.message}"
    hint = f"all of it: gptq verify {shell_word(str(directory))}"
    if defect.hint:
        hint = f"{defect.hint}; {hint}"
    return InputError(defect.code, message, hint=hint)


def refuse_damaged(
    directory: Path, hashes: Mapping[str, str] | None = None, report: Report = ignore
) -> None:
    """Raise GateError E_CKPT_HASH if a file is not the one that `gptq_manifest.json` lists.

    Without a manifest nothing is checked. `hashes` are the known hashes of files; without them all
    listed files are hashed. Files that were added or removed are not refused.
    """
    _, defects = check_manifest(directory, full=hashes is None, report=report)
    damaged = []
    for defect in defects:
        if defect.code == "E_CKPT_HASH" and defect.effect == "numbers":
            damaged.append(defect)
    if hashes and not damaged and is_file(directory / MANIFEST):
        damaged = _other_hashes(directory, hashes)
    if damaged:
        message = f"`{directory}`, {damaged[0].place}: {damaged[0].message}"
        hint = f"copy or download it again; if you changed it on purpose, remove {MANIFEST}"
        raise GateError("E_CKPT_HASH", message, hint=hint)


# ---------------------------------------------------------------- settings, files and modules


def examine(checkpoint: Checkpoint, *, numbers: bool = True) -> Examined:
    """Return the defects of settings, files and packed linears.

    Without `numbers` only headers are read. InputError E_CKPT_QUANTIZED as in `format_of`, but a
    checkpoint that claims format gptq and is packed in another way is a defect.
    """
    coded = checkpoint.coded()
    if coded:
        from gptq_cli.checkpoint.coded_checks import check_coded

        forms = dict.fromkeys(weight.form for weight in coded.values())
        found = tuple(check_coded(checkpoint, coded, numbers=numbers))
        return Examined(None, {}, tuple(coded), found, ", ".join(forms))
    # This module imports numpy, without which commands that examine nothing start faster.
    from gptq_cli.checkpoint.module_checks import check_module

    mislabelled = _mislabelled(checkpoint)
    if mislabelled:
        return Examined(None, {}, (), (mislabelled,))
    config, defects = stored_config(checkpoint)
    packing = packing_of(checkpoint)
    modules = quantized_names(checkpoint.tensors, packing)
    for code, text in checkpoint.remarks:
        # Such a model can be loaded, but no tool that writes whole checkpoints makes such an index.
        if code == "W_CKPT_INDEX":
            defects.append(Defect("E_CKPT_INDEX", text, effect="form"))
    defects += check_files(checkpoint)
    if config is None:
        return Examined(None, {}, tuple(modules), tuple(defects))
    # Rules are matched here and not in threads: only the main thread can stop a slow pattern
    # without a process of its own.
    settings = {module: config.settings(module) for module in modules}
    defects += check_rules(checkpoint, config, modules, packing)
    tensors = checkpoint.tensors

    def check(module: str) -> list[Defect]:
        return check_module(module, tensors, settings[module], packing, numbers=numbers)

    for of_module in side_by_side(check, modules):
        defects += of_module
    return Examined(config, settings, tuple(modules), tuple(defects))


def _mislabelled(checkpoint: Checkpoint) -> Defect | None:
    """Return the defect of a checkpoint that claims format gptq and is packed in another way."""
    if checkpoint.method != "gptq":
        return None
    packing = other_packing(checkpoint)
    if packing is None or declared_format(checkpoint.quantization or {}) not in GPTQ_FORMATS:
        return None
    message = f"has format gptq, but its linears are packed for {packing}"
    return Defect("E_CKPT_QUANTIZED", message, "config.json", None, READABLE)


def check_files(checkpoint: Checkpoint) -> Iterator[Defect]:
    """Yield weights under a name unknown to transformers, others beside them, and adapters.

    If only the headers of a checkpoint were fetched from the Hub, it has no files to check.
    """
    directory = checkpoint.directory
    used = set()
    for tensor in checkpoint.tensors.values():
        if tensor.file.parent != directory:
            return
        used.add(tensor.file.name)
    if not (directory / INDEX_NAME).is_file():
        yield from _check_weight_files(checkpoint, sorted(used))
    if (directory / ADAPTER_CONFIG).is_file():
        message = "makes transformers take the directory for an adapter of another model"
        hint = "move it out of the directory"
        yield Defect("E_CKPT_KIND", message, ADAPTER_CONFIG, None, hint, "form")


def _check_weight_files(checkpoint: Checkpoint, used: list[str]) -> Iterator[Defect]:
    """Yield defects of the names of weight files that have no index; `used` are read."""
    directory = checkpoint.directory
    if used and SINGLE_FILE not in used:
        name = used[0] if len(used) == 1 else index_file(directory).name
        message = f"transformers looks for {SINGLE_FILE} or {INDEX_NAME}, but not for this name"
        hint = f"{convert_command(directory, format_of(checkpoint))} gives it that name"
        yield Defect("E_CKPT_MISSING", message, name, None, hint, "form")
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in used:
            message = "is beside the weights, and readers differ in whether they load it"
            hint = "move it out of the directory"
            yield Defect("E_CKPT_INDEX", message, file.name, None, hint, "form")


def _check_unread(
    checkpoint: Checkpoint, modules: Iterable[str], count: ByteCount
) -> Iterator[Defect]:
    """Yield defects of tensors whose numbers `examine` has not read; `count` gets the bytes."""
    coded = checkpoint.coded()
    if coded:
        from gptq_cli.checkpoint.coded_checks import check_scales

        yield from check_scales(checkpoint, coded.values())
    packing = GPTQ
    if checkpoint.method not in (None, "gptq"):  # the packing may be the defect
        packing = packing_of(checkpoint)
    codes, examined = set(), set()
    for module in modules:
        for part in packing.dtypes:
            examined.add(f"{module}.{part}")
        codes.add(f"{module}.{packing.codes}")
    for name, tensor in checkpoint.tensors.items():
        if name in codes:
            yield from _check_codes(tensor)
        elif name not in examined:
            yield from _check_finite(tensor)
        count.passed(tensor.nbytes)


def _check_codes(tensor: TensorInfo) -> Iterator[Defect]:
    if tensor.dtype in ("I32", "U32") and tensor.nbytes and is_zero(tensor):
        message = "holds nothing but zeros, as a file that was never written does"
        yield tensor_defect("E_CKPT_CORRUPT", tensor, message)


def _check_finite(tensor: TensorInfo) -> Iterator[Defect]:
    count = count_not_finite(tensor)
    if count:
        yield tensor_defect("E_CKPT_NONFINITE", tensor, f"holds NaN or infinity, {count} times")


# ---------------------------------------------------------------- the manifest


def check_manifest(
    directory: Path, *, full: bool, report: Report = ignore
) -> tuple[int, list[Defect]]:
    """Return how many files were hashed, and the files that differ from the manifest, if any.

    Without `full` only names and sizes are compared. A file that the manifest does not list is a
    defect unless no reader of models uses it.
    """
    if not is_file(directory / MANIFEST):
        return 0, []
    try:
        content = read_json(directory / MANIFEST)
    except InputError as error:
        if error.code == UNREADABLE:
            raise
        return 0, [Defect("E_CKPT_HASH", str(error), MANIFEST, hint=error.hint)]
    files = _listed_files(content)
    if files is None:
        return 0, [Defect("E_CKPT_HASH", "has no mapping `files`", MANIFEST)]
    defects = []
    if not is_intact(content):
        defects.append(Defect("E_CKPT_HASH", "was changed after it was written", MANIFEST))
    defects += _check_listed(directory, files, report, full=full)
    defects += _unlisted_files(directory, files)
    hashed = len(files) if full else 0
    return hashed, defects


def _listed_files(content: Any) -> dict[str, dict[str, Any]] | None:
    """Return the entries of files in a manifest; None if it has none."""
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        return None
    return files


def _unlisted_files(directory: Path, listed: dict[str, Any]) -> Iterator[Defect]:
    hint = "move it out of the directory, unless you know why it is there"
    for name in _files_of(directory):
        if name not in listed and not _may_be_unlisted(name):
            message = "is not in the manifest"
            yield Defect("E_CKPT_HASH", message, name, None, hint, "readers")


def _files_of(directory: Path) -> list[str]:
    """Return the names of all files in `directory` and below, relative to it."""
    names = []
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            names.append(path.relative_to(directory).as_posix())
    return sorted(names)


def _may_be_unlisted(name: str) -> bool:
    """Return whether a file may be added to a finished checkpoint.

    It is about the run, a page or picture, or hidden, as the files of git are.
    """
    path = PurePosixPath(name)
    if name in (MANIFEST, REPORT_DATA, REPORT_PAGE) or path.name.startswith("LICENSE"):
        return True
    return path.suffix.lower() in PAGES or any(part.startswith(".") for part in path.parts)


def _check_listed(
    directory: Path, files: dict[str, dict[str, Any]], report: Report, *, full: bool
) -> list[Defect]:
    """Return how the files differ from their entries in the manifest."""
    defects: list[Defect] = []
    of_listed_size = []
    for name, entry in files.items():
        found = list(_check_file(directory, name, entry))
        defects += found
        if not found:
            of_listed_size.append(name)
    if full:
        defects += _check_hashes(directory, of_listed_size, files, report)
    return defects


def _check_file(directory: Path, name: str, entry: dict[str, Any]) -> Iterator[Defect]:
    """Yield the first difference of a file from its entry in the manifest, but do not hash it."""
    file = directory / name
    if not is_safe_file(directory, name):
        yield Defect("E_UNSAFE_PATH", f"names a file outside the directory: {name!r}", MANIFEST)
        return
    if not is_file(file):
        yield Defect("E_CKPT_MISSING", "is listed in the manifest but missing", name)
        return
    n_bytes, listed_size = file.stat().st_size, entry.get("size")
    if n_bytes != listed_size:
        message = f"has {n_bytes} bytes, but the manifest lists {listed_size}"
        yield Defect("E_CKPT_HASH", message, name)


def _check_hashes(
    directory: Path, names: list[str], entries: dict[str, dict[str, Any]], report: Report
) -> Iterator[Defect]:
    """Yield the files whose hash is not the one in the manifest."""
    total = sum((directory / name).stat().st_size for name in names)
    report(PhaseStarted("verify", f"the hashes of {size(total)}"))
    paths = [directory / name for name in names]
    for name, found in zip(names, file_hashes(paths, ByteCount(report, total)), strict=True):
        yield from _check_hash(name, found, entries[name])


def _check_hash(name: str, found: str, entry: dict[str, Any]) -> Iterator[Defect]:
    listed = entry.get("sha256")
    if found != listed:
        digests = f"{found[:12]}..., but the manifest lists {str(listed)[:12]}..."
        yield Defect("E_CKPT_HASH", f"has SHA-256 {digests}", name)


def _other_hashes(directory: Path, hashes: Mapping[str, str]) -> list[Defect]:
    """Return the listed files whose known hash is not the one in the manifest."""
    defects: list[Defect] = []
    listed = _listed_files(read_json(directory / MANIFEST)) or {}
    for name in listed.keys() & hashes.keys():
        defects += _check_hash(name, hashes[name], listed[name])
    return sorted(defects, key=lambda defect: defect.place)
