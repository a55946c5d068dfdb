"""Runs an application until the process is asked to end."""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import Any

import uvicorn
from absl import logging
from uvicorn.protocols.http.h11_impl import H11Protocol

from dqe_jax.serving.app import Service, make_app
from dqe_jax.serving.guard import is_loopback
from dqe_jax.serving.settings import Access
from dqe_jax.utils.errors import UserError

HEADER_BYTES = 65_536  # of the headers of a request


def serve(service: Service, *, host: str, port: int, access: Access) -> None:
    """Serves until SIGTERM or SIGINT; requests in flight are answered before it returns.

    Args:
      service: to serve.
      host: address to listen on.
      port: to listen on; 0 for any that is free.
      access: who may ask.

    Raises:
      UserError: the address cannot be used, or others could reach it without a token.
    """
    if not is_loopback(host) and not access.token:
        raise UserError(
            f"--host={host} can be reached from other machines: give --token as well, or leave out "
            "--host."
        )
    listening = listen(host, port)
    number = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    server = make_server(service, access)
    secret = f"#token={access.token}" if access.token else ""
    logging.info("Open http://%s:%d/%s (Ctrl-C ends).", name, number, secret)
    # uvicorn raises the signal again when it has ended: the process then ends by itself.
    before = {number: signal.signal(number, _pass) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listening])
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        listening.close()
        service.batcher.close()
    logging.info("Ended; all requests were answered.")


def make_server(service: Service, access: Access) -> uvicorn.Server:
    """A server that is not yet started."""
    limits = service.limits

    class Protocol(H11Protocol):
        """Drops connections that do not bring a request in time."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            loop = asyncio.get_running_loop()
            self._late = loop.call_later(limits.header_seconds, self._drop)

        def connection_lost(self, exc: Exception | None) -> None:
            self._late.cancel()
            super().connection_lost(exc)

        def _drop(self) -> None:
            if getattr(self, "cycle", None) is None and not self.transport.is_closing():
                self.transport.close()

    config = uvicorn.Config(
        make_app(service, access=access),
        http=Protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=limits.shutdown_seconds,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; raises a `UserError` if the address cannot be used."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(place)
        except OSError:
            listening.close()
            raise
    except (OSError, OverflowError) as error:
        raise UserError(
            f"cannot listen on {host}, port {port} "
            f"({getattr(error, 'strerror', None) or error}): give another --port or --host."
        ) from error
    return listening


def _pass(number: int, frame: object) -> None:
    """Does nothing: uvicorn has heeded the signal."""
    del number, frame
