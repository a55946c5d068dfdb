"""What a server allows."""

from __future__ import annotations

import dataclasses

from dqe_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
      upload_bytes: of an uploaded image.
      json_bytes: of the body of any other request.
      uploads: images that users gave, kept at a time; the oldest are dropped.
      seconds: that a request may take once its body is there.
      body_seconds: that a body may take to come.
      header_seconds: that a new connection may take until its first request is there.
      requests: at a time; more get status 503.
      upload_requests: of them, those that bring an image.
      connections: at a time; more get status 503.
      batch: searches answered together on the devices.
      shutdown_seconds: that requests in flight have when the server is asked to end.
    """

    upload_bytes: int = 20_000_000
    json_bytes: int = 200_000
    uploads: int = 256
    seconds: float = 30.0
    body_seconds: float = 20.0
    header_seconds: float = 10.0
    requests: int = 64
    upload_requests: int = 8
    connections: int = 256
    batch: int = 8
    shutdown_seconds: int = 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise UserError(f"the limit {field.name} is {value}: give a number above 0.")


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
      token: that requests must bring; "" asks for none.
      hosts: names by which the server may be called, beside those of this machine's loopback; "*"
        for any. Where no token is asked for, this keeps a foreign page from reading answers by a
        name of its own that leads here (DNS rebinding).
      framed: whether other pages, such as notebooks, may show this one in a frame.
    """

    token: str = ""
    hosts: tuple[str, ...] = ()
    framed: bool = False
