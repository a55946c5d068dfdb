"""A bucket on this machine for tests: `gcp-storage-emulator`, behind a door that can fail.

The emulator keeps the objects. The door adds what it lacks and what the libraries of a run count
on, as the JSON API of Cloud Storage documents it: generations as preconditions of reads and writes
(`ifGenerationMatch`, 412 and 304), the generation of what is read, moves, and the answer of an
upload that is complete to who asks for it again. It also makes faults at stated rates, and counts
them: slow answers, 429, 503, connections that are dropped before a request is done, and such that
are dropped after it.
"""

from __future__ import annotations

import collections
import dataclasses
import http.client
import json
import random
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("slow", "429", "503", "dropped", "lost")
_OBJECT = re.compile(r"^(?:/download)?(?:/storage/v1)?/b/([^/]+)/o/([^/]+)$")
_MOVE = re.compile(r"^(?:/storage/v1)?/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)$")
_UPLOAD = re.compile(r"^(?:/upload)?(?:/storage/v1)?/b/([^/]+)/o$")
# Headers of a connection, not of what goes over it.
_OF_CONNECTION = ("connection", "content-length", "transfer-encoding", "keep-alive", "host")


@dataclasses.dataclass(frozen=True)
class Faults:
    """How often requests go wrong.

    Attributes:
      rates: share of requests by kind, of `KINDS`: "slow" is answered after `delay_s`, "429" and
        "503" are refused, "dropped" loses its connection before anything is done, and "lost" after
        it, so that who asked does not know that it was done.
      delay_s: seconds of a slow answer.
      seed: of the draws.
    """

    rates: Mapping[str, float]
    delay_s: float = 1.0
    seed: int = 0


class Bucket:
    """An emulated bucket; a context manager.

    Attributes:
      name: of the bucket.
      url: of the door.
      counts: requests ("requests") and injected faults by their kinds.
    """

    def __init__(self, name: str = "bucket"):
        """Starts nothing yet; needs the package `gcp-storage-emulator`."""
        self.name, self.url = name, ""
        self.counts: collections.Counter[str] = collections.Counter()
        self._faults, self._random = Faults({}), random.Random(0)
        self._uploads: dict[str, tuple[int, dict[str, str], bytes]] = {}  # that are complete
        self._lock = threading.Lock()  # the emulator takes one request at a time

    def __enter__(self) -> Bucket:
        from gcp_storage_emulator.server import create_server

        self._port = _free_port()
        self._emulator = create_server(
            "127.0.0.1", self._port, in_memory=True, default_bucket=self.name
        )
        self._emulator.start()
        bucket = self

        class Handler(_Handler):
            owner = bucket

        self._door = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._door.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._door.server_address[1]}"
        threading.Thread(target=self._door.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._door.shutdown()
        self._door.server_close()
        self._emulator.stop()

    def environment(self) -> dict[str, str]:
        """What points gcsfs, and so etils and TFDS, and TensorStore at the bucket."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            # Otherwise gcsfs asks for the kind of each bucket at Google.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def inject(self, faults: Faults) -> None:
        """From now on requests go wrong as `faults` says."""
        self._faults, self._random = faults, random.Random(faults.seed)

    def names(self) -> list[str]:
        """Names of all objects."""
        names: list[str] = []
        page = ""
        while True:
            path = f"/storage/v1/b/{self.name}/o" + (f"?pageToken={page}" if page else "")
            found = json.loads(self.forward("GET", path)[2])
            names += [item["name"] for item in found.get("items", [])]
            page = found.get("nextPageToken", "")
            if not page:
                return names

    def fault(self) -> str:
        """The fault of the next request; "" for none."""
        with self._lock:
            self.counts["requests"] += 1
            drawn = self._random.random()
            for kind, rate in self._faults.rates.items():
                drawn -= rate
                if drawn < 0:
                    self.counts[kind] += 1
                    return kind
        return ""

    @property
    def delay_s(self) -> float:
        """Seconds of a slow answer."""
        return self._faults.delay_s

    def forward(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content that the emulator answers with."""
        with self._lock:
            return self._forward(method, path, body, headers or {})

    def answer(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """The same, with what the door adds."""
        with self._lock:
            parts = urllib.parse.urlsplit(path)
            query = urllib.parse.parse_qs(parts.query)
            moved = _MOVE.match(parts.path)
            if moved is not None and method == "POST":
                return self._move(*moved.groups())
            held = self._generation(*_object_of(parts.path, query, body, headers))
            if "ifGenerationMatch" in query and int(query["ifGenerationMatch"][0]) != held:
                return _refused(412, "conditionNotMet")
            if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"][0]) == held:
                return (304, {}, b"") if method == "GET" else _refused(412, "conditionNotMet")
            status, found, content = self._forward(method, path, body, headers)
            for upload in query.get("upload_id", ()):
                if status == 200:
                    self._uploads[upload] = status, dict(found), content
                elif status == 404 and upload in self._uploads:
                    return self._uploads[upload]  # asked again after an answer that was lost
            if method == "GET" and held:
                found["X-Goog-Generation"] = str(held)
            return status, found, content

    def _generation(self, bucket: str, name: str) -> int:
        """The generation of an object; 0 for none."""
        if not name:
            return 0
        quoted = urllib.parse.quote(name, safe="")
        status, _, content = self._forward("GET", f"/storage/v1/b/{bucket}/o/{quoted}", b"", {})
        return int(json.loads(content)["generation"]) if status == 200 else 0

    def _move(self, bucket: str, source: str, target: str) -> tuple[int, dict[str, str], bytes]:
        at = f"/storage/v1/b/{bucket}/o"
        path = f"{at}/{source}/rewriteTo/b/{bucket}/o/{target}"
        status, _, content = self._forward(
            "POST", path, b"{}", {"Content-Type": "application/json"}
        )
        if status != 200:
            return status, {}, content
        self._forward("DELETE", f"{at}/{source}", b"", {})
        made = json.dumps(json.loads(content)["resource"]).encode()
        return 200, {"Content-Type": "application/json"}, made

    def _forward(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        sent = {k: v for k, v in headers.items() if k.lower() not in _OF_CONNECTION}
        # By it the emulator names the place of an upload.
        sent["Host"] = self.url.removeprefix("http://")
        try:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            content = response.read()
            found = {k: v for k, v in response.getheaders() if k.lower() not in _OF_CONNECTION}
            return response.status, found, content
        finally:
            connection.close()


class _Handler(BaseHTTPRequestHandler):
    """A connection of the door."""

    owner: Bucket
    protocol_version = "HTTP/1.1"
    # Header and content go out as one, or who asked would wait 40 ms for the second.
    wbufsize = -1
    disable_nagle_algorithm = True

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):  # who asked has gone
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def _answer(self) -> None:
        body = self._body()
        kind = self.owner.fault()
        if kind == "dropped":
            return self._drop()
        if kind in ("429", "503"):
            return self._send(*_refused(int(kind), "injected"))
        if kind == "slow":
            time.sleep(self.owner.delay_s)
        answer = self.owner.answer(self.command, self.path, body, dict(self.headers.items()))
        return self._drop() if kind == "lost" else self._send(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _answer  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status != 304:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if status != 304 and self.command != "HEAD":
            self.wfile.write(content)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def _object_of(
    path: str, query: Mapping[str, list[str]], body: bytes, headers: Mapping[str, str]
) -> tuple[str, str]:
    """The bucket and the object that a request is about; "" for none."""
    found = _OBJECT.match(path)
    if found is not None:
        return found[1], urllib.parse.unquote(found[2])
    found = _UPLOAD.match(path)
    if found is None:
        return "", ""
    if "name" in query:
        return found[1], query["name"][0]
    kind = {k.lower(): v for k, v in headers.items()}.get("content-type", "")
    if kind.startswith("multipart/"):  # its first part is the object's metadata
        start = body.index(b"{")
        return found[1], json.JSONDecoder().raw_decode(body[start:].decode("latin-1"))[0]["name"]
    if kind.startswith("application/json") and body:
        return found[1], json.loads(body).get("name", "")
    return found[1], ""


def _refused(status: int, why: str) -> tuple[int, dict[str, str], bytes]:
    content = {"error": {"code": status, "message": why, "errors": [{"reason": why}]}}
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port
