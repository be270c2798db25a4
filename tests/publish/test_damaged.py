"""A damaged or foreign report is refused with the place of the flaw, or shown but not obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptq_cli.cli.app import app
from gptq_cli.errors import InputError
from gptq_cli.publish.report import write_page
from tests.fuzzing import EVALUATION, REPORT

Data = dict[str, Any]


def changed(change: Callable[[Data], object]) -> str:
    data = deepcopy(REPORT)
    change(data)
    return json.dumps(data)


def first_layer(**values: object) -> Callable[[Data], object]:
    return lambda data: data["layers"][0].update(values)


DAMAGED = [
    ("[" * 100, "cannot be read as JSON"),
    ("", "cannot be read as JSON"),
    ("{}", "not the data of a report of version 1"),
    ("[1]", "not the data of a report of version 1"),
    (changed(lambda data: data.pop("layers")), "layers: Field required"),
    (changed(lambda data: data.update(layers=[])), "layers: List should have at least 1"),
    (changed(lambda data: data.update(layers="x")), "layers: Input should be a valid list"),
    (changed(lambda data: data.update(layers=[[]])), "layers.0: Input should be"),
    (
        changed(lambda data: data.update(bytes_after=0)),
        "bytes_after: Input should be greater than 0",
    ),
    (
        changed(lambda data: data.update(bytes_after=-5)),
        "bytes_after: Input should be greater than",
    ),
    (changed(lambda data: data.update(bytes_before=10**400)), "bytes_before: "),
    (changed(lambda data: data.update(seconds=float("nan"))), "seconds: "),
    (changed(lambda data: data.update(name=7)), "name: Input should be a valid string"),
    (
        changed(first_layer(relative_error="x")),
        "layers.0.relative_error: Input should be a valid number",
    ),
    (
        changed(first_layer(relative_error=True)),
        "layers.0.relative_error: Input should be a valid number",
    ),
    (changed(first_layer(block=None)), "layers.0.block: Input should be a valid integer"),
    (changed(first_layer(block=10**12)), "layers.0.block: Input should be less than"),
    (
        changed(lambda data: data["experts"][0].update(tokens=[])),
        "experts.0.tokens: List should have at least 1",
    ),
    (
        changed(lambda data: data.update(experts=[{"name": "x", "tokens": [0] * 2000}] * 501)),
        "are too many",
    ),
    (changed(lambda data: data.update(blocks=[{}])), "blocks.0.index: Field required, and 3 more"),
    (
        changed(
            lambda data: data.update(
                layers=[{**data["layers"][0], "name": f"a.0.b{i}x"} for i in range(300)]
            )
        ),
        "300 kinds of layers in 1 blocks are too many to be drawn",
    ),
]


@pytest.mark.parametrize(("content", "says"), DAMAGED)
def test_an_error_shows_the_place_of_damage_in_a_report(
    content: str, says: str, tmp_path: Path
) -> None:
    (tmp_path / "gptq_report.json").write_text(content)
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (found.exit_code, found.stdout) == (3, "")
    assert found.stderr.startswith("error[E_REPORT]: `")
    assert says in found.stderr
    assert "hint: quantize again, with --overwrite" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["gptq_report.json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"perplexity": None}, "perplexity: Input should be a valid number"),
        ({"perplexity": float("inf")}, "perplexity: "),
        ({"windows": 2.5}, "windows: Input should be a valid integer"),
        ({"kl": None}, "a baseline has no kl"),
        ({"dataset": ["a"]}, "dataset: Input should be a valid string"),
        ({"seqlen": 10**400}, "seqlen: "),
    ],
)
def test_an_error_shows_the_place_of_damage_in_an_evaluation(
    change: Data, says: str, tmp_path: Path
) -> None:
    (tmp_path / "gptq_report.json").write_text(json.dumps(REPORT))
    (tmp_path / "ppl.json").write_text(json.dumps(EVALUATION | change))
    with pytest.raises(InputError, match="not the result of an evaluation") as caught:
        write_page(tmp_path, tmp_path / "page.html", evaluation=tmp_path / "ppl.json")
    assert says in str(caught.value)
    assert (caught.value.code, "eval-ppl" in (caught.value.hint or "")) == ("E_REPORT", True)


@pytest.mark.parametrize(
    "name",
    [
        "$\\frac{q$",
        "$x$ {{7*7}} {% raw %}",
        "a" * 5000,
        "\u202e\x1b[31m",
        "<script>alert(1)</script>\"'>",
    ],
)
def test_names_are_shown_as_text_and_not_as_formulas(name: str, tmp_path: Path) -> None:
    data = deepcopy(REPORT)
    data["layers"][0]["name"] = f"model.layers.0.{name}"
    data |= {"name": name, "model": name, "command": name}
    (tmp_path / "gptq_report.json").write_text(json.dumps(data))
    page = write_page(tmp_path, tmp_path / "page.html", png=tmp_path / "map.png").read_text()
    assert "<script" not in page
    assert ">49<" not in page
    assert "\x1b" not in page
    assert len(page) < 200_000
    if name.startswith("$"):
        assert name.split()[0].replace("$", "&#36;") in page or name.split()[0] in page


def test_numbers_beyond_the_color_scale_do_not_break_the_page(tmp_path: Path) -> None:
    data = deepcopy(REPORT)
    for value in (5e-324, 1e308, float("inf"), float("nan"), -1.0, 0):
        data["layers"][0] |= {"relative_error": value, "rtn_relative_error": value}
        (tmp_path / "gptq_report.json").write_text(json.dumps(data))
        assert write_page(tmp_path, tmp_path / "page.html").stat().st_size > 1000


def test_a_report_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gptq_report.json").write_text(json.dumps(REPORT))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read `.*gptq_report") as caught:
        write_page(tmp_path, tmp_path / "page.html")
    assert caught.value.code == "E_FILE"
