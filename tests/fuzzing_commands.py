"""Commands over files of strangers: run files, reports, evaluations, names of files beside a model.

Each call must work, or be refused with a code and exit code 2 to 6. It may make, change and remove
nothing but its output, and print no character that steers a terminal.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Callable, Collection
from contextlib import chdir, suppress
from pathlib import Path

from typer.testing import CliRunner

from gptq_cli.checkpoint.verify import verify_checkpoint
from gptq_cli.cli.app import app
from gptq_cli.inspection.convert import convert_checkpoint
from gptq_cli.storage.manifest import INDEX_NAME, MANIFEST, REPORT_DATA, REPORT_PAGE, sealed
from gptq_cli.storage.work_directory import RUN, read_run
from tests.checkpoint.gptq_files import gptq_files
from tests.disks import CountingDisk, using
from tests.families import save_model
from tests.fuzzing import EVALUATION, REPORT, Subject
from tests.tiny import SMALL, WORK, Case, kill_after_block

HERE = b"FOLDER"  # in the inputs: the folder of the trials, whose name differs from run to run
CODE = re.compile(r"\bE_[A-Z_]+")
LONG = b"x" * 255
NAMES = [
    b"chat_template.jinja", b"LICENSE", b"tokenizer.model", b"sub/folder/file.txt",
         b"configuration_x.py", b".hidden",
    MANIFEST.encode(), REPORT_DATA.encode(), REPORT_PAGE.encode(), b"gptq_config.yaml",
         b"quantize_config.json",
    INDEX_NAME.encode(), b"model.safetensors", b"x.safetensors", b"pytorch_model.bin",
         b"adapter_config.json",
    f".{MANIFEST}.tmp".encode(), b".config.json.tmp", b"lock", b"holder.json", b"run.json",
         b"journal.jsonl", b"out",
    b"CON", b"nul.txt", b"CONFIG.JSON", b"config.json ", b"...", b" ", b"~", b"-o", b"--overwrite",
         b"*", b"[a-z]?.txt",
    b"{a,b}", b"$(touch x)", b"`x`", b"%s%n", b"a\nerror[E_BUG]: forged", b"a\r\nwarning: x",
         b"\x1b[2J\x07.txt",
    b"\xff\xfe.txt", "\ud800".encode("utf-8", "surrogatepass"), "\u202etxt.py".encode(),
         "e\u0301".encode(),
    "\u2028".encode(), b"C:\\x", b"..\\x", LONG, LONG[:250] + b".json", b"d/" * 60 + b"f",
         b".git/config",
    b"checkpoint-1/model.safetensors", b"__pycache__/x.pyc", b"../secret.txt", b"../../secret.txt",
         b"/etc/hostname",
    b"./config.json", b"sub/../config.json", b"'\"", b"a\\nb", b"\x7f", b"\xc2\x9b31m",
]  # fmt: skip


def call(folder: Path, *words: object, may_change: Collection[Path] = ()) -> str:
    """Return how `gptq` with `words` ends in `folder`: `done`, or the code of its error.

    Raise AssertionError if it ends otherwise or changes anything in `folder` outside `may_change`.
    """
    before = _state(folder, may_change)
    with chdir(folder / "trial"):
        result = CliRunner().invoke(app, [str(word) for word in words])
    printed = f"{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    said = f"gptq {words}: exit code {result.exit_code}\n{printed}"
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        f"{result.exception!r}\n{said}"
    )
    assert result.exit_code in (0, 2, 3, 4, 5, 6), said
    assert not re.search(r"(?m)^error\[E_BUG\]|^Traceback", result.stderr), said
    assert not [
        letter
        for letter in result.output
        if unicodedata.category(letter) == "Cc" and letter not in "\n\t"
    ], said
    assert _state(folder, may_change) == before, said
    if result.exit_code == 0:
        if "--json" in words:
            json.loads(result.stdout)
        return "done"
    codes = CODE.findall(result.output)
    assert codes, said
    return str(codes[0])


def _state(folder: Path, without: Collection[Path]) -> dict[str, tuple[object, ...]]:
    """What tells whether something below `folder` has changed."""
    found: dict[str, tuple[object, ...]] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name) not in without]
        for name in (*folders, *names):
            path = Path(place, name)
            if path not in without:
                status = path.lstat()
                times = () if path.is_dir() else (status.st_mtime_ns, status.st_size)
                found[str(path)] = (status.st_ino, status.st_mode, *times)
    return found


def _trial(folder: Path) -> Path:
    """An empty directory of one trial, with a file beside it that nobody may touch."""
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir(parents=True)
    (folder / "secret.txt").touch()
    (trial / "secret.txt").touch()
    return trial


def _run_files(folder: Path) -> list[bytes]:
    """The run file of an unfinished run, whose work directory is kept for the trials."""
    model = save_model(folder / "model", **SMALL)
    output = _trial(folder) / "out"
    with using(CountingDisk()):
        kill_after_block(Case(model, {}, []), output, 0)
    run = read_run(folder / "trial" / WORK)
    shutil.move(folder / "trial" / WORK, folder / "unfinished")
    return [json.dumps(run).encode().replace(os.fsencode(folder), HERE)]


def _resume(content: bytes, folder: Path) -> str:
    trial = _trial(folder)
    work = Path(shutil.copytree(folder / "unfinished", trial / WORK))
    content = content.replace(HERE, os.fsencode(folder))
    (work / RUN).write_bytes(content if len(content) % 4 == 0 else _with_checksum(content))
    log = trial / "log.txt"
    words = ["resume", work, *([] if len(content) % 2 else ["--log-file", log])]
    with using(CountingDisk()):
        ended = call(folder, *words, may_change=(work, trial / "out", log))
    if ended == "done":
        assert verify_checkpoint(trial / "out", full=True).ok
        assert not work.exists()
    return ended


def _with_checksum(content: bytes) -> bytes:
    """Return the JSON object with its right checksum, so that the program reads the rest, too."""
    with suppress(ValueError, RecursionError, AttributeError):
        return json.dumps(sealed(json.loads(content))).encode()
    return content


def _show_report(content: bytes, folder: Path) -> str:
    output = _output(folder)
    (output / REPORT_DATA).write_bytes(content)
    ended = call(folder, "report", output, may_change=[output / REPORT_PAGE])
    assert ended != "done" or b"<script" not in (output / REPORT_PAGE).read_bytes().lower()
    return ended


def _show_evaluation(content: bytes, folder: Path) -> str:
    output = _output(folder)
    (folder / "trial" / "ppl.json").write_bytes(content)
    return call(
        folder,
        "push",
        output,
        "me/x",
        "--base-model",
        "a/b",
        "--evaluation",
        "ppl.json",
        "--dry-run",
        *_json(content),
    )


def _output(folder: Path) -> Path:
    """A small sound checkpoint in a new trial."""
    if not (folder / "gptq").exists():
        gptq_files().write(folder / "gptq")
    return Path(shutil.copytree(folder / "gptq", _trial(folder) / "out"))


def _json(content: bytes) -> list[str]:
    return ["--json"] if len(content) % 2 else []


def _names_beside(content: bytes, folder: Path) -> str:
    """A command over a model with a strange name in it, or with settings that name one."""
    if not (folder / "gptq").exists():
        gptq_files().write(folder / "gptq")
        save_model(folder / "plain", **SMALL)
        convert_checkpoint(str(folder / "gptq"), folder / "old", "gptq_v2")
        (folder / "text.txt").write_text(
            "a quick brown fox jumps over the lazy dog and then some more " * 20
        )
    number = zlib.crc32(content)
    trial = _trial(folder)
    command = COMMANDS[number % len(COMMANDS)]
    place = PLACES[number // 100 % len(PLACES)]
    source = Path(
        shutil.copytree(folder / ("plain" if command[0] == "quantize" else "gptq"), trial / "model")
    )
    output = trial / "out"
    words = [command[0], source, *command[1:], *_json(content)]
    if place is _listed_in_an_old_output:
        shutil.copytree(folder / "old", output)
        place(content, output)
        words += ["--overwrite"] if "-o" in words else []
    elif not place(content, source):
        return "cannot be made"
    ended = call(folder, *words, may_change=(output, trial / WORK))
    if ended == "done" and "-o" in words:
        defects = [] if command[0] == "dequantize" else verify_checkpoint(output, full=True).defects
        assert not defects, (command, place, content, defects)
        assert not [
            path
            for path in output.rglob("*")
            if path.is_symlink() or not (path.is_file() or path.is_dir())
        ]
        assert not (trial / WORK).exists()
    return f"{command[0]}: {ended}"


def _path(content: bytes, directory: Path) -> Path | None:
    """Return a path in `directory` with a name of `content`, or None; make the folders above."""
    parts = [
        part[:255]
        for part in content.replace(b"\0", b"").split(b"/")
        if part not in (b"", b".", b"..")
    ]
    if not parts:
        return None
    path = directory.joinpath(*map(os.fsdecode, parts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return None if os.path.lexists(path) else path
    except OSError:
        return None


def _as_file(content: bytes, directory: Path) -> bool:
    path = _path(content, directory)
    if path:
        path.write_bytes(b"something")
    return path is not None


def _as_folder(content: bytes, directory: Path) -> bool:
    path = _path(content, directory)
    if path:
        path.mkdir()
        (path / "file.txt").write_bytes(b"something")
    return path is not None


def _as_pipe(content: bytes, directory: Path) -> bool:
    path = _path(content, directory)
    if path:
        os.mkfifo(path)
    return path is not None


def _as_link(content: bytes, directory: Path) -> bool:
    path = _path(content, directory)
    if path:
        targets = [
            "../secret.txt",
            "config.json",
            "nothing",
            path.name,
            "..",
            "/dev/zero",
            directory / "config.json",
        ]
        path.symlink_to(targets[zlib.crc32(content) // 1000 % len(targets)])
    return path is not None


def _in_the_index(content: bytes, directory: Path) -> bool:
    """A shard of this name in the index."""
    file = directory / INDEX_NAME
    index = (
        json.loads(file.read_bytes())
        if file.exists()
        else {"metadata": {}, "weight_map": {"a.weight": ""}}
    )
    index["weight_map"][min(index["weight_map"])] = os.fsdecode(content)
    file.write_text(json.dumps(index))
    return True


def _in_the_manifest(content: bytes, directory: Path) -> bool:
    """A file of this name, which need not be there, in a manifest."""
    name = os.fsdecode(content)
    entry = {"sha256": hashlib.sha256(b"").hexdigest(), "size": 0}  # of secret.txt
    with suppress(ValueError):  # a name that no checksum can be made of
        old = (
            json.loads((directory / MANIFEST).read_bytes())
            if (directory / MANIFEST).exists()
            else {"schema": 1}
        )
        manifest = sealed(old | {"files": old.get("files", {}) | {name: entry}})
        (directory / MANIFEST).write_text(json.dumps(manifest))
        return True
    return False


def _listed_in_an_old_output(content: bytes, directory: Path) -> bool:
    if content.startswith((b".", b"/")):
        return _in_the_manifest(content, directory)
    return _as_link(content, directory) and _in_the_manifest(content, directory)


PLACES: list[Callable[[bytes, Path], bool]] = [
    _as_file, _as_file, _as_folder, _as_pipe, _as_link, _as_link, _in_the_index, _in_the_manifest,
    _listed_in_an_old_output,
]  # fmt: skip
COMMANDS: list[list[str]] = [
    ["convert", "--to", "gptq_v2", "-o", "out"],
    ["dequantize", "-o", "out"],
    [
        "quantize",
        "-o",
        "out",
        "--dataset",
        "../text.txt",
        "-g",
        "32",
        "-b",
        "4",
        "--nsamples",
        "2",
        "--seqlen",
        "16",
    ],
    ["inspect"],
    ["verify", "--full"],
    ["push", "me/x", "--base-model", "a/b", "--dry-run"],
]
# Each input costs as much as many that are only read.
CALLS = {
    "run files": Subject(_run_files, _resume, weight=20, within=True),
    "pages of reports": Subject(
        [json.dumps(REPORT).encode()], _show_report, weight=20, within=True
    ),
    "cards of evaluations": Subject(
        [json.dumps(EVALUATION).encode()], _show_evaluation, weight=20, within=True
    ),
    "names of side files": Subject(NAMES, _names_beside, weight=20),
}
