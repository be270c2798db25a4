"""`gptq plan` and `quantize --dry-run` print a plan; they load, download and write nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gptq_cli.checkpoint.source import open_checkpoint
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.errors import clock
from gptq_cli.planning.checks import default_output
from gptq_cli.planning.seconds import Rates
from gptq_cli.runtime import rates as runtime_rates
from gptq_cli.storage.manifest import write_manifest
from tests.families import save_model
from tests.hub import serve

from .conftest import FakeQuantizer, Run, validate_output
from .processes import run_process

SETTINGS = ["-b", "4", "-g", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model of several shards."""
    return save_model(tmp_path_factory.mktemp("plan") / "Tiny-1M", max_shard_size="200KB")


@pytest.fixture
def printed(gptq: Run, model: Path) -> Result:
    """Return the result of a plan with a rule that keeps some layers."""
    return gptq("plan", model, *SETTINGS, "--dynamic", r"-:.*\.0\.mlp", "-o", "there")


def test_the_plan_lists_the_layers_and_why_some_are_kept(printed: Result) -> None:
    assert printed.exit_code == 0
    lines = printed.stdout.splitlines()
    assert lines[0] == "Tiny-1M -> there"
    for line in (
        "  3 x  self_attn.q_proj              128x64  4 bit g32",
        "  2 x  mlp.down_proj                 64x128  4 bit g32",
        r"  1 x  mlp.down_proj                 64x128  F32        rule '-:.*\.0\.mlp': kept",
        "  1 x  lm_head                       512x64  F32        see --lm-head",
    ):
        assert line in lines


@pytest.mark.parametrize(
    "words",
    [
        "smaller) in 1 file",
        "on the CPU (estimate)",
        "(estimate, not measured)",
        "disk    ",
        "loads in ",
    ],
)
def test_the_plan_prints_sizes_memory_disk_and_engines(words: str, printed: Result) -> None:
    assert words in printed.stdout


def test_the_plan_fits_100_columns_without_escapes(printed: Result) -> None:
    assert max(map(len, printed.stdout.splitlines())) <= 100
    assert "\x1b" not in printed.stdout
    assert printed.stderr == ""


def test_a_dry_run_prints_the_plan(gptq: Run, model: Path, quantizer: FakeQuantizer) -> None:
    planned = gptq("plan", model, *SETTINGS, "--json")
    dry = gptq("quantize", model, *SETTINGS, "--json", "--dry-run")
    assert (planned.exit_code, dry.exit_code) == (0, 0)
    data, same = json.loads(planned.stdout), json.loads(dry.stdout)
    assert data["disk"].pop("free_bytes") > 0
    assert data == same | {"disk": data["disk"]}
    assert quantizer.calls == []


def test_a_dry_run_writes_nothing(
    gptq: Run,
    model: Path,
    quantizer: FakeQuantizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["plan", model], ["quantize", model, "--dry-run"]):
        assert gptq(*words, *SETTINGS, "--json").exit_code == 0
    assert quantizer.calls == []
    assert list(tmp_path.iterdir()) == []


def test_the_sums_of_the_plan_as_json_are_right(gptq: Run, model: Path) -> None:
    data = json.loads(gptq("plan", model, *SETTINGS, "--json").stdout)
    assert data["output"] == "Tiny-1M-GPTQ-Int4-g32"
    assert data["bytes_after"] == sum(data["files"].values())
    assert data["memory"]["estimate"] is True
    assert data["memory"]["cpu"]["peak_bytes"] == sum(data["memory"]["cpu"]["terms"].values())
    assert len(data["layers"]) == sum(row["count"] for row in data["quantized"]) == 21


def test_a_plan_without_a_width_is_a_table(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, "--seqlen", "64", "--device", "cpu")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[2].split() == ["bits", "group", "size", "bpw", "CPU", "GPU", "loads", "in"]
    rows = [line.replace("*", " ").split() for line in lines[3:11]]
    groups = ["64", "32"]  # 128 does not divide 64 inputs
    assert [row[:2] for row in rows] == [[bits, group] for bits in "8432" for group in groups]
    marked = [line for line in lines if "*" in line]
    assert marked[:2] == [lines[5], "* = the defaults with --group-size auto"]
    assert [line.split(" layers ")[0] for line in marked[2:]] == ["size of *:"]
    assert "group_size auto is 64" in result.stderr
    assert max(map(len, lines)) <= 80


def test_the_name_of_an_output_has_the_number_of_auto(gptq: Run, model: Path) -> None:
    planned = gptq("plan", model, "-b", "3", "-g", "auto", "--json")
    assert json.loads(planned.stdout)["output"] == "Tiny-1M-GPTQ-Int3-g64"
    config = QuantizeConfig(bits=3, group_size="auto")
    assert default_output(str(model), config, config) == Path("Tiny-1M-GPTQ-Int3-g64")


def test_the_rows_of_the_table_are_those_of_single_plans(gptq: Run, model: Path) -> None:
    data = json.loads(gptq("plan", model, "--json").stdout)
    assert len(data["choices"]) == 8
    for choice in data["choices"][::3]:
        words = ["-b", str(choice["bits"]), "-g", str(choice["group_size"])]
        alone = json.loads(gptq("plan", model, *words, "--json").stdout)
        assert alone["choices"] == []
        assert choice["bytes_after"] == alone["bytes_after"]
        assert choice["bits_per_weight"] == alone["bits_per_weight"]
        assert choice["cpu_bytes"] == alone["memory"]["cpu"]["peak_bytes"]
        outcomes = alone["engines"].items()
        assert choice["loads"] == [
            engine for engine, found in outcomes if found["outcome"] in ("yes", "limited")
        ]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_parts_of_a_plan_are_those_of_the_file(kind: str, gptq: Run, tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", kind)
    data = json.loads(gptq("plan", source, *SETTINGS, "--json").stdout)
    before = {}
    for name, tensor in open_checkpoint(source).tensors.items():
        before[name] = tensor.nbytes
    names = ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight")
    assert data["parts"]["embeddings"] == sum(before.get(name, 0) for name in names) > 0
    assert data["parts"]["head"] == before.get("lm_head.weight", 0)
    headers = data["bytes_after"] - sum(data["parts"].values())
    assert 0 < headers < 20_000
    assert data["parts"]["layers"] > sum(row["bytes"] for row in data["quantized"])


def test_a_plan_has_a_time_only_with_the_flag(gptq: Run, model: Path) -> None:
    words = ["plan", model, *SETTINGS, "--device", "cpu"]
    plain = gptq(*words).stdout
    assert "time" not in [line.split(" ")[0] for line in plain.splitlines()]
    timed = gptq(*words, "--time").stdout
    assert "\ntime    at least 0:00:" in timed
    assert "rates measured on this device" in timed


def test_the_table_has_the_time_of_the_marked_row(gptq: Run, model: Path) -> None:
    words = ["plan", model, "--device", "cpu", "--format", "mlx", "--seqlen", "64"]
    plain, timed = gptq(*words), gptq(*words, "--time")
    assert "rates measured" not in plain.stdout
    lines = timed.stdout.splitlines()
    marked = lines.index("* = the defaults with --group-size auto")
    assert lines[marked + 2].startswith("time    at least 0:00:")
    assert "next: add --bits 4 to see the layers of a row" in timed.stderr


def test_a_plan_as_json_has_seconds_only_with_the_flag(gptq: Run, model: Path) -> None:
    words = ["plan", model, *SETTINGS, "--device", "cpu", "--json"]
    plain, timed = gptq(*words), gptq(*words, "--time")
    assert (plain.exit_code, timed.exit_code) == (0, 0)
    assert json.loads(plain.stdout)["seconds"] is None
    validate_output(json.loads(timed.stdout), "plan")
    seconds = json.loads(timed.stdout)["seconds"]
    parts = sum(seconds[part] for part in ("forward", "hessian", "factor", "solve", "network"))
    assert seconds["total"] == max(parts, seconds["reading"]) + seconds["fixed"] > 0


def test_the_time_of_a_run_with_a_goal_names_its_measurement(
    gptq: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Rates(forward=1e6, hessian=1e6, factor=1e6, solve=1e6, columns=1e6, disk=1e9)
    monkeypatch.setattr(runtime_rates, "measure_rates", lambda *_: slow)
    words = ["plan", model, "--device", "cpu", "-g", "32", "--seqlen", "64", "--time"]
    one_width = json.loads(gptq(*words, "--bits", "3", "--json").stdout)["seconds"]
    goal = ["--bits", "3", "--allow-bits", "2,3,4"]
    found = json.loads(gptq(*words, *goal, "--json").stdout)["seconds"]
    assert one_width["measuring"] is None
    assert found["measuring"] > 1
    assert found["total"] == pytest.approx(one_width["total"] + found["measuring"], rel=0.2)
    shown = gptq(*words, *goal).stdout
    assert f"the measurement of widths {clock(found['measuring'])}, which is part of" in shown
    assert "measurement of widths" not in gptq(*words, "--bits", "3").stdout


@pytest.mark.parametrize("devices", ["3", "0,1,2", "cpu:3"])
def test_a_plan_takes_the_devices_of_a_run_or_their_number(
    devices: str, gptq: Run, model: Path
) -> None:
    result = gptq("plan", model, *SETTINGS, "--devices", devices, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["devices"] == 3


@pytest.mark.parametrize("devices", ["many", "cpu:0", "-1"])
def test_a_plan_refuses_devices_that_a_run_refuses(devices: str, gptq: Run, model: Path) -> None:
    result = gptq("plan", model, *SETTINGS, f"--devices={devices}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_RANGE]: --devices must be numbers of GPUs" in result.stderr


def test_time_for_several_devices_is_refused(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, *SETTINGS, "--time", "--devices", "4")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error[E_CFG_CONFLICT]: --time measures one device, but --devices is 4" in result.stderr
    assert "omit --devices or --time" in result.stderr


def test_quiet_prints_the_bytes_alone(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, *SETTINGS, "-q")
    assert result.stdout.strip().isdigit()
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "exit_code", "message", "hint"),
    [
        (
            ["MODEL", "-b", "4", "-g", "48"],
            2,
            "error[E_SHAPE]: group_size 48 does not divide",
            "use --group-size auto, which takes 64, or --group-size -1",
        ),
        (["MODEL", "-b", "4", "-g", "32", "--seqlen", "999"], 2, "E_CFG_SEQLEN", "--seqlen 128"),
        (
            ["./none", "-b", "4"],
            3,
            "error[E_MODEL_NOT_FOUND]: `./none` is not a directory",
            "a Hub id",
        ),
        (["MODEL", "-b", "4", "--overwrite"], 2, "there is no option --overwrite", ""),
    ],
)
def test_the_plan_refuses_the_settings_that_a_run_refuses(
    words: list[str], exit_code: int, message: str, hint: str, gptq: Run, model: Path
) -> None:
    names = {"MODEL": str(model)}
    result = gptq("plan", *[names.get(word, word) for word in words])
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
    result, usual = (gptq("plan", directory, *SETTINGS, "-q") for directory in (odd, model))
    assert (result.exit_code, result.stdout) == (0, usual.stdout)


def test_the_plan_reports_an_existing_output_and_a_full_disk(
    gptq: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    result = gptq("plan", model, *SETTINGS, "-o", tmp_path)
    assert result.exit_code == 0
    assert f"note: `{tmp_path}` exists" in result.stderr
    assert "warning[W_DISK]: 1 KB are free" in result.stderr


def test_the_plan_notes_that_an_output_may_be_complete(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    write_manifest(tmp_path, {"identity": {}})
    result = gptq("plan", model, *SETTINGS, "-o", tmp_path)
    assert result.exit_code == 0
    assert "if this run would write the same, quantize will keep it; if not" in result.stderr


def test_the_plan_notes_a_memory_limit_that_is_too_low(gptq: Run, model: Path) -> None:
    words = ["plan", model, *SETTINGS, "--max-ram", "1MB", "--max-vram", "900GB"]
    result = gptq(*words)
    assert result.exit_code == 0
    assert "note: --max-ram allows 1 MB, but a run on the CPU needs about " in result.stderr
    assert "--max-vram" not in result.stderr


@dataclass(frozen=True)
class HubPlan:
    """A plan of a model on the Hub: the JSON, the requests for weights, the files of the cache."""

    exit_code: int
    data: dict[str, Any]
    stderr: str
    loaded: list[str]
    commit: str
    asked: list[str]
    cached: list[str]


@pytest.fixture(scope="module")
def hub_plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> HubPlan:
    """Plan the model on a server that stands for the Hub."""
    home = tmp_path_factory.mktemp("home")
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    with serve({"someone/Tiny-1M": files}, kind="model") as hub:
        words = ["plan", "someone/Tiny-1M", *SETTINGS, "--json"]
        code, stdout, stderr, loaded = run_process(words, hub.environment(home))
        asked: list[str] = []
        for request in hub.requests:
            if ".safetensors" in request and "index" not in request:
                asked.append(request)
        commit = hub.commit("someone/Tiny-1M")
    cached = [path.name for path in home.rglob("*") if path.is_file()]
    return HubPlan(code, json.loads(stdout), stderr, loaded, commit, asked, cached)


def test_the_plan_of_a_hub_model_equals_that_of_its_copy(hub_plan: HubPlan, model: Path) -> None:
    assert (hub_plan.exit_code, hub_plan.stderr) == (0, "")
    assert hub_plan.loaded == ["huggingface_hub"]
    assert hub_plan.data["commit"] == hub_plan.commit
    _, stdout, _, loaded = run_process(["plan", str(model), *SETTINGS, "--json"], {})
    assert loaded == []
    local = json.loads(stdout)
    for key in ("layers", "quantized", "kept", "files", "bytes_before", "bytes_after"):
        assert hub_plan.data[key] == local[key]


def test_the_plan_of_a_hub_model_downloads_no_weights(hub_plan: HubPlan, model: Path) -> None:
    assert len(list(model.glob("*.safetensors"))) > 2
    assert {request.split()[0] for request in hub_plan.asked} <= {"GET", "HEAD"}
    assert not any(name.endswith(".safetensors") for name in hub_plan.cached)


@pytest.mark.parametrize(
    ("name", "error"),
    [("someone/single", "E_CKPT_MISSING"), ("someone/nothing", "E_HUB_NOT_FOUND")],
)
def test_a_hub_model_without_weights_is_an_input_error(
    name: str, error: str, tmp_path: Path
) -> None:
    with serve({"someone/single": {"config.json": b"{}"}}, kind="model") as hub:
        environment = hub.environment(tmp_path / "home")
        code, _, stderr, _ = run_process(["plan", name, "-b", "4"], environment)
    assert code == 3
    assert error in stderr


def test_an_unreachable_hub_is_an_input_error(tmp_path: Path) -> None:
    with serve({}, kind="model") as hub:
        environment = hub.environment(tmp_path)
    code, _, stderr, _ = run_process(["plan", "someone/tiny", "-b", "4"], environment)
    assert code == 3
    assert "E_HUB_NETWORK" in stderr
    assert len(stderr.splitlines()) <= 4


def test_the_plan_counts_the_text_of_this_machine(gptq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1500)  # the tokenizer has one token for each byte
    (tmp_path / "b.txt").write_text("y" * 100)
    windows = ["--nsamples", "10", "--seqlen", "11"]
    names = ["--dataset", f"{tmp_path}/a.txt:0.7", "--dataset", f"{tmp_path}/b.txt:0.3"]
    result = gptq("plan", model, *SETTINGS, *windows, *names)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"text    {tmp_path}/a.txt, 1,500 tokens read; 7 windows of 11 need 77" in result.stdout
    assert f"text    {tmp_path}/b.txt, 100 tokens; 3 windows of 11 need 33" in result.stdout


def test_the_plan_names_what_would_fit_a_short_text(gptq: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 1000)
    words = ["--dataset", tmp_path / "a.txt", "--nsamples", "12", "--seqlen", "100"]
    result = gptq("plan", model, *SETTINGS, *words, "--json")
    [text] = json.loads(result.stdout)["text"]
    assert (text["tokens"], text["windows"], text["needed_tokens"]) == (1000, 12, 1200)
    assert "gives 10 windows of 100 tokens (1,000 tokens), but 12 are needed" in result.stderr
    assert "10 windows (--nsamples) or windows of 83 tokens (--seqlen)" in result.stderr
    fitting = gptq("plan", model, *SETTINGS, *words[:2], "--nsamples", 12, "--seqlen", 83)
    assert "are needed" not in fitting.stderr


def test_the_plan_of_text_on_the_hub_says_what_is_needed(gptq: Run, model: Path) -> None:
    result = gptq("plan", model, *SETTINGS)
    needed = f"{128 * 128:,} tokens at most"  # the model has 128 positions
    assert f"text    wikitext2, not read yet; 128 windows of 128 need {needed}" in result.stdout


def test_the_plan_refuses_text_that_the_run_would_refuse(
    gptq: Run, model: Path, tmp_path: Path
) -> None:
    result = gptq("plan", model, *SETTINGS, "--dataset", tmp_path / "gone.txt")
    assert result.exit_code == 3
    assert "gone.txt` does not exist" in result.stderr
