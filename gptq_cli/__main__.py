"""`gptq` and `python -m gptq_cli`."""

from __future__ import annotations


def main() -> None:
    """Run the command line and leave with its exit code."""
    from gptq_cli.cli.app import app

    app(prog_name="gptq")


if __name__ == "__main__":
    main()
