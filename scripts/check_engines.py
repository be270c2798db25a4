#!/usr/bin/env python3
"""Look up in the newest releases of the engines what the table of engines takes from them.

    python scripts/check_engines.py [--archives FOLDER] [--json] [PACKAGE ...]

Downloads a release of each package of scripts/engine_facts.yaml with pip, installs nothing, and
reads the files that the facts name. Prints each fact that no longer holds, with what the table
says because of it. With --archives, archives that a folder has already are read and others are
downloaded into it. Exit codes: 0 = all facts hold, 1 = some fact changed, 2 = no archive.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from common import argument_parser

FACTS = Path(__file__).with_name("engine_facts.yaml")


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a fact: it "holds", it "changed", or its file is "missing"."""

    package: str
    version: str
    state: str
    file: str
    pattern: str
    means: str


class NoArchive(Exception):
    """pip gave no archive of a package."""


def archive_of(package: str, folder: Path, *, sdist: bool) -> Path:
    """Return the archive of `package` in its folder below `folder`; if it is absent, download it.

    Raises NoArchive with pip's words.
    """
    home = folder / package
    if not home.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if sdist:
            command += ["--no-binary", package]
        done = subprocess.run(
            [*command, "--dest", str(home), package], capture_output=True, text=True
        )
        if done.returncode:
            raise NoArchive(f"{package}: {done.stderr.strip()}")
    archives = sorted(home.glob("*"))
    if not archives:
        raise NoArchive(f"{package}: `{home}` is empty")
    return archives[-1]


def read_files(archive: Path, patterns: Collection[str]) -> dict[str, str]:
    """Return the text of each file in a wheel or a source archive whose path a pattern matches."""
    found: dict[str, str] = {}
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in wheel.namelist():
                if _matches(name, patterns):
                    found[name] = wheel.read(name).decode("utf-8", "replace")
        return found
    with tarfile.open(archive) as sources:
        for member in sources:
            file = sources.extractfile(member)
            if file and _matches(member.name, patterns):
                found[member.name] = file.read().decode("utf-8", "replace")
    return found


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def check(package: dict[str, Any], archive: Path) -> Iterator[Finding]:
    """Yield a finding for each fact about `package`, read in `archive`."""
    files = read_files(archive, {fact["file"] for fact in package["facts"]})
    version = archive.name.removesuffix(".tar.gz").split("-")[1]
    for fact in package["facts"]:
        texts = [text for name, text in files.items() if fnmatchcase(name, fact["file"])]
        pattern = fact.get("has") or fact["lacks"]
        state = _state(fact, texts)
        yield Finding(package["package"], version, state, fact["file"], pattern, fact["means"])


def _state(fact: dict[str, str], texts: Sequence[str]) -> str:
    """Return what became of `fact` in the texts of its files."""
    if not texts:
        return "missing"
    wanted = "has" in fact
    pattern = re.compile(fact.get("has") or fact["lacks"], re.M)
    found = any(pattern.search(text) for text in texts)
    if found != wanted:
        return "changed"
    return "holds"


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="all if none is named")
    parser.add_argument("--facts", type=Path, default=FACTS, help=f"default: {FACTS.name}")
    parser.add_argument("--archives", type=Path, metavar="FOLDER", help="archives that are here")
    parser.add_argument("--json", action="store_true", help="print all findings as JSON")
    arguments = parser.parse_args()
    packages = yaml.safe_load(arguments.facts.read_text(encoding="utf-8"))
    if arguments.packages:
        packages = [entry for entry in packages if entry["package"] in arguments.packages]
    findings: list[Finding] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for entry in packages:
            try:
                folder = arguments.archives or Path(scratch)
                archive = archive_of(entry["package"], folder, sdist=entry.get("sdist", False))
                findings += check(entry, archive)
            except NoArchive as error:
                failures.append(str(error))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(packages, findings)
    for failure in failures:
        print(f"no archive of {failure}", file=sys.stderr)
    if failures:
        return 2
    return int(any(finding.state != "holds" for finding in findings))


def show(packages: Sequence[dict[str, Any]], findings: Sequence[Finding]) -> None:
    """Print a line for each package and one for each fact that does not hold."""
    for entry in packages:
        mine = [finding for finding in findings if finding.package == entry["package"]]
        if not mine:
            continue
        holding = sum(finding.state == "holds" for finding in mine)
        print(
            f"{entry['package']} {mine[0].version} (facts found in {entry['version']}): "
            f"{holding} of {len(mine)} facts hold"
        )
        for finding in mine:
            if finding.state != "holds":
                print(f"  {finding.state}: {finding.file}: {finding.pattern}")
                print(f"    the table says: {finding.means}")


if __name__ == "__main__":
    sys.exit(main())
