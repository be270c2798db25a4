"""Chats become the text that the tokenizer's own template makes of them, token by token.

The second truth is `apply_chat_template` of transformers, called on messages that are written here
by hand.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gptq_cli.calibration.chats import ChatTemplate
from gptq_cli.calibration.corpus import DatasetSource, Documents, load_documents
from gptq_cli.calibration.windows import (
    calibration_windows,
    evaluation_windows,
    load_encoder,
    read_parts,
)
from gptq_cli.errors import ConfigError, ExistsError, GptqError
from gptq_cli.evaluation.perplexity import evaluate_perplexity
from gptq_cli.evaluation.request import EvalRequest
from gptq_cli.events import Event, PhaseStarted
from gptq_cli.planning.checks import calibration_sources
from gptq_cli.quantization.run import quantize_checkpoint
from tests.calibration.rows import json_lines, parquet_bytes
from tests.disks import Killed
from tests.families import save_model, save_tokenizer
from tests.runs import calibration_ids, config, quantize_with_events
from tests.tiny import SMALL, killer

BOS = 1
BODY = """{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}
{%- for message in messages %}<{{ message.role }}>
{%- if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- call.function.name }}({{ call.function.arguments.city }}){% endfor %}{{ eos_token }}
{%- endfor %}"""
TEMPLATE = "{{ bos_token }}" + BODY
USER = {"role": "user", "content": "a question"}
ASSISTANT = {"role": "assistant", "content": "an answer"}
SYSTEM = {"role": "system", "content": "be brief"}
OPENAI = [USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": "a question"}, {"from": "gpt", "value": "an answer"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
WRITTEN_CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bonn"}'},
}
REASONED = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
PARTS = [{"type": "text", "text": "a question"}, {"type": "text", "text": "more"}]

Row = dict[str, Any]
# name: a row, the messages that it means, its tools
FORMS: dict[str, tuple[Row, list[Row], list[Row] | None]] = {
    "openai": ({"messages": OPENAI}, OPENAI, None),
    "sharegpt": ({"conversations": SHAREGPT}, OPENAI, None),
    "sharegpt with a system column": (
        {"conversations": SHAREGPT, "system": "be brief"},
        [SYSTEM, *OPENAI],
        None,
    ),
    "sharegpt with a system turn": (
        {"conversations": [{"from": "system", "value": "be brief"}, *SHAREGPT], "system": "x"},
        [SYSTEM, *OPENAI],
        None,
    ),
    "another name": ({"id": "7", "chat": OPENAI}, OPENAI, None),
    "prompt": ({"prompt": "a question", "completion": "an answer"}, OPENAI, None),
    "prompt of messages": ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]},
                           [SYSTEM, *OPENAI], None),
    "instruction": ({"instruction": "a question", "output": "an answer"}, OPENAI, None),
    "instruction without input": (
        {"instruction": "a question", "input": "", "output": "an answer"},
        OPENAI,
        None,
    ),
    "instruction with input": (
        {"instruction": "a", "input": "b", "output": "an answer"},
        [{"role": "user", "content": "a\nb"}, ASSISTANT],
        None,
    ),
    "tools": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
         "tools": [TOOL]},
        [USER, {"role": "assistant", "tool_calls": [CALL]}],
        [TOOL],
    ),
    "tools in strings": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [WRITTEN_CALL]}],
         "tools": json.dumps([TOOL])},
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        [TOOL],
    ),
    "reasoning": ({"messages": [USER, REASONED]}, [USER, REASONED], None),
    "parts": (
        {"messages": [{"role": "user", "content": PARTS}]},
        [{"role": "user", "content": "a question\nmore"}],
        None,
    ),
}  # fmt: skip
IN_CSV = ("prompt", "instruction", "instruction without input", "instruction with input")


def written(path: Path, rows: list[Row]) -> Path:
    if path.suffix == ".parquet":
        path.write_bytes(parquet_bytes(pyarrow.Table.from_pylist(rows)))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            table = csv.DictWriter(stream, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(json_lines(rows))
    return path


def chats(number: int) -> list[Row]:
    """Rows of chats of different lengths."""
    rows = []
    for index in range(number):
        question = {"role": "user", "content": f"what is {index} and {index}? " * (1 + index % 3)}
        rows.append({"messages": [question, {"role": "assistant", "content": f"{2 * index}"}]})
    return rows


def tokenizer_in(directory: Path, template: str | None, *, adds_bos: bool = False) -> Path:
    """Save a tokenizer with a chat template, which may put a token before every text."""
    save_tokenizer(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tokenizer_in(save_model(tmp_path / "model", **SMALL), TEMPLATE)


def loaded(dataset: Path, model: Path | None, **options: Any) -> Documents:
    if model is None:
        return load_documents(DatasetSource(str(dataset), **options))
    encoder = load_encoder(model, trust_remote_code=False)
    source = DatasetSource(str(dataset), **options)
    template = ChatTemplate(encoder.tokenizer, model, source.template_file)
    return load_documents(source, template)


def refused(dataset: Path, model: Path | None = None, **options: Any) -> GptqError:
    with pytest.raises(GptqError) as caught:
        list(loaded(dataset, model, **options).texts)
    return caught.value


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
@pytest.mark.parametrize("name", FORMS)
def test_each_form_becomes_the_text_of_the_tokenizers_template(
    name: str, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".csv" and name not in IN_CSV:
        pytest.skip("a field of CSV is a text")
    row, messages, tools = FORMS[name]
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
    documents = loaded(written(tmp_path / f"x{suffix}", [row, row]), directory)
    assert documents.chats is not None
    tokenizer = AutoTokenizer.from_pretrained(directory)
    truth = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert list(documents.texts) == [truth, truth]
    assert truth.startswith("<s>")
    assert documents.chats.summary == "2 chats, rendered with the model's chat template"


def test_messages_of_a_schema_have_only_the_keys_that_hold_something(tmp_path: Path) -> None:
    rows = [{"messages": [USER, REASONED]}, {"messages": [USER, ASSISTANT, {"from": "gpt"}]}]
    rows[1]["messages"].pop()
    template = "{% for message in messages %}{{ message.keys() | list }}{% endfor %}"
    directory = tokenizer_in(tmp_path / "tokenizer", template)
    texts = list(loaded(written(tmp_path / "x.parquet", rows), directory).texts)
    assert "reasoning_content" in texts[0]
    assert "reasoning_content" not in texts[1]


def test_text_is_read_before_chats_and_chats_by_their_name(tmp_path: Path) -> None:
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
    row = {"messages": OPENAI, "turns": SHAREGPT, "prompt": "p", "completion": "c"}
    row |= {"text": "rendered", "instruction": "i", "output": "o"}
    file = written(tmp_path / "x.jsonl", [row])
    plain = loaded(file, directory)
    assert (list(plain.texts), plain.chats) == (["rendered"], None)
    truth = AutoTokenizer.from_pretrained(directory).apply_chat_template(OPENAI, tokenize=False)
    assert list(loaded(file, directory, text_column="turns").texts) == [truth]
    assert list(loaded(file, directory, text_column="prompt").texts) == ["p"]
    del row["text"]
    assert list(loaded(written(file, [row]), directory).texts) == [truth]
    del row["messages"]
    assert "<user>p</s>" in next(iter(loaded(written(file, [row]), directory).texts))
    del row["completion"]
    assert "<user>i</s>" in next(iter(loaded(written(file, [row]), directory).texts))


WRONG = {
    "role missing": ({"messages": [{"content": "a"}]}, "message 1 has no `role` that is a string"),
    "role of a number": ({"messages": [{"role": 1, "content": "a"}]}, "message 1 has no `role`"),
    "no object": ({"messages": [USER, "hello"]}, "message 2 is a text, not an object"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "message 2 has null as its"),
    "number": ({"messages": [{"role": "user", "content": 4}]}, "has a number as its content"),
    "video": (
        {"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]},
        "message 1 has a part that is neither a text nor an image",
    ),
    "speaker": (
        {"conversations": [{"from": "function_call", "value": "a"}]},
        "message 1 is from 'function_call'; known are human, user, gpt",
    ),
    "empty": ({"messages": []}, "column `messages` is an empty list"),
    "a text": ({"messages": "hello"}, "column `messages` holds a text, not a list of messages"),
    "null prompt": ({"prompt": None, "completion": "a"}, "column `prompt` holds null"),
    "list of instructions": (
        {"instruction": ["a"], "output": "a"},
        "column `instruction` holds a list, not a string",
    ),
    "input": ({"instruction": "a", "input": 4, "output": "a"}, "column `input` holds a number"),
    "tools": ({"messages": OPENAI, "tools": "[{"}, "`tools` holds a string that is not JSON"),
    "tools of an object": ({"messages": OPENAI, "tools": {"a": 1}}, "`tools` holds an object"),
    "calls": (
        {"messages": [{"role": "assistant", "tool_calls": "a"}]},
        "message 1 has a text as its `tool_calls`, not a list",
    ),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        "message 1 has a string of arguments that is not JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_row_without_a_chat_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    row, reason = WRONG[name]
    first = {"messages": OPENAI}
    if "conversations" in row:
        first = {"conversations": SHAREGPT}
    elif "prompt" in row:
        first = {"prompt": "a", "completion": "b"}
    elif "instruction" in row:
        first = {"instruction": "a", "output": "b"}
    file = written(tmp_path / "x.jsonl", [first, row])
    error = refused(file, tokenizer_in(tmp_path / "tokenizer", TEMPLATE))
    assert (error.code, error.exit_code) == ("E_DATA_CHAT", 3)
    assert str(error).startswith(f"line 2 of dataset `{file}` holds no chat: ")
    assert reason in str(error)
    assert (error.hint or "").startswith('write each chat as {"messages": [{"role": "user"')


def test_a_row_without_the_columns_of_the_first_is_named(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI}, {"text": "plain"}])
    error = refused(file, tokenizer_in(tmp_path / "tokenizer", TEMPLATE))
    assert error.code == "E_DATA_COLUMN"
    assert str(error).startswith(f"line 2 of dataset `{file}` has no column `messages`")


def test_half_a_letter_in_a_chat_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "\\ud83d"}]}\n')
    error = refused(file, tokenizer_in(tmp_path / "tokenizer", TEMPLATE))
    assert error.code == "E_DATA_FORMAT"
    assert "line 1" in str(error)
    assert "half of a surrogate pair" in str(error)


def test_a_folder_of_chats_and_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    written(folder / "a.jsonl", [{"messages": OPENAI}])
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
    written(folder / "b.jsonl", [{"prompt": "a", "completion": "b"}])
    assert len(list(loaded(folder, directory).texts)) == 2
    (folder / "c.txt").write_text("plain")
    error = refused(folder, directory)
    assert (error.code, error.exit_code) == ("E_DATA_FORMAT", 3)
    assert "mixes chats (`b.jsonl`) and text (`c.txt`)" in str(error)
    assert error.hint == "put them into two folders, and give one of these"


def test_chats_of_a_model_without_a_template_need_one(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI, "story": "plain"}])
    directory = tokenizer_in(tmp_path / "tokenizer", None)
    error = refused(file, directory)
    assert (error.code, error.exit_code) == ("E_DATA_TEMPLATE", 3)
    assert (
        str(error) == f"line 1 of dataset `{file}` holds a chat, but the model has no chat template"
    )
    assert "--chat-template FILE" in (error.hint or "")
    assert "--text-column" in (error.hint or "")
    # Both ways of the hint lead to text.
    assert list(loaded(file, directory, text_column="story").texts) == ["plain"]
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    documents = loaded(file, directory, chat_template=str(template))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    truth = tokenizer.apply_chat_template(OPENAI, chat_template=TEMPLATE, tokenize=False)
    assert list(documents.texts) == [truth]
    assert documents.chats is not None
    assert documents.chats.summary == f"1 chat, rendered with the chat template {template}"


def test_a_template_of_the_user_replaces_that_of_the_model(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI}])
    template = tmp_path / "other.jinja"
    template.write_text("{{ messages[0].content }}!")
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
    assert list(loaded(file, directory, chat_template=str(template)).texts) == ["a question!"]


FAILING = {
    "syntax": ("one\n{% for message in %}\n", "line 2", "Expected an expression"),
    "unknown tag": ("{{ 1 }}\n\n{% nonsense %}", "line 3", "unknown tag 'nonsense'"),
    "raises": ("\n\n{{ raise_exception('no system turns') }}", "line 3", "no system turns"),
    "type": ("{% set a = 1 %}\n{{ messages[0].content + 5 }}", "line 2", "can only concatenate"),
    "division": ("\n{{ 1 / 0 }}", "line 2", "division by zero"),
    "outside the sandbox": ("\n{{ messages.__class__.__mro__ }}", "line 2", "unsafe"),
}  # fmt: skip


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", FAILING)
def test_a_failing_template_is_named_with_its_line(name: str, own: bool, tmp_path: Path) -> None:
    template, line, reason = FAILING[name]
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI}])
    if own:
        directory = tokenizer_in(tmp_path / "tokenizer", template)
        error = refused(file, directory)
        place = directory / "chat_template.jinja"
    else:
        place = tmp_path / "own.jinja"
        place.write_text(template)
        directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
        error = refused(file, directory, chat_template=str(place))
    assert (error.code, error.exit_code) == ("E_DATA_TEMPLATE", 3)
    assert str(error).startswith(
        f"chat template `{place}`, {line}, fails at line 1 of dataset `{file}`: "
    )
    assert reason in str(error)
    assert "\n" not in str(error)
    assert error.hint == "fix the template, or give another one with --chat-template FILE"


def test_a_template_in_the_settings_of_the_tokenizer_is_named(tmp_path: Path) -> None:
    directory = tokenizer_in(tmp_path / "tokenizer", None)
    settings = directory / "tokenizer_config.json"
    content = json.loads(settings.read_text()) | {"chat_template": "a\n{{ raise_exception('no') }}"}
    settings.write_text(json.dumps(content))
    error = refused(written(tmp_path / "x.jsonl", [{"messages": OPENAI}]), directory)
    assert str(error).startswith(f"chat template in `{settings}`, line 2, fails at line 1 of ")


def test_a_template_file_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI}])
    template = tmp_path / "own.jinja"
    for content, words in (
        (None, "is not a file"),
        (b" \n", "is empty"),
        ("{{ 1 }}".encode("utf-16"), "is not UTF-8"),
    ):
        if content is not None:
            template.write_bytes(content)
        error = refused(file, chat_template=str(template))
        assert (error.code, error.exit_code) == ("E_DATA_TEMPLATE", 3)
        assert f"chat template `{template}` {words}" in str(error)
        assert error.hint


def test_a_template_for_text_is_refused_not_ignored(tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    (tmp_path / "x.txt").write_text("plain")
    rows = written(tmp_path / "x.jsonl", [{"text": "plain"}])
    for dataset, meant in ((tmp_path / "x.txt", "x.txt`"), (rows, "which holds text")):
        error = refused(dataset, chat_template=str(template))
        assert isinstance(error, ConfigError)
        assert (error.code, error.exit_code) == ("E_CFG_CONFLICT", 2)
        assert meant in str(error)
        assert "remove chat_template" in (error.hint or "")
    with pytest.raises(ConfigError, match="no meaning for the registered dataset"):
        load_documents(DatasetSource(chat_template=str(template)))


def test_a_template_sees_the_same_date_every_day(tmp_path: Path) -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %Y-%m-%d') }}{% endif %}"
    directory = tokenizer_in(tmp_path / "tokenizer", template + "\n{{ raise_exception('no') }}")
    file = written(tmp_path / "x.jsonl", [{"messages": OPENAI}])
    assert "chat_template.jinja`, line 2, fails" in str(refused(file, directory))
    tokenizer_in(directory, "\n" + template)
    assert list(loaded(file, directory).texts) == ["\n01 Jul 2025, 2025-07-01"]


def ids_of(rows: list[Row], directory: Path) -> list[int]:
    """The tokens of all chats, by transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = []
    for row in rows:
        ids += tokenizer.apply_chat_template(row["messages"], return_dict=False)
    return ids


def test_a_stream_of_chats_is_read_no_further_than_the_pool(tmp_path: Path) -> None:
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE)
    file = written(tmp_path / "x.jsonl", chats(3000))
    documents = loaded(file, directory)
    encoder = load_encoder(directory, trust_remote_code=False)
    options = {"seqlen": 32, "nsamples": 2, "seed": 0, "bos_token_id": BOS}
    first = calibration_windows(documents, encoder, **options)
    assert documents.chats is not None
    assert documents.chats.rendered < 30
    assert (
        calibration_windows(loaded(written(file, chats(60)), directory), encoder, **options).sha256
        == first.sha256
    )


def test_evaluation_takes_all_windows_of_the_chats_in_order(tmp_path: Path) -> None:
    directory = tokenizer_in(tmp_path / "tokenizer", TEMPLATE, adds_bos=True)
    rows = chats(12)
    file = written(tmp_path / "x.jsonl", rows)
    documents = loaded(file, directory, purpose="evaluation")
    encoder = load_encoder(directory, trust_remote_code=False)
    windows = evaluation_windows(documents, encoder, seqlen=32).ids
    ids = ids_of(rows, directory)
    assert windows.flatten().tolist() == ids[: len(ids) // 32 * 32]


def phases(events: list[Event], name: str) -> list[str]:
    return [
        event.detail for event in events if isinstance(event, PhaseStarted) and event.name == name
    ]


def test_a_first_token_before_each_window_is_told_apart(tmp_path: Path) -> None:
    directory = tokenizer_in(tmp_path / "tokenizer", None, adds_bos=True)
    (tmp_path / "x.txt").write_text("what is one and one? " * 100)
    settings = config(dataset=str(tmp_path / "x.txt"), seqlen=8, nsamples=4)
    [part] = read_parts(directory, settings, calibration_sources(settings))
    assert part.summary.endswith("4 windows of 8 need 28, because each begins with the BOS token")
    assert {len(window) for window in part.pool.windows} == {8}
    assert {window[0] for window in part.pool.windows} == {BOS}


def test_a_run_and_an_evaluation_tell_what_was_recognised(model: Path, tmp_path: Path) -> None:
    rows = chats(10)
    file = written(tmp_path / "x.jsonl", rows)
    settings = {"dataset": str(file), "seqlen": 32, "nsamples": 4, "batch_size": 2}
    result, events = quantize_with_events(model, tmp_path / "out", **settings)
    ids = ids_of(rows, model)
    # Each chat is longer than a window and has one turn of the user: 32 of its tokens are taken.
    held = f"320 tokens ({len(ids) - 320} more are cut off)"
    told = f"{file}, 10 chats, rendered with the model's chat template, {held}"
    assert phases(events, "text") == [f"{told}; 4 windows of 32 need 128"]
    assert calibration_ids(model, config(**settings))[:, 0].tolist() == [BOS] * 4
    template = tmp_path / "other.jinja"
    template.write_text(BODY)
    request = EvalRequest(str(file), seqlen=32, device="cpu", chat_template=str(template))
    heard: list[Event] = []
    measured = evaluate_perplexity(str(result.output), request, heard.append)
    assert phases(heard, "text") == [f"10 chats, rendered with the chat template {template}"]
    assert measured.join == ""
    assert measured.tokens == (len(ids) - 10) // 32 * 32


def test_another_template_is_another_run_and_another_path_is_not(
    model: Path, tmp_path: Path
) -> None:
    template, output = tmp_path / "a.jinja", tmp_path / "out"
    template.write_text(TEMPLATE)
    dataset = str(written(tmp_path / "x.jsonl", chats(40)))
    settings = {"dataset": dataset, "seqlen": 32, "nsamples": 4, "batch_size": 2}

    def run(file: Path, **options: Any) -> int:
        chosen = config(chat_template=str(file), **settings)
        return quantize_checkpoint(str(model), output, chosen, **options).resumed_blocks

    with pytest.raises(Killed):
        run(template, report=killer(0))
    # The comment changes no token: the file itself belongs to the identity.
    template.write_text("{# a comment #}" + TEMPLATE)
    with pytest.raises(ExistsError, match=r"other settings: the chat template is another one$"):
        run(template)
    template.write_text(TEMPLATE)
    assert run(shutil.copy(template, tmp_path / "b.jinja")) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_without_messages_is_called_a_list(suffix: str, tmp_path: Path) -> None:
    error = refused(written(tmp_path / f"x{suffix}", [{"text": ["a", "b"], "body": "c"}]))
    assert "holds a list" in str(error)
    assert "chat" not in str(error)
    assert error.hint == "fix it, or name another with --text-column: `body`"
