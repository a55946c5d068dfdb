"""The lock of a workdir in a bucket: a lease, which its holder renews and others watch.

A bucket has no locks of its own, but writes an object only if it is of an expected generation. The
object `trainer.lease` names who trains. Its holder writes it anew every `LEASE_S / 3` seconds, each
time only if nobody else has. Who finds one watches it: an object that changes has a holder, and one
that stays the same for `LEASE_S` is taken over. So no two clocks are compared. A run that ends
removes its lease; one that was killed leaves it, and the next one waits for `LEASE_S`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from typing import TYPE_CHECKING

from absl import logging
from etils import epath

from dqe_jax.utils.errors import UserError, reason_of

if TYPE_CHECKING:
    import tensorstore as ts

OBJECT = "trainer.lease"
LEASE_S = 60.0


class BusyError(UserError):
    """Another process trains in the workdir."""


class Lease:
    """A lease that is held, and renewed by a thread of its own until it is closed."""

    def __init__(self, store: ts.KvStore, path: str, seconds: float = LEASE_S):
        """Takes the lease, which may wait for `seconds`.

        Args:
          store: key-value store of the workdir.
          path: of the workdir, for sentences.
          seconds: after which a lease that is not renewed may be taken over.

        Raises:
          BusyError: another process renews it.
        """
        self._store, self._path, self._seconds = store, path, seconds
        self._token, self._count = uuid.uuid4().hex, 0
        self._closed, self._lost = threading.Event(), ""
        self._busy = threading.Lock()  # of the thread and who calls `check`
        self._generation = self._take()
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Sees that the lease is still held; asks the bucket if it was not renewed in time.

        Raises:
          BusyError: another process has taken it over.
          UserError: the bucket does not answer.
        """
        if time.monotonic() - self._renewed > self._seconds / 2:
            try:
                self._renew()
            except Exception as error:  # TensorStore raises many types, after many tries
                raise UserError(
                    f"{self._path} cannot be reached ({reason_of(error)}): run the same command "
                    "again when it can; it continues from the newest checkpoint."
                ) from error
        if self._lost:
            raise BusyError(
                f"{self._lost} has taken over the run in {self._path}, which this process had not "
                f"renewed for {self._seconds:.0f} s: nothing more is written here; let the other "
                "one go on."
            )

    def close(self) -> None:
        """Gives it back; it is left to expire if the bucket does not answer."""
        self._closed.set()
        self._thread.join(self._seconds / 3)
        if not self._lost:
            try:
                # Of no other generation: what another one holds stays.
                self._store.write(OBJECT, None, if_equal=self._generation).result(
                    timeout=self._seconds / 3
                )
            except Exception as error:
                logging.warning(
                    "The lease of %s could not be given back (%s); the next run waits for %.0f s.",
                    *(self._path, reason_of(error), self._seconds),
                )

    def _content(self) -> bytes:
        self._count += 1
        holder = f"process {os.getpid()} of {socket.gethostname()}"
        content = {"holder": holder, "token": self._token, "renewed": self._count}
        return json.dumps(content).encode()

    def _take(self) -> bytes:
        """Writes the lease; its generation."""
        seen, since, told = b"", 0.0, False
        while True:
            found = self._store.read(OBJECT).result()
            now, generation = time.monotonic(), found.stamp.generation
            if found.state != "value" or (generation == seen and now - since >= self._seconds):
                written = self._write(generation)
                if written is not None:
                    return written
                continue
            holder, _ = _read(found.value)
            if seen and generation != seen:
                raise BusyError(
                    f"{holder} trains in {self._path}: wait until it ends, or take another "
                    "--workdir."
                )
            if not seen:
                seen, since = generation, now
            if not told:
                told = True
                logging.info(
                    "%s has trained in %s and may still do: looking for %.0f s whether it renews "
                    "its lease.",
                    *(holder, self._path, self._seconds),
                )
            time.sleep(self._seconds / 20)

    def _write(self, expected: bytes) -> bytes | None:
        """Writes the object if it is of a generation; its new one, or None if it is another's."""
        content = self._content()
        written = self._store.write(OBJECT, content, if_equal=expected).result()
        if written.generation:
            return bytes(written.generation)
        # It may have been written by a request whose answer was lost, and that was sent again.
        found = self._store.read(OBJECT).result()
        own = found.state == "value" and _read(found.value)[1] == self._token
        return bytes(found.stamp.generation) if own else None

    def _renew(self) -> None:
        with self._busy:
            if self._lost:
                return
            written = self._write(self._generation)
            if written is not None:
                self._generation, self._renewed = written, time.monotonic()
                return
            found = self._store.read(OBJECT).result()
            self._lost = _read(found.value)[0] if found.state == "value" else "another process"

    def _keep(self) -> None:
        while not self._closed.wait(self._seconds / 3) and not self._lost:
            try:
                self._renew()
            except Exception as error:  # TensorStore raises many types
                logging.warning(
                    "The lease of %s could not be renewed (%s); it is tried again.",
                    *(self._path, reason_of(error)),
                )


def take_lease(path: epath.Path) -> Lease | None:
    """The lease of a workdir in a bucket; None where the storage has no conditional writes.

    Raises:
      BusyError: another process trains there.
      UserError: the bucket cannot be read or written.
    """
    import tensorstore as ts  # slow to import

    url = os.fspath(path).rstrip("/") + "/"
    if not url.startswith(("gs://", "s3://")):
        logging.warning("%s has no locks: nothing keeps a second trainer out.", path)
        return None
    try:
        return Lease(ts.KvStore.open(url).result(), os.fspath(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--workdir: {path} cannot be locked ({reason_of(error)}): name a bucket that exists "
            "and that you may write to."
        ) from error


def _read(content: bytes) -> tuple[str, str]:
    """Holder and token of a lease; of a damaged one something that is nobody's."""
    try:
        held = json.loads(content)
        return str(held["holder"]), str(held["token"])
    except (ValueError, TypeError, KeyError):
        return "another process", ""
