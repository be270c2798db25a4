"""What libraries log and warn of while a command runs: it may quote files that were downloaded."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gptq_cli.cli.console import indented


@contextmanager
def libraries_quoted() -> Iterator[None]:
    """In the body no log record or warning of a library can look like a line of gptq, or control the terminal."""
    make, warn = logging.getLogRecordFactory(), warnings.formatwarning

    def quoted(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        with suppress(TypeError, ValueError):  # arguments that do not fit: logging says so itself
            record.msg, record.args = indented(record.getMessage()), ()
        return record

    def formatted(message: Warning | str, *arguments: Any, **named: Any) -> str:
        return indented(warn(message, *arguments, **named).rstrip("\n")) + "\n"

    logging.setLogRecordFactory(quoted)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        warnings.formatwarning = warn
