"""Fetches photos by their published addresses, politely: one at a time, at a rate, and only once.

-   A photo that lies in the raw directory is not asked for. An address that several photos share is
    asked for once.
-   An answer that may be another one later (too many requests, an error of the server or of the
    connection) is asked for again after a wait that doubles, or the one that the server names.
-   An answer that will stay (no such page, no image) counts as gone: `OVERVIEW` keeps it, and it is
    not asked for again. Remove that file to do so.
-   A photo is whole or not there. An interrupted download goes on by the same command.
-   After `IN_A_ROW` failures one after the other it ends: the connection is at fault then.
"""

from __future__ import annotations

import collections
import dataclasses
import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence

from absl import logging
from etils import epath
from PIL import Image

from dqe_jax.data.photos import MAX_BYTES
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import cannot_write, read_json, write_json
from dqe_jax.utils.progress import progress

OVERVIEW = "download.json"
TRIES, WAIT_S, LONGEST_WAIT_S, TIMEOUT_S = 4, 1.0, 60.0, 30.0
IN_A_ROW = 20
_LATER = (408, 425, 429, 500, 502, 503, 504)
_AGENT = "dqe_jax (research; fetches each photo of a published list once)"


@dataclasses.dataclass
class Overview:
    """What became of the photos.

    Attributes:
      wanted: how many were asked for by name.
      there: how many lay there before.
      fetched: how many came.
      gone: why a photo will not come, by its name.
      failed: why a photo did not come this time.
    """

    wanted: int = 0
    there: int = 0
    fetched: int = 0
    gone: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)

    def lines(self) -> list[str]:
        """What there is to say of it."""
        said = [f"{self.wanted:,} photos: {self.there:,} were there, {self.fetched:,} were fetched"]
        for what, names in (("gone", self.gone), ("not fetched this time", self.failed)):
            by_reason = collections.defaultdict(list)
            for name, reason in names.items():
                by_reason[reason].append(name)
            for reason, own in by_reason.items():
                more = f" and {len(own) - 5:,} more" if len(own) > 5 else ""
                said.append(f"{len(own):,} {what} ({reason}): {', '.join(own[:5])}{more}")
        return said


def fetch(
    addresses: Mapping[str, str],
    folder: epath.Path,
    at_hand: Callable[[str], bool],
    *,
    per_second: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Overview:
    """Fetches photos as `<name>.jpg`, and writes `OVERVIEW` beside them.

    Args:
      addresses: by name, which is safe as a file's.
      folder: where the photos go.
      at_hand: whether a photo of that name is there.
      per_second: requests a second, at the most.
      sleep: waits so many seconds.

    Returns:
      The overview, which is logged.

    Raises:
      UserError: the folder cannot be written, or the connection fails; what has come stays.
    """
    known = folder / OVERVIEW
    before = read_json(known, dict, "remove it").get("gone") if known.exists() else {}
    if not isinstance(before, dict):
        raise UserError(f"{known} does not say which photos are gone: remove it.")
    found = Overview(wanted=len(addresses))
    by_address: dict[str, list[str]] = collections.defaultdict(list)
    for name, address in addresses.items():
        if at_hand(name) or (folder / f"{name}.jpg").exists():
            found.there += 1
        elif name in before:
            found.gone[name] = str(before[name])
        else:
            by_address[address].append(name)
    row: list[str] = []
    last = -1 / per_second
    try:
        for address, names in progress(by_address.items(), len(by_address), "Photos by address"):
            sleep(max(0.0, last + 1 / per_second - time.monotonic()))
            last = time.monotonic()
            data, reason, stays = _get(address, sleep)
            if data is None:
                (found.gone if stays else found.failed).update(dict.fromkeys(names, reason))
                row = [] if stays else [*row, reason]
                if len(row) >= IN_A_ROW:
                    raise UserError(
                        f"{len(row)} addresses in a row failed (last: {address}, {row[-1]}): see "
                        "whether this machine reaches them and run the same command again; what "
                        "was fetched stays."
                    )
                continue
            row = []
            _write(folder, names, data)
            found.fetched += len(names)
    finally:
        facts = dataclasses.asdict(found)
        write_json(known, {**facts, "gone": {**before, **found.gone}})
        logging.info("%s\nOverview: %s", "\n  ".join(found.lines()), known)
    return found


def _write(folder: epath.Path, names: Sequence[str], data: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            partial = folder / f"{name}.partial"
            partial.write_bytes(data)
            partial.replace(folder / f"{name}.jpg")
    except OSError as error:
        raise cannot_write(folder, error) from error


def _get(address: str, sleep: Callable[[float], None]) -> tuple[bytes | None, str, bool]:
    """The photo at an address; or None, why, and whether that will stay so."""
    if not address.startswith(("http://", "https://")):
        return None, "no address", True
    wait, reason = WAIT_S, ""
    for attempt in range(TRIES):
        if attempt:
            sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)
        request = urllib.request.Request(address, headers={"User-Agent": _AGENT})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                data = answer.read(MAX_BYTES + 1)
                length = answer.headers.get("Content-Length", "")
        except urllib.error.HTTPError as error:
            reason = f"status {error.code}"
            if error.code not in _LATER:
                return None, reason, True
            named = error.headers.get("Retry-After", "")
            wait = min(float(named), LONGEST_WAIT_S) if named.isdigit() else wait
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that broke
            reason = reason_of(error) or type(error).__name__
        except ValueError:
            return None, "no address", True
        else:
            if length.isdigit() and len(data) < min(int(length), MAX_BYTES):
                reason = "the connection broke"
                continue
            fault = _fault(data)
            return (None, fault, True) if fault else (data, "", False)
    return None, reason, False


def _fault(data: bytes) -> str:
    """What is wrong with a photo; "" if nothing is."""
    if len(data) > MAX_BYTES:
        return "too large"
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as photo:
            photo.verify()
    except Exception:  # decoders raise many types
        return "no image"
    return ""
