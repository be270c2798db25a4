"""`gptq allocate`, and `gptq quantize` with a goal: sizes, rules, refusals."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gptq_cli.cli.allocate import show_engines_of_goal
from gptq_cli.cli.console import Console
from gptq_cli.config.resolve import load_config
from gptq_cli.config.schema import QuantizeConfig
from tests.families import save_model, texts

from .conftest import Run

WIDTHS = "--allow-bits=2,3,4"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model and a text into one folder."""
    folder = tmp_path_factory.mktemp("allocate")
    save_model(folder / "model", "qwen3")
    (folder / "text.txt").write_text(texts()[0], encoding="utf-8")
    return folder


def settings(place: Path) -> list[str | Path]:
    """Return the model and the options of a run of a second."""
    sizes = ["--nsamples=4", "--batch-size=4", "--seqlen=64", "--device=cpu", "-g32"]
    sizes.append("--preset=gptq")
    return [place / "model", "--dataset", place / "text.txt", *sizes]


def smallest_step(units: list[dict[str, object]]) -> int:
    """Return the fewest bytes that one more bit of a unit takes."""
    steps = []
    for unit in units:
        sizes = unit["bytes"]
        assert isinstance(sizes, dict)
        steps += [sizes["3"] - sizes["2"], sizes["4"] - sizes["3"]]
    return min(steps)


def test_a_target_size_is_met_from_below_by_less_than_a_unit(gptq: Run, place: Path) -> None:
    file, out = place / "size.yaml", place / "size"
    for target in (200_000, 215_000, 229_999):
        goal = [*settings(place), WIDTHS, f"--target-size={target}", "--json", "--overwrite"]
        found = json.loads(gptq("allocate", *goal, "-o", file).stdout)
        gap = target - found["chosen"]["bytes"]
        assert 0 <= gap < smallest_step(found["units"])
    done = gptq("quantize", *goal, "-o", out)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bytes_after"] == found["chosen"]["bytes"]
    files = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert sum(files) == found["chosen"]["bytes"]
    assert (out / "gptq_allocation.json").is_file()
    said = done.stderr.splitlines()
    note = (
        "note: layers may get 2, 3 or 4 bits; an output with all of these does not load in "
        "vllm, sglang, transformers, llama.cpp"
    )
    (place_of_note,) = [number for number, line in enumerate(said) if line.startswith(note)]
    assert said[place_of_note + 1].startswith("note: with --target ENGINE")
    measured = [number for number, line in enumerate(said) if line.startswith("block 1/")]
    assert place_of_note < measured[0]
    for beginning in ("device: ", "calibration: ", "text: ", "source: "):
        assert len([line for line in said if line.startswith(beginning)]) == 1
    assert done.stderr.count("vllm, sglang") == 1


@pytest.mark.parametrize("widths", [[2, 3, 4, 8], [4, 8]])
def test_a_run_with_a_goal_names_the_engines_that_the_plan_names(
    widths: list[int], gptq: Run, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = "--allow-bits=" + ",".join(map(str, widths))
    plan = gptq("plan", *settings(place), "--bits=5", allowed, "--json")
    goal = QuantizeConfig(bits=5, group_size=32, allow_bits=widths)
    show_engines_of_goal(Console(), goal)
    note, _ = capsys.readouterr().err.splitlines()
    named = note.partition(" does not load in ")[2].split(", ")
    for engine, verdict in json.loads(plan.stdout)["engines"].items():
        assert (engine in named) == (verdict["outcome"] in ("no", "wrong"))
    assert len(named) >= 2


@pytest.mark.parametrize("target", ["vllm", "gptqmodel"])
def test_a_run_for_a_target_has_no_note_about_engines(
    target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = QuantizeConfig(bits=5, allow_bits=[4, 8], target=target)
    show_engines_of_goal(Console(), goal)
    assert capsys.readouterr() == ("", "")


def test_the_written_rules_do_what_quantize_does_alone(gptq: Run, place: Path) -> None:
    file, alone, after = place / "rules.yaml", place / "alone", place / "after"
    goal = [*settings(place), WIDTHS, "--bits=2.5", "--protect=.*[.]2[.].*v_proj"]
    found = gptq("allocate", *goal, "-o", file, "--json")
    widths = json.loads(found.stdout)["chosen"]["widths"]
    assert widths["model.layers.2.self_attn.v_proj"] == 4
    config = load_config(file)
    for unit in json.loads(found.stdout)["units"]:
        assert {config.choose(name).config.bits for name in unit["layers"]} == {
            widths[unit["name"]]
        }
    assert gptq("quantize", *goal, "-o", alone).exit_code == 0
    assert gptq("quantize", place / "model", "-c", file, "-o", after).exit_code == 0
    one, other = (directory / "model.safetensors" for directory in (alone, after))
    assert one.read_bytes() == other.read_bytes()
    again = gptq("quantize", *goal, "-o", alone)
    assert "already, by an earlier run" in again.stdout


def test_the_result_shows_the_frontier_and_the_width_of_each_unit(gptq: Run, place: Path) -> None:
    result = gptq("allocate", *settings(place), WIDTHS, "--bits=3.5")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[2].split()[:5] == ["bits", "size", "bpw", "expected", "KL"]
    words = [line.partition(" = ")[0] for line in lines if " = " in line]
    assert words == ["bits", "bpw", "expected KL", "mixed"]
    assert [line.split()[0] for line in lines if "  all " in line] == ["2.00", "3.00", "4.00"]
    (chosen,) = [line for line in lines if line.startswith("chosen: ")]
    assert "bits on average" in chosen
    assert lines[0].endswith(
        ": 21 units; q, k, v, gate and up get widths of their own, because no engine that "
        "takes these widths fuses them"
    )
    (picture,) = [line for line in lines if "self_attn.v_proj" in line]
    assert set(picture.split()[1]) <= {"2", "3", "4"}
    assert len(picture.split()[1]) == 3


def test_the_frontier_fits_a_terminal_of_80_columns(
    gptq: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = import_module("gptq_cli.cli.console")
    words = [*settings(place), "--allow-bits=2,3,4,8"]
    wide = gptq("allocate", *words).stdout.splitlines()
    monkeypatch.setattr(console, "window", lambda _: 80)
    narrow = gptq("allocate", *words).stdout.splitlines()
    assert max(map(len, wide)) > 80 >= max(map(len, narrow))
    shown = [line for line in narrow if " +" in line]
    assert len(shown) > 2
    for line in shown:
        assert any(full.startswith(line.rpartition(" +")[0]) for full in wide)


def test_what_an_engine_fuses_has_one_width(gptq: Run, place: Path) -> None:
    goal = [*settings(place), "--allow-bits=4,8", "--bits=5.5"]
    result = gptq("allocate", *goal)
    first = result.stdout.splitlines()[0]
    assert first.endswith(
        ": 12 units; q, k and v get one width, and so do gate and up, "
        "because vllm, sglang or aphrodite fuses them"
    )
    found = json.loads(gptq("allocate", *goal, "--json").stdout)
    assert found["fused_for"] == ["vllm", "sglang", "aphrodite"]
    assert "model.layers.0.self_attn.qkv_proj" in found["chosen"]["widths"]


def test_the_report_of_a_run_shows_what_it_chose_from(gptq: Run, place: Path) -> None:
    out, file = place / "reported", place / "reported.yaml"
    goal = [*settings(place), WIDTHS, "--bits=2.5"]
    done = gptq("quantize", *goal, "-o", out, "--report")
    assert done.exit_code == 0, done.stderr
    found = json.loads(gptq("allocate", *goal, "-o", file, "--json").stdout)
    choice = json.loads((out / "gptq_allocation.json").read_text())["choice"]
    figures = ("bits", "bytes", "expected_kl")
    shown = [[entry[key] for key in figures] for entry in choice["frontier"]]
    assert shown == [[entry[key] for key in figures] for entry in found["frontier"]]
    assert choice["chosen"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert [entry["bits"] for entry in choice["uniform"]] == [2, 3, 4]
    page = (out / "gptq_report.html").read_text()
    assert "2.5 bits on average" in page
    assert "In this choice, q, k, v, gate and up get widths of their own" in page
    assert page.count("<svg") == 4


def test_a_written_configuration_is_named_with_its_use(gptq: Run, place: Path) -> None:
    file = place / "named.yaml"
    result = gptq("allocate", *settings(place), WIDTHS, "--bits=2.5", "-o", file)
    assert result.stdout.splitlines()[-1] == f"written to {file}"
    following = f"next: gptq quantize {place / 'model'} --config {file}"
    assert result.stderr.splitlines()[-1] == following
    assert "next:" not in gptq("allocate", *settings(place), WIDTHS, "--bits=2.5").stderr


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            ["--target-size=1KB"],
            "error[E_ALLOC_GOAL]: no choice of widths meets --target-size 1KB: "
            "the smallest output has",
            "choose another goal, or allow other widths with --allow-bits",
        ),
        (
            ["--target-size=1GB"],
            "error[E_ALLOC_GOAL]: --target-size 1GB leaves nothing to choose: "
            "the largest output has",
            "choose a smaller size, or allow other widths with --allow-bits",
        ),
        (
            ["--bits=3.5", "--target=vllm"],
            "error[E_ALLOC_GOAL]: layers cannot have 3.5 bits on average: vllm takes 4 or 8 bits",
            "use an average between these, or another --target",
        ),
        (
            ["--bits=4.5", "--allow-bits=2,4"],
            "error[E_ALLOC_GOAL]: layers cannot have 4.5 bits on average: layers may get 2 or",
            "use an average between these, or allow other widths with --allow-bits",
        ),
        (
            ["--bits=5", "--allow-bits=4,6"],
            "error[E_CFG_FORMAT]: --allow-bits and format (default) do not fit: gptq stores 2",
            "leave out 6",
        ),
        (
            ["--bits=3.5", "--allow-bits=3,4", "--target=vllm"],
            "error[E_TARGET]: vllm does not load 3, 4 bits: it serves 4 and 8 bits",
            "use --bits 4 or 8",
        ),
        (
            ["--bits=3.5", "--target=transformers"],
            "error[E_TARGET]: transformers does not load layers with different bits or group_size",
            "use no `+:` rules of --dynamic",
        ),
        (
            ["--bits=3.5", "--target=exllamav2"],
            "error[E_TARGET]: exllamav2 takes 4 bits only, so there is nothing to allocate",
            "use --bits 4, or another --target",
        ),
        (
            ["--bits=4.5", "--target=vllm/cpu"],
            "error[E_TARGET]: vllm/cpu takes 4 bits only, so there is nothing to allocate",
            "use --bits 4, or another --target",
        ),
        (
            ["--bits=3.5", "--target-kl=0.1"],
            "error[E_CFG_CONFLICT]: --target-kl and --bits are both goals of an allocation",
            "give one goal: an average of bits, a size or a KL",
        ),
        (
            ["--bits=4", "--protect=.*v_proj"],
            "error[E_CFG_CONFLICT]: --protect has no effect if all layers have the same bits",
            "add --allow-bits, or an average such as --bits 3.5",
        ),
    ],
)
def test_a_goal_that_cannot_be_met_is_refused_by_the_plan(
    words: list[str], message: str, hint: str | None, gptq: Run, place: Path
) -> None:
    result = gptq("plan", *settings(place), *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert hint is None or f"hint: {hint}" in result.stderr


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (
            ["--target-kl=1e-9", "--allow-bits=2,3"],
            "error[E_ALLOC_GOAL]: no choice of widths meets --target-kl 1e-09: "
            "the smallest expected KL is",
            "choose another goal",
        ),
        (
            ["--bits=2.5", "--allow-bits=2,3", "--protect=.*x_proj"],
            "error[E_CFG_NO_MATCH]: protect: '.*x_proj' matches no layer",
            "it must match from the start of a name such as model.layers.0.",
        ),
        (
            ["--bits=2.1", "--allow-bits=2,4", "--protect=.*"],
            "error[E_ALLOC_GOAL]: no choice of widths meets --bits 2.1 on average: "
            "the smallest average is 4",
            "choose another goal",
        ),
    ],
)
def test_a_goal_that_the_measurement_excludes_is_refused(
    words: list[str], message: str, hint: str, gptq: Run, place: Path
) -> None:
    result = gptq("allocate", *settings(place), *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert f"hint: {hint}" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        ([], 2, "error[E_ALLOC_GOAL]: there is no goal, so", "add a goal: --bits 3.5"),
        (["--bits=3"], 6, "error[E_OUT_EXISTS]: `", "replace it: --overwrite"),
    ],
)
def test_a_configuration_is_only_written_for_a_goal(
    words: list[str], code: int, message: str, hint: str, gptq: Run, place: Path
) -> None:
    file = place / "old.yaml"
    file.write_text("bits: 4\n")
    result = gptq("allocate", *settings(place), *words, "-o", file)
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr
    assert f"hint: {hint}" in result.stderr
    assert file.read_text() == "bits: 4\n"


@pytest.mark.parametrize("widths", ["[]", "3.5,4", "1,4", "x,4"])
def test_a_wrong_width_is_one_problem(widths: str, gptq: Run, place: Path) -> None:
    result = gptq("plan", *settings(place), "--bits=3.5", f"--allow-bits={widths}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--allow-bits" in result.stderr
    assert "leave out" not in result.stderr
    assert result.stderr.count("error[") == 1


@pytest.mark.parametrize("content", ["{}", "[1]", "notes", None])
@pytest.mark.parametrize(
    ("words", "code"), [([], "E_OUT_EXISTS"), (["--overwrite"], "E_OUT_FOREIGN")]
)
def test_a_file_that_is_no_measurement_is_not_replaced(
    content: str | None, words: list[str], code: str, gptq: Run, place: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "config.json"
    if content is None:
        beside.mkdir()
    else:
        beside.write_text(content)
    output = tmp_path / "config.yaml"
    result = gptq("allocate", *settings(place), WIDTHS, "--bits=3", "-o", output, *words)
    assert (result.exit_code, result.stdout) == (6, "")
    assert f"error[{code}]: `{beside}` would hold the measurement" in result.stderr
    assert "hint: choose another -o, or move this file" in result.stderr
    assert content is None or beside.read_text() == content
    assert list(tmp_path.iterdir()) == [beside]


def test_a_plan_shows_the_sizes_that_widths_may_make(gptq: Run, place: Path) -> None:
    result = gptq("plan", *settings(place), "--bits=5.5", "--target=vllm")
    assert result.exit_code == 0, result.stderr
    assert "note: each layer will get 4 or 8 bits, the output " in result.stderr
    assert "note: q, k and v get one width, and so do gate and up, because vllm" in result.stderr
    assert "this plan is an example with 5." in result.stderr
    without = gptq("plan", *settings(place), "--bits=3.5")
    assert "note: q, k, v, gate and up get widths of their own, because no engine" in without.stderr


def test_the_plan_of_a_goal_has_its_size_and_its_engines(gptq: Run, place: Path) -> None:
    def planned(*words: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(gptq("plan", *settings(place), *words, "--json").stdout)
        return found

    least, most = planned("--bits=2")["bytes_after"], planned("--bits=4")["bytes_after"]
    target = least + (most - least) // 3
    by_size = planned(f"--target-size={target}", WIDTHS)
    assert 0.95 * target < by_size["bytes_after"] <= target
    by_bits = planned("--bits=2.7", WIDTHS)
    share = (by_bits["bytes_after"] - least) / (most - least)
    assert 0.25 < share <= 0.37  # 0.7 of 2 bits
    by_kl = planned("--target-kl=0.02", WIDTHS)
    assert least < by_kl["bytes_after"] < most
    for found in (by_size, by_bits, by_kl):
        loads = [name for name, verdict in found["engines"].items() if verdict["outcome"] == "yes"]
        assert loads == ["gptqmodel", "auto-round"]


@pytest.mark.parametrize("goal", ["--target-size=1KB", "--bits=2.1"])
@pytest.mark.parametrize("command", ["quantize", "allocate"])
def test_a_goal_out_of_reach_is_refused_before_the_measurement(
    command: str, goal: str, gptq: Run, place: Path, tmp_path: Path
) -> None:
    words = [goal, WIDTHS, "--protect=.*"]
    if command == "quantize":
        words += ["-o", str(tmp_path / "out")]
    result = gptq(command, *settings(place), *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert (
        f"error[E_ALLOC_GOAL]: no choice of widths meets {goal.replace('=', ' ')}" in result.stderr
    )
    assert "probe" not in result.stderr


def test_a_measurement_of_an_earlier_call_is_named(gptq: Run, place: Path, tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    words = [*settings(place), WIDTHS, "--json", "--overwrite", "-o", file]
    first = gptq("allocate", *words, "--bits=2.5")
    again = gptq("allocate", *words, "--bits=3.5")
    named = f"resume: using the measurement of an earlier call, `{tmp_path}/twice.json`"
    assert named not in first.stderr
    assert named in again.stderr.splitlines()
    assert "gradients: " in first.stderr
    assert "gradients: " not in again.stderr
    found = [json.loads(result.stdout)["already_measured"] for result in (first, again)]
    assert found == [False, True]


def test_help_tells_that_overwrite_replaces_a_configuration(gptq: Run) -> None:
    shown = " ".join(gptq("allocate", "--help").stdout.split())
    assert "replace a configuration at the output" in shown
    assert "replace a checkpoint" not in shown
