"""A small stand-in of the Hugging Face Hub's HTTP API on loopback: repositories of models, with branches and commits.

It knows what `huggingface_hub` asks for to make a repository, upload a folder (large files by LFS), and download a
snapshot, also one that was cut off, and answers errors as the Hub does, by `X-Error-Code`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_the_right_one"
NAME = r"([\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Files by name of each commit, and the commit of each branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, changed: dict[str, bytes]) -> str:
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changed}
        name = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def find(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


class Hub:
    """All of it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        """What was uploaded by LFS, by sha256."""
        self.collections: dict[str, list[str]] = {"someone/erasures-1234": []}
        self.asked: list[tuple[str, str, str]] = []
        """Method, path and `Range` of each request."""
        self.cut: dict[str, int] = {}
        """Bytes after which the download of a file breaks off, once."""
        self.broken: set[str] = set()
        """Files that cannot be downloaded now."""
        self.status = 0
        """What everything is answered with; 0 for what is right."""

    def ranges(self, name: str) -> list[str]:
        """`Range` of each download of a file."""
        return [span for method, path, span in self.asked if method == "GET" and path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[no-any-return]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range", "")))
        length = int(self.headers.get("Content-Length", 0))
        self.content = self.rfile.read(length)
        if self.hub.status:
            self.error(self.hub.status, "", "so it was told")
            return
        for pattern, method in ROUTES.items():
            if found := re.fullmatch(pattern, path):
                getattr(self, method)(*found.groups())
                return
        self.error(404, "EntryNotFound", f"nothing at {path}")

    # Answers

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def json(self, data: object, status: int = 200) -> None:
        self.send(status, json.dumps(data).encode(), Content_Type="application/json")

    def error(self, status: int, code: str, message: str) -> None:
        self.send(
            status, json.dumps({"error": message}).encode(), Content_Type="application/json", X_Error_Code=code,
            X_Error_Message=message,
        )  # fmt: skip

    # Rights

    def may(self, writes: bool) -> bool:
        given = self.headers.get("Authorization")
        if given not in (None, f"Bearer {TOKEN}") or (writes and given is None):
            self.error(401, "", "Invalid username or password.")
            return False
        return True

    def repository(self, name: str, *, writes: bool = False) -> Repository | None:
        if not self.may(writes):
            return None
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.headers.get("Authorization") is None):
            self.error(404, "RepoNotFound", "Repository not found")
            return None
        return found

    # What is asked for

    def create(self) -> None:
        if not self.may(True):
            return
        told = json.loads(self.content)
        name = f"{told.get('organization') or 'someone'}/{told['name']}"
        known = name in self.hub.repositories
        if not known:
            made = self.hub.repositories[name] = Repository(told.get("visibility") == "private")
            made.commit("main", {".gitattributes": b""})
        self.json({"url": f"{self.server.address}/{name}", "id": name, "name": name}, 409 if known else 200)

    def branch(self, name: str, branch: str) -> None:
        if (found := self.repository(name, writes=True)) is not None:
            if branch in found.branches:
                self.error(409, "", "Reference already exists")
                return
            found.branches[branch] = found.branches["main"]
            self.json({})

    def validate(self) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.repository(name, writes=True) is not None:
            asked = json.loads(self.content)["files"]
            modes = [
                {"path": each["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular"}
                for each in asked
            ]  # fmt: skip
            self.json({"files": modes})

    def batch(self, name: str) -> None:
        if self.repository(name, writes=True) is not None:
            objects = []
            for each in json.loads(self.content)["objects"]:
                put = {"upload": {"href": f"{self.server.address}/store/{each['oid']}", "header": {}}}
                objects.append({**each, **({} if each["oid"] in self.hub.stored else {"actions": put})})
            self.json({"transfer": "basic", "objects": objects})

    def store(self, digest: str) -> None:
        assert hashlib.sha256(self.content).hexdigest() == digest
        self.hub.stored[digest] = self.content
        self.send(200)

    def commit(self, name: str, revision: str) -> None:
        if (found := self.repository(name, writes=True)) is None:
            return
        changed = {}
        for line in self.content.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                changed[value["path"]] = self.hub.stored[value["oid"]]
        made = found.commit(revision, changed)
        self.json({"commitUrl": f"{self.server.address}/{name}/commit/{made}", "commitOid": made, "success": True})

    def info(self, name: str, revision: str = "main") -> None:
        if (found := self.repository(name)) is not None:
            commit = found.find(revision)
            if commit is None:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return
            files = [{"rfilename": file} for file in found.commits[commit]]
            self.json({"id": name, "modelId": name, "sha": commit, "siblings": files, "private": found.private,
                       "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def tree(self, name: str, revision: str) -> None:
        if (found := self.repository(name)) is not None:
            commit = found.find(revision)
            assert commit is not None
            self.json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in found.commits[commit].items()
                ]
            )

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.repository(name)) is None:
            return
        commit = found.find(revision)
        if commit is None or file not in found.commits[commit]:
            self.error(404, "EntryNotFound", f"no {file}")
            return
        content = found.commits[commit][file]
        if self.command == "GET" and file in self.hub.broken:
            self.error(503, "", "broken for now")
            return
        known = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        status, span = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if span is not None:
            known["Content_Range"] = f"bytes {span[1]}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[int(span[1]) :]
        cut = self.hub.cut.pop(file, None) if self.command == "GET" else None
        if cut is None:
            self.send(status, content, **known)
            return
        self.send_response(status)
        for header, value in {**known, "Content_Length": str(len(content))}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = True

    def collect(self, slug: str) -> None:
        if not self.may(True):
            return
        if slug not in self.hub.collections:
            self.error(404, "", "Collection not found")
            return
        self.hub.collections[slug].append(json.loads(self.content)["item"]["id"])
        owner, _, title = slug.partition("/")
        told = {"slug": slug, "title": title, "owner": {"name": owner}, "items": [], "private": False,
                "lastUpdated": "2026-01-01T00:00:00.000Z", "upvotes": 0, "theme": "blue", "position": 0}  # fmt: skip
        self.json(told)


ROUTES = {
    r"/api/repos/create": "create",
    r"/api/validate-yaml": "validate",
    rf"/api/models/{NAME}/branch/(.+)": "branch",
    rf"/api/models/{NAME}/preupload/(.+)": "preupload",
    rf"/api/models/{NAME}/commit/(.+)": "commit",
    rf"/api/models/{NAME}/tree/([^/]+)": "tree",
    rf"/api/models/{NAME}/revision/(.+)": "info",
    rf"/api/models/{NAME}": "info",
    rf"/api/collections/{NAME}/items": "collect",
    rf"/{NAME}\.git/info/lfs/objects/batch": "batch",
    r"/store/([0-9a-f]{64})": "store",
    rf"/{NAME}/resolve/([^/]+)/(.+)": "resolve",
}


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """A hub and its address, while the block lasts."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, server.address = Hub(), f"http://127.0.0.1:{server.server_address[1]}"
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.hub, server.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
