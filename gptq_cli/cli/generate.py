"""`gptq generate`: print what a checkpoint writes after a prompt, token by token."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_cli.cli import options as o
from gptq_cli.cli.console import Console, write_piece
from gptq_cli.config.fields import Panel
from gptq_cli.config.resolve import with_variables
from gptq_cli.errors import InputError, counted
from gptq_cli.events import Event, PhaseStarted, Warned

if TYPE_CHECKING:
    from gptq_cli.evaluation.generate import GenerateResult

STDIN = "-"
Prompt = Annotated[
    str,
    typer.Argument(
        metavar="PROMPT",
        help="prompt; - reads it from stdin",
        show_default=False,
        rich_help_panel="Input",
    ),
]
Raw = Annotated[
    bool,
    o.plain(
        "--raw",
        help="take the prompt as plain text, even if the model has a chat template",
        panel=Panel.TEXT,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    o.plain(
        "--max-new-tokens",
        help="most tokens to write; default 128",
        metavar="N",
        panel=Panel.TEXT,
        min=1,
    ),
]
Temperature = Annotated[
    float,
    o.plain(
        "--temperature",
        help="0 = take the most likely token each time; above 0 = draw it; default 0",
        metavar="X",
        panel=Panel.TEXT,
    ),
]
TopP = Annotated[
    float | None,
    o.plain(
        "--top-p",
        help="draw among the most likely tokens that have this probability together",
        metavar="X",
        panel=Panel.TEXT,
    ),
]
Seed = Annotated[
    int | None,
    o.plain(
        "--seed",
        help="chooses the drawn tokens; default 0",
        metavar="N",
        panel=Panel.TEXT,
    ),
]


@o.takes_settings("chat_template", "device", "dtype", "trust_remote_code")
def generate(
    model: o.Model,
    prompt: Prompt,
    *,
    raw: Raw = False,
    settings: o.Settings,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    revision: o.Revision = None,
    as_json: o.AsJson = False,
    quiet: o.Quiet = False,
) -> None:
    """Write text with a checkpoint, quantized or not.

    The text appears on stdout token by token; the prompt is not repeated.
    If the model has a chat template, the prompt becomes a chat. No engine
    is needed: the weights are decoded as for eval-ppl, and as many blocks
    as fit stay in memory.

    Example: gptq generate ./Qwen3-0.6B-GPTQ-Int4-g128 "Why is the sky blue?"
    """
    settings = with_variables(settings, os.environ)
    console = Console(as_json, quiet)
    from gptq_cli.api import generate
    from gptq_cli.evaluation.request import GenerateRequest

    if prompt == STDIN:
        prompt = _from_stdin(console)
    request = GenerateRequest(
        prompt=prompt,
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        revision=revision,
        **settings,
    )
    printed = _Printed(silent=as_json)
    try:
        result = generate(model, request, on_text=printed, on_event=_notes(console))
    finally:
        printed.end()
    if as_json:
        console.result(result.to_json(), "", "")
    console.say(_summary(result))


class _Printed:
    """Writes pieces of text on stdout as one text with a line end, or nothing if `silent`."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent
        self._last = ""

    def __call__(self, text: str) -> None:
        self._last = text
        if not self._silent:
            write_piece(text)

    def end(self) -> None:
        if self._last and not self._last.endswith("\n"):
            self("\n")


def _from_stdin(console: Console) -> str:
    """Return the text on stdin without its last line end.

    InputError E_DATA_EMPTY if there is none, E_DATA_ENCODING if it is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        content = b""
    else:
        if sys.stdin.isatty():
            console.say("reading the prompt from the terminal; end it with Ctrl-D")
        content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"the prompt on stdin is not UTF-8: {error.reason} at offset {error.start}"
        hint = "convert it first, for example with iconv"
        raise InputError("E_DATA_ENCODING", message, hint=hint) from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        hint = "give the prompt as an argument, or write it to stdin"
        raise InputError("E_DATA_EMPTY", "there is no prompt on stdin", hint=hint)
    return text


def _notes(console: Console) -> Callable[[Event], None]:
    """Return a receiver of events that shows warnings and the sizes of the model."""

    def show(event: Event) -> None:
        match event:
            case Warned():
                console.warn(event.code, event.message)
            case PhaseStarted():
                console.say(f"{event.name}: {event.detail}")

    return show


def _summary(result: GenerateResult) -> str:
    kind = "plain text"
    if result.chat:
        kind = "a chat"
    prompt = f"prompt: {counted(result.prompt_tokens, 'token')} as {kind}"
    ended = {"end": "the model ended the text", "length": "the text was cut there"}
    rate = f"{result.tokens / max(result.seconds, 1e-9):.3g} a second"
    return f"{prompt}; {counted(result.tokens, 'new token')}, {rate}; {ended[result.stopped]}"
