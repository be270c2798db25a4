"""`gptq plan` and `quantize --dry-run`: the table, the words, and that nothing is loaded, downloaded or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_cli.storage.manifest import write_manifest
from tests.families import save_model
from tests.hub import serve

from .conftest import FakeQuantizer, Run

HEAVY = ("torch", "transformers", "datasets", "safetensors", "huggingface_hub")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plan") / "Tiny-1M", max_shard_size="200KB")


def run_process(words: list[str], environment: dict[str, str]) -> tuple[int, str, str, list[str]]:
    """Exit code, stdout, stderr, and which of the heavy packages were loaded."""
    script = f"""
import sys
from gptq_cli.__main__ import main
sys.argv = ["gptq", *{words!r}]
try:
    main()
except SystemExit as stop:
    print("LOADED", *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)
    raise
"""
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    *stderr, loaded = found.stderr.splitlines()
    return found.returncode, found.stdout, "\n".join(stderr), loaded.split()[1:]


def test_the_plan_lists_the_layers_and_why_some_are_kept(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, "-b", "4", "-g", "32", "--dynamic", r"-:.*\.0\.mlp", "-o", "there")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == "Tiny-1M -> there"
    assert "  3 x  self_attn.q_proj                 128x64  4 bit g32" in lines
    assert "  2 x  mlp.down_proj                    64x128  4 bit g32" in lines
    assert (
        r"  1 x  mlp.down_proj                    64x128  F32        rule '-:.*\.0\.mlp': kept"
        in lines
    )
    assert (
        "  1 x  lm_head                          512x64  F32        output head, see --lm-head"
        in lines
    )
    for words in (
        "smaller) in 1 file",
        "on the CPU (estimate)",
        "(estimate, not measured)",
        "disk    ",
        "loads in ",
    ):
        assert words in result.stdout
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_a_dry_run_prints_the_same_and_runs_nothing(
    gptq: Run,
    model: Path,
    quantizer: FakeQuantizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(model), "-b", "4", "-g", "32", "--json"]
    planned, dry = gptq("plan", *words), gptq("quantize", *words, "--dry-run")
    assert (planned.exit_code, dry.exit_code) == (0, 0)
    data, same = json.loads(planned.stdout), json.loads(dry.stdout)
    assert data["disk"].pop("free_bytes") > 0
    assert data == same | {"disk": data["disk"]}
    assert data["output"] == "Tiny-1M-GPTQ-Int4-g32"
    assert data["bytes_after"] == sum(data["files"].values())
    assert data["memory"]["estimate"] is True
    assert data["memory"]["cpu"]["peak_bytes"] == sum(data["memory"]["cpu"]["terms"].values())
    assert len(data["layers"]) == sum(row["count"] for row in data["quantized"]) == 21
    assert quantizer.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_plan_has_a_time_only_with_the_flag(gptq: Run, model: Path) -> None:
    words = ["plan", str(model), "-b", "4", "-g", "32", "--device", "cpu"]
    plain, timed = gptq(*words, "--json"), gptq(*words, "--time", "--json")
    assert (plain.exit_code, timed.exit_code) == (0, 0)
    assert json.loads(plain.stdout)["seconds"] is None
    seconds = json.loads(timed.stdout)["seconds"]
    parts = sum(seconds[part] for part in ("forward", "hessian", "factor", "solve", "network"))
    assert seconds["total"] == max(parts, seconds["reading"]) > 0
    assert "time" not in [line.split(" ")[0] for line in gptq(*words).stdout.splitlines()]
    shown = gptq(*words, "--time").stdout
    assert "\ntime    about 0:00:0" in shown
    assert "rates measured on this device" in shown


def test_time_for_several_devices_is_refused(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, "-b", "4", "-g", "32", "--time", "--devices", "4")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_CONFLICT]: --time measures one device, but --devices is 4" in result.stderr
    assert "omit --devices or --time" in result.stderr


def test_quiet_prints_the_bytes_alone(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, "-b", "4", "-g", "32", "-q")
    assert result.stdout.strip().isdigit()
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        (["MODEL"], 2, "error[E_CFG_MISSING]: bits is required", "--bits 4"),
        (
            ["MODEL", "-b", "4", "-g", "48"],
            2,
            "error[E_SHAPE]: group_size 48 does not divide",
            "such as 64 or -1",
        ),
        (["MODEL", "-b", "4", "-g", "32", "--seqlen", "999"], 2, "E_CFG_SEQLEN", "--seqlen 128"),
        (
            ["./none", "-b", "4"],
            3,
            "error[E_MODEL_NOT_FOUND]: `./none` is not a directory",
            "a Hub id",
        ),
        (["MODEL", "-b", "4", "--overwrite"], 2, "No such option: --overwrite", ""),
    ],
)
def test_the_plan_refuses_the_settings_that_a_run_refuses(
    words: list[str], exit_code: int, message: str, hint: str, gptq: Run, model: Path
) -> None:
    result = gptq("plan", *[str(model) if word == "MODEL" else word for word in words])
    assert (result.exit_code, result.stdout) == (exit_code, "")
    assert message in result.stderr
    assert hint in result.stderr


def test_a_text_config_that_is_no_mapping_is_ignored(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    odd = Path(shutil.copytree(model, tmp_path / "odd"))
    content = json.loads((odd / "config.json").read_text(encoding="utf-8"))
    (odd / "config.json").write_text(
        json.dumps(content | {"text_config": "none"}), encoding="utf-8"
    )
    result, usual = (
        gptq("plan", directory, "-b", "4", "-g", "32", "-q") for directory in (odd, model)
    )
    assert (result.exit_code, result.stdout) == (0, usual.stdout)


def test_the_plan_reports_an_existing_output_and_a_full_disk(
    gptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    result = gptq("plan", model, "-b", "4", "-g", "32", "-o", tmp_path)
    assert result.exit_code == 0
    assert f"note: `{tmp_path}` exists" in result.stderr
    assert "warning[W_DISK]: 1 KB are free" in result.stderr


def test_the_plan_notes_that_an_output_may_be_complete(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    write_manifest(tmp_path, {"identity": {}})
    result = gptq("plan", model, "-b", "4", "-g", "32", "-o", tmp_path)
    assert result.exit_code == 0
    assert "if this run would write the same, quantize will keep it; if not" in result.stderr


def test_the_plan_notes_a_memory_limit_that_is_too_low(gptq: Run, model: Path) -> None:
    words = ["plan", model, "-b", "4", "-g", "32", "--max-ram", "1MB", "--max-vram", "900GB"]
    result = gptq(*words)
    assert result.exit_code == 0
    assert "note: --max-ram allows 1 MB, but a run on the CPU needs about " in result.stderr
    assert "--max-vram" not in result.stderr


def test_a_hub_model_is_planned_from_ranges_of_its_files(model: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 2
    with serve(
        {"someone/Tiny-1M": files, "someone/single": {"config.json": b"{}"}}, kind="model"
    ) as hub:
        environment = hub.environment(tmp_path / "home")
        words = ["plan", "someone/Tiny-1M", "-b", "4", "-g", "32", "--json"]
        code, stdout, stderr, loaded = run_process(words, environment)
        asked = [
            request
            for request in hub.requests
            if ".safetensors" in request and "index" not in request
        ]
        refused = run_process(["plan", "someone/single", "-b", "4"], environment)
        unknown = run_process(["plan", "someone/nothing", "-b", "4"], environment)
    assert (code, stderr, loaded) == (0, "", ["huggingface_hub"])
    remote = json.loads(stdout)
    assert remote["commit"] == hub.commit("someone/Tiny-1M")
    _, stdout, _, loaded = run_process(["plan", str(model), *words[2:]], {})
    assert loaded == []
    local = json.loads(stdout)
    for key in ("layers", "quantized", "kept", "files", "bytes_before", "bytes_after"):
        assert remote[key] == local[key]
    assert {request.split()[0] for request in asked} <= {"GET", "HEAD"}
    cached = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert not any(name.endswith(".safetensors") for name in cached)
    assert refused[0] == 3
    assert "E_CKPT_MISSING" in refused[2]
    assert unknown[0] == 3
    assert "E_HUB_NOT_FOUND" in unknown[2]


def test_an_unreachable_hub_is_an_input_error(tmp_path: Path) -> None:
    with serve({}, kind="model") as hub:
        environment = hub.environment(tmp_path)
    code, _, stderr, _ = run_process(["plan", "someone/tiny", "-b", "4"], environment)
    assert code == 3
    assert "E_HUB_NETWORK" in stderr
    assert len(stderr.splitlines()) <= 4
