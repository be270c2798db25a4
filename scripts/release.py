#!/usr/bin/env python3
"""Build the sdist and the wheel, and run the demo with the wheel in fresh environments.

    python scripts/release.py [--python 3.11 ...] [--versions lowest newest] [--constraint FILE]

Each Python gets two environments: one with the lowest versions that pyproject.toml allows and one
with the newest. In each, the demo quantizes and measures the demo model with the installed wheel.
A Python that this machine does not have is reported and left out, unless --python names it. With
`--without-torch` the environments have no torch, and only the commands that need none are run.
Writes the files to dist/ and the environments to build/release. Exit code 1 if something failed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from common import DEMO, ROOT, argument_parser

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
RESOLUTIONS = {"lowest": "lowest-direct", "newest": "highest"}  # the words of uv
WORK = ROOT / "build" / "release"
LOOKS = (  # commands that need no torch
    ["quantize", "--help"],
    ["plan", "demo/model", "--bits", "4"],
    ["inspect", "demo/model"],
    ["recipes"],
    ["env"],
)


class Failed(Exception):
    """A step of a release did not do what it should."""


def uv(*words: str | Path) -> str:
    """Run uv and return what it prints on stdout. Raises Failed with its messages."""
    done = subprocess.run(["uv", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"uv {words[0]} failed:\n{done.stderr.strip()}")
    return done.stdout.strip()


def check_sources() -> str:
    """Return the version of the sources. Raises Failed if they are not ready for a release."""
    text = (ROOT / "gptq_cli" / "errors.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise Failed("gptq_cli/errors.py has no __version__")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"\n## {found[1]}" not in changelog:
        raise Failed(f"CHANGELOG.md has no section {found[1]}")
    status = ["git", "status", "--porcelain"]
    changed = subprocess.run(status, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if changed:
        raise Failed(f"commit or remove these files first:\n{changed.rstrip()}")
    return found[1]


def build(directory: Path, name: str) -> Path:
    """Build the sdist, and the wheel from it, into `directory`; return the wheel."""
    for old in directory.glob("gptq_cli-*"):
        old.unlink()
    uv("build", ROOT, "--out-dir", directory)
    wheel = directory / f"gptq_cli-{name}-py3-none-any.whl"
    sdist = directory / f"gptq_cli-{name}.tar.gz"
    with tarfile.open(sdist) as archive:
        check_files(sdist, {member.partition("/")[2] for member in archive.getnames()})
    with zipfile.ZipFile(wheel) as packed:
        check_files(wheel, set(packed.namelist()))
    return wheel


def check_files(archive: Path, names: set[str]) -> None:
    """Raise Failed if a file of the package is not among the `names` in `archive`."""
    listing = ["git", "ls-files", "gptq_cli"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    absent = sorted(set(listed.splitlines()) - names)
    if absent:
        raise Failed(f"{archive.name} lacks {', '.join(absent)}")


def make_environment(
    place: Path, python: str, resolution: str, wheel: Path, options: list[str | Path]
) -> None:
    """Install `wheel` and what its report extra needs into a new environment at `place`."""
    shutil.rmtree(place, ignore_errors=True)
    uv("venv", place, "--python", python)
    target = ["--python", place / "bin" / "python"]
    # For uv the requirements of a wheel are indirect, of which it takes the newest.
    chosen = ["--resolution", RESOLUTIONS[resolution], "--extra", "report"]
    pins = place / "pins.txt"
    uv("pip", "compile", ROOT / "pyproject.toml", *target, *chosen, *options, "-o", pins)
    uv("pip", "install", *target, *options, "--requirement", pins, wheel)


def run(place: Path, *words: str | Path) -> str:
    """Run a program of the environment at `place` beside its demo; return what it prints."""
    command = [str(place / "bin" / str(words[0])), *map(str, words[1:])]
    cwd = place / "scripts"
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def try_environment(place: Path, name: str, without_torch: bool) -> str:
    """Run what a user runs first at `place`; return the line that shows it worked."""
    # A copy, so that the package beside the scripts does not stand in for the wheel.
    shutil.copytree(DEMO, place / "scripts" / "demo")
    for script in ("demo.py", "common.py"):
        shutil.copy(ROOT / "scripts" / script, place / "scripts")
    if name not in run(place, "gptq", "--version"):
        raise Failed(f"{place} holds another version than {name}")
    for words in LOOKS:
        run(place, "gptq", *words)
    if without_torch:
        return "commands without torch work"
    printed = run(place, "python", "demo.py")
    measured = re.search(r"KL to the original\W+([\d.]+)", printed)
    if measured is None:
        raise Failed(f"the demo printed no KL:\n{printed}")
    if not float(measured[1]) < 0.01:
        raise Failed(f"the demo has a KL of {measured[1]}, which is above 0.01")
    run(place, "gptq", "verify", "demo-output/demo-GPTQ-Int4-g128", "--full")
    run(place, "gptq", "report", "demo-output/demo-GPTQ-Int4-g128")
    return f"demo has KL {measured[1]}"


def versions_in(place: Path) -> str:
    """Return the names and versions that matter most in the environment at `place`."""
    python = place / "bin" / "python"
    lines = uv("pip", "freeze", "--python", python).splitlines()
    wanted = ("torch==", "transformers==", "numpy==", "datasets==", "filelock==", "typer==")
    return ", ".join(line for line in lines if line.startswith(wanted))


def pythons(asked: list[str] | None) -> list[str]:
    """Return the Pythons to try: those that were asked for, or those that this machine has."""
    found = []
    for name in asked or PYTHONS:
        try:
            uv("python", "find", "--no-python-downloads", name)
        except Failed as error:
            if asked:
                raise
            print(f"python {name}: not on this machine, left out ({error})", flush=True)
            continue
        found.append(name)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--python", nargs="+", help="versions to try, such as 3.11")
    parser.add_argument("--versions", nargs="+", choices=RESOLUTIONS, default=list(RESOLUTIONS))
    parser.add_argument("--constraint", type=Path, help="versions that every environment keeps")
    parser.add_argument("--without-torch", action="store_true", help="try the rest alone")
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    options: list[str | Path] = []
    if arguments.constraint:
        options += ["--constraint", arguments.constraint.resolve()]
    WORK.mkdir(parents=True, exist_ok=True)
    if arguments.without_torch:
        never = WORK / "without-torch.txt"
        never.write_text("torch ; python_version < '3'\n", encoding="utf-8")
        options += ["--override", never]
    failures = 0
    try:
        name = check_sources()
        wheel = build(arguments.output.resolve(), name)
        print(f"built {wheel.name} and its sdist in {wheel.parent}", flush=True)
        chosen = pythons(arguments.python)
    except Failed as error:
        sys.exit(str(error))
    for python in chosen:
        for resolution in arguments.versions:
            place = WORK / f"{python}-{resolution}"
            try:
                make_environment(place, python, resolution, wheel, options)
                result = try_environment(place, name, arguments.without_torch)
                print(f"python {python}, {resolution}: {result}; {versions_in(place)}", flush=True)
            except Failed as error:
                failures += 1
                print(f"python {python}, {resolution}: FAILED\n{error}", flush=True)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
