#!/usr/bin/env python3
"""Draw what a terminal shows while `gptq` quantizes the demo model, and after further commands.

    python scripts/record_terminal.py docs/images

Runs the commands anew in a terminal of this machine and writes running.svg and terminal.svg.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import DEMO, argument_parser
from rich.console import Console
from rich.text import Text

COLUMNS = 90
QUANTIZE = "gptq quantize demo --bits 4 --dataset text.txt --nsamples 64 --seqlen 512"
FURTHER = (
    "gptq eval-ppl demo-GPTQ-Int4-g128 --baseline demo --dataset heldout.txt",
    "gptq verify demo-GPTQ-Int4-g128 --full",
)
MOMENT = "self_attn.o_proj  error"  # of the last block: the live view that is drawn
NEXT_VIEW = "\r\x1b[2K"
CONTROL = re.compile(r"(\x1b\[[\d;?]*[A-Za-z]|[\r\n])")
UNSEEN = ("\r", "\x1b[?25l", "\x1b[?25h")  # a line is erased before it is written anew


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("output", type=Path, help="folder to write the pictures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(DEMO / "model", folder / "demo")
        shutil.copy(DEMO / "calibration.txt", folder / "text.txt")
        shutil.copy(DEMO / "heldout.txt", folder)
        printed = {command: recorded(command, folder) for command in (QUANTIZE, *FURTHER)}
    end = printed[QUANTIZE].index(NEXT_VIEW, printed[QUANTIZE].rindex(MOMENT))
    draw({QUANTIZE: printed[QUANTIZE][:end]}, arguments.output / "running.svg")
    draw(printed, arguments.output / "terminal.svg")


def recorded(command: str, folder: Path) -> str:
    """Run a command in a terminal and return all that it writes there.

    Raises CalledProcessError if it fails.
    """
    words = [sys.executable, "-m", "gptq_cli", *shlex.split(command)[1:]]
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    here, there = pty.openpty()
    running = subprocess.Popen(
        words, cwd=folder, env=environment, stdin=there, stdout=there, stderr=there
    )
    os.close(there)
    parts = []
    while part := _read(here):
        parts.append(part)
    os.close(here)
    if running.wait():
        raise subprocess.CalledProcessError(running.returncode, words)
    return b"".join(parts).decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def screen(printed: str) -> list[str]:
    """Return the lines that a terminal shows after `printed`, with the codes of their colours.

    Raises ValueError for a control sequence that it does not know.
    """
    lines, row = [""], 0
    for part in CONTROL.split(printed):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part.startswith("\x1b") and part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part.startswith("\x1b") and not part.endswith("m") and part not in UNSEEN:
            raise ValueError(f"no terminal for {part!r}")
        elif part not in UNSEEN:
            lines[row] += part
    return "\n".join(lines).rstrip("\n").split("\n")


def draw(printed: dict[str, str], picture: Path) -> None:
    """Write the SVG of a terminal in which commands have `printed` their output."""
    terminal = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    for command, output in printed.items():
        terminal.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
        for line in screen(output):
            text = Text.from_ansi(line)
            terminal.print(*text.divide(range(COLUMNS, len(text), COLUMNS)), sep="\n")
        terminal.print()
    drawn = terminal.export_svg(title="gptq", unique_id=picture.stem)
    # Every letter has its own position, so any monospace font will do and none is downloaded.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    picture.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
