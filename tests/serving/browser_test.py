"""The page in a real browser: Chromium, driven by Playwright, where both are installed."""

import contextlib
import importlib.util
import io
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from dqe_jax.data import feedback
from dqe_jax.serving.app import Service
from dqe_jax.serving.server import make_server
from dqe_jax.serving.settings import Access, Limits

pytestmark = pytest.mark.slow

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
# A photo that is dropped or pasted: made in the page, as a browser gives it.
GIVE = """async ([kind, bytes, type, name]) => {
  const file = new File([new Uint8Array(bytes)], name, {type});
  const data = new DataTransfer();
  data.items.add(file);
  const event = kind === "paste"
    ? new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true})
    : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
  document.getElementById("drop").dispatchEvent(event);
}"""


def expect(locator):
    """Playwright's own waiting check, imported where it is installed. Its wait for a JavaScript
    condition would evaluate text, which the page forbids."""
    from playwright import sync_api

    return sync_api.expect(locator)


@contextlib.contextmanager
def running(service, access=Access(), port=0):  # noqa: B008 (frozen)
    """A server in a thread: gives its address and its port."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        server = make_server(service, access)
        server.config.timeout_graceful_shutdown = 2
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        number = listening.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{number}/", number
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def service(index, tmp_path):
    made = Service(
        index, limits=Limits(upload_bytes=200_000), log=tmp_path / "log.jsonl", demo="For show."
    )
    made.warm_up()
    yield made
    made.batcher.close()


def opened(browser, address, context=None, **options):
    """The page in a tab, and what went wrong there: errors, and requests to other hosts."""
    context = context or browser.new_context(**options)
    tab, wrong = context.new_page(), []
    tab.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    own = (address.partition("#")[0], "blob:", "data:")
    tab.on("request", lambda r: None if r.url.startswith(own) else wrong.append(r.url))
    tab.goto(address)
    tab.wait_for_selector("html[data-ready=yes]")
    return tab, wrong


def photo(seed=0):
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (60, 60, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return list(data.getvalue())


def give(tab, kind="drop", data=None, type="image/png", name="mine.png"):
    tab.evaluate(GIVE, [kind, data or photo(), type, name])


def found(tab):
    """Ids of what is shown, after the search has ended."""
    tab.wait_for_selector("body:not(.busy) #results li")
    return tab.eval_on_selector_all("#results li", "all => all.map(one => one.dataset.id)")


def ask(tab, text):
    tab.fill("#text", text)
    with tab.expect_response("**/search"):
        tab.press("#text", "Enter")
    return found(tab)


def trouble(tab):
    tab.wait_for_selector("#trouble:not([hidden])")
    return tab.inner_text("#trouble-text")


def test_three_turns_and_a_step_back(browser, service):
    with running(service) as (address, _):
        tab, wrong = opened(browser, address)
        assert "40 images" in tab.inner_text("#about")
        assert tab.inner_text("#demo") == "For show."
        assert "start from one of these" in tab.inner_text("#empty")
        assert tab.locator("#samples button").count() == 12
        give(tab)
        similar = found(tab)
        assert len(similar) == 24
        assert tab.inner_text("#reference-name") == "your photo"
        first = ask(tab, "make the red zork blue")
        assert "The model ignores 'zork'" in tab.inner_text("#warnings")
        trails = []
        for turn, text in enumerate(("in red", "in blue"), 2):
            with tab.expect_response("**/search"):
                tab.locator("#results .look").nth(1).click()
            found(tab)
            assert tab.evaluate("document.activeElement.id") == "text"
            assert tab.locator("#trail li").count() == turn
            trails.append(ask(tab, text))
        assert tab.locator("#trail [aria-current=step]").inner_text() == "in blue"
        with tab.expect_response("**/search"):
            tab.locator("#trail button").nth(1).click()
        assert found(tab) == trails[0]
        assert tab.input_value("#text") == "in red"
        with tab.expect_response("**/search"):
            tab.locator("#trail button").first.click()
        assert found(tab) == first
        assert tab.is_hidden("#trail-nav")
        tab.click("#new")
        assert tab.is_visible("#empty")
        assert wrong == []


def test_sliders_and_filters_search_again(browser, service, index):
    with running(service) as (address, _):
        tab, wrong = opened(browser, address)
        tab.locator("#samples button").first.click()
        found(tab)
        assert tab.is_hidden("#weights")  # nothing is weighed without a text
        before = ask(tab, "make the red circle blue")
        scores = tab.locator("#results .facts b").all_inner_texts()
        sliders = tab.locator("#sliders input")
        assert sliders.count() == len(index.model.attribute_names)
        with tab.expect_response("**/search") as response:
            sliders.first.fill("4")
        sent = response.value.request.post_data_json
        assert sent["weights"] == {index.model.attribute_names[0]: 4}
        after = found(tab)
        tab.wait_for_timeout(50)
        assert tab.locator("#results .facts b").all_inner_texts() != scores
        for slider in sliders.all()[1:]:
            with tab.expect_response("**/search"):
                slider.fill("0")
        after = found(tab)
        assert after != before
        sliders.first.focus()
        with tab.expect_response("**/search"):
            tab.keyboard.press("ArrowLeft")
        with tab.expect_response("**/search"):
            tab.click("#reset")
        assert found(tab) == before
        tab.click("#filters summary")
        with tab.expect_response("**/search"):
            tab.get_by_label("brand").select_option("North")
        assert all("more & more" in id_ for id_ in found(tab))
        with tab.expect_response("**/search"):
            tab.get_by_label("price, at least").fill("1000")
            tab.keyboard.press("Tab")
        expect(tab.locator("#status")).to_have_text(re.compile("^No image"))
        assert tab.locator("#results li").count() == 0
        with tab.expect_response("**/search"):
            tab.click("#clear")
        assert found(tab) == before
        assert wrong == []


def test_picks_and_rejections_are_kept(browser, service):
    with running(service) as (address, _):
        tab, wrong = opened(browser, address)
        give(tab, "paste")
        found(tab)
        first = ask(tab, "in red")
        yes = tab.get_by_role("button", name=f"This one: {first[2]}", exact=True)
        with tab.expect_response("**/feedback"):
            yes.click()
        assert yes.get_attribute("aria-pressed") == "true"
        expect(tab.locator("#status")).to_have_text(re.compile("^Noted"))
        with tab.expect_response("**/feedback"), tab.expect_response("**/search"):
            tab.get_by_role("button", name=f"Not this one: {first[0]}", exact=True).click()
        second = found(tab)
        assert first[0] not in second
        assert "1 image is not what you mean." in tab.inner_text("#rejections")
        clicks = feedback.read_log(service.log).clicks
        assert [(c.kind, c.image) for c in clicks] == [("pick", first[2]), ("reject", first[0])]
        assert clicks[0].shown == tuple(first)
        key = clicks[0].references[0].removeprefix("upload:")
        assert feedback.upload_file(service.log, key).is_file()
        with tab.expect_response("**/feedback"), tab.expect_response("**/search"):
            tab.click("#undo")
        assert found(tab) == first
        (judged,) = feedback.judged(feedback.read_log(service.log).clicks)
        assert (judged.picked, judged.rejected) == ((first[2],), ())
        assert wrong == []


def test_bad_files_end_in_a_sentence(browser, service):
    with running(service) as (address, _):
        tab, wrong = opened(browser, address)
        give(tab, data=list(b"no image at all"), name="bad.png")
        assert trouble(tab) == "The image is no JPEG, PNG or WebP: give a JPEG, PNG or WebP image."
        tab.click("#dismiss")
        assert tab.is_hidden("#trouble")
        give(tab, data=list(b"text"), type="text/plain", name="notes.txt")
        assert "notes.txt is no image" in trouble(tab)
        give(tab, data=[0] * 300_000, name="huge.png")
        assert "huge.png has 0.3 MB" in trouble(tab)
        bomb = io.BytesIO()
        Image.new("1", (9_000, 9_000)).save(bomb, "PNG")
        give(tab, data=list(bomb.getvalue()), name="bomb.png")
        expect(tab.locator("#trouble-text")).to_contain_text("9000")
        give(tab)  # and one that is well
        assert len(found(tab)) == 24
        # The browser itself tells of answers with an error status.
        assert all("status of 422" in said for said in wrong)


def test_tabs_are_apart_and_a_reload_goes_on(browser, service):
    with running(service) as (address, _):
        context = browser.new_context()
        one, wrong = opened(browser, address, context)
        two, other_wrong = opened(browser, address, context)
        give(one)
        found(one)
        first = ask(one, "in red")
        two.locator("#samples button").first.click()
        found(two)
        second = ask(two, "in blue")
        assert found(one) == first
        with one.expect_response("**/search"):
            one.reload()
        one.wait_for_selector("html[data-ready=yes]")
        assert found(one) == first
        assert one.input_value("#text") == "in red"
        assert found(two) == second
        # The server was started again, and knows the photo no more.
        service.uploads._held.clear()
        one.reload()
        assert "give it again" in trouble(one)
        assert one.is_visible("#empty")
        assert [said for said in wrong if "404" not in said] == []
        assert other_wrong == []


def test_a_server_that_is_gone_is_told_and_tried_again(browser, service):
    with running(service) as (address, port):
        tab, _ = opened(browser, address)
        tab.locator("#samples button").first.click()
        found(tab)
    tab.fill("#text", "in red")
    tab.press("#text", "Enter")
    assert "The server does not answer" in trouble(tab)
    again = Service(service.index, limits=service.limits)
    with running(again, port=port):
        with tab.expect_response("**/search"):
            tab.click("#again")
        assert len(found(tab)) == 24
        assert tab.is_hidden("#trouble")
    again.batcher.close()


def test_a_token_is_entered_once(browser, service):
    token = "abcdefgh12345678"
    with running(service, Access(token=token)) as (address, _):
        tab = browser.new_context().new_page()
        tab.goto(address)
        tab.wait_for_selector("#token-form:not([hidden])")
        assert tab.is_hidden("#main")
        tab.fill("#token", "wrong")
        tab.press("#token", "Enter")
        assert "not the token" in trouble(tab)
        tab.fill("#token", token)
        tab.press("#token", "Enter")
        tab.wait_for_selector("html[data-ready=yes]")
        assert tab.locator("#samples img").first.evaluate("i => i.decode().then(() => true)")
        tab, wrong = opened(browser, f"{address}#token={token}")
        assert tab.url == address  # nobody sees it over a shoulder
        assert wrong == []


def test_all_of_it_works_without_a_mouse(browser, service):
    with running(service) as (address, _):
        tab, wrong = opened(browser, address)
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        seen = []
        for _ in range(40):
            tab.keyboard.press("Tab")
            label = tab.evaluate("document.activeElement.getAttribute('aria-label') || ''")
            seen.append(label)
            if label.startswith("Start from"):
                break
        with tab.expect_response("**/search"):
            tab.keyboard.press("Enter")
        found(tab)
        assert tab.evaluate("document.activeElement.id") == "text"
        tab.keyboard.type("in red")
        with tab.expect_response("**/search"):
            tab.keyboard.press("Enter")
        found(tab)
        tab.locator("#results .look").first.focus()
        with tab.expect_response("**/search"):
            tab.keyboard.press("Enter")
        found(tab)
        assert tab.locator("#trail li").count() == 2
        assert wrong == []


SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_it_can_be_read_by_everyone(browser, service, scheme, size, tmp_path):
    """axe-core finds nothing serious, and nothing scrolls sideways; a picture is kept."""
    width, height = SIZES[size]
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme}
    with running(service) as (address, _):
        tab, wrong = opened(browser, address, **options)
        assert serious(tab) == []
        tab.locator("#samples button").first.click()
        found(tab)
        ask(tab, "make the red zork blue")
        tab.locator("#results .look").first.click()
        found(tab)
        ask(tab, "in red")
        if not tab.locator("#filters[open]").count():
            tab.click("#filters summary")
        tab.locator("#results [data-pick]").first.click()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert serious(tab) == []
        tab.screenshot(path=tmp_path / f"{size}-{scheme}.png", full_page=size == "phone")
        tab.goto(f"{address}docs")
        tab.wait_for_selector("html[data-ready=yes]")
        assert "POST /search" in tab.inner_text("#routes")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert serious(tab) == []
        assert wrong == []


def serious(tab):
    """What axe-core finds that is serious or critical; nothing where it is not installed."""
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None:
        return []
    script = Path(spec.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    tab.evaluate(script)  # not as a script of the page: its policy refuses that
    results = tab.evaluate("axe.run()")
    return [
        (one["id"], [node["html"][:120] for node in one["nodes"]])
        for one in results["violations"]
        if one["impact"] in ("serious", "critical")
    ]
