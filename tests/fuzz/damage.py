"""Bad files, made from good ones: of any format, by a seed.

A damage is a name and what it does to a path. Those of `places` put something else there than a
file; those of `of_bytes` know nothing of the format; the others change what a file says.
"""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = Callable[[Path], None]
PIXELS = 30_000  # a side of an image that promises far more than it holds


# --- In place of a file ---------------------------------------------------------------------------


def places() -> dict[str, Damage]:
    """Things that are no file with content. None can be read, whatever the format."""

    def directory(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    def dangling(path: Path) -> None:
        path.unlink()
        path.symlink_to("nothing-here")

    def endless(path: Path) -> None:
        path.unlink()
        path.symlink_to("/dev/zero")

    def device(path: Path) -> None:
        path.unlink()
        path.symlink_to("/dev/null")

    def pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def door(path: Path) -> None:
        path.unlink()
        with socket.socket(socket.AF_UNIX) as opened:
            here = os.getcwd()
            os.chdir(path.parent)  # names of sockets are short
            try:
                opened.bind(path.name)
            finally:
                os.chdir(here)

    def gone(path: Path) -> None:
        path.unlink()

    made = (directory, loop, dangling, endless, device, pipe, door, gone)
    return {one.__name__: one for one in made}


# --- Of any format --------------------------------------------------------------------------------


def of_bytes(rng: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Damages that know nothing of the format."""
    kinds = (_empty, _cut, _flip, _insert, _zeros, _twice, _other, _utf16, _swap, _remove)
    for i in range(count):
        kind, seed = kinds[i % len(kinds)], rng.getrandbits(32)
        yield kind.__name__.strip("_"), _changing(kind, seed)


def _changing(kind: Callable[[bytearray, random.Random], bytes], seed: int) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(kind(bytearray(path.read_bytes()), random.Random(seed)))

    return damage


def _empty(data: bytearray, rng: random.Random) -> bytes:
    del data, rng
    return b""


def _cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 3, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _insert(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return bytes(data[:at] + rng.randbytes(rng.choice((1, 8, 300))) + data[at:])


def _zeros(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    many = min(len(data) - at, rng.choice((1, 16, 4096)))
    data[at : at + many] = bytes(many)
    return bytes(data)


def _twice(data: bytearray, rng: random.Random) -> bytes:
    del rng
    return bytes(data + data)


def _other(data: bytearray, rng: random.Random) -> bytes:
    del data
    pickled = (
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93."
    )
    web = b"<!DOCTYPE html><html><body>404 not found</body></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    return rng.choice((pickled, web, pointer, b"PK\x03\x04", b"PAR1", rng.randbytes(2000)))


def _utf16(data: bytearray, rng: random.Random) -> bytes:
    del rng
    return data.decode("latin-1").encode("utf-16")


def _swap(data: bytearray, rng: random.Random) -> bytes:
    a, b = (rng.randrange(len(data)) for _ in range(2))
    data[a], data[b] = data[b], data[a]
    return bytes(data)


def _remove(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 100))]
    return bytes(data)


# --- JSON -----------------------------------------------------------------------------------------

_DEEP = "[" * 100_000 + "]" * 100_000
# What is put in place of a value; text stands as it is in the file.
VALUES = (
    *("null", "true", "-1", "0", "1e400", "NaN", "-Infinity", "9" * 400, "9" * 5_000, '""', "[]"),
    *("{}", '"x"', json.dumps("x" * 100_000), '"\\ud800"', '"\\u0000"', '"../../etc/passwd"'),
    *("[[[1]]]", '{"a": {"b": []}}', _DEEP, "1.5", '"१२"', '[null, "a", 1]'),
)
_MARK = "@value-of-the-case@"
JsonPath = tuple[str | int, ...]


def paths_of(content: object, at: JsonPath = ()) -> Iterator[JsonPath]:
    """The places of all values in a JSON tree, the root's first."""
    yield at
    if isinstance(content, dict):
        for key, value in content.items():
            yield from paths_of(value, (*at, key))
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from paths_of(value, (*at, i))


def of_json(rng: random.Random, text: str, count: int) -> Iterator[tuple[str, Damage]]:
    """Damages of values and keys at places that are drawn by their depth first."""
    content = json.loads(text)
    by_depth: dict[int, list[JsonPath]] = {}
    for path in paths_of(content):
        by_depth.setdefault(len(path), []).append(path)
    for i in range(count):
        path = rng.choice(by_depth[rng.choice(list(by_depth))])
        how = ("value", "value", "value", "drop", "more", "again")[i % 6]
        yield f"json {how}", _json_damage(path, how, rng.choice(VALUES))


def _json_damage(path: JsonPath, how: str, value: str) -> Damage:
    def damage(file: Path) -> None:
        tree = [copy.deepcopy(json.loads(file.read_text()))]
        holder: object = tree
        key: str | int = 0
        for step in path:
            holder, key = holder[key], step  # type: ignore[index]
        if how == "value":
            holder[key] = _MARK  # type: ignore[index]
        elif how == "drop" and path:
            del holder[key]  # type: ignore[attr-defined]
        elif how == "more":
            inside = holder[key]  # type: ignore[index]
            if isinstance(inside, dict):
                inside["a-key-of-the-case"] = _MARK
            elif isinstance(inside, list):
                inside.append(_MARK)
        elif how == "again" and isinstance(holder, list) and path:
            holder.insert(int(key), holder[int(key)])
        file.write_text(json.dumps(tree[0]).replace(json.dumps(_MARK), value))

    return damage


# --- Tables and lines -----------------------------------------------------------------------------


def of_lines(rng: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Damages of files of lines with commas, tabs or spaces in them."""
    kinds = (
        *(_no_header, _line_twice, _line_cut, _quote, _nul, _long, _columns, _blank, _returns),
        *(_latin, _mark, _surrogate),
    )
    for i in range(count):
        kind, seed = kinds[i % len(kinds)], rng.getrandbits(32)
        yield "line " + kind.__name__.strip("_").replace("_", " "), _changing(kind, seed)


def _line(data: bytearray, rng: random.Random) -> tuple[list[bytes], int]:
    lines = bytes(data).split(b"\n")
    return lines, rng.randrange(len(lines) - 1 or 1)


def _no_header(data: bytearray, rng: random.Random) -> bytes:
    del rng
    return bytes(data).partition(b"\n")[2]


def _line_twice(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    return b"\n".join([*lines[:at], lines[at], *lines[at:]])


def _line_cut(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] = lines[at][: len(lines[at]) // 2]
    return b"\n".join(lines)


def _quote(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] = b'"' + lines[at]
    return b"\n".join(lines)


def _nul(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] = lines[at][:2] + b"\0" + lines[at][2:]
    return b"\n".join(lines)


def _long(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] += b"x" * 300_000
    return b"\n".join(lines)


def _columns(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] += b",x,y,z\t1 2 3"
    return b"\n".join(lines)


def _blank(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    return b"\n".join([*lines[:at], b"", b"  ", *lines[at:]])


def _returns(data: bytearray, rng: random.Random) -> bytes:
    del rng
    return bytes(data).replace(b"\n", b"\r\n")


def _latin(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] += b"\xe9"
    return b"\n".join(lines)


def _mark(data: bytearray, rng: random.Random) -> bytes:
    del rng
    return b"\xef\xbb\xbf" + bytes(data)


def _surrogate(data: bytearray, rng: random.Random) -> bytes:
    lines, at = _line(data, rng)
    lines[at] += b"\xed\xa0\x80"
    return b"\n".join(lines)


# --- Safetensors ----------------------------------------------------------------------------------


def of_safetensors(rng: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Damages of the header and of numbers."""
    kinds = (_length, _header_json, _offsets, _shape, _dtype, _not_finite, _gone, _huge, _overlap)
    for i in range(count):
        kind, seed = kinds[i % len(kinds)], rng.getrandbits(32)
        yield "tensors " + kind.__name__.strip("_").replace("_", " "), _changing(kind, seed)


def split_safetensors(data: bytes) -> tuple[dict[str, dict[str, object]], bytes]:
    """The header of a safetensors file, and the numbers."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), bytes(data[8 + length :])


def _joined(header: object, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def _tensor(data: bytearray, rng: random.Random) -> tuple[dict, dict, bytes]:
    header, numbers = split_safetensors(bytes(data))
    name = rng.choice([key for key in header if key != "__metadata__"])
    return header, header[name], numbers


def _length(data: bytearray, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice((0, 7, 2**63, 2**64 - 1, len(data)))) + bytes(data[8:])


def _header_json(data: bytearray, rng: random.Random) -> bytes:
    _, numbers = split_safetensors(bytes(data))
    return _joined(rng.choice(([], "x", None, {"a": []}, {"__metadata__": []})), numbers)


def _offsets(data: bytearray, rng: random.Random) -> bytes:
    header, tensor, numbers = _tensor(data, rng)
    tensor["data_offsets"] = rng.choice(([0, 10**15], [-1, 4], [8, 4], [0], None, ["0", "4"]))
    return _joined(header, numbers)


def _shape(data: bytearray, rng: random.Random) -> bytes:
    header, tensor, numbers = _tensor(data, rng)
    tensor["shape"] = rng.choice(([2**62, 2**62], [-1], [], [0], "x", None, [10**9, 10**9]))
    return _joined(header, numbers)


def _dtype(data: bytearray, rng: random.Random) -> bytes:
    header, tensor, numbers = _tensor(data, rng)
    tensor["dtype"] = rng.choice(("I32", "F64", "O", "", None, "BOOL"))
    return _joined(header, numbers)


def _not_finite(data: bytearray, rng: random.Random) -> bytes:
    header, tensor, numbers = _tensor(data, rng)
    start, end = tensor["data_offsets"]
    changed = bytearray(numbers)
    at = start + 4 * rng.randrange(max((end - start) // 4, 1))
    changed[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"))))
    return _joined(header, bytes(changed))


def _gone(data: bytearray, rng: random.Random) -> bytes:
    """The tensor that is last in the file is cut off, and its entry."""
    del rng
    header, numbers = split_safetensors(bytes(data))
    names = [key for key in header if key != "__metadata__"]
    last = max(names, key=lambda key: header[key]["data_offsets"][1])
    start = header.pop(last)["data_offsets"][0]
    return _joined(header, numbers[:start])


def _huge(data: bytearray, rng: random.Random) -> bytes:
    """A header that promises terabytes."""
    header, tensor, numbers = _tensor(data, rng)
    tensor |= {"shape": [2**38, 4], "data_offsets": [0, 2**42]}
    return _joined(header, numbers)


def _overlap(data: bytearray, rng: random.Random) -> bytes:
    header, _, numbers = _tensor(data, rng)
    for name, tensor in header.items():
        if name != "__metadata__":
            tensor["data_offsets"] = [0, tensor["data_offsets"][1] - tensor["data_offsets"][0]]
    return _joined(header, numbers)


# --- NumPy's archives -----------------------------------------------------------------------------


def of_npz(rng: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Damages of the archive and of the arrays in it."""
    kinds = (
        _pickled,
        _missing,
        _bomb_array,
        _nan_array,
        _names,
        _shuffled,
        _wrong_type,
        _encrypted,
    )
    for i in range(count):
        kind, seed = kinds[i % len(kinds)], rng.getrandbits(32)
        yield "npz " + kind.__name__.strip("_").replace("_", " "), _npz_damage(kind, seed)


def _npz_damage(kind: Callable[..., None], seed: int) -> Damage:
    import numpy as np

    def damage(path: Path) -> None:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: held[name] for name in held.files}
        kind(path, arrays, random.Random(seed))

    return damage


def _floats(arrays: dict, rng: random.Random) -> str:
    return rng.choice([name for name, x in arrays.items() if x.dtype.kind == "f"])


def _save(path: Path, arrays: dict) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **arrays)


def _pickled(path: Path, arrays: dict, rng: random.Random) -> None:
    name = rng.choice(list(arrays))
    arrays[name] = arrays[name].astype(object)
    _save(path, arrays)


def _missing(path: Path, arrays: dict, rng: random.Random) -> None:
    del arrays[rng.choice(list(arrays))]
    _save(path, arrays)


def _bomb_array(path: Path, arrays: dict, rng: random.Random) -> None:
    """An array whose header promises a terabyte."""
    import io
    import zipfile

    name = _floats(arrays, rng)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, value in arrays.items():
            text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**36}, 4), }}"
            if key == name:
                header = text.ljust(117).encode() + b"\n"
                content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
            else:
                held = io.BytesIO()
                import numpy as np

                np.save(held, value)
                content = held.getvalue()
            archive.writestr(f"{key}.npy", content)


def _nan_array(path: Path, arrays: dict, rng: random.Random) -> None:
    name = _floats(arrays, rng)
    arrays[name] = arrays[name].copy()
    arrays[name].flat[rng.randrange(arrays[name].size)] = rng.choice((float("nan"), float("inf")))
    _save(path, arrays)


def _names(path: Path, arrays: dict, rng: random.Random) -> None:
    name = rng.choice([key for key in arrays if "id" in key])
    arrays[name] = arrays[name][:-1]
    _save(path, arrays)


def _shuffled(path: Path, arrays: dict, rng: random.Random) -> None:
    """Members in another order, in Fortran's order of axes, packed: the same arrays."""
    import numpy as np

    names = list(arrays)
    rng.shuffle(names)
    with path.open("wb") as file:
        np.savez_compressed(file, **{name: np.asfortranarray(arrays[name]) for name in names})


def _wrong_type(path: Path, arrays: dict, rng: random.Random) -> None:
    name = rng.choice(list(arrays))
    held = arrays[name]
    arrays[name] = (
        held.astype("complex64") if held.dtype.kind == "f" else held[:, None].repeat(2, 1)
    )
    _save(path, arrays)


def _encrypted(path: Path, arrays: dict, rng: random.Random) -> None:
    """Each entry of the archive is marked as encrypted, here and in its list."""
    del rng
    _save(path, arrays)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(mark, at + 4)
    path.write_bytes(data)


# --- Photos ---------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG of a size that holds no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    empty = zlib.compress(b"")
    data = (
        struct.pack(">I", len(empty))
        + b"IDAT"
        + empty
        + struct.pack(">I", zlib.crc32(b"IDAT" + empty))
    )
    return b"\x89PNG\r\n\x1a\n" + head + data + b"\x00\x00\x00\x00IEND\xaeB`\x82"


def photos() -> dict[str, tuple[bool, Damage]]:
    """Photos that can be read, and such that cannot, by name."""
    from PIL import Image

    def saved(image: Image.Image, kind: str, **options: object) -> Damage:
        def damage(path: Path) -> None:
            with path.open("wb") as file:
                image.save(file, kind, **options)

        return damage

    def header(width: int, height: int) -> Damage:
        return lambda path: path.write_bytes(png_header(width, height)) and None

    def bomb(path: Path) -> None:
        Image.new("1", (PIXELS, PIXELS)).save(path, "PNG")

    red = Image.new("RGB", (30, 20), "red")
    rotated = Image.Exif()
    rotated[0x0112] = 77  # no orientation that there is
    return {
        "grey": (True, saved(red.convert("L"), "PNG")),
        "sixteen bits": (True, saved(Image.new("I;16", (9, 9), 40_000), "PNG")),
        "palette with transparency": (True, saved(red.convert("P"), "PNG", transparency=0)),
        "cmyk": (True, saved(red.convert("CMYK"), "JPEG")),
        "one pixel": (True, saved(red.resize((1, 1)), "PNG")),
        "one wide": (True, saved(red.resize((1, 900)), "PNG")),
        "bad orientation": (True, saved(red, "JPEG", exif=rotated)),
        "bad profile": (True, saved(red, "JPEG", icc_profile=b"no profile")),
        "gif": (False, saved(red, "GIF")),
        "tiff": (False, saved(red, "TIFF")),
        "no pixels": (False, header(8, 8)),
        "no size": (False, header(0, 0)),
        "promises much": (False, header(PIXELS, PIXELS)),
        "promises all": (False, header(2**31 - 1, 2**31 - 1)),
        "bomb": (False, bomb),
    }
