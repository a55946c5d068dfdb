"""Photos by their addresses, from a server of this machine."""

import collections
import http.server
import io
import json
import threading
from pathlib import Path

import pytest
from etils import epath
from PIL import Image

from dqe_jax.data import downloads
from dqe_jax.data.annotations import fashioniq
from dqe_jax.data.prepare import download_photos, prepare_benchmark
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.testing import standins
from dqe_jax.utils.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "annotations" / "fashioniq"


def picture():
    content = io.BytesIO()
    Image.new("RGB", (6, 8), (200, 10, 10)).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture
def server():
    """A server's address, and how often each path was asked for."""
    asked = collections.Counter()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            kind, number = self.path.strip("/").split("-")[0], asked[self.path]
            status, body = 200, picture()
            if kind == "gone":
                status = 404
            elif kind == "busy":
                status = 503 if number < 3 else 200
            elif kind == "down":
                status = 500
            elif kind == "page":
                body = b"<html>sorry</html>"
            self.send_response(status)
            if kind == "busy":
                self.send_header("Retry-After", "7")
            # A connection that breaks in the middle of the first answer.
            self.send_header("Content-Length", str(len(body) + (kind == "cut" and number < 2)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def fetched(folder, addresses, at_hand=lambda name: False):
    waits = []
    found = downloads.fetch(
        addresses, epath.Path(folder), at_hand, per_second=1000, sleep=waits.append
    )
    return found, [wait for wait in waits if wait >= 1]


def test_photos_are_fetched_once(server, tmp_path):
    root, asked = server
    addresses = {
        "A": f"{root}/good-1",
        "B": f"{root}/good-1",  # the same picture
        "C": f"{root}/busy-1",
        "D": f"{root}/cut-1",
        "E": f"{root}/gone-1",
        "F": f"{root}/page-1",
        "G": "",
        "H": "file:///etc/passwd",
        "I": f"{root}/good-2",
        "J": f"{root}/down-1",
    }
    found, waits = fetched(tmp_path, addresses, lambda name: name == "I")
    assert (found.wanted, found.there, found.fetched) == (10, 1, 4)
    assert found.gone == {"E": "status 404", "F": "no image", "G": "no address", "H": "no address"}
    assert found.failed == {"J": "status 500"}
    assert {f.name for f in tmp_path.iterdir()} == {
        *(f"{name}.jpg" for name in "ABCD"),
        downloads.OVERVIEW,
    }
    assert all((tmp_path / f"{name}.jpg").read_bytes() == picture() for name in "ABCD")
    assert asked == {
        "/good-1": 1,
        "/busy-1": 3,
        "/cut-1": 2,
        "/gone-1": 1,
        "/page-1": 1,
        "/down-1": 4,
    }
    # The server's own wait, then one for the broken answer, then waits that double.
    assert waits == [7, 7, 1, 1, 2, 4]
    overview = json.loads((tmp_path / downloads.OVERVIEW).read_text())
    assert overview["gone"] == found.gone
    assert any("1 gone (status 404): E" in line for line in found.lines())

    # Again: only what failed is asked for.
    found, _ = fetched(tmp_path, addresses, lambda name: name == "I")
    assert (found.there, found.fetched) == (5, 0)
    assert asked["/good-1"] == asked["/gone-1"] == 1
    assert asked["/down-1"] == 8
    assert len(found.gone) == 4


def test_the_rate(server, tmp_path, monkeypatch):
    root, _ = server
    waits, now = [], [100.0]
    monkeypatch.setattr(downloads.time, "monotonic", lambda: now[0])
    addresses = {f"A{i}": f"{root}/good-{i}" for i in range(4)}
    downloads.fetch(
        *(addresses, epath.Path(tmp_path), lambda name: False),
        per_second=4,
        sleep=lambda seconds: (waits.append(seconds), now.__setitem__(0, now[0] + seconds)),
    )
    assert waits == pytest.approx([0, 0.25, 0.25, 0.25])


def test_a_dead_connection_ends_it(server, tmp_path):
    root, _ = server
    good = {"A": f"{root}/good-1"}
    dead = {f"B{i}": f"http://127.0.0.1:9/{i}" for i in range(30)}
    with pytest.raises(UserError, match=r"20 addresses in a row failed .*what was fetched stays"):
        fetched(tmp_path, good | dead)
    assert (tmp_path / "A.jpg").exists()
    assert len(json.loads((tmp_path / downloads.OVERVIEW).read_text())["failed"]) == 20


def test_a_prepared_fashioniq_from_addresses(server, tmp_path, monkeypatch):
    root, asked = server
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    raw = tmp_path / "raw"
    standins.small_fashioniq(raw, count=2, images=4)
    for path in (raw / "images").iterdir():
        path.unlink()
    for category in fashioniq.CATEGORIES:
        listed = json.loads((raw / "image_splits" / f"split.{category}.val.json").read_text())
        names = {image: f"{category[0].upper()}{i:09d}" for i, image in enumerate(listed)}
        for kind in ("image_splits/split", "captions/cap"):
            file = raw / f"{kind}.{category}.val.json"
            text = file.read_text()
            for old, new in names.items():
                text = text.replace(old, new)
            file.write_text(text)
        lines = [f"{name} \t {root}/good-{name}" for name in names.values()]
        if category == "dress":
            lines[3] = lines[3].replace("good", "gone")
        lines.append("../../x \t http://127.0.0.1/x")
        (raw / f"asin2url.{category}.txt").write_text("\n".join(lines) + "\n")
    addresses, malformed = fashioniq.read_addresses(RawFiles(raw))
    assert len(addresses) == 12
    assert malformed == [f"asin2url.{c}.txt:4" for c in fashioniq.CATEGORIES]
    found = prepare_benchmark(
        *("fashioniq", raw, tmp_path / "data"),
        image_size=16,
        splits=["val"],
        max_missing=0.5,
        num_workers=1,
        download=True,
        per_second=100,
    )
    assert sum(asked.values()) == 12
    assert len(list((raw / "images").glob("*.jpg"))) == 11
    assert found.splits["validation"].missing == 1
    with pytest.raises(UserError, match="--download: cirr has no list of addresses"):
        download_photos("cirr", raw, ("train",), per_second=1)


@pytest.mark.skipif(not REAL.is_dir(), reason="the published annotations are not here")
def test_the_published_addresses():
    addresses, malformed = fashioniq.read_addresses(RawFiles(REAL))
    assert not malformed
    assert len(addresses) == 74_381  # all images of all splits
    assert addresses["B00014NGF6"].endswith("/51AERD8SM8L._SY445_.jpg")
