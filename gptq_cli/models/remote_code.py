"""Python code that comes with a model or its tokenizer, and runs only if the user allows it."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.errors import InputError

_MOST_FILES = 5  # names in a message


def remote_code_refusal(error: Exception, directory: Path, what: str = "") -> InputError | None:
    """Return E_REMOTE_CODE if transformers refused to run code from `directory`, else None.

    `what` names the part of the model that needs the code, as a prefix of the message.
    """
    if "trust_remote_code" not in str(error):
        return None
    message = f"{what}`{directory}` needs its own Python code to run{_own_code(directory)}"
    return InputError("E_REMOTE_CODE", message, hint="read that code, then add --trust-remote-code")


def _own_code(directory: Path) -> str:
    """Return the names of the Python files, and the commit if the directory is in the Hub's cache.

    A directory of the Hub's cache is named after its commit.
    """
    text = ""
    files = sorted(directory.glob("*.py"))
    if files:
        text = f": {', '.join(file.name for file in files[:_MOST_FILES])}"
    if len(files) > _MOST_FILES:
        text += ", ..."
    if directory.parent.name == "snapshots":
        text += f", at commit {directory.name}"
    return text
