"""The write side of the loopback Hub: repositories, large files, commits.

The protocol is that of huggingface_hub's client with the LFS transfer. As on the Hub, a commit is
atomic, and a commit is refused if its parent is no longer the head of `main`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LARGE = ".safetensors"  # what the Hub keeps as large files
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)/(?P<action>preupload|commit)(?:/(?P<rest>.*))?"
)
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answers; with `cut` the connection closes after so many bytes of the body."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass(slots=True)
class Uploads:
    """The state that requests change beside `Hub.repos`."""

    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    corrupt: str | None = None  # a file that commits garble
    # files that somebody else pushes before the next commit
    rival: dict[str, bytes] = field(default_factory=dict)


def answer(
    state: Uploads, repos: Any, url: str, method: str, target: str, body: bytes
) -> Reply | None:
    """The reply to a request that sends something or is about that; None for any other."""
    parts = urlsplit(target)
    if parts.path == "/api/repos/create":
        return _create(state, repos, url, json.loads(body))
    if parts.path == "/api/validate-yaml":
        return json_reply({"errors": [], "warnings": []})
    if BATCH.fullmatch(parts.path):
        return _batch(state, url, json.loads(body))
    if method == "PUT" and parts.path.startswith("/lfs/"):
        return _store(state, parts.path.rpartition("/")[2], body)
    match = API.fullmatch(parts.path)
    if match is None or match["repo"] not in repos:
        return None
    if match["action"] == "preupload":
        return _preupload(repos[match["repo"]], json.loads(body))
    return _commit(state, repos, url, match["repo"], body)


def commit_of(files: Mapping[str, bytes]) -> str:
    """The 40 hex digits that name the state of a repository."""
    digest = hashlib.sha1()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + files[path] + b"\0")
    return digest.hexdigest()


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the API lists it."""
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "oid": blob_id(content),
        "size": len(content),
    }
    if path.endswith(LARGE):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 130,
        }
    return entry


def json_reply(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def refusal(status: int, code: str) -> Reply:
    return Reply(status, headers={"X-Error-Code": code, "X-Error-Message": code})


def _create(state: Uploads, repos: Any, url: str, asked: dict[str, Any]) -> Reply:
    repo = f"{asked['organization']}/{asked['name']}"
    if repo in repos:
        return Reply(409, json.dumps({"url": f"{url}/{repo}"}).encode())
    repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
    if asked.get("visibility") == "private":
        state.private.add(repo)
    return json_reply({"url": f"{url}/{repo}"})


def _preupload(files: Mapping[str, bytes], asked: dict[str, Any]) -> Reply:
    listed = []
    for file in asked["files"]:
        path = file["path"]
        mode = "lfs" if path.endswith(LARGE) else "regular"
        oid = blob_id(files[path]) if path in files else None
        listed.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_reply({"files": listed})


def _batch(state: Uploads, url: str, asked: dict[str, Any]) -> Reply:
    objects = []
    for item in asked["objects"]:
        upload = {"actions": {"upload": {"href": f"{url}/lfs/{item['oid']}"}}}
        known = item["oid"] in state.large
        objects.append(item if known else item | upload)
    return json_reply({"transfer": "basic", "objects": objects})


def _store(state: Uploads, oid: str, body: bytes) -> Reply:
    if hashlib.sha256(body).hexdigest() != oid:
        return Reply(400)
    state.large[oid] = body
    return Reply(200)


def _commit(state: Uploads, repos: Any, url: str, repo: str, body: bytes) -> Reply:
    repos[repo] = dict(repos[repo]) | state.rival
    files, parent = dict(repos[repo]), None
    for item in map(json.loads, body.splitlines()):
        value = item["value"]
        if item["key"] == "header":
            parent = value["parentCommit"]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
        elif item["key"] == "lfsFile":
            files[value["path"]] = state.large[value["oid"]]
        else:
            files[value["path"]] = base64.b64decode(value["content"])
    if parent != commit_of(repos[repo]):
        return Reply(412, json.dumps({"error": "A commit has happened since."}).encode())
    if state.corrupt in files:
        files[str(state.corrupt)] += b"?"
    repos[repo] = files
    commit = commit_of(files)
    return json_reply({"commitUrl": f"{url}/{repo}/commit/{commit}", "commitOid": commit})
