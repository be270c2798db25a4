"""Generated text is that of the whole decoded model, whatever part of it is in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_cli.calibration.windows import load_encoder
from gptq_cli.errors import ConfigError, InputError, ResourceError
from gptq_cli.evaluation import generate
from gptq_cli.evaluation.generate import GenerateResult, generate_text
from gptq_cli.evaluation.request import GenerateRequest
from gptq_cli.events import Event, PhaseStarted, Warned
from gptq_cli.inspection.dequantize import dequantize_checkpoint
from tests.families import save_model
from tests.runs import quantize
from tests.workspace import TEMPLATE

PROMPT = "the quick brown fox"


def written(model: Path, request: GenerateRequest, events: list[Event]) -> GenerateResult:
    """Generate; the pieces that were written must be the text of the result."""
    pieces: list[str] = []
    result = generate_text(str(model), request, pieces.append, events.append)
    assert "".join(pieces) == result.text
    return result


def greedy(model: Path, text: str, n_tokens: int, *, special: bool = True) -> str:
    """Return the most likely tokens, one forward of the whole sequence for each, as text."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = tokenizer(text, add_special_tokens=special)["input_ids"]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            logits: Tensor = whole(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    decoded: str = tokenizer.decode(ids[len(prompt) :])
    return decoded


def limit_memory(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """Let tensors take `n_bytes` / WEIGHTS_SHARE of memory."""
    free = int(n_bytes / generate.WEIGHTS_SHARE) + 1
    monkeypatch.setattr("gptq_cli.runtime.memory.free_bytes", lambda _: free)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_greedy_text_is_that_of_single_forwards(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", family, num_hidden_layers=2)
    output, _ = quantize(tmp_path, model, nsamples=2, batch_size=2, bits=3)
    dequantize_checkpoint(str(output), tmp_path / "plain", "float32")
    expected = greedy(tmp_path / "plain", PROMPT, 8)
    request = GenerateRequest(PROMPT, max_new_tokens=8, device="cpu", dtype="float32")
    events: list[Event] = []
    whole = written(output, request, events)
    assert [type(event) for event in events] == [PhaseStarted, PhaseStarted]
    assert events[0].name == "device"
    assert (whole.text, whole.tokens, whole.stopped) == (expected, 8, "length")
    assert whole.blocks_in_memory == whole.blocks
    monkeypatch.setattr(generate, "_blocks_in_memory", lambda *_: 1)
    streamed = written(output, request, events)
    assert (streamed.text, streamed.blocks_in_memory) == (expected, 1)


def test_as_many_blocks_as_fit_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=5)
    held = generate_text(str(model), GenerateRequest(PROMPT, max_new_tokens=1), print)
    tensors = AutoModelForCausalLM.from_pretrained(model).state_dict()
    block = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    outside = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." not in name)
    limit_memory(monkeypatch, outside + 4 * block)
    events: list[Event] = []
    result = written(model, GenerateRequest(PROMPT, max_new_tokens=1), events)
    assert (held.blocks_in_memory, result.blocks_in_memory, result.blocks) == (5, 3, 5)
    assert isinstance(events[-1], Warned)
    assert events[-1].code == "W_MEM_BLOCKS"
    assert "3 of 5 blocks stay in memory" in events[-1].message
    limit_memory(monkeypatch, outside + block - 10)
    with pytest.raises(ResourceError, match="the embeddings and one block take") as refused:
        generate_text(str(model), GenerateRequest(PROMPT), print)
    assert (refused.value.code, refused.value.exit_code) == ("E_OOM", 5)


def first_token(model: Path, text: str) -> int:
    """Return the most likely token after `text`."""
    whole = AutoModelForCausalLM.from_pretrained(model)
    ids = load_encoder(model, trust_remote_code=False)(text, True)
    with torch.no_grad():
        return int(whole(input_ids=torch.tensor([ids])).logits[0, -1].argmax())


@pytest.mark.parametrize("as_list", [False, True])
def test_a_token_of_the_generation_config_ends_the_text(as_list: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    ends: object = first_token(model, PROMPT)
    if as_list:
        ends = [500, 10**30, [1], ends]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    result = written(model, GenerateRequest(PROMPT), [])
    assert (result.tokens, result.stopped) == (1, "end")


@pytest.mark.parametrize("raw", [False, True])
def test_half_of_a_letter_in_the_prompt_is_refused(raw: bool, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE + '{{ "\\ud800" }}')
    prompt = PROMPT
    if raw:
        prompt += "\udcff"
    with pytest.raises(InputError, match=r"the prompt.* holds half of a surrogate pair") as refused:
        written(model, GenerateRequest(prompt, raw=raw, max_new_tokens=1), [])
    assert (refused.value.code, refused.value.exit_code) == ("E_DATA_FORMAT", 3)
    assert "half of a pair" in str(refused.value.hint)


def test_the_chat_template_makes_a_chat_unless_raw(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    template = TEMPLATE + "{% if add_generation_prompt %}assistant:{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    chat = written(model, GenerateRequest(PROMPT, max_new_tokens=5), [])
    assert (chat.chat, chat.text) == (
        True,
        greedy(model, f"user: {PROMPT}\nassistant:", 5, special=False),
    )
    raw = written(model, GenerateRequest(PROMPT, raw=True, max_new_tokens=5), [])
    assert (raw.chat, raw.text) == (False, greedy(model, PROMPT, 5))
    (tmp_path / "own.jinja").write_text(
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    own = GenerateRequest(PROMPT, chat_template=str(tmp_path / "own.jinja"), max_new_tokens=5)
    assert written(model, own, []).text == greedy(model, PROMPT, 5, special=False)


def test_drawn_tokens_depend_on_the_seed_alone(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def drawn(seed: int, top_p: float | None) -> str:
        request = GenerateRequest(
            PROMPT, max_new_tokens=20, temperature=2.0, seed=seed, top_p=top_p
        )
        return written(model, request, []).text

    assert drawn(1, None) == drawn(1, None) != drawn(2, None)
    narrow = GenerateRequest(PROMPT, max_new_tokens=20)
    assert drawn(1, 1e-9) == drawn(2, 1e-9) == written(model, narrow, []).text


def test_text_is_written_before_the_last_token(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", max_position_embeddings=10**6)

    def interrupt(text: str) -> None:
        assert text
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_text(str(model), GenerateRequest(PROMPT, max_new_tokens=10**5), interrupt)


class Letters:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_letter_is_written_when_its_last_byte_is_there() -> None:
    pieces: list[str] = []
    writer = generate._Writer(Letters(), pieces.append)
    writer.put(torch.tensor([[1, 2]]))
    for byte in "aé€".encode() + b"\xf0":
        writer.put(torch.tensor([byte]))
    assert pieces == ["a", "é", "€"]
    writer.end()
    assert writer.text == "".join(pieces) == "aé€\ufffd"


@pytest.mark.parametrize(
    ("prompt", "most", "message", "hint"),
    [
        ("x" * 128, None, "the prompt has 128 tokens, and the model has 128 positions", "shorter"),
        ("x" * 100, 29, "29 new tokens do not fit", "use --max-new-tokens 28"),
    ],
)
def test_a_prompt_that_leaves_no_room_is_refused(
    prompt: str, most: int | None, message: str, hint: str, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=message) as refused:
        generate_text(str(model), GenerateRequest(prompt, max_new_tokens=most), print)
    assert refused.value.code == "E_CFG_SEQLEN"
    assert hint in str(refused.value.hint)


def test_the_default_length_keeps_to_the_positions(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1, hidden_size=32)
    result = written(model, GenerateRequest("x" * 120), [])
    assert (result.tokens, result.prompt_tokens) == (8, 120)


def test_a_prompt_without_a_token_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", num_hidden_layers=1)
    with pytest.raises(InputError, match="the prompt holds no token") as refused:
        generate_text(str(model), GenerateRequest(""), print)
    assert (refused.value.code, refused.value.exit_code) == ("E_DATA_EMPTY", 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be a number of 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be a number of 0 or more, got nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be a number above 0 and at most 1"),
        ({"top_p": 0.5}, "top_p has no effect without a temperature above 0"),
        ({"seed": 1}, "seed has no effect without a temperature above 0"),
        ({"raw": True, "chat_template": "x"}, "raw and chat_template conflict"),
        ({"device": "gpu"}, "device must be"),
    ],
)
def test_a_wrong_request_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        GenerateRequest(PROMPT, **values)  # type: ignore[arg-type]
    assert refused.value.code in ("E_CFG_RANGE", "E_CFG_CONFLICT")
