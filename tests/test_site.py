"""The site builds without a warning, and its reference has all that the program has."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from pathlib import Path
from types import ModuleType

import pytest

from gptq_cli import errors
from gptq_cli.cli.app import COMMANDS
from gptq_cli.cli.codes import explanations
from gptq_cli.config.layer import PRESETS
from gptq_cli.config.resolve import recipes
from gptq_cli.config.schema import QuantizeConfig
from gptq_cli.config.serving import ENGINES
from tests.test_docs import options

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; mkdocs raises Abort for a broken link or a missing page."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    directory = tmp_path_factory.mktemp("site")
    level = logging.getLogger("mkdocs").level
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True))
    logging.getLogger("mkdocs").setLevel(level)
    return directory


@pytest.fixture(scope="module")
def docs_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "scripts" / "docs_site.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_site_is_complete_and_fetches_nothing(site: Path) -> None:
    pages = {
        str(page.relative_to(site)): page.read_text(encoding="utf-8")
        for page in site.rglob("*.html")
    }
    assert {
        "index.html",
        "tutorial.html",
        "reference/command-line.html",
        "benchmarks/index.html",
    } <= set(pages)
    fetched = [
        (name, at)
        for name, page in pages.items()
        for at in re.findall(r'(?:src|<link[^>]*href)="(http[^"]+)', page)
    ]
    assert fetched == []


def test_the_search_needs_no_server(site: Path) -> None:
    """Browsers read neither JSON nor workers from the disk: both come as plain scripts."""
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    found = json.loads(index.removeprefix("var __index = "))
    assert "tutorial.html" in {entry["location"] for entry in found["docs"]}
    page = (site / "how-to" / "quantize.html").read_text(encoding="utf-8")
    assert '<script src="../assets/iframe-worker.js">' in page
    assert (site / "assets" / "iframe-worker.js").exists()


def test_equations_are_rendered(site: Path) -> None:
    page = (site / "algorithm.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    assert page.count("<math") == source.count(r"\(") + source.count(r"\[") > 30
    assert not re.search(r"\\[(\[]", page)


def test_reference_lists_commands_options_keys_codes_and_engines(docs_site: ModuleType) -> None:
    pages = docs_site.pages()
    cli, keys, codes = (
        pages[f"reference/{name}.md"] for name in ("command-line", "configuration", "error-codes")
    )
    assert [name for name in COMMANDS if f"## gptq {name}\n" not in cli] == []
    assert [option for option in options() - {"--help"} if f"`{option}`" not in cli] == []
    assert [key for key in QuantizeConfig.model_fields if f"| `{key}` |" not in keys] == []
    assert [name for name in [*PRESETS, *recipes()] if name not in keys] == []
    assert [code for code in explanations() if f"## {code}\n" not in codes] == []
    assert [
        engine.name
        for engine in ENGINES
        if f"## {engine.name}\n" not in pages["reference/engines.md"]
    ] == []


def test_reference_shows_the_values_of_the_default_preset(docs_site: ModuleType) -> None:
    keys = docs_site.pages()["reference/configuration.md"]
    assert '| `scale_search` | `"mse"` |' in keys
    assert "| `refine_sweeps` | `4` |" in keys


def test_reference_lists_the_exit_codes_of_all_errors(docs_site: ModuleType) -> None:
    documented = {
        int(code)
        for code in re.findall(r"^\| (\d+) \|", docs_site.exit_codes(), flags=re.MULTILINE)
    }
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert {kind.exit_code for kind in classes} | {0, 130, 143} == documented


def test_reference_lists_the_output_schema_and_all_decisions(
    docs_site: ModuleType,
) -> None:
    pages = docs_site.pages()
    shown = pages["reference/json-output.md"]
    assert [name for name in COMMANDS if name != "schema" and f"## {name}\n" not in shown] == []
    parts = json.loads(
        (ROOT / "gptq_cli" / "cli" / "output.schema.json").read_text(encoding="utf-8")
    )["$defs"]
    fields = {field for part in parts.values() for field in part.get("properties", {})}
    assert [field for field in sorted(fields) if f"| `{field}` |" not in shown] == []
    assert "| `memory.cpu` | [memory_peak](#memory_peak) |" in shown
    written = sorted(file.name for file in (ROOT / "docs" / "decisions").glob("*.md"))
    assert re.findall(r"\]\((\d\S+\.md)\)", pages["decisions/index.md"]) == written


def test_words_that_are_code_already_stay_as_they_are(docs_site: ModuleType) -> None:
    assert docs_site._text("`gptq plan --json` has `a_b` and --bits") == (
        "`gptq plan --json` has `a_b` and `--bits`"
    )
    assert docs_site._text("no --bits, a_b <x>") == r"no `--bits`, a\_b \<x>"


def test_parts_of_json_without_fields_have_no_table(docs_site: ModuleType) -> None:
    shown = docs_site.pages()["reference/json-output.md"]
    assert "The same as [quantize](#quantize)." in shown.partition("## resume\n")[2]
    assert "| --- | --- | --- |\n\n" not in shown


def test_long_values_of_the_reference_break_at_their_bars(site: Path) -> None:
    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert "<code>mean|<wbr>diagonal</code>" in page
    assert "<wbr>" not in (site / "index.html").read_text(encoding="utf-8")


def test_a_bar_in_a_cell_has_no_backslash(site: Path) -> None:
    page = (site / "architectures.html").read_text(encoding="utf-8")
    assert "k_proj|model" in page
    assert r"\|" not in page


def test_links_to_the_reference_reach_its_pages(site: Path) -> None:
    page = (site / "how-to" / "quantize.html").read_text(encoding="utf-8")
    assert 'href="../reference/configuration.html"' in page
    assert 'href="../reference/error-codes.html#w_data_built_in"' in page
    assert "reference/index.html#" not in page
    overview = (site / "reference" / "index.html").read_text(encoding="utf-8")
    assert 'href="error-codes.html"' in overview.partition('id="error-codes"')[2]


def test_codes_in_code_and_in_headings_are_no_links(docs_site: ModuleType) -> None:
    text = "<h2>E_SHAPE</h2> <pre><code>E_SHAPE</code></pre> E_SHAPE, E_OF_NOBODY"
    linked = docs_site._link_codes(text, "../")
    found = '<a href="../reference/error-codes.html#e_shape">E_SHAPE</a>'
    assert linked == f"<h2>E_SHAPE</h2> <pre><code>E_SHAPE</code></pre> {found}, E_OF_NOBODY"


def test_cells_of_a_wide_table_know_their_columns(site: Path) -> None:
    page = (site / "peers.html").read_text(encoding="utf-8")
    row = page.partition("reads the output back and hashes it")[2].partition("</tr>")[0]
    labels = re.findall(r'data-label="([^"]*)"', row)
    assert labels == ["gptq_cli", "GPTQModel", "llm-compressor", "auto-round", "Optimum"]
