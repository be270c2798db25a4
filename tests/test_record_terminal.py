"""The pictures of the README show what a terminal shows."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("record_terminal", "common"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return import_module("record_terminal")


def test_an_erased_view_is_not_on_the_screen(recorder: ModuleType) -> None:
    view = "\x1b[?25lbar 1\r\nmemory 1\r\x1b[2K\x1b[1A\x1b[2K"
    assert recorder.screen(f"plan\r\n{view}done\r\nbar 2\r\n") == ["plan", "done", "bar 2"]
    assert recorder.screen("one\r\ntwo\r\n\x1b[2A\x1b[2Kthree\r\n") == ["three", "two"]


def test_colours_stay_and_unknown_sequences_are_refused(recorder: ModuleType) -> None:
    assert recorder.screen("\x1b[36mnext:\x1b[0m go\r\n") == ["\x1b[36mnext:\x1b[0m go"]
    with pytest.raises(ValueError, match="no terminal for"):
        recorder.screen("\x1b[2J")


def test_a_picture_has_the_command_and_its_lines(recorder: ModuleType, tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    recorder.draw({"gptq env": f"\x1b[36mfirst\x1b[0m\r\n{'x' * 91}\r\n"}, picture)
    drawn = picture.read_text(encoding="utf-8")
    assert "gptq&#160;env" in drawn
    assert ">first<" in drawn
    assert f">{'x' * 90}<" in drawn
    assert ">x<" in drawn
    assert "http" not in drawn.replace("https://www.textualize.io", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
