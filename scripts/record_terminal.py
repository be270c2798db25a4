#!/usr/bin/env python3
"""Draw what `gptq` prints for the demo model as the picture of a terminal.

    python scripts/record_terminal.py docs/images/terminal.svg

Runs the commands anew on this machine and writes the SVG of the README; shows the same on stderr.
"""

from __future__ import annotations

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

COLUMNS = 99
COMMANDS = [
    "gptq quantize demo --bits 4 --dataset text.txt --nsamples 64 --seqlen 512",
    "gptq eval-ppl demo-GPTQ-Int4-g128 --baseline demo --dataset heldout.txt 2> /dev/null",
    "gptq verify demo-GPTQ-Int4-g128 --full",
]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("output", type=Path, help="file to write the SVG to")
    arguments = parser.parse_args()
    terminal = Console(
        record=True, width=COLUMNS, file=sys.stderr, force_terminal=True, color_system="truecolor"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEMO / "model", Path(folder) / "demo")
        shutil.copy(DEMO / "calibration.txt", Path(folder) / "text.txt")
        shutil.copy(DEMO / "heldout.txt", folder)
        for command in COMMANDS:
            run, _, without_stderr = command.partition(" 2> ")
            words = [sys.executable, "-m", "gptq_cli", *shlex.split(run)[1:]]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            terminal.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            if done.stderr and not without_stderr:
                terminal.print(Text(done.stderr.rstrip(), "grey62"))
            terminal.print(Text(done.stdout.rstrip()), Text(), sep="\n")
    drawn = terminal.export_svg(title="gptq")
    # Every letter has its own position, so any monospace font will do and none is downloaded.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    arguments.output.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
