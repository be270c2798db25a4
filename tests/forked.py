"""`gptq` as a command that starts at once: a process that has loaded everything forks for a call.

    python tests/forked.py serve SOCKET MODULE...   prints a line when it has loaded the modules
    python tests/forked.py call SOCKET ...          acts as `gptq ...` with its streams, exit code

Tests of scripts that call the program several times save the time of the imports.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALL = (
    "datasets",
    "transformers.models.llama.modeling_llama",
    "gptq_cli.evaluation.perplexity",
    "gptq_cli.quantization.run",
)


@contextmanager
def serving(
    folder: Path, environment: dict[str, str], modules: Sequence[str] = ALL
) -> Iterator[list[str]]:
    """Start a server whose socket is in `folder`; yield the words that act as `gptq`."""
    place = str(folder / "s")
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", place, *modules],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield [sys.executable, "-S", __file__, "call", place]
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def serve(path: str, modules: Sequence[str]) -> None:
    """Run the program for each connection, one after the other, while this process lives."""
    for module in modules:
        import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        message, streams, _, _ = socket.recv_fds(connection, 2**20, 3)
        child = os.fork()
        if not child:
            _become(json.loads(message), streams)
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        connection.close()


def call(path: str, words: list[str]) -> int:
    """The exit code of `gptq` with `words`, here."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        message = json.dumps(
            {"words": words, "directory": str(Path.cwd()), "variables": dict(os.environ)}
        )
        socket.send_fds(connection, [message.encode()], [0, 1, 2])
        return int(connection.recv(16))


def _become(called: dict[str, object], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(str(called["directory"]))
    os.environ.clear()
    os.environ.update(called["variables"])  # type: ignore[call-overload]
    sys.argv = ["gptq", *called["words"]]  # type: ignore[misc]
    from gptq_cli.__main__ import main

    try:
        main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 0)
    finally:
        os._exit(1)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
