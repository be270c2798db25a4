"""`gptq push`: upload a checkpoint and its model card to the Hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, joined
from gptq_cli.cli.progress import Progress
from gptq_cli.errors import counted, size

if TYPE_CHECKING:
    from gptq_cli.publish.push import PushResult
    from gptq_cli.publish.upload import Published


def push(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="GPTQ checkpoint", show_default=False)
    ],
    repo: Annotated[
        str,
        typer.Argument(
            metavar="REPO", help="repository on the Hub: NAMESPACE/NAME", show_default=False
        ),
    ],
    base_model: Annotated[
        str | None,
        o.plain(
            "--base-model",
            help="Hub id of the original model, if DIR does not name it",
            metavar="ID",
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        o.plain("--evaluation", help="result of gptq eval-ppl --json for the card", metavar="FILE"),
    ] = None,
    card: Annotated[
        Path | None,
        o.plain("--card", help="model card to upload instead of the generated one", metavar="FILE"),
    ] = None,
    public: Annotated[
        bool, o.plain("--public", help="make the repository public; default private")
    ] = False,
    overwrite: Annotated[
        bool, o.plain("--overwrite", help="replace the files of the repository")
    ] = False,
    dry_run: Annotated[
        bool, o.plain("--dry-run", "-n", help="print the model card and exit; uploads nothing")
    ] = False,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Upload a checkpoint with a model card to the Hub.

    DIR is verified first, but not changed. One commit adds all files, so
    nobody downloads half a model. If a push ends early, run it again: it
    sends only what is missing. Log in first: hf auth login.

    Example: gptq push ./Qwen3-0.6B-GPTQ-Int4-g128 me/small --base-model Qwen/Qwen3-0.6B --dry-run
    """
    console = Console(as_json, quiet)
    from gptq_cli.publish.push import prepare_push, push_upload

    with Progress(console) as progress:
        upload = prepare_push(
            directory,
            repo,
            base_model=base_model,
            evaluation=evaluation,
            card=card,
            report=progress,
        )
    if dry_run:
        return console.document(upload.result(public=public).to_json(), upload.card)
    bars = not quiet and sys.stderr is not None and sys.stderr.isatty()
    with Progress(console) as progress:
        done = push_upload(
            upload, public=public, overwrite=overwrite, progress=bars, report=progress
        )
    assert done.published is not None
    return console.result(done.to_json(), _text(done, done.published), done.published.url)


def _text(done: PushResult, published: Published) -> str:
    files = f"{counted(len(done.files), 'file')}, {size(sum(done.files.values()))}"
    readers = "private" if done.private else "public"
    change = "unchanged" if published.already_there else "new commit"
    lines = [
        published.url,
        f"files    {files}, {readers}",
        f"main     {published.commit[:12]}, {change}",
    ]
    lines += [f"deleted  {name}" for name in published.deleted]
    return joined(lines)
