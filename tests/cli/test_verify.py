"""`gptq verify` prints one line for a sound checkpoint, or a list of defects with exit code 4."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.checkpoint.gptq_files import MODULES, SHARDS, gptq_files

from .conftest import Run


def test_a_sound_checkpoint_gets_one_line_with_the_checks(gptq: Run, tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    found = gptq("verify", directory)
    assert (found.exit_code, found.stderr) == (0, "")
    assert found.stdout == (
        f"{directory}: ok, 6 modules of 4 bits (gptq) in 30 tensors, 29.8 KB; "
        "read headers, groups, zero points and scales\n"
    )
    assert gptq("verify", directory, "-q").stdout == "ok\n"
    data = json.loads(gptq("verify", directory, "--json").stdout)
    assert (data["status"], data["defects"]) == ("ok", [])
    assert (data["modules"], data["format"]) == (6, "gptq")


def test_defects_are_listed_and_exit_with_4(gptq: Run, tmp_path: Path) -> None:
    files = gptq_files()
    files.tensors[f"{MODULES[5]}.scales"][0, 0] = 0
    files.tensors[f"{MODULES[0]}.g_idx"][0] = 7
    directory = files.write(tmp_path / "c")
    found = gptq("verify", directory)
    assert found.exit_code == 4
    lines = found.stdout.splitlines()
    assert lines == [
        f"E_CKPT_GROUPS {SHARDS[0]}: {MODULES[0]}.g_idx: holds 0 to 7, but there are 2 groups",
        f"E_CKPT_SCALES {SHARDS[1]}: {MODULES[5]}.scales: 1 of 256 scales are zero in float16",
    ]
    assert found.stderr.startswith(f"error[E_VERIFY]: `{directory}` has 2 defects\n\nhint: ")
    data = json.loads(gptq("verify", directory, "--json").stdout)
    assert (data["status"], data["exit_code"]) == ("error", 4)
    assert data["problems"][0]["code"] == "E_VERIFY"
    place = {"file": SHARDS[1], "tensor": f"{MODULES[5]}.scales"}
    assert place.items() <= data["defects"][1].items()


def test_many_defects_of_one_kind_are_counted(gptq: Run, tmp_path: Path) -> None:
    files = gptq_files()
    for name in MODULES:
        files.tensors[f"{name}.scales"] = np.zeros_like(files.tensors[f"{name}.scales"])
    found = gptq("verify", files.write(tmp_path / "c"))
    assert len(found.stdout.splitlines()) == 6
    assert found.stdout.endswith("E_CKPT_SCALES 1 more, see --json\n")


def test_a_torn_shard_is_a_defect(gptq: Run, tmp_path: Path) -> None:
    directory = gptq_files().write(tmp_path / "c")
    (directory / SHARDS[0]).write_bytes(b"torn")
    found = gptq("verify", directory)
    assert (found.exit_code, len(found.stderr.splitlines())) == (4, 3)
    assert "E_CKPT_CORRUPT" in found.stdout


def test_a_directory_that_holds_no_checkpoint_is_refused(gptq: Run, tmp_path: Path) -> None:
    missing = gptq("verify", tmp_path / "none")
    assert missing.exit_code == 3
    assert "E_MODEL_NOT_FOUND" in missing.stderr + missing.stdout
    empty = gptq("verify", tmp_path)
    assert "E_CKPT_CONFIG" in empty.stderr + empty.stdout


def test_escapes_and_markup_in_names_are_escaped(gptq: Run, tmp_path: Path) -> None:
    files = gptq_files()
    for part in ("qweight", "qzeros", "scales"):
        files.tensors[f"model.layers.0.\x1b[31m[red]evil[/red].{part}"] = np.zeros(
            (2, 2), np.float32
        )
    found = gptq("verify", files.write(tmp_path / "c"))
    assert found.exit_code == 4
    assert "\\x1b[31m[red]evil[/red]: no g_idx" in found.stdout
    assert "\x1b" not in found.stdout + found.stderr
