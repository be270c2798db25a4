"""A small Hub on the loopback: its HTTP protocol as far as the real client needs it.

    with serve({"someone/tiny": {"README.md": b"...", "data/train.parquet": b"..."}}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(tmp_path / "home")})

The client reads its endpoint at import, so code that talks to the server runs in its own process,
or inside `client_of(hub, home)`.
`hub_uploads.py` answers the requests that send files.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pytest

from tests import hub_uploads
from tests.hub_uploads import Reply, Uploads, blob_id, commit_of
from tests.hub_uploads import json_reply as _json
from tests.hub_uploads import refusal as _refusal

Kind = Literal["dataset", "model"]
Repos = Mapping[str, Mapping[str, bytes]]
Change = Callable[[Reply], Reply]
ROUTE = re.compile(
    r"(?P<api>/api)?(?:/(?P<kind>datasets|models))?/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<action>resolve|revision|tree|paths-info)/(?P<revision>[^/]+))?(?:/(?P<path>.*))?"
)


@dataclass(slots=True)
class Hub:
    """The running server; `requests` lists all requests, `gated` the repositories with consent.

    `ranges` has the first and the last byte of each part of a file that was sent, by name.
    `earlier` has the content of commits that `main` has left.
    """

    repos: Repos
    kind: Kind
    gated: frozenset[str]
    url: str = ""
    requests: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)  # seconds, by a client of this process
    uploads: Uploads = field(default_factory=Uploads)
    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    earlier: dict[str, Mapping[str, bytes]] = field(default_factory=dict)

    def move_on(self, repo: str, files: Mapping[str, bytes]) -> None:
        """Let `main` have these files; its present commit is still there under its name."""
        self.earlier[self.commit(repo)] = self.repos[repo]
        self.repos = {**self.repos, repo: files}

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


@dataclass(slots=True)
class Fault:
    """A fault of the next `times` matching requests.

    `reply` takes the place of the real one, or changes it; if it is None, the real one is cut.
    """

    pattern: str
    reply: Reply | Change | None
    times: int = 10**6

    def hits(self, request: str) -> bool:
        return self.times > 0 and re.search(self.pattern, request) is not None


def answer(hub: Hub, method: str, target: str, body: bytes) -> Reply:
    """The reply to one request."""
    sent = (
        hub_uploads.answer(hub.uploads, hub.repos, hub.url, method, target, body)
        if hub.kind == "model"
        else None
    )
    if sent is not None:
        return sent
    match = ROUTE.fullmatch(unquote(urlsplit(target).path.replace("%2F", "\0")))
    if match is None:
        return _refusal(404, "EntryNotFound")
    kind: Kind = "dataset" if match["kind"] == "datasets" else "model"
    files = hub.repos.get(match["repo"]) if kind == hub.kind else None
    if files is None:
        return _refusal(404, "RepoNotFound")
    if match["repo"] in hub.gated:
        return _refusal(403, "GatedRepo")
    revision = (match["revision"] or "main").replace("\0", "/")
    commit = commit_of(files)
    if revision in hub.earlier:
        files, commit = hub.earlier[revision], revision
    elif revision not in ("main", commit):
        return _refusal(404, "RevisionNotFound")
    if match["action"] in ("resolve", "tree", "paths-info"):
        return _content(files, match["action"], match["path"], body)
    siblings = [{"rfilename": path} for path in sorted(files)]
    return _json(
        {
            "id": match["repo"],
            "sha": commit,
            "private": match["repo"] in hub.uploads.private,
            "gated": False,
            "siblings": siblings,
            "tags": [],
        }
    )


def _content(files: Mapping[str, bytes], action: str, path: str | None, body: bytes) -> Reply:
    if action == "resolve":
        return _file(files, path, commit_of(files))
    if action == "tree":
        return _json(_tree(files, path or ""))
    return _json([entry for entry in _tree(files, "") if entry["path"] in _asked_paths(body)])


@contextmanager
def serve(
    repos: Repos, kind: Kind = "dataset", *, gated: frozenset[str] = frozenset()
) -> Iterator[Hub]:
    """Serve repositories {id: {path: content}} inside the block; `main` is the only branch."""
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


@contextmanager
def client_of(hub: Hub, home: Path) -> Iterator[None]:
    """Send the client of this process to `hub`, with a cache of its own, and without waiting."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr("huggingface_hub.utils._http.time.sleep", hub.slept.append)
        close_session()
        yield
        close_session()


def _file(files: Mapping[str, bytes], path: str | None, commit: str) -> Reply:
    if path is None or path not in files:
        return Reply(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
    return Reply(200, files[path], {"ETag": f'"{blob_id(files[path])}"', "X-Repo-Commit": commit})


def _tree(files: Mapping[str, bytes], under: str) -> list[dict[str, Any]]:
    """All files and folders below `under`, as the API lists them."""
    prefix = f"{under.rstrip('/')}/" if under else ""
    paths = [path for path in sorted(files) if path.startswith(prefix)]
    folders = {
        str(parent)
        for path in paths
        for parent in Path(path).parents
        if str(parent).startswith(prefix)
    } - {"."}
    entries = [
        {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        for folder in sorted(folders)
    ]
    return entries + [hub_uploads.tree_entry(path, files[path]) for path in paths]


def _asked_paths(body: bytes) -> list[str]:
    """The `paths` of a JSON body."""
    return [path.rstrip("/") for path in json.loads(body)["paths"]]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            request = f"{self.command} {self.path}"
            hub.requests.append(request)
            hub.tokens.append(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = _refused(hub, request)
            if reply is None:
                whole = answer(hub, self.command, self.path, body)
                reply = _ranged(whole, self.headers.get("Range"))
            reply = _faulty(hub, request, reply)
            _note_range(hub, self.path, reply)
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
        do_PUT = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: `hub.requests` has it."""

    return Handler


def _refused(hub: Hub, request: str) -> Reply | None:
    """The reply of a fault that needs no real one."""
    for fault in hub.faults:
        if fault.hits(request) and isinstance(fault.reply, Reply):
            return fault.reply
    return None


def _faulty(hub: Hub, request: str, reply: Reply) -> Reply:
    """The reply, or what a fault makes of it."""
    for fault in hub.faults:
        if fault.hits(request):
            fault.times -= 1
            if fault.reply is None:
                return replace(reply, cut=len(reply.body) // 2)
            if isinstance(fault.reply, Reply):
                return fault.reply
            return fault.reply(reply)
    return reply


def _note_range(hub: Hub, target: str, reply: Reply) -> None:
    match = re.match(r"bytes (\d+)-(\d+)/", reply.headers.get("Content-Range", ""))
    if match:
        name = unquote(urlsplit(target).path).rpartition("/")[2]
        hub.ranges.setdefault(name, []).append((int(match[1]), int(match[2])))


def _ranged(reply: Reply, wanted: str | None) -> Reply:
    """The part of a reply that a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if reply.status != 200 or match is None:
        return reply
    first, total = int(match[1]), len(reply.body)
    last = min(int(match[2] or total), total - 1)
    headers = {**reply.headers, "Content-Range": f"bytes {first}-{last}/{total}"}
    return Reply(206, reply.body[first : last + 1], headers)
