"""Draws what `gptq` prints on the demo model as a terminal, for the README: a real run, of now, on this machine.

python scripts/record_terminal.py docs/images/terminal.svg
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

DEMO = Path(__file__).resolve().parent / "demo"
COLUMNS = 94
COMMANDS = [
    "gptq quantize demo --bits 4 --dataset text.txt --nsamples 64 --seqlen 512",
    "gptq eval-ppl demo-GPTQ-Int4-g128 --baseline demo --dataset heldout.txt 2> /dev/null",
    "gptq verify demo-GPTQ-Int4-g128 --full",
]


def main() -> None:
    terminal = Console(
        record=True, width=COLUMNS, file=sys.stderr, force_terminal=True, color_system="truecolor"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(DEMO / "model", Path(folder) / "demo")
        shutil.copy(DEMO / "calibration.txt", Path(folder) / "text.txt")
        shutil.copy(DEMO / "heldout.txt", folder)
        for command in COMMANDS:
            said, _, hidden = command.partition(" 2> ")
            words = [sys.executable, "-m", "gptq_cli", *shlex.split(said)[1:]]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            terminal.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            if done.stderr and not hidden:
                terminal.print(Text(done.stderr.rstrip(), "grey62"))
            terminal.print(Text(done.stdout.rstrip()), Text(), sep="\n")
    drawn = terminal.export_svg(title="gptq")
    # Letters have their places: any monospace font will do, and nothing is fetched.
    Path(sys.argv[1]).write_text(
        re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
