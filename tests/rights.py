"""The program for a user who is not root: root may read everything despite permissions."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from typer.testing import CliRunner

from gptq_cli.cli.app import app

_VERSION_3, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 0x20080522, 1, 2  # linux/capability.h


class Said(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def held_back(*words: str | Path) -> Said:
    """What the program says when permissions count, in a process of its own."""

    def run() -> list[Any]:
        found = CliRunner().invoke(app, [str(word) for word in words])
        return [found.exit_code, found.stdout, found.stderr]

    return Said(*in_a_child(run))


def in_a_child(run: Callable[[], Any]) -> Any:
    """Return the JSON value of `run` in a forked process without root's right to read all."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _give_up_rights()
            os.write(writing, json.dumps(run()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def _give_up_rights() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    system = ctypes.CDLL(None, use_errno=True)
    assert system.capget(header, sets) == 0
    for place in range(3):
        sets[place] &= ~(1 << _CAP_DAC_OVERRIDE | 1 << _CAP_DAC_READ_SEARCH)
    assert system.capset(header, sets) == 0
