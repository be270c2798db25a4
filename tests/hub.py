"""A small Hub on the loopback: enough of its HTTP protocol for the real client to resolve a revision and fetch files.

    with serve({"someone/tiny": {"README.md": b"...", "data/train.parquet": b"..."}}, kind="dataset") as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})

The client reads its endpoint when it is imported, so code that talks to the server runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["dataset", "model"]
Repos = Mapping[str, Mapping[str, bytes]]
ROUTE = re.compile(
    r"(?P<api>/api)?(?:/(?P<kind>datasets|models))?/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<action>resolve|revision|tree|paths-info)/(?P<revision>[^/]+))?(?:/(?P<path>.*))?"
)


def commit_of(files: Mapping[str, bytes]) -> str:
    """The 40 hex digits that name the state of a repository."""
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + files[path] + b"\0")
    return digest.hexdigest()


@dataclass(slots=True)
class Hub:
    """The running server; `requests` lists what was asked, `gated` holds repositories that need consent."""

    repos: Repos
    kind: Kind
    gated: frozenset[str]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        """What revision `main` of a repository resolves to."""
        return commit_of(self.repos[repo])

    def environment(self, home: Path, *, offline: bool = False) -> dict[str, str]:
        """The variables that send the Hub client here, with caches under `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answers; with `cut` the connection closes after so many bytes of the body."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `times` requests that match; a reply of None cuts the real one in half."""

    pattern: str
    reply: Reply | None
    times: int = 10**6


def answer(hub: Hub, target: str, body: bytes) -> Reply:
    """The reply to one request."""
    match = ROUTE.fullmatch(unquote(urlsplit(target).path))
    if match is None:
        return _refusal(404, "EntryNotFound")
    kind: Kind = "dataset" if match["kind"] == "datasets" else "model"
    files = hub.repos.get(match["repo"]) if kind == hub.kind else None
    if files is None:
        return _refusal(404, "RepoNotFound")
    if match["repo"] in hub.gated:
        return _refusal(403, "GatedRepo")
    commit = commit_of(files)
    if match["revision"] not in (None, "main", commit):
        return _refusal(404, "RevisionNotFound")
    if match["action"] == "resolve":
        return _file(files, match["path"], commit)
    if match["action"] == "tree":
        return _json(_tree(files, match["path"] or ""))
    if match["action"] == "paths-info":
        return _json([entry for entry in _tree(files, "") if entry["path"] in _asked_paths(body)])
    siblings = [{"rfilename": path} for path in sorted(files)]
    return _json(
        {"id": match["repo"], "sha": commit, "private": False, "gated": False, "siblings": siblings, "tags": []}
    )


@contextmanager
def serve(repos: Repos, kind: Kind = "dataset", *, gated: frozenset[str] = frozenset()) -> Iterator[Hub]:
    """Serves the repositories {id: {path: content}} until the block is left; `main` is their only branch."""
    hub = Hub(repos, kind, gated)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _refusal(status: int, code: str) -> Reply:
    return Reply(status, headers={"X-Error-Code": code, "X-Error-Message": code})


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _file(files: Mapping[str, bytes], path: str | None, commit: str) -> Reply:
    if path is None or path not in files:
        return Reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    return Reply(200, files[path], {"ETag": f'"{_blob_id(files[path])}"', "X-Repo-Commit": commit})


def _tree(files: Mapping[str, bytes], under: str) -> list[dict[str, Any]]:
    """All files and folders below `under`, as the API lists them."""
    prefix = f"{under.rstrip('/')}/" if under else ""
    paths = [path for path in sorted(files) if path.startswith(prefix)]
    folders = {str(parent) for path in paths for parent in Path(path).parents if str(parent).startswith(prefix)} - {"."}
    entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
    blobs = [{"type": "file", "path": path, "oid": _blob_id(files[path]), "size": len(files[path])} for path in paths]
    return entries + blobs


def _asked_paths(body: bytes) -> list[str]:
    """The `paths` of a JSON body."""
    return [path.rstrip("/") for path in json.loads(body)["paths"]]


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            request = f"{self.command} {self.path}"
            hub.requests.append(request)
            hub.tokens.append(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = _ranged(answer(hub, self.path, body), self.headers.get("Range"))
            reply = _faulty(hub, request, reply)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body[: reply.cut])
            self.close_connection = reply.cut is not None

        do_HEAD = do_GET  # noqa: N815
        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: `hub.requests` has it."""

    return Handler


def _faulty(hub: Hub, request: str, reply: Reply) -> Reply:
    """The reply, or what a fault makes of it."""
    for fault in hub.faults:
        if fault.times > 0 and re.search(fault.pattern, request):
            fault.times -= 1
            return replace(reply, cut=len(reply.body) // 2) if fault.reply is None else fault.reply
    return reply


def _ranged(reply: Reply, wanted: str | None) -> Reply:
    """The part of a reply that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if reply.status != 200 or match is None:
        return reply
    first, total = int(match[1]), len(reply.body)
    last = min(int(match[2] or total), total - 1)
    headers = {**reply.headers, "Content-Range": f"bytes {first}-{last}/{total}"}
    return Reply(206, reply.body[first : last + 1], headers)
