"""What the documents promise is what the program has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gptq_cli import __version__
from gptq_cli.cli.app import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
HOW_TO = sorted((ROOT / "docs/how-to").glob("*.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *HOW_TO]
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "gptq_cli").rglob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"gptq {command}[ `]", README)


def options() -> set[str]:
    """Every option of every command."""
    parameters = [parameter for name in COMMANDS for parameter in load_command(name).params]
    words = {
        word for parameter in parameters for word in [*parameter.opts, *parameter.secondary_opts]
    }
    return {word for word in words if word.startswith("-")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(--[a-z][a-z0-9-]+)", page.read_text()))
    assert named <= options() | {"--help", "--version", "--install-completion"}


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.name)
def test_a_how_to_page_begins_with_its_command(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if line]
    begin = [line for line in lines if not line.startswith("<!-- needs:")]
    assert begin[0].startswith("# ")
    assert begin[1] in ("```bash", "```pycon")


def test_pages_name_more_than_twenty_options() -> None:
    assert (
        len(
            set(re.findall(r"`(--[a-z0-9-]+)", "".join(page.read_text() for page in PAGES)))
            & options()
        )
        > 20
    )


def test_files_and_targets_of_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, flags=re.MULTILINE)) <= set(targets)
    paths = re.findall(r"[`(]((?:docs|scripts|configs|examples)/[\w./-]*)[`)]", README)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_changelog_lists_the_version_or_unreleased_changes() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {__version__}" in changelog or "## Unreleased" in changelog


def headings(page: Path) -> set[str]:
    """Return the names by which links reach the headings of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in found]
    return {heading.replace(" ", "-") for heading in plain}


def broken(page: Path) -> list[str]:
    """Return the links of a page that lead to no file or heading of the repository."""
    missing = []
    text = re.sub(r"`[^`\n]+`", "", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, heading = link.partition("#")
        if "://" in name:
            continue
        target = page
        if name:
            target = page.parent / name
        if not target.exists() or (heading and heading not in headings(target)):
            missing.append(link)
    return missing


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_document_lead_somewhere_in_a_clone(page: Path) -> None:
    assert broken(page) == []


def test_documents_have_more_than_a_hundred_links() -> None:
    links = [link for page in DOCUMENTS for link in re.findall(r"\]\([^)]+\)", page.read_text())]
    assert len(links) > 100
