"""`gptq` and `python -m gptq_cli`."""

from __future__ import annotations

import os  # os and sys are there already: nothing else is imported before the current directory is left out
import sys


def leave_out_current_directory() -> None:
    """Take the current directory off the places where this process and its children look for modules.

    It may be a model that was downloaded. `python -m` and an empty word in PYTHONPATH put it in front of what is
    installed; it stays if PYTHONPATH names it by its full path, or if it is where this package is.
    """
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # for any Python that a library may start, from Python 3.11 on
    )
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was removed, and holds no modules
        return
    said = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = {
        os.path.dirname(os.path.dirname(__file__)),
        *map(os.path.normpath, filter(os.path.isabs, said)),
    }
    library = os.path.dirname(os.__file__)
    # what is behind Python's own library was put there by those who installed it
    for path in sys.path[: sys.path.index(library) if library in sys.path else None]:
        if os.path.realpath(path or here) == here and path not in kept:
            sys.path.remove(path)


def main() -> None:
    """Run the command line and exit with its exit code."""
    leave_out_current_directory()
    # Threads that wait by spinning take the cores that the working ones need when anything else runs: seen to make a
    # block five times slower. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Tensors of megabytes are taken from the system and given back one by one; pages of 2 MB make that quicker.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # transformers would load code from the Hub for some types of models if the package `kernels` is installed.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        from gptq_cli.cli.app import app

        app(prog_name="gptq")
    except KeyboardInterrupt:  # before there is a command that could say more
        sys.exit(130)


if __name__ == "__main__":
    main()
