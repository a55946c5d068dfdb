"""Stands before the application: who may ask, how much and how long, and what browsers may do."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit

from absl import logging

from dqe_jax.serving.counters import Counters
from dqe_jax.serving.settings import Access, Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "dqe_token"
UPLOADS = "/uploads"
# Without a token: the page itself, which holds nothing of the index, and what asks for the token.
OPEN = ("/", "/health", "/session", "/docs", "/openapi.json")
STATIC = "/static/"
_LOOPBACK = ("localhost", "localhost.localdomain", "127.0.0.1", "::1", "[::1]")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors {}"
)


class _Refused(Exception):  # noqa: N818 (an answer, not an error of ours)
    """A request is answered with a status and a sentence."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.headers = status, sentence, headers or {}


class Guard:
    """An ASGI application around another one.

    It checks the name by which the server is called, refuses requests that other sites start, asks
    for the token, and limits the size of bodies, the time of requests and their number. Each
    answer gets the headers that keep browsers from loading anything from elsewhere.
    """

    def __init__(self, app: App, *, access: Access, limits: Limits, counters: Counters):
        """Wraps an application."""
        self._app, self._access, self._limits, self._counters = app, access, limits, counters
        self._running = {"all": 0, UPLOADS: 0}
        self._hosts = {*_LOOPBACK, *(host.lower() for host in access.hosts)}
        self._policy = _POLICY.format("*" if access.framed else "'none'")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started, began = False, time.perf_counter()
        status = 500

        async def answer(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                message = {**message, "headers": self._headers(message["headers"])}
            await send(message)

        counted: list[str] = []
        try:
            headers = _headers_of(scope)
            self._check(scope, headers)
            self._admit(scope, counted)
            body = await self._body(scope, headers, receive)
            async with asyncio.timeout(self._limits.seconds):
                await self._app(scope, _once(body, receive), answer)
        except _Refused as refused:
            if not started:
                await _say(answer, refused.status, refused.sentence, refused.headers)
        except TimeoutError:
            if not started:
                await _say(answer, 504, "The request took too long: try again, or ask for less.")
        except Exception:  # nothing of it may reach the client
            logging.exception("A request failed.")
            if not started:
                await _say(answer, 500, "Something went wrong in the server; its log says what.")
        finally:
            for kind in counted:
                self._running[kind] -= 1
            route = getattr(scope.get("route"), "path", "other")
            self._counters.request(route, status, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuses who may not ask."""
        host = headers.get("host", "")
        if "*" not in self._hosts and _host_name(host) not in self._hosts:
            raise _Refused(400, "The server is not called by this name; start it with --host_name.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise _Refused(405, "The method is not allowed.", {"allow": "GET, HEAD, POST"})
        if scope["method"] == "POST":
            origin = headers.get("origin")
            foreign = headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none")
            if foreign or (origin is not None and _network_place(origin) != host.lower()):
                raise _Refused(403, "Requests from other sites are not allowed.")
        path = scope["path"]
        if self._access.token and path not in OPEN and not path.startswith(STATIC):
            given = _token_of(headers)
            if not hmac.compare_digest(given.encode(), self._access.token.encode()):
                raise _Refused(
                    401,
                    "A token is needed: see where the server was started.",
                    {"www-authenticate": "Bearer"},
                )

    def _admit(self, scope: Scope, counted: list[str]) -> None:
        """Counts a request, and refuses one too many; says in `counted` what was counted."""
        if scope["path"] == "/health":
            return
        most = {"all": self._limits.requests, UPLOADS: self._limits.upload_requests}
        for kind in ("all", UPLOADS) if scope["path"] == UPLOADS else ("all",):
            if self._running[kind] >= most[kind]:
                sentence = "The server is busy: try again in a moment."
                raise _Refused(503, sentence, {"retry-after": "1"})
            self._running[kind] += 1
            counted.append(kind)

    async def _body(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The body of a request; refuses one that is too large or comes too slowly."""
        limits = self._limits
        most = limits.upload_bytes if scope["path"] == UPLOADS else limits.json_bytes
        too_large = _Refused(413, f"The request is too large: at most {most:,} bytes.")
        length = headers.get("content-length", "")
        if length and (not length.isdecimal() or len(length) > 15 or int(length) > most):
            raise too_large
        parts, read, more = [], 0, True
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Refused(400, "The client went away.")
                    parts.append(message.get("body", b""))
                    read, more = read + len(parts[-1]), message.get("more_body", False)
                    if read > most:
                        raise too_large
        except TimeoutError:
            raise _Refused(408, "The request came too slowly.") from None
        return b"".join(parts)

    def _headers(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        own = {
            "content-security-policy": self._policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "permissions-policy": "camera=(), geolocation=(), microphone=()",
        }
        if not self._access.framed:
            own["x-frame-options"] = "DENY"
        known = {name.lower() for name, _ in headers}
        if b"cache-control" not in known:
            own["cache-control"] = "no-store"
        return [*headers, *((name.encode(), value.encode()) for name, value in own.items())]


def _once(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what else comes: that the client has gone."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _headers_of(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): x.decode("latin-1") for name, x in scope["headers"]}


def _host_name(host: str) -> str:
    """A Host header without its port."""
    if host.startswith("["):
        return host.partition("]")[0].lower() + "]"
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


def _network_place(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _token_of(headers: Mapping[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    try:
        cookies = SimpleCookie(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""


async def _say(
    send: Send, status: int, sentence: str, headers: Mapping[str, str] | None = None
) -> None:
    body = json.dumps({"error": sentence}).encode()
    more = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    start = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    if status in (408, 413):  # the rest of the body is not read
        start.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
