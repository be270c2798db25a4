"""`gptq` and `python -m gptq_cli`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    # Threads that wait by spinning take the cores that the working ones need when anything else runs: seen to make a
    # block five times slower. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tensors of megabytes are taken from the system and given back one by one; pages of 2 MB make that quicker.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        from gptq_cli.cli.app import app

        app(prog_name="gptq")
    except KeyboardInterrupt:  # before there is a command that could say more
        sys.exit(130)


if __name__ == "__main__":
    main()
