"""Python code that comes with a model or its tokenizer, and runs only if the user says so."""

from __future__ import annotations

from pathlib import Path

from gptq_cli.errors import InputError


def remote_code_refusal(error: Exception, directory: Path, what: str = "") -> InputError | None:
    """E_REMOTE_CODE if transformers has refused to run code of its own for `what` in `directory`; None otherwise."""
    if "trust_remote_code" not in str(error):
        return None
    message = f"{what}`{directory}` needs its own Python code to run{_own_code(directory)}"
    return InputError("E_REMOTE_CODE", message, hint="read that code, then add --trust-remote-code")


def _own_code(directory: Path) -> str:
    """Which code that is. A directory of the Hub's cache is named after its commit."""
    files = sorted(path.name for path in directory.glob("*.py"))
    commit = f", at commit {directory.name}" if directory.parent.name == "snapshots" else ""
    return (
        f": {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}{commit}" if files else commit
    )
