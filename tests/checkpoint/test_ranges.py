"""Byte ranges of files on the Hub: what arrives under faults, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub.errors import HfHubHTTPError

from gptq_cli.checkpoint import ranges
from gptq_cli.checkpoint.download import is_block, most_bytes_at_once, piece_of
from gptq_cli.checkpoint.headers import TensorInfo
from gptq_cli.checkpoint.ranges import HubFiles, Stopped
from gptq_cli.errors import InputError
from tests.hub import Fault, Hub, Reply, client_of, serve

ID, FILE = "someone/tiny", "weights.bin"
DATA = bytes(value * value % 251 for value in range(50_000))
ALL = "GET .*/resolve/"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve one file of 50,000 bytes."""
    monkeypatch.setattr(ranges, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(ranges, "CHUNK_BYTES", 64)  # what a broken answer brings at least
    with serve({ID: {FILE: DATA}}, kind="model") as server, client_of(server, tmp_path):
        yield server


def received(hub: Hub, start: int, end: int, files: HubFiles | None = None) -> bytes:
    """Return what is received of a range, at the places at which it is put."""
    found = bytearray(b"?" * len(DATA))

    def put(position: int, chunk: bytes) -> None:
        found[position : position + len(chunk)] = chunk

    (files or HubFiles(ID, hub.commit(ID))).receive(FILE, start, end, put)
    return bytes(found)


def expected(start: int, end: int) -> bytes:
    return b"?" * start + DATA[start:end] + b"?" * (len(DATA) - end)


def shortened(reply: Reply) -> Reply:
    """Return an answer that claims and holds the first half of the range that was asked for."""
    first, _, rest = reply.headers["Content-Range"].removeprefix("bytes ").partition("-")
    half = len(reply.body) // 2
    header = f"bytes {first}-{int(first) + half - 1}/{rest.partition('/')[2]}"
    return replace(
        reply, body=reply.body[:half], headers={**reply.headers, "Content-Range": header}
    )


@pytest.mark.parametrize(("start", "end"), [(0, 50000), (7, 11), (49999, 50000), (3, 3)])
def test_a_range_arrives_at_its_place(start: int, end: int, hub: Hub) -> None:
    assert received(hub, start, end) == expected(start, end)


def test_a_range_ends_with_its_file(hub: Hub) -> None:
    assert received(hub, 40000, 90000) == expected(40000, 50000)


@pytest.mark.parametrize(
    ("fault", "slept"),
    [
        (Fault(ALL, None, ranges.MOST_TRIES + 2), []),
        (Fault(ALL, shortened, ranges.MOST_TRIES + 2), []),
        (Fault(ALL, Reply(503), 2), [1, 2]),
        (Fault(ALL, Reply(429, headers={"Retry-After": "7"}), 1), [8.0]),
    ],
)
def test_a_fault_that_passes_changes_no_byte(fault: Fault, slept: list[float], hub: Hub) -> None:
    hub.faults.append(fault)
    assert received(hub, 10, 49000) == expected(10, 49000)
    assert fault.times == 0
    assert hub.slept == slept


def test_a_range_that_breaks_off_continues_where_it_ended(hub: Hub) -> None:
    hub.faults.append(Fault(ALL, shortened, 1))
    received(hub, 0, 4000)
    assert hub.ranges[FILE] == [(0, 1999), (2000, 3999)]


def test_a_redirect_to_storage_is_followed_without_the_token(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve({ID: {FILE: DATA}}, kind="model") as storage:
        place = f"{storage.url}/{ID}/resolve/main/{FILE}"
        hub.faults.append(Fault(ALL, Reply(302, headers={"Location": place})))
        assert received(hub, 5, 900) == expected(5, 900)
    assert storage.ranges[FILE] == [(5, 899)]
    assert set(hub.tokens) == {"Bearer hf_secret"}
    assert set(storage.tokens) == {""}


@pytest.mark.parametrize("reply", [Reply(500), Reply(403)])
def test_an_answer_that_refuses_is_raised(reply: Reply, hub: Hub) -> None:
    hub.faults.append(Fault(ALL, reply))
    with pytest.raises(HfHubHTTPError) as caught:
        received(hub, 0, 10)
    assert caught.value.response.status_code == reply.status


def test_tries_that_bring_no_byte_come_to_an_end(hub: Hub) -> None:
    def empty(reply: Reply) -> Reply:
        return replace(reply, body=b"")

    hub.faults.append(Fault(ALL, empty))
    with pytest.raises(ConnectionError, match="sent only a part of a range"):
        received(hub, 0, 10)
    assert len(hub.ranges[FILE]) == ranges.MOST_TRIES


@pytest.mark.parametrize(
    ("status", "header"),
    [(200, None), (206, None), (206, "bytes 3-9/50000"), (206, "bytes 0-9/*"), (206, "octets")],
)
def test_an_answer_that_is_not_the_range_is_refused(
    status: int, header: str | None, hub: Hub
) -> None:
    headers = {"Content-Range": header} if header else {}
    hub.faults.append(Fault(ALL, Reply(status, DATA[:10], headers)))
    with pytest.raises(InputError, match="does not send ranges of weights") as caught:
        received(hub, 0, 10)
    assert (caught.value.code, caught.value.hint) == ("E_STREAM", ranges.WHOLE)


def test_a_file_that_changes_its_size_is_refused(hub: Hub) -> None:
    files = HubFiles(ID, hub.commit(ID))
    received(hub, 0, 10, files)
    hub.faults.append(Fault(ALL, Reply(206, DATA[:10], {"Content-Range": "bytes 0-9/4000"})))
    with pytest.raises(InputError, match="had 50000 bytes, but now has 4000") as caught:
        received(hub, 0, 10, files)
    assert (caught.value.code, caught.value.exit_code) == ("E_SOURCE_CHANGED", 3)
    assert caught.value.hint == ranges.OTHER_BYTES


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [
        ("ETag", '"other"', r'had the ETag "\w+", but now has "other"'),
        ("X-Linked-Etag", '"other"', r'had the ETag "\w+", but now has "other"'),
        ("X-Repo-Commit", "1" * 40, r"was of commit \w+, but now is of 1{40}"),
    ],
)
def test_a_file_of_another_version_is_refused(
    header: str, value: str, message: str, hub: Hub
) -> None:
    def other(reply: Reply) -> Reply:
        return replace(reply, headers={**reply.headers, header: value})

    files = HubFiles(ID, hub.commit(ID))
    received(hub, 0, 10, files)
    received(hub, 10, 20, files)
    hub.faults.append(Fault(ALL, other))
    with pytest.raises(InputError, match=message) as caught:
        received(hub, 20, 30, files)
    assert (caught.value.code, caught.value.exit_code) == ("E_SOURCE_CHANGED", 3)
    assert caught.value.hint == ranges.OTHER_BYTES


def test_the_tag_of_a_redirect_counts_not_that_of_the_storage(hub: Hub) -> None:
    files = HubFiles(ID, hub.commit(ID))
    with (
        serve({ID: {FILE: DATA}}, kind="model") as storage,
        serve({ID: {FILE: DATA[::-1]}}, kind="model") as other_storage,
    ):
        for place, tag in ((storage, '"a"'), (other_storage, '"a"'), (storage, '"b"')):
            headers = {"Location": f"{place.url}/{ID}/resolve/main/{FILE}", "X-Linked-Etag": tag}
            headers["X-Repo-Commit"] = hub.commit(ID)
            hub.faults[:] = [Fault(ALL, Reply(302, headers=headers))]
            if tag == '"a"':
                received(hub, 0, 10, files)
                continue
            with pytest.raises(InputError, match='had the ETag "a", but now has "b"'):
                received(hub, 0, 10, files)


def test_a_file_that_is_gone_is_named(hub: Hub) -> None:
    hub.faults.append(Fault(ALL, Reply(404)))
    with pytest.raises(InputError, match=f"`{ID}` has no file {FILE} on the Hub") as gone:
        received(hub, 0, 10)
    assert (gone.value.code, gone.value.exit_code) == ("E_HUB_NOT_FOUND", 3)
    assert (gone.value.hint or "").startswith("look at its files on the Hub")


def test_a_file_that_lost_its_end_has_changed(hub: Hub) -> None:
    files = HubFiles(ID, hub.commit(ID))
    hub.faults.append(Fault(ALL, Reply(416)))
    with pytest.raises(InputError, match="does not send ranges") as unknown:
        received(hub, 0, 10, files)
    assert unknown.value.code == "E_STREAM"
    hub.faults.clear()
    received(hub, 0, 10, files)
    hub.faults.append(Fault(ALL, Reply(416)))
    with pytest.raises(InputError, match="had 50000 bytes, but now has no byte 49000") as caught:
        received(hub, 49000, 50000, files)
    assert (caught.value.code, caught.value.hint) == ("E_SOURCE_CHANGED", ranges.OTHER_BYTES)


def test_more_bytes_than_were_asked_for_are_not_put(hub: Hub) -> None:
    hub.faults.append(Fault(ALL, Reply(206, DATA[:900], {"Content-Range": "bytes 0-899/50000"})))
    assert received(hub, 0, 10) == expected(0, 10)


def test_nothing_arrives_after_the_end_of_a_run(hub: Hub) -> None:
    files = HubFiles(ID, hub.commit(ID))
    files.stop()
    with pytest.raises(Stopped):
        received(hub, 0, 10, files)


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", "model.layers.12"),
        ("transformer.h.0.attn.bias", "transformer.h.0"),
        ("h.7.ln_1.weight", "h.7"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.conv2d.weight", "model.conv2d"),
        ("norm", "norm"),
    ],
)
def test_a_piece_is_a_block_or_a_module_outside(name: str, piece: str) -> None:
    assert piece_of(name) == piece
    assert is_block(piece) == piece[-1].isdecimal()


def test_two_largest_blocks_and_all_else_are_at_once_there() -> None:
    sizes = {"embed.weight": 1000, "vision.blocks.0.w": 300, "vision.blocks.1.w": 300}
    sizes |= {"layers.0.a": 10, "layers.0.b": 5, "layers.1.a": 40, "layers.2.a": 20}
    tensors = []
    for name, n_bytes in sizes.items():
        tensors.append(TensorInfo(name, "U8", (n_bytes,), Path("file"), 0, n_bytes))
    assert most_bytes_at_once(tensors, "layers") == 1000 + 600 + 40 + 20
