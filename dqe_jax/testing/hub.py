"""A stand-in of the Hugging Face hub: the part of its HTTP API that a model's way there takes.

Repositories lie in memory. Each commit keeps all files, so that a revision can be asked for.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

# Who may write, and who may only read.
WRITER, READER = "hf_writer", "hf_reader"


@dataclasses.dataclass
class Repo:
    """A repository.

    Attributes:
      private: whether only those with a token see it.
      gated: whether nobody may read its files.
      commits: files by name, of each commit.
      branches: the commit of each branch.
    """

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Adds files to a branch; returns the commit."""
        held = self.commits.get(self.branches.get(branch, ""), {}) | files
        facts = [branch, len(self.commits), *((n, x.hex()) for n, x in sorted(held.items()))]
        name = hashlib.sha1(json.dumps(facts).encode()).hexdigest()
        self.commits[name], self.branches[branch] = held, name
        return name


@dataclasses.dataclass
class Hub:
    """What a stand-in holds.

    Attributes:
      endpoint: its address.
      repos: by `OWNER/NAME`.
      asked: the methods and paths of all requests.
    """

    endpoint: str
    repos: dict[str, Repo]
    asked: list[str]


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs a stand-in on this machine until the block ends."""
    hub = Hub("", {}, [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Nothing: tests have logs of their own."""

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            self._send(*_reply(hub, self.command, path, body, token))

        def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


_Reply = tuple[int, dict[str, str], bytes]


def _json(content: object, status: int = 200) -> _Reply:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _refused(status: int, code: str, message: str) -> _Reply:
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return status, headers, json.dumps({"error": message}).encode()


def _reply(hub: Hub, method: str, path: str, body: bytes, token: str) -> _Reply:
    if path == "/api/validate-yaml":
        return _json({"errors": [], "warnings": []})
    if method == "POST" and token != WRITER:
        return _refused(403 if token else 401, "", "this token may not write")
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        known = name in hub.repos
        private = asked.get("private") or asked.get("visibility") == "private"
        made = hub.repos.setdefault(name, Repo(private=bool(private)))
        if not known:
            made.commit({".gitattributes": b""})
        return _json({"url": f"{hub.endpoint}/{name}"}, 409 if known else 200)
    found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.*))?)?", path)
    plain = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
    match = found or plain
    repo = hub.repos.get(match[1]) if match else None
    if match is None or repo is None or (repo.private and not token):
        return _refused(401 if not token else 404, "RepoNotFound", "Repository not found")
    if plain:
        return _file(repo, plain[2], plain[3])
    return _api(repo, match[1], match[2] or "revision", match[3] or "main", body)


def _commit_of(repo: Repo, revision: str) -> str | None:
    name = repo.branches.get(revision, revision)
    return name if name in repo.commits else None


def _api(repo: Repo, name: str, verb: str, rest: str, body: bytes) -> _Reply:
    """What is asked of a repository; `rest` begins with a revision."""
    revision = rest.partition("/")[0]
    if verb == "branch":
        asked = json.loads(body) if body else {}
        start = _commit_of(repo, asked.get("startingPoint") or "main")
        if revision in repo.branches:
            return _json({"error": "it is there"}, 409)
        repo.branches[revision] = str(start)
        return _json({})
    commit = _commit_of(repo, revision)
    if commit is None:
        return _refused(404, "RevisionNotFound", "Revision not found")
    files = repo.commits[commit]
    if verb == "revision":
        siblings = [{"rfilename": file} for file in files]
        facts = {"id": name, "modelId": name, "sha": commit, "private": repo.private}
        return _json(facts | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})
    if verb == "tree":
        return _json(
            [
                {"type": "file", "path": file, "size": len(x), "oid": hashlib.sha1(x).hexdigest()}
                for file, x in files.items()
            ]
        )
    if verb == "preupload":
        asked = json.loads(body)["files"]
        return _json(
            {
                "files": [
                    {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for x in asked
                ]
            }
        )
    if verb == "commit":
        lines = [json.loads(line) for line in body.splitlines()]
        added = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        made = repo.commit(added, revision)
        return _json({"commitUrl": f"/{name}/commit/{made}", "commitOid": made})
    return _refused(404, "EntryNotFound", f"no {verb} here")


def _file(repo: Repo, revision: str, name: str) -> _Reply:
    commit = _commit_of(repo, revision)
    if repo.gated:
        return _refused(403, "GatedRepo", "Access is restricted")
    if commit is None:
        return _refused(404, "RevisionNotFound", "Revision not found")
    if name not in repo.commits[commit]:
        return _refused(404, "EntryNotFound", "Entry not found")
    content = repo.commits[commit][name]
    headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
    return 200, headers | {"Accept-Ranges": "none"}, content
