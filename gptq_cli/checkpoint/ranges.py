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
from gptq_cli.hub_errors import GONE, is_of_network

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

FIRST_BYTES = 2**17  # of a file; most headers are shorter
CHUNK_BYTES = 2**20
BUSY = (408, 429, 500, 502, 503, 504)  # answers of a Hub that may answer better a little later
MOST_TRIES = 8  # in a row that bring no byte
FIRST_PAUSE, MOST_PAUSE = 1.0, 30.0  # seconds between two of them; each pause doubles
NOT_FOUND, NO_SUCH_RANGE = (404, 410), 416  # answers
OTHER_BYTES = "run the same command again; if that fails, too, leave out --stream-download"
WHOLE = "leave out --stream-download: the whole model is then downloaded first"

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

Put = Callable[[int, bytes], None]


class Stopped(Exception):
    """The run has ended, so nothing more is received."""


class RemoteHeader(NamedTuple):
    """The tensors of a safetensors file on the Hub, and what the file is known by."""

    tensors: dict[str, TensorInfo]
    identity: str


class Version(NamedTuple):
    """What an answer tells about a file: its size, and its tag, None if the Hub sends none."""

    size: int
    tag: str | None


class HubFiles:
    """The files of model `identifier` at `commit`; after `stop` nothing more is received."""

    def __init__(self, identifier: str, commit: str) -> None:
        self.identifier, self.commit = identifier, commit
        self._versions: dict[str, Version] = {}  # of files, by the first answer about each
        self._stopped = Event()

    def stop(self) -> None:
        """End all calls of `receive`, which raise Stopped."""
        self._stopped.set()

    def receive(self, file: str, start: int, end: int, put: Put) -> None:
        """Call `put` with positions and bytes of `file` from `start` to `end`, in order.

        A range that breaks off continues after its last byte. A file that ends earlier is received
        up to its end. InputError E_STREAM if the Hub answers with anything but the range,
        E_SOURCE_CHANGED if the file has another size, tag or commit than before, E_HUB_NOT_FOUND if
        the file is gone; and the client's own errors if the Hub refuses the file or still gives no
        answer after several tries.
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
        known = self._versions.get(file)
        return end if known is None else min(end, known.size)

    def header(self, file: str) -> RemoteHeader:
        """Return the header of a safetensors file; raise what `receive` and `read_header` raise."""
        received = bytearray()

        def put(_position: int, chunk: bytes) -> None:
            received.extend(chunk)

        self.receive(file, 0, FIRST_BYTES, put)
        path, size = self._path(file), self._versions[file].size
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
        self._check_status(file, position, response)
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code != 206 or found is None or int(found[1]) != position:
            message = f"the Hub does not send ranges of {file} of `{self.identifier}`"
            raise InputError("E_STREAM", message, hint=WHOLE)
        commit, tag = _commit_and_tag(response)
        if commit not in (None, self.commit):
            how = f"was of commit {self.commit}, but now is of {commit}"
            raise self._changed(file, how)
        found_version = Version(int(found[2]), tag)
        known = self._versions.setdefault(file, found_version)
        if found_version.size != known.size:
            how = f"had {known.size} bytes, but now has {found_version.size}"
            raise self._changed(file, how)
        if tag != known.tag:
            how = f"had the ETag {known.tag}, but now has {tag}"
            raise self._changed(file, how)

    def _check_status(self, file: str, position: int, response: Any) -> None:
        """Raise if the Hub refuses a file, has no such file, or no byte `position` of it."""
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        known = self._versions.get(file)
        if response.status_code == NO_SUCH_RANGE and known is not None:
            how = f"had {known.size} bytes, but now has no byte {position}"
            raise self._changed(file, how)
        if response.status_code == NO_SUCH_RANGE:
            return  # an answer that is no range
        try:
            hf_raise_for_status(response)
        except HfHubHTTPError as error:
            # The client tells the reason of a 404 only if the server names it.
            if type(error) is not HfHubHTTPError or response.status_code not in NOT_FOUND:
                raise
            message = f"model `{self.identifier}` has no file {file} on the Hub any more"
            raise InputError("E_HUB_NOT_FOUND", message, hint=GONE) from error

    def _path(self, file: str) -> Path:
        return Path(self.identifier) / file

    def _changed(self, file: str, how: str) -> InputError:
        return source_changed(self._path(file), how, OTHER_BYTES)

    def _refuse_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped


def _commit_and_tag(response: Any) -> tuple[str | None, str | None]:
    """Return the commit and the tag of the file of an answer, None for what is not told.

    A redirect to the storage of large files tells them in place of the storage.
    """
    commit = tag = None
    for answer in (*response.history, response):
        headers = answer.headers
        commit = commit or headers.get("X-Repo-Commit")
        tag = tag or headers.get("X-Linked-Etag") or headers.get("ETag")
    return commit, tag
