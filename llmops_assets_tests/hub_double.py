"""A double of the Hugging Face Hub's HTTP API, as huggingface_hub 2.4 uses it.

Strict: it answers only what that client asks for in a download, refuses requests without
its user agent, and records everything else in `unexpected`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

LARGE_SUFFIXES = (".safetensors", ".bin")
"""What a repository keeps as large files, which the Hub serves from another host."""
TREE = re.compile(r"/api/models/([^/]+/[^/]+)/tree/([^/?]+)\?.*")
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
LARGE = re.compile(r"/large/([0-9a-f]{64})")
# The client looks for a list of programs that use it; the real Hub has one.
HARNESSES = "/api/agent-harnesses"


def blob_id(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Repository:
    """A repository with one commit.

    A gated one shows its list of files to all and its files only to a token's owner, a
    private one does not even show that it exists.
    """

    revision: str
    files: Mapping[str, bytes]
    gated: bool = False
    private: bool = False


@dataclass
class HubDouble:
    """What the double serves, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str = "hf_the-right-token"
    url: str = ""
    breaks_once_at: int | None = None
    """Bytes after which the next large file's connection breaks."""
    unavailable: bool = False
    """Whether large files cannot be had."""
    tampered: bool = False
    """Whether large files have another content than their commit says."""
    requests: Counter[str] = field(default_factory=Counter)
    """How often each method and path was asked for."""
    ranges: list[str] = field(default_factory=list)
    """The byte ranges that were asked for."""
    unexpected: list[str] = field(default_factory=list)
    """Requests that a download does not need, or that reveal a token."""

    def large(self, digest: str) -> bytes | None:
        files = (content for r in self.repositories.values() for content in r.files.values())
        return next((c for c in files if hashlib.sha256(c).hexdigest() == digest), None)


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubDouble]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Says nothing; requests are counted instead."""

    def _serve(self) -> None:
        self.hub.requests[f"{self.command} {self.path}"] += 1
        if "hf_hub/" not in self.headers.get("user-agent", ""):
            self.hub.unexpected.append(f"{self.command} {self.path} without a user agent")
            self._answer(400)
        elif self.path == HARNESSES:
            self._json({"standardEnvVars": [], "harnesses": {}})
        elif found := TREE.fullmatch(self.path):
            self._tree(found[1], found[2])
        elif found := RESOLVE.fullmatch(self.path):
            self._resolve(*found.groups())
        elif found := LARGE.fullmatch(self.path):
            self._large(found[1])
        else:
            self.hub.unexpected.append(f"{self.command} {self.path}")
            self._answer(404)

    def _repository(self, name: str, revision: str) -> Repository | None:
        """The repository, or the Hub's refusal."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._known):
            # For strangers there is no difference between the two.
            self._answer(401 if not self._known else 404, {"X-Error-Code": "RepoNotFound"})
        elif revision != found.revision:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return found
        return None

    @property
    def _known(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _tree(self, name: str, revision: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        entries: list[dict[str, Any]] = []
        for path, content in repository.files.items():
            if "/" in path and "recursive=True" not in self.path:
                continue
            entry: dict[str, Any] = {
                "type": "file", "path": path, "size": len(content), "oid": blob_id(content)
            }  # fmt: skip
            if path.endswith(LARGE_SUFFIXES):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._json(entries)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name, revision)
        if repository is None:
            return
        commit = {"X-Repo-Commit": revision}
        if repository.gated and not self._known:
            status = 403 if "authorization" in self.headers else 401
            self._answer(status, {"X-Error-Code": "GatedRepo", **commit})
        elif (content := repository.files.get(path)) is None:
            self._answer(404, {"X-Error-Code": "EntryNotFound", **commit})
        elif path.endswith(LARGE_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            # By another name of the same machine: a token must not follow there.
            location = self.hub.url.replace("127.0.0.1", "localhost") + f"/large/{digest}"
            headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self._answer(302, {"Location": location, **headers, **commit})
        else:
            self._answer(200, {"ETag": f'"{blob_id(content)}"', **commit}, content)

    def _large(self, digest: str) -> None:
        content = self.hub.large(digest)
        if "authorization" in self.headers:
            self.hub.unexpected.append("a token sent to another host")
        if content is None or self.hub.unavailable:
            self._answer(500 if self.hub.unavailable else 404)
            return
        if self.hub.tampered:
            content = bytes(len(content))
        start = 0
        if wanted := self.headers.get("range"):
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        rest = content[start:]
        if self.hub.breaks_once_at is not None:
            cut, self.hub.breaks_once_at = self.hub.breaks_once_at, None
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:cut])
            self.close_connection = True
            return
        part = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._answer(206 if start else 200, part if start else {}, rest)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _answer(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub_double() -> Iterator[HubDouble]:
    """Serves on a loopback port until the end."""
    hub = HubDouble()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)
