"""The page about a run: it shows the run's numbers, stands alone, and obeys no text of the run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from typer.testing import CliRunner

from gptq_cli.cli.app import app
from gptq_cli.errors import InputError
from gptq_cli.publish import report_page
from gptq_cli.publish.charts import NEVER
from gptq_cli.publish.report import check_report, write_page
from gptq_cli.publish.report_page import experts_of, grids, render
from gptq_cli.quantization.run import quantize_checkpoint
from gptq_cli.storage.manifest import sealed, write_report_data
from tests.disks import CountingDisk, DyingDisk, Killed, using
from tests.families import save_model
from tests.runs import config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    output = folder / "Tiny-GPTQ-Int4-g32"
    result = quantize_checkpoint(str(save_model(folder / "model")), output, config())
    write_report_data(output, result.to_json(), "gptq quantize model -b 4 --report")
    write_page(output, output / "gptq_report.html")
    return output


def data_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "gptq_report.json").read_text())
    return found


def stored(file: Path, content: object) -> Path:
    file.write_text(json.dumps(content))
    return file


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("left", [b"", b"{", b"[]", b'{"report": 0}', None])
def test_damaged_data_of_a_finished_run_is_written_again(
    left: bytes | None, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gptq_report.json"
    result = {**data_of(finished), "already_done": True}
    del result["command"]
    if left is not None:
        file.write_bytes(left)
    write_report_data(tmp_path, result, "again")
    assert data_of(tmp_path)["command"] == "again"
    write_report_data(tmp_path, result, "a third time")
    assert data_of(tmp_path)["command"] == "again"


def test_an_evaluation_joins_the_data_that_is_kept(finished: Path, tmp_path: Path) -> None:
    result = {**data_of(finished), "already_done": True}
    del result["command"]
    write_report_data(tmp_path, result, "first")
    measured = {
        "perplexity": 12.5, "windows": 3, "seqlen": 64, "dataset": "english", "dtype": "float32",
        "baseline_perplexity": 12.25, "kl": 0.0456, "top1_agreement": 0.9,
    }  # fmt: skip
    write_report_data(tmp_path, result, "second", measured)
    data = data_of(tmp_path)
    assert (data["command"], data["evaluation"]) == ("first", measured)
    page = write_page(tmp_path, tmp_path / "page.html").read_text()
    assert "0.0456" in page
    assert "english" in page


def test_the_page_shows_layers_errors_blocks_and_the_command(finished: Path) -> None:
    page, run = (finished / "gptq_report.html").read_text(), data_of(finished)
    worst = sorted(run["layers"], key=lambda layer: -layer["relative_error"])[:10]
    shown = re.findall(r"<tr><td>(model[^<]*)</td><td>4</td><td>([^<]*)</td>", page)
    assert shown == [(layer["name"], f"{layer['relative_error']:.2e}") for layer in worst]
    for words in (
        "Tiny-GPTQ-Int4-g32",
        "gptq quantize model -b 4 --report",
        f"quantizing, without the start of the command; {run['tokens']} tokens of calibration",
    ):
        assert words in page
    assert len(run["blocks"]) == 3
    assert page.count("<svg") == 2
    first = next(
        layer for layer in run["layers"] if layer["name"] == "model.layers.0.self_attn.q_proj"
    )
    ratio = first["relative_error"] / first["rtn_relative_error"]
    numbers = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", page)
    assert {f"{first['relative_error']:.1e}", f"{ratio:.2f}"} <= set(numbers)


def test_the_page_loads_nothing_and_runs_nothing(finished: Path) -> None:
    page = (finished / "gptq_report.html").read_text()
    found = Tags(page).found
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found}
    addresses = [
        value
        for _, attributes in found
        for key, value in attributes.items()
        if key in ("href", "src", "xlink:href")
    ]
    assert all((value or "").startswith(("#", "data:image/png;base64,")) for value in addresses)
    assert not re.findall(r"url\((?!#)", page)
    assert "default-src 'none'" in page
    ids = [attributes["id"] for _, attributes in found if attributes.get("id")]
    assert "currentColor" in page
    assert len(ids) > 10


def test_names_are_text_and_never_markup(finished: Path) -> None:
    evil = "<script>alert(1)</script>"
    run = data_of(finished) | {
        "name": evil,
        "command": f"gptq '{evil}' & more",
        "model": evil,
        "evaluation": None,
    }
    run["layers"][0]["name"] = f"model.layers.0.{evil}"
    page = render(run)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "&amp; more" in page


def test_grids_have_one_row_per_block_and_join_experts() -> None:
    layers = [
        {
            "name": f"model.layers.{block}.mlp.experts.{expert}.up_proj",
            "block": block,
            "relative_error": error,
        }
        for block, expert, error in ((0, 0, 0.1), (0, 1, 0.3), (1, 0, 0.2))
    ]
    layers = [layer | {"rtn_relative_error": 0.5, "bits": 3} for layer in layers]
    head = {"name": "lm_head", "block": 2, "bits": 8}
    layers.append(head | {"relative_error": None, "rtn_relative_error": 0.0})
    found = grids(layers)
    assert found.blocks == (0, 1, 2)
    assert found.linears == ("mlp.experts.up_proj", "lm_head")
    assert found.bits == ((3, None), (3, None), (None, 8))
    assert found.error == ((pytest.approx(0.2), None), (0.2, None), (None, None))
    assert found.against_rtn == (
        (pytest.approx(0.4), None),
        (pytest.approx(0.4), None),
        (None, None),
    )


CHOICE: dict[str, Any] = {
    "frontier": [
        {"bits": 2.0, "bytes": 2_000_000, "expected_kl": 0.5},
        {"bits": 2.5, "bytes": 2_500_000, "expected_kl": 0.2},
        {"bits": 4.0, "bytes": 4_000_000, "expected_kl": -1e-9},
    ],
    "uniform": [
        {"bits": 2.0, "bytes": 2_000_000, "expected_kl": 0.5},
        {"bits": 4.0, "bytes": 4_000_000, "expected_kl": -1e-9},
    ],
    "chosen": {"bits": 2.5, "bytes": 2_500_000, "expected_kl": 0.2},
}


def with_choice(finished: Path, copy: Path, choice: object) -> Path:
    """Return a copy of a finished run that holds a choice of widths."""
    copytree(finished, copy)
    (copy / "gptq_allocation.json").write_text(json.dumps(sealed({"choice": choice})))
    return copy


def test_a_choice_of_widths_is_shown_with_its_frontier(finished: Path, tmp_path: Path) -> None:
    copy = with_choice(finished, tmp_path / "run", CHOICE)
    run = data_of(copy)
    for layer in run["layers"]:
        layer["bits"] = 2 + layer["block"] % 2
    stored(copy / "gptq_report.json", run)
    page = write_page(copy, copy / "gptq_report.html").read_text()
    assert "2.5 bits on average, 2.5 MB, with an expected KL of 0.2" in page
    numbers = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", page)
    assert [text for text in numbers if text.startswith("all ")] == ["all 2 bits"]
    n_of_block = len(run["layers"]) // 3
    assert numbers.count("2") >= 2 * n_of_block
    assert numbers.count("3") >= n_of_block
    assert page.count("<svg") == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"chosen": None}, "chosen: Input should be"),
        ({"frontier": [{"bits": 2.0, "bytes": 5}]}, "frontier.0.expected_kl: Field required"),
        ({"uniform": [CHOICE["chosen"] | {"expected_kl": math.nan}]}, "uniform.0.expected_kl: "),
        ({"uniform": [CHOICE["chosen"] | {"bytes": 0}]}, "uniform.0.bytes: "),
    ],
)
def test_a_damaged_choice_is_refused_with_its_place(
    change: dict[str, Any], says: str, finished: Path, tmp_path: Path
) -> None:
    copy = with_choice(finished, tmp_path / "run", CHOICE | change)
    found = CliRunner().invoke(app, ["report", str(copy)])
    assert (found.exit_code, found.stdout) == (3, "")
    file = copy / "gptq_allocation.json"
    assert f"error[E_REPORT]: `{file}` is damaged: {says}" in found.stderr
    assert "hint: quantize again, with --overwrite" in found.stderr
    file.write_text(file.read_text().replace("frontier", "frontiers"))
    found = CliRunner().invoke(app, ["report", str(copy)])
    assert f"`{file}` is damaged: its checksum is wrong" in found.stderr


def test_a_perplexity_is_shown_if_it_is_known(finished: Path, tmp_path: Path) -> None:
    measured = {
        "perplexity": 12.3456,
        "baseline_perplexity": 11.5,
        "kl": 0.0123,
        "top1_agreement": 0.987,
        "dataset": "wikitext2",
        "windows": 3,
        "seqlen": 64,
        "dtype": "float32",
    }
    (tmp_path / "ppl.json").write_text(json.dumps(measured))
    page = write_page(
        finished, tmp_path / "page.html", evaluation=tmp_path / "ppl.json", png=tmp_path / "map.png"
    )
    for words in (
        "12.3456",
        "11.5000 before",
        "KL 0.0123",
        "98.70 %",
        "wikitext2, 3 windows of 64 tokens, float32",
    ):
        assert words in page.read_text()
    assert "Perplexity" not in (finished / "gptq_report.html").read_text()
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_tells_of_errors_from_a_sample_of_rows(finished: Path) -> None:
    run = data_of(finished)
    assert run["layers"][0]["rtn_rows"] is None
    usual = render(run | {"choice": None, "evaluation": None})
    run["layers"][0]["rtn_rows"] = 1366
    page = render(run | {"choice": None, "evaluation": None})
    words = "measured on a sample of rows"
    assert (words in usual, words in page) == (False, True)


def test_the_page_shows_strengths_of_asymmetric_calibration(finished: Path) -> None:
    run = data_of(finished) | {"choice": None, "evaluation": None}
    assert "Asymmetric calibration" not in render(run)
    for layer in run["layers"]:
        if layer["name"].endswith("q_proj"):
            layer["asymmetric_calibration"] = (layer["block"] + 1) / 8
    strengths = [layer["block"] for layer in run["layers"] if "q_proj" in layer["name"]]
    assert strengths == [0, 1, 2]
    page = render(run)
    assert "Asymmetric calibration" in page
    cells = "<td>q_proj</td><td>0.12</td><td>0.25</td><td>0.38</td>"
    assert page.count(cells) == 1


def experts(tokens: list[list[int]]) -> list[dict[str, Any]]:
    """What `quantize --json` says of mixtures, as far as the page reads it."""
    return [
        {"name": f"model.layers.{2 * i + 1}.mlp.experts", "tokens": row}
        for i, row in enumerate(tokens)
    ]


def test_expert_tokens_are_counted_per_layer_worst_first() -> None:
    found = experts_of(experts([[5, 7, 9, 100], [1, 0, 0, 8], [0, 3, 4, 5]]))
    assert [row.name.split(".")[2] for row in found.rows] == ["3", "5", "1"]
    assert [(row.least, row.median, row.most, row.uncovered) for row in found.rows] == [
        (0, 0.5, 8, 2),
        (0, 3.5, 5, 1),
        (5, 8.0, 100, 0),
    ]
    assert (found.count, found.least, found.median, found.uncovered) == (12, 0, 4.5, 3)


def test_the_page_maps_expert_tokens_and_marks_idle_experts(finished: Path) -> None:
    run = data_of(finished) | {"evaluation": None}
    assert "Tokens of each expert" not in render(run)
    page = render(run | {"experts": experts([[5, 7, 9], [1, 0, 8]])})
    assert page.count("<svg") == 3
    assert "6 experts, 0 tokens or more, median 6;" in page
    assert "1 without a token</strong>, red in the map and rounded to nearest" in page
    assert page.count(f"fill: {NEVER}") == 1  # one red cell
    assert re.search(
        r"<tr><td>model\.layers\.3\.mlp\.experts</td><td>0</td><td>1</td><td>8</td><td>1</td>", page
    )
    labels = re.findall(r"<text[^>]*>\s*([^<]*?)\s*</text>", page)
    assert {"expert", "tokens", "3"} <= set(labels)
    covered = render(run | {"experts": experts([[5, 7], [1, 2, 8]])})
    assert "without a token" not in covered
    assert NEVER not in covered
    many = render(run | {"experts": experts([[0, *range(1, 128)] for _ in range(48)])})
    assert len(many) - len(covered) < 300_000
    assert NEVER not in many  # a picture then


def test_the_same_run_gives_the_same_page(finished: Path, tmp_path: Path) -> None:
    first, second = (write_page(finished, tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes() == (finished / "gptq_report.html").read_bytes()


def test_a_run_of_many_blocks_is_drawn_without_numbers(finished: Path) -> None:
    run = data_of(finished) | {"evaluation": None}
    run["layers"] = [
        dict(layer, block=layer["block"] + 3 * i) for i in range(20) for layer in run["layers"]
    ]
    assert not re.search(r">\s*\d\.\de-\d\d\s*</text>", render(run))


def test_a_file_that_is_no_report_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"holds no gptq_report\.json") as absent:
        write_page(tmp_path, tmp_path / "x.html")
    assert (absent.value.code, absent.value.exit_code) == ("E_REPORT", 3)
    assert absent.value.hint == "gptq quantize writes it: quantize again, with --overwrite"
    (tmp_path / "gptq_report.json").write_text('{"report": 99}')
    with pytest.raises(InputError, match="not the data of a report of version 1"):
        write_page(tmp_path, tmp_path / "x.html")
    whole = {"perplexity": 2.5, "dataset": "c4", "windows": 3, "seqlen": 64, "dtype": "float32"}
    write_page(finished, tmp_path / "fine.html", evaluation=stored(tmp_path / "e.json", whole))
    for content in (
        {},
        [],
        whole | {"windows": None},
        whole | {"dataset": 1},
        whole | {"baseline_perplexity": 2.0},
    ):
        with pytest.raises(InputError, match="not the result of an evaluation") as wrong:
            write_page(
                finished, tmp_path / "x.html", evaluation=stored(tmp_path / "e.json", content)
            )
    assert "gptq eval-ppl" in (wrong.value.hint or "")
    with pytest.raises(InputError, match=r"there is no file `none\.json`") as nothing:
        write_page(finished, tmp_path / "x.html", evaluation=Path("none.json"))
    assert (nothing.value.code, nothing.value.hint) == ("E_REPORT", wrong.value.hint)
    assert not (tmp_path / "x.html").exists()
    monkeypatch.setattr(
        "gptq_cli.publish.report.find_spec", lambda name: None if name == "matplotlib" else name
    )
    with pytest.raises(InputError, match="reports need matplotlib") as missing:
        check_report()
    assert missing.value.hint == "install it: pip install matplotlib"


@pytest.mark.parametrize("option", ["--output", "--png"])
@pytest.mark.parametrize("name", ["thesis.html", "model.safetensors", "folder"])
def test_a_file_that_is_no_page_of_gptq_is_kept(
    option: str, name: str, finished: Path, tmp_path: Path
) -> None:
    place = tmp_path / name
    if name == "folder":
        place.mkdir()
    else:
        place.write_text("mine")
    before = sorted(tmp_path.iterdir())
    words = [
        "report",
        str(finished),
        *(["-o", str(tmp_path / "page")] if option == "--png" else []),
        option,
        str(place),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 6
    reason = (
        "exists and is not a file" if name == "folder" else "exists, but gptq has not written it"
    )
    assert result.stderr.startswith(f"error[E_OUT_FOREIGN]: `{place}` {reason}\n")
    assert "hint: choose another name" in result.stderr
    assert sorted(tmp_path.iterdir()) == before
    assert name == "folder" or place.read_text() == "mine"


def test_pages_and_pictures_of_gptq_are_replaced(finished: Path, tmp_path: Path) -> None:
    page, png = tmp_path / "page.html", tmp_path / "heat.png"
    page.touch()
    for _ in range(2):
        words = ["report", str(finished), "-o", str(page), "--png", str(png)]
        assert CliRunner().invoke(app, words).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    assert png.read_bytes().startswith(b"\x89PNG")
    (finished / "gptq_report.html").write_text("an old page")
    assert CliRunner().invoke(app, ["report", str(finished)]).exit_code == 0
    swapped = CliRunner().invoke(app, ["report", str(finished), "-o", str(png)])
    assert swapped.exit_code == 6  # a picture is no page


def test_the_same_call_finishes_a_killed_report(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = data_of(finished) | {"evaluation": None}
    page, image = render(run), report_page.picture(run)
    # The page and the picture are the same each time, so they are drawn once.
    monkeypatch.setattr(report_page, "render", lambda _: page)
    monkeypatch.setattr(report_page, "picture", lambda _: image)
    operations = CountingDisk()
    with using(operations):
        write_page(finished, tmp_path / "page.html", png=tmp_path / "heat.png")
    whole = {path.name for path in tmp_path.iterdir()}
    for last in range(1, len(operations.operations)):
        with pytest.raises(Killed), using(DyingDisk(last)):
            write_page(finished, tmp_path / "page.html", png=tmp_path / "heat.png")
        write_page(finished, tmp_path / "page.html", png=tmp_path / "heat.png")
        assert {path.name for path in tmp_path.iterdir()} == whole == {"page.html", "heat.png"}
