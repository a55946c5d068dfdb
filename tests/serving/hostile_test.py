"""Hostile requests: none crashes the server, none tells a path, none reads what is no image of it.

A short form of each kind is in the fast suite; `-m slow` sends all of them, over sockets too.
"""

import http.client
import io
import itertools
import json
import random
import socket
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="FastAPI is not installed")
from starlette.testclient import TestClient

from dqe_jax.search.index import open_index
from dqe_jax.serving.app import Service, make_app
from dqe_jax.serving.server import listen, make_server
from dqe_jax.serving.settings import Access, Limits
from dqe_jax.utils.errors import UserError

HOST = "http://localhost:8000"
GOOD = {"references": [{"id": "000.png"}], "text": "in red", "k": 2}
LIMITS = Limits(upload_bytes=300_000, json_bytes=60_000, body_seconds=1.0, header_seconds=1.0)


@pytest.fixture(scope="module")
def service(index, tmp_path_factory):
    made = Service(index, limits=LIMITS, log=tmp_path_factory.mktemp("hostile") / "log.jsonl")
    yield made
    made.batcher.close()


@pytest.fixture(scope="module")
def client(service):
    with TestClient(make_app(service), base_url=HOST, raise_server_exceptions=False) as made:
        yield made


def check(answer, place, statuses=range(400, 500)):
    """An answer that refuses, in one sentence, and tells nothing of the machine."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:300])
    told = answer.text
    for word in (str(place), "Traceback", "site-packages", ".py", "0x"):
        assert word not in told, told[:300]
    assert answer.headers["x-content-type-options"] == "nosniff"
    if answer.headers.get("content-type") == "application/json" and answer.status_code >= 400:
        assert set(answer.json()) == {"error"}


def alive(client):
    assert client.post("/search", json=GOOD).status_code == 200


# --- Bodies that are no search --------------------------------------------------------------------

DEEP = 15_000
BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"1e999",
    b'"text"',
    b"{",
    b'{"references":',
    b"\xff\xfe\x00",
    b"\x00" * 100,
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * 9_000 + b"1" + b"}" * 9_000,
    b'{"references": [{"id": "000.png"}], "text": "\\ud800"}',
    b'{"references": [{"id": "000.png"}], "k": ' + b"9" * 5_000 + b"}",
    b"NaN",
    b'{"references": [{"id": "000.png"}], "weights": {"color": NaN}}',
    b'{"references": [{"id": "000.png"}], "weights": {"color": Infinity}}',
    b'{"references": [{"id": "000.png"}], "weights": {"color": 1e400}}',
]
NAMES = [
    "../secret.png",
    "../../etc/passwd",
    "/etc/passwd",
    "..\\secret.png",
    "more & more/../../secret.png",
    "....//secret.png",
    "000.png/../../secret.png",
    "000.png\0.jpg",
    "file:///etc/passwd",
    "http://127.0.0.1/",
    "gs://bucket/a.png",
    "\\\\host\\share",
    "C:\\windows",
    "~/.ssh/id_rsa",
    "%2e%2e%2fsecret.png",
    "000.png ",
    " 000.png",
    "000.PNG",
    "０００.png",
    "\u202e000.png",
    "🙂" * 50,
    "a" * 4_096,
    "$(id)",
    "`id`",
    "';--",
    "<script>alert(1)</script>",
    "{{7*7}}",
    "\r\nset-cookie: a=b",
    ".",
    "..",
    "/",
    "//",
    "more & more",
    "more & more/",
]
CHANGES = [
    *({"references": x} for x in (None, [], {}, "000.png", [None], [{}], [[]], [1], [{"id": 1}])),
    {"references": [{"id": "000.png", "upload": "0" * 32}]},
    {"references": [{"id": "000.png"}] * 5},
    {"references": [{"path": "/etc/passwd"}]},
    {"references": [{"upload": "../secret"}]},
    {"references": [{"upload": "0" * 31}]},
    {"references": [{"upload": "G" * 32}]},
    {"references": [{"id": ""}]},
    *({"text": x} for x in (None, 1, [], {}, True, "a" * 1_001, ["in red"])),
    *({"k": x} for x in (0, -1, 101, 10**30, 1.5, "3", None, True, [])),
    *({"weights": x} for x in ([], {"nothing": 1}, {"color": -1}, {"color": "2"}, {"color": None})),
    {"weights": {"color": 1e30}},
    {"weights": {str(i): 1 for i in range(101)}},
    *({"exclude": x} for x in ("000.png", ["../secret.png"], [1], ["000.png"] * 501)),
    *({"rejected": x} for x in (["nothing.png"], ["000.png"] * 101, {}, [None])),
    *({"filter": x} for x in ([], {"nothing": 1}, {"price": "a"}, {"price": {"least": "1"}})),
    {"filter": {"brand": {"least": 1}}},
    {"filter": {"brand": {"$ne": ""}}},
    {"filter": {"price": {"least": 1, "more": 2}}},
    {"filter": {"price": [[1]]}},
    {"filter": {"__class__": "x"}},
    *({"earlier": x} for x in ([1], [{}], [{"references": [], "text": "a"}], "x")),
    {"earlier": [{"references": [{"id": "000.png"}], "text": "a"}] * 9},
    {"earlier": [{"references": [{"id": "../secret.png"}], "text": "a"}]},
    {"include_reference": "yes"},
    {"unknown": 1},
    {"__proto__": {}},
]
# Texts that are odd and allowed: they are answered.
TEXTS = [
    "",
    " ",
    "a" * 1_000,
    "🙂" * 500,
    "\u0000",
    "\u202e\u200b\ufeff",
    "in\nred\r\n",
    "<script>alert(1)</script>",
    "'; DROP TABLE images; --",
    "${jndi:ldap://x}",
    "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "في اللون الأحمر",
    "{0.__class__}",
    "%s%n%x",
    "-1",
    "]]>",
]


def post_body(client, body):
    return client.post("/search", content=body, headers={"content-type": "application/json"})


def send_change(client, change):
    """A search with one thing changed; sent as text, so that any value can be."""
    return post_body(client, json.dumps({**GOOD, **change}).encode())


def few(items, every=7):
    """Some of these in the fast suite; all of them are sent by the slow one."""
    return items[::every]


@pytest.mark.parametrize("body", few(BODIES, 4))
def test_some_bodies(client, place, body):
    check(post_body(client, body), place)


@pytest.mark.parametrize("name", few(NAMES))
def test_some_names(client, place, name):
    for answer in by_name(client, name):
        check(answer, place)


@pytest.mark.parametrize("change", few(CHANGES))
def test_some_changes(client, place, change):
    check(send_change(client, change), place)


def by_name(client, name):
    """What asks for an image of this name."""
    import urllib.parse

    quoted = urllib.parse.quote(name, safe="")
    yield send_change(client, {"references": [{"id": name}]})
    yield send_change(client, {"exclude": [name]})
    if name not in ("", ".", "..", "/", "//"):
        yield client.get(f"/images/{quoted}?size=large")
    line = {"kind": "pick", "conversation": "c", "turn": 0, **GOOD, "image": name}
    del line["k"]
    yield post_to(client, "/feedback", line)


def post_to(client, path, content):
    headers = {"content-type": "application/json"}
    return client.post(path, content=json.dumps(content).encode(), headers=headers)


@pytest.mark.slow
def test_all_that_is_no_search(client, place):
    """More than two hundred requests in a row, in any order."""
    sent = 0
    asks = [
        *(lambda body=body: [post_body(client, body)] for body in BODIES),
        *(lambda name=name: list(by_name(client, name)) for name in NAMES),
        *(lambda change=change: [send_change(client, change)] for change in CHANGES),
    ]
    random.Random(0).shuffle(asks)
    for ask in asks:
        for answer in ask():
            check(answer, place)
            sent += 1
    alive(client)
    assert sent > 200
    for text in TEXTS:
        answer = send_change(client, {"text": text})
        assert answer.status_code == 200, (text, answer.text)
    alive(client)


# --- Images that are none -------------------------------------------------------------------------


def encoded(kind, size=(64, 64), **options):
    data = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


def chunk(kind, data):
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_of(width, height, data=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def bad_images():
    jpeg, png, webp = (encoded(kind) for kind in ("JPEG", "PNG", "WEBP"))
    yield from (jpeg[: len(jpeg) // 3], png[:50], webp[:30], jpeg[:2], png[:8])
    yield b""
    yield b"\x00" * 1_000
    yield b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    yield b"<!doctype html><script>alert(1)</script>"
    yield b"GIF89a" + b"\x01\x00" * 50
    yield b"%PDF-1.7\n"
    yield b"PK\x03\x04" + b"\x00" * 100
    yield b"#!/bin/sh\nid\n"
    yield b"\x7fELF" + b"\x00" * 200
    yield encoded("BMP")
    yield encoded("TIFF")
    yield encoded("GIF")
    yield encoded("PPM")
    yield png_of(100_000, 100_000)
    yield png_of(2**31 - 1, 2**31 - 1)
    yield png_of(0, 0)
    yield png_of(10_001, 1, b"\x00" * 30_004)
    yield png_of(20_000, 20_000, b"\x00" * 1_000)
    yield png_of(64, 64, b"\x00" * 10)
    bomb = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(bomb, "PNG")
    yield bomb.getvalue()
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"a" * 100_000_000))
    yield png[:33] + text  # a bomb of text, and nothing behind it
    rng = random.Random(2)
    for kind in (jpeg, png, webp):
        for _ in range(5):  # damaged heads
            data = bytearray(kind)
            for place in range(2, 40):
                data[place] = rng.randrange(256)
            yield bytes(data)


def test_images_that_are_none(client, place):
    for data in bad_images():
        answer = client.post("/uploads", content=data, headers={"content-type": "image/png"})
        check(answer, place)
    for kind in ("text/html", "application/json", "multipart/form-data", "", "image/"):
        answer = client.post("/uploads", content=encoded("PNG"), headers={"content-type": kind})
        check(answer, place, [415])
    alive(client)


def test_damaged_images_are_refused_or_read(client, place):
    """Bytes that are changed anywhere: Pillow may read them, and nothing else may happen."""
    rng = random.Random(3)
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(kind)
        for _ in range(6):
            data = bytearray(whole)
            for _ in range(8):
                data[rng.randrange(len(data))] = rng.randrange(256)
            answer = client.post(
                "/uploads", content=bytes(data), headers={"content-type": "image/jpeg"}
            )
            check(answer, place, [200, 422])
    alive(client)


# --- Size, methods and places ---------------------------------------------------------------------


def test_too_much_is_refused(client, place):
    huge = b'{"text": "' + b"a" * 100_000 + b'"}'
    check(post_body(client, huge), place, [413])
    check(client.post("/uploads", content=b"\xff" * 400_000), place, [413])
    kind = {"content-type": "image/png"}
    for length in ("999999999999", "-1", "1e3", "0x10", "9" * 40):
        headers = {**kind, "content-length": length}
        check(client.post("/uploads", content=b"", headers=headers), place, [413])

    def endless():
        while True:
            yield b"\x00" * 60_000

    check(client.post("/uploads", content=itertools.islice(endless(), 20)), place, [413])
    many = [{"id": "000.png"}] * 5_000
    check(send_change(client, {"references": many}), place, [413, 422])
    alive(client)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "X"])
def test_other_methods(client, place, method):
    check(client.request(method, "/search"), place, [405])


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static//etc/passwd",
        "/static/....//app.py",
        "/static/",
        "/static",
        "/.git/config",
        "/images/../secret.png",
        "/images/%2e%2e%2fsecret.png",
        "/images/..%252fsecret.png",
        "/images/%00",
        "/images/000.png%00.jpg",
        "/images/%ff%fe",
        "/images?first=-1",
        "/images?count=1000000",
        "/images?first=a",
        "/images/000.png?size=../large",
        "/uploads/../../secret.png",
        "/uploads/%2e%2e",
        "/feedback",
        "/nothing",
        "/redoc",
        "/search",
        "/" + "a" * 5_000,
    ],
)
def test_places_that_are_not_there(client, place, path):
    check(client.get(path), place)


def test_a_link_that_was_made_since_leads_nowhere(place, index, client):
    """The index knows the image; its file was replaced by a link out of the folder."""
    file = place / "photos" / "038.png"
    data = file.read_bytes()
    index.model.index(place / "photos", output=place / "bare", keep_features=False)
    file.unlink()
    file.symlink_to(place / "secret.png")
    try:
        answer = client.get("/images/038.png?size=large")
        assert answer.status_code == 422
        assert "leads out of the folder" in answer.text
        # The index keeps what the model made of the image: the file is not looked at.
        answer = send_change(client, {"references": [{"id": "038.png"}]})
        assert answer.status_code == 200
        assert str(place) not in answer.text
        bare = open_index(place / "bare", model=index.model)
        with pytest.raises(UserError, match="leads out of the folder"):
            bare.known("038.png")
    finally:
        file.unlink()
        file.write_bytes(data)


# --- Over sockets ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port(service):
    listening = listen("127.0.0.1", 0)
    server = make_server(service, Access())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()
    listening.close()


def raw(port, data, wait=10.0):
    """What the server says to these bytes, until it closes or waits for more."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.settimeout(wait)
        got = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65_536):
                got += part
        except OSError:
            pass
        return got


def works(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", "/search", json.dumps(GOOD), {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    answer.read()
    connection.close()


HEAD = b"POST /search HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [
        b"\x00\xff\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 50_000 + b"\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 500_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncookie: " + b"a=b;" * 10_000 + b"\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        HEAD + b"transfer-encoding: gzip\r\n\r\n",
        HEAD + b"content-length: -5\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nhost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    ],
)
def test_bytes_that_are_no_request(port, place, data):
    got = raw(port, data, wait=3.0)
    assert str(place).encode() not in got
    assert b"Traceback" not in got
    works(port)


@pytest.mark.slow
def test_slow_clients_are_let_go(port):
    """A body that does not come, a head that does not come, and many that say nothing."""
    began = time.monotonic()
    got = raw(port, HEAD + b"content-length: 100\r\n\r\n{", wait=10.0)
    assert got.startswith(b"HTTP/1.1 408")
    assert raw(port, b"GET / HTTP/1.1\r\nho", wait=10.0) == b""
    assert time.monotonic() - began < 9
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    works(port)
    time.sleep(1.5)
    for connection in silent:
        connection.settimeout(2)
        assert connection.recv(1) == b""  # it was closed
        connection.close()
    works(port)


@pytest.mark.slow
def test_a_hundred_megabytes_of_text_are_not_read(port):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
    piece, sent = b"10000\r\n" + b"a" * 65_536 + b"\r\n", 0
    try:
        while sent < 100_000_000:
            connection.sendall(piece)
            sent += 65_536
    except OSError:
        pass
    assert sent < 20_000_000
    connection.close()
    works(port)


@pytest.mark.slow
def test_clients_that_go_away_leave_nothing_behind(port, service):
    body = json.dumps(GOOD).encode()
    head = HEAD + b"content-length: %d\r\n\r\n" % len(body)
    for cut in range(0, 60, 2):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(head + body[: len(body) - cut])
        connection.close()
    works(port)
    time.sleep(2.5)
    counted = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    counted.request("GET", "/metrics")
    assert counted.getresponse().status == 200
    counted.close()
    works(port)
