"""Regular expressions that somebody else wrote, matched by Python's `re` within a limit of time.

A pattern such as (a+)+$ can take longer than anybody waits. Most patterns leave too few choices for that. With others,
`re` looks for signals while it matches, so in the main thread a timer ends it. In another thread nothing can, and the
pattern is matched by a child process.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from threading import current_thread, main_thread
from types import FrameType

SECONDS = 1.0  # of computing; a pattern that anybody means takes microseconds
SECONDS_OF_CHILD = 20.0  # a busy machine takes its time to start one
MOST_CHOICES, MOST_GROUPS = 3, 2
_CHOICE = re.compile(r"[*+{]|(?<!\()\?")
_OTHERS = re.compile(r"\)[*+{]|\\[1-9]|\(\?[A-Za-z-]")  # repeated groups, references, flags
_CHILD = "import json, re, sys; sys.exit(re.match(*json.load(sys.stdin)) is None)"


def matches_in_time(pattern: str, text: str) -> bool:
    """Whether the pattern matches from the start of the text, as `re.match` does; TimeoutError if that takes long."""
    if _is_plain(pattern):
        return re.match(pattern, text) is not None
    if current_thread() is main_thread() and hasattr(signal, "setitimer"):
        return _match_here(pattern, text)
    command, question = (
        [sys.executable, "-I", "-S", "-c", _CHILD],
        json.dumps([pattern, text]).encode(),
    )
    try:
        return (
            subprocess.run(
                command, input=question, timeout=SECONDS_OF_CHILD, check=False
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        raise TimeoutError from None


def _is_plain(pattern: str) -> bool:
    """Whether matching takes at most about the cube of the text's length, by what the pattern looks like."""
    few = len(_CHOICE.findall(pattern)) <= MOST_CHOICES and pattern.count("(") <= MOST_GROUPS
    return few and not _OTHERS.search(pattern)


def _match_here(pattern: str, text: str) -> bool:
    usual = signal.signal(signal.SIGVTALRM, _late)
    timer = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        return re.match(pattern, text) is not None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *timer)
        signal.signal(signal.SIGVTALRM, usual)


def _late(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError
