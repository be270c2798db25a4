"""Entry point of `gptq` and of `python -m gptq_cli`."""

# Nothing else may be imported before `leave_out_current_directory` has run. Python has loaded
# two of these already, and the third is a part of it.
import os
import sys
import time


def leave_out_current_directory() -> None:
    """Remove the current directory from the places where Python looks for modules.

    The current directory may be a downloaded model. `python -m` and an empty entry in PYTHONPATH
    put it before the installed packages, here and in child processes. It stays if PYTHONPATH
    names it by its full path, or if this package is in it.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # for Pythons that a library starts, from Python 3.11 on
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the directory was removed, so it holds no modules
        return
    kept = {os.path.dirname(os.path.dirname(__file__))}
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if os.path.isabs(path):
            kept.add(os.path.normpath(path))
    # An entry behind Python's own library was added on purpose when packages were installed.
    candidates = list(sys.path)
    library = os.path.dirname(os.__file__)
    if library in sys.path:
        candidates = sys.path[: sys.path.index(library)]
    for path in candidates:
        if os.path.realpath(path or here) == here and path not in kept:
            sys.path.remove(path)


def main() -> None:
    """Run the command line and exit with its exit code."""
    leave_out_current_directory()
    if "_GPTQ_LAUNCHER" not in os.environ:  # a process of --devices began with its launcher
        os.environ["_GPTQ_BEGAN"] = str(time.time())
    # Threads that wait by spinning take cores from the threads that work as soon as another
    # process runs: a block took five times as long. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Large tensors are allocated from and returned to the system one by one, which is faster
    # with pages of 2 MB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # With the package `kernels` installed, transformers loads code from the Hub for some models.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        from gptq_cli.cli.app import app

        app(prog_name="gptq")
    except KeyboardInterrupt:  # during the imports, before a command could report it
        sys.exit(130)


if __name__ == "__main__":
    main()
