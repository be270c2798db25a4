"""Byte ranges of the files of a Hub model, all of one commit.

Requests go through the session of huggingface_hub, so that endpoint, token, proxies, redirects to
the storage of large files and waiting times are those of any download.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from gptq_cli.checkpoint.headers import TensorInfo, header_identity, header_length, parse_header
from gptq_cli.errors import InputError
from gptq_cli.files import source_changed
from gptq_cli.hub_errors import is_of_network

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

FIRST_BYTES = 2**17  # of a file; most headers are shorter
CHUNK_BYTES = 2**20
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a Hub that may answer better a little later
MOST_TRIES = 8  # in a row that bring no byte
FIRST_PAUSE, MOST_PAUSE = 1.0, 30.0  # seconds between two of them; each pause doubles
WHOLE = "leave out --stream-download: the whole model is then downloaded first"

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

Put = Callable[[int, bytes], None]


class Stopped(Exception):
    """The run has ended, so nothing more is received."""


class RemoteHeader(NamedTuple):
    """The tensors of a safetensors file on the Hub, and what the file is known by."""

    tensors: dict[str, TensorInfo]
    identity: str


class HubFiles:
    """The files of model `identifier` at `commit`; after `stop` nothing more is received."""

    def __init__(self, identifier: str, commit: str) -> None:
        self.identifier, self.commit = identifier, commit
        self._sizes: dict[str, int] = {}  # of files, by the first answer about each
        self._stopped = Event()

    def stop(self) -> None:
        """End all calls of `receive`, which raise Stopped."""
        self._stopped.set()

    def receive(self, file: str, start: int, end: int, put: Put) -> None:
        """Call `put` with positions and bytes of `file` from `start` to `end`, in order.

        A range that breaks off continues after its last byte. A file that ends earlier is received
        up to its end. InputError E_STREAM if the Hub answers with anything but the range,
        E_SOURCE_CHANGED if the file has another size than before; and the client's own errors if
        the Hub refuses the file or still gives no answer after several tries.
        """
        position, tries = start, 0
        while position < self._end(file, end):
            try:
                for chunk in self._chunks(file, position, end):
                    put(position, chunk)
                    position, tries = position + len(chunk), 0
            except Exception as error:
                tries += 1
                if tries == MOST_TRIES or not is_of_network(error):
                    raise
                self._stopped.wait(min(FIRST_PAUSE * 2 ** (tries - 1), MOST_PAUSE))

    def _chunks(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of one answer to a request for a range; ConnectionError if some lack."""
        self._refuse_stopped()
        with self._answer(file, start, end) as response:
            self._check_answer(file, start, response)
            left = self._end(file, end) - start
            for chunk in response.iter_bytes(CHUNK_BYTES):
                self._refuse_stopped()
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return
        raise ConnectionError(f"the Hub sent only a part of a range of {file}")

    def _end(self, file: str, end: int) -> int:
        """Return `end`, or the end of the file if that comes before and is known."""
        return min(end, self._sizes.get(file, end))

    def header(self, file: str) -> RemoteHeader:
        """Return the header of a safetensors file; raise what `receive` and `read_header` raise."""
        received = bytearray()

        def put(_position: int, chunk: bytes) -> None:
            received.extend(chunk)

        self.receive(file, 0, FIRST_BYTES, put)
        path, size = Path(self.identifier) / file, self._sizes[file]
        end = 8 + header_length(path, bytes(received[:8]), size)
        self.receive(file, len(received), end, put)
        raw = bytes(received[:end])
        return RemoteHeader(parse_header(path, raw[8:], size), header_identity(size, raw))

    def _answer(self, file: str, start: int, end: int) -> AbstractContextManager[Any]:
        """Return the answer to a request for a range, once the Hub is no longer busy."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            http_stream_backoff,
        )

        # A server that compresses its answer would not send a range.
        wanted = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        answer: AbstractContextManager[Any] = http_stream_backoff(
            "GET",
            hf_hub_url(self.identifier, file, revision=self.commit),
            headers={**build_hf_headers(), **wanted},
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            retry_on_status_codes=BUSY,
        )
        return answer

    def _check_answer(self, file: str, position: int, response: Any) -> None:
        """Raise if the answer is no range that begins at `position` of the known file."""
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        hf_raise_for_status(response)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != position:
            message = f"the Hub does not send ranges of {file} of `{self.identifier}`"
            raise InputError("E_STREAM", message, hint=WHOLE)
        size = int(found[2])
        known = self._sizes.setdefault(file, size)
        if size != known:
            path = Path(self.identifier) / file
            raise source_changed(path, f"had {known} bytes, but now has {size}")

    def _refuse_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped
