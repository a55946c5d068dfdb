"""Stores of frozen towers in words and as JSON."""

from __future__ import annotations

import textwrap

from dqe_jax.performance.planning.chips import GB
from dqe_jax.performance.planning.stores import UNDECIDED, Stored
from dqe_jax.utils.files import JsonObject

_WIDTH = 100
_NAMES = {"device": "on the devices", "host": "in each host's memory", "disk": "on disk"}


def _gb(size: float) -> str:
    return f"{size / GB:.3g} GB" if size >= GB else f"{size / 1e6:.3g} MB"


def _of(size: float, free: float | None) -> str:
    return _gb(size) if free is None else f"{size / GB:.3g} of {free / GB:.3g} GB free"


def stored_lines(stored: Stored) -> str:
    """What is stored, where it lies, and what a step reads of it: a line each."""
    wrapped = [textwrap.wrap(_size(stored), _WIDTH, subsequent_indent="  ")]
    for said in (_place(stored), _reading(stored)):
        wrapped.append(textwrap.wrap(said, _WIDTH, initial_indent="  ", subsequent_indent="  "))
    return "\n".join(line for lines in wrapped for line in lines)


def _size(stored: Stored) -> str:
    kind = stored.kind
    what = f"features of {kind.name}: "
    if not stored.rows:
        return f"{what}rows of {_gb(kind.row_bytes)}; how many is not known (give --queries)"
    parts = [(kind.training, "to train on"), (kind.evaluation, "to evaluate on")]
    of = ", ".join(f"{rows:,} {use}" for rows, use in parts if rows)
    size = f"{stored.rows:,} rows of {_gb(kind.row_bytes)}, {_gb(stored.nbytes)}"
    return f"{what}{size} ({of})"


def _place(stored: Stored) -> str:
    """Where it lies, and why not in a nearer place."""
    if stored.place == UNDECIDED:
        return _choices(stored)
    on_device = _of(stored.of_device, stored.free_device)
    in_host = _of(stored.nbytes, stored.free_host)
    said = f"they lie {_NAMES[stored.place]}"
    if stored.too_large:
        return f"they do not fit on the devices: each would take {on_device}"
    if stored.place == "device":
        return f"{said}, {on_device} on each"
    if stored.place == "host":
        said += f", {in_host}"
    if stored.asked != "auto":
        return said
    said += f"; a device would need {on_device}"
    return f"{said}, and a host {in_host}" if stored.place == "disk" else said


def _choices(stored: Stored) -> str:
    """The places that are left, each with the memory that decides."""
    if not stored.rows:
        return "where they lie depends on how many there are"
    needed = {"device": 2 * stored.of_device, "host": 2 * stored.nbytes}
    said = [
        f"{_NAMES[place]} if {_gb(needed[place])} are free {'on each' if place == 'device' else ''}"
        for place in stored.places[:-1]
    ]
    return ", else ".join([*(one.strip() for one in said), _NAMES[stored.places[-1]]])


def _reading(stored: Stored) -> str:
    taken, host = _gb(stored.kind.read), _gb(stored.read_by_host)
    if stored.place == UNDECIDED:
        return f"a step takes {taken} on each device"
    if stored.place != "device":
        where = {"host": "memory", "disk": "disk"}[stored.place]
        return f"a step reads {host} from each host's {where}, and each device gets {taken}"
    if stored.devices == 1:
        return f"a step reads {taken} from the memory of the device"
    return (
        f"a step takes {taken} on each device, which reads {_gb(stored.searched)} of its memory "
        f"and sends {_gb(stored.sent)}"
    )


def store_json(stored: Stored) -> JsonObject:
    """The same for `json.dumps`: bytes, those of a step where they are read or sent."""
    kind, on_devices = stored.kind, stored.place == "device"
    return {
        "kind": kind.name,
        "rows": stored.rows,
        "rows_of_training": kind.training,
        "rows_of_evaluation": kind.evaluation,
        "row_bytes": kind.row_bytes,
        "nbytes": stored.nbytes,
        "place": stored.place,
        "places": list(stored.places),
        "free_device": stored.free_device,
        "free_host": stored.free_host,
        "device_bytes": stored.of_device if on_devices else 0,
        "read": kind.read,
        "read_by_device": stored.searched if on_devices else 0,
        "read_by_host": 0 if on_devices or stored.place == UNDECIDED else stored.read_by_host,
        "sent": stored.sent if on_devices else 0,
    }
