"""The REST interface: what it answers, whom it refuses, and that it ends cleanly."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="FastAPI is not installed")
from starlette.testclient import TestClient

from dqe_jax.data import feedback
from dqe_jax.search.asks import Ask
from dqe_jax.serving import schemas
from dqe_jax.serving.app import STATIC, Service, make_app
from dqe_jax.serving.batcher import Batcher, BusyError, ClosedError
from dqe_jax.serving.guard import is_loopback
from dqe_jax.serving.references import Newest
from dqe_jax.serving.server import serve
from dqe_jax.serving.settings import Access, Limits
from dqe_jax.testing.small_runs import compiles_quickly
from dqe_jax.utils.errors import UserError

HOST = "http://localhost:8000"


@pytest.fixture(scope="module")
def service(index, tmp_path_factory):
    made = Service(
        index,
        limits=Limits(upload_bytes=100_000, json_bytes=50_000),
        log=tmp_path_factory.mktemp("log") / "feedback.jsonl",
    )
    yield made
    made.batcher.close()


@pytest.fixture
def client(service):
    with TestClient(make_app(service), base_url=HOST) as made:
        yield made


def png(seed=0, size=(40, 30)):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def search(client, status=200, **request):
    answer = client.post("/search", json={"references": [{"id": "000.png"}], **request})
    assert answer.status_code == status, answer.text
    return answer.json()


def test_it_finds_what_the_python_interface_finds(client, index):
    request = {"text": "make the red zork blue", "k": 7, "weights": {"color": 2.0}}
    got = search(client, **request, filter={"price": {"least": 3}}, exclude=["004.png"])
    want = index.search(
        *("000.png", request["text"]),
        **{"k": 7, "weights": {"color": 2.0}, "filter": {"price": (3, None)}},
        exclude=["004.png"],
    )
    assert [one["id"] for one in got["results"]] == [one.id for one in want]
    np.testing.assert_allclose(
        [one["score"] for one in got["results"]], [one.score for one in want], atol=1e-5
    )
    assert got["warnings"] == list(want.warnings)
    assert "zork" in got["warnings"][0]
    assert got["attribute_weights"] == pytest.approx(dict(want.attribute_weights), abs=1e-5)
    assert got["results"][0]["metadata"].keys() == {"price", "brand"}
    text = json.dumps(got)
    assert "/photos" not in text
    assert "path" not in text
    brands = search(client, text="in red", filter={"brand": ["North"]}, k=100)["results"]
    assert {one["metadata"]["brand"] for one in brands} == {"North"}


def test_an_image_that_is_given_is_searched_with(client, index, place):
    data = png()
    taken = client.post("/uploads", content=data, headers={"content-type": "image/png"}).json()
    assert (taken["width"], taken["height"]) == (30, 40)
    own = {"references": [{"upload": taken["upload"]}]}
    got = search(client, **own, text="in red", k=5)
    want = index.search(np.array(Image.open(io.BytesIO(data))), "in red", k=5)
    assert [one["id"] for one in got["results"]] == [one.id for one in want]
    assert client.get(f"/uploads/{taken['upload']}").headers["content-type"] == "image/jpeg"
    # A copy of an image of the index is not found.
    copy = (place / "photos" / "002.png").read_bytes()
    key = client.post("/uploads", content=copy, headers={"content-type": "image/png"}).json()
    got = search(client, references=[{"upload": key["upload"]}], k=100)
    assert "002.png" not in [one["id"] for one in got["results"]]
    assert len(got["results"]) == 39
    gone = search(client, 404, references=[{"upload": "0" * 32}])
    assert gone["error"] == "The image that you gave is gone: give it again."


def test_a_conversation_moves_the_query(client, index):
    first = search(client, text="in red", k=10)["results"]
    rejected = [one["id"] for one in first[:3]]
    second = search(client, text="in red", k=10, rejected=rejected)["results"]
    assert not {one["id"] for one in second} & set(rejected)
    # Scores are of the moved query.
    scores = {one["id"]: one["score"] for one in first}
    assert any(abs(scores[o["id"]] - o["score"]) > 1e-4 for o in second if o["id"] in scores)
    turns = [{"references": [{"id": "002.png"}], "text": "make it blue"}]
    third = search(client, text="in red", k=10, earlier=turns)["results"]
    from dqe_jax.search.asks import Turn

    want = index.search("000.png", "in red", earlier=[Turn(("002.png",), "make it blue")])
    assert [one["id"] for one in third] == [one.id for one in want]


def test_images_and_what_is_served(client, index):
    about = client.get("/about").json()
    assert about["images"] == 40
    assert about["attributes"] == list(index.model.attribute_names)
    assert about["largest_factor"] == 4  # of a sum
    price, brand = about["columns"]
    assert (price["kind"], price["least"], price["most"]) == ("numbers", 0, 39)
    assert brand["values"] == ["North", "South"]
    listing = client.get("/images", params={"first": 38, "count": 10}).json()
    assert listing == {"images": list(index.ids[38:]), "total": 40}
    one = client.get("/images/more%20%26%20more/001.png")
    assert Image.open(io.BytesIO(one.content)).format == "JPEG"
    assert client.get("/images/000.png?size=large").status_code == 200
    assert client.get("/images/000.png?size=huge").status_code == 422
    assert client.get("/health").json() == {"status": "ok", "images": 40}
    api = client.get("/openapi.json").json()
    assert {"/search", "/images/{id}", "/uploads", "/feedback", "/metrics"} <= set(api["paths"])
    counted = client.get("/metrics").text
    assert 'dqe_requests_total{route="/search",status="200"}' in counted
    assert "dqe_batch_searches_bucket" in counted
    assert "dqe_index_images 40.0" in counted


def test_the_page_loads_nothing_from_elsewhere(client):
    for name in ("/", "/docs"):
        page = client.get(name)
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
    assert client.get("/").headers["x-frame-options"] == "DENY"
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        links = text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in links
        assert "https://" not in links
        if file.suffix == ".html":
            assert "style=" not in text
            assert "<script>" not in text
        assert client.get(f"/static/{file.name}").status_code == 200


def test_clicks_are_logged(client, service):
    key = client.post("/uploads", content=png(3), headers={"content-type": "image/png"}).json()
    line = {
        "kind": "pick",
        "image": "002.png",
        "conversation": "c1",
        "turn": 0,
        "references": [{"upload": key["upload"]}],
        "text": "in red",
        "shown": ["002.png", "004.png"],
    }
    assert client.post("/feedback", json=line).json() == {"logged": True}
    other = {**line, "kind": "reject", "image": "004.png"}
    assert client.post("/feedback", json=other).status_code == 200
    log = feedback.read_log(service.log)
    assert [click.kind for click in log.clicks][-2:] == ["pick", "reject"]
    assert feedback.upload_file(service.log, key["upload"]).read_bytes() == png(3)
    (judged,) = feedback.judged(log.clicks)
    assert (judged.picked, judged.rejected) == (("002.png",), ("004.png",))
    assert judged.references == (f"upload:{key['upload']}",)
    unknown = client.post("/feedback", json={**line, "image": "../secret.png"})
    assert unknown.status_code == 404
    service.log.parent.joinpath("dir").mkdir()
    before, service.log = service.log, service.log.parent / "dir"
    try:
        full = client.post("/feedback", json=line)
    finally:
        service.log = before
    assert full.status_code == 507
    assert str(before.parent) not in full.text


# --- Who may ask ----------------------------------------------------------------------------------


def test_a_token_is_asked_for(service):
    token = "abcdefgh12345678"
    app = make_app(service, access=Access(token=token, hosts=("*",)))
    client = TestClient(app, base_url="http://search.example")
    assert client.get("/").status_code == 200
    assert client.get("/health").status_code == 200
    for path in ("/about", "/images", "/images/000.png", "/metrics", "/uploads/" + "0" * 32):
        assert client.get(path).status_code == 401, path
    assert client.post("/search", json={}).status_code == 401
    own = {"authorization": f"Bearer {token}"}
    assert client.get("/about", headers=own).status_code == 200
    assert client.get("/about", headers={"authorization": "Bearer no"}).status_code == 401
    assert client.post("/session", headers={"authorization": "Bearer no"}).status_code == 401
    assert client.post("/session", headers=own).status_code == 204
    assert client.get("/about").status_code == 200  # by the cookie
    cookie = client.post("/session", headers=own).headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 400),
        ({"host": ""}, 400),
        ({"host": "127.0.0.1:9"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:9999"}, 403),
        ({"origin": HOST}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_sites_may_not_ask(client, headers, status):
    request = {"references": [{"id": "000.png"}], "text": "in red", "k": 1}
    answer = client.post("/search", json=request, headers=headers)
    assert answer.status_code == status, answer.text


def test_more_than_the_server_can_do_is_refused(index):
    release = threading.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(index, name)

        def __len__(self):
            return len(index)

        def answer(self, asks):
            assert release.wait(20)
            return index.answer(asks)

    service = Service(Slow(), limits=Limits(requests=3, seconds=1.0, batch=1))
    request = {"references": [{"id": "000.png"}], "text": "in red", "k": 1}
    with TestClient(make_app(service), base_url=HOST) as client:
        answers = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/search", json=request)))
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes == [503] * 3 + [504] * 3
        assert {a.headers.get("retry-after") for a in answers if a.status_code == 503} == {"1"}
        release.set()
        assert client.post("/search", json=request).status_code == 200
    service.batcher.close()


# --- Parts ----------------------------------------------------------------------------------------


def run_together(batcher, asks):
    async def every():
        return await asyncio.gather(*map(batcher.ask, asks), return_exceptions=True)

    return asyncio.run(every())


def test_searches_that_wait_are_answered_together():
    sizes, first = [], threading.Event()

    def answer(asks):
        if not first.is_set():
            first.set()
            time.sleep(0.2)  # others come meanwhile
        if any(ask.text == "bad" for ask in asks):
            raise UserError("bad") if len(asks) == 1 else ValueError("some are bad")
        return [ask.text for ask in asks]

    batcher = Batcher(answer, most=4, waiting=100, counted=sizes.append)
    asks = [Ask((), "bad" if i == 5 else str(i)) for i in range(10)]
    found = run_together(batcher, asks)
    assert [x for i, x in enumerate(found) if i != 5] == [str(i) for i in range(10) if i != 5]
    assert isinstance(found[5], UserError)
    assert max(sizes) == 4
    assert sum(sizes) == 10
    batcher.close()
    assert isinstance(run_together(batcher, asks[:1])[0], ClosedError)


def test_too_many_that_wait_are_refused():
    release = threading.Event()

    def answer(asks):
        release.wait(20)
        return [0] * len(asks)

    batcher = Batcher(answer, most=1, waiting=2)

    async def crowd():
        tasks = [asyncio.ensure_future(batcher.ask(Ask((), "x")))]
        await asyncio.sleep(0.1)
        tasks += [asyncio.ensure_future(batcher.ask(Ask((), "x"))) for _ in range(4)]
        await asyncio.sleep(0.1)
        release.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(crowd())
    assert found[:3] == [0, 0, 0]
    assert [type(x) for x in found[3:]] == [BusyError, BusyError]
    batcher.close()


def test_the_newest_are_kept():
    kept = Newest(2)
    for i in range(3):
        kept.put(i, str(i))
    assert kept.get(0) is None
    assert kept.get(1) == "1"
    kept.put(3, "3")
    assert kept.get(2) is None
    assert kept.get_or_make(1, lambda key: "new") == "1"
    assert kept.get_or_make(7, str) == "7"
    assert len(kept) == 2


def test_addresses():
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("example.com")
    with pytest.raises(UserError, match=r"--host=0\.0\.0\.0 can be reached .* give --token"):
        serve(None, host="0.0.0.0", port=0, access=Access())
    with pytest.raises(UserError, match="upload_bytes is 0"):
        Limits(upload_bytes=0)
    assert schemas.MOST == 100


# --- The command ----------------------------------------------------------------------------------


def start_command(place, *flags):
    """`dqe-jax serve` in a process of its own, and the address that it names."""
    env = os.environ | compiles_quickly() | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "dqe_jax", "serve", "--port=0", *flags],
        **{"cwd": place, "env": env, "stderr": subprocess.PIPE, "text": True},
    )
    for line in process.stderr:
        if line.startswith("Open http"):
            return process, line.split()[1]
    raise AssertionError(process.wait())


@pytest.mark.slow
def test_sigterm_answers_what_is_in_flight(place, index):
    process, address = start_command(place, f"--index={index.directory}", "--log=own.jsonl")
    request = {"references": [{"id": "000.png"}], "text": "in red", "k": 3}
    found, late = [], []

    def ask():
        one = urllib.request.Request(
            f"{address}search",
            json.dumps(request).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(one, timeout=60) as answer:
                found.append(len(json.load(answer)["results"]))
        except OSError as error:  # it came too late: the server takes no new requests
            late.append(error)

    try:
        ask()
        assert found, late
        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0
        assert "all requests were answered" in process.stderr.read()
    finally:
        process.kill()
    # Those that had reached the server by then were answered; none was cut off.
    assert len(found) + len(late) == 13
    assert set(found) == {3}
