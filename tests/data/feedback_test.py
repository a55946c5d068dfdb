"""The log of picks and rejections: it is written, read in spite of damage, and learned from."""

import json
import logging
import os
import random
import shutil

import numpy as np
import pytest
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, feedback, splits
from dqe_jax.data.feedback import Click, append, judged, read_log
from dqe_jax.data.feedback_split import with_feedback
from dqe_jax.data.splits import image_ids_of, known_positive_ids
from dqe_jax.testing.small_runs import small_config
from dqe_jax.utils.errors import UserError

CLICK = Click("pick", "c1", 0, "/photos", ("a.jpg",), "in red", "b.jpg", ("b.jpg", "c.jpg"))


def click(kind, image, *, text="in red", turn=0, conversation="c1", references=("a.jpg",)):
    return Click(kind, conversation, turn, "/photos", references, text, image)


def test_what_is_written_is_read(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    append(log, CLICK, {})
    other = click("reject", "ü\n🙂.jpg", references=("upload:abc",), text='say "x"')
    append(log, other, {"abc": b"image"})
    got = read_log(log).clicks
    assert [(c.kind, c.image, c.text, c.references, c.shown) for c in got] == [
        ("pick", "b.jpg", "in red", ("a.jpg",), ("b.jpg", "c.jpg")),
        ("reject", "ü\n🙂.jpg", 'say "x"', ("upload:abc",), ()),
    ]
    assert got[0].time.endswith("+00:00")
    assert feedback.upload_file(log, "abc").read_bytes() == b"image"
    assert log.read_text().count("\n") == 2


def test_damaged_lines_are_skipped_and_counted(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    append(log, CLICK, {})
    whole = json.loads(log.read_text())
    changed = [
        {"format": 2},
        {"kind": "like"},
        {"image": ""},
        {"image": 1},
        {"references": []},
        {"references": "a.jpg"},
        {"references": [1]},
        {"turn": "1"},
        {"turn": True},
        {"text": None},
        {"folder": "a\0b"},
        {"shown": {}},
    ]
    bad = [json.dumps({**whole, **change}).encode() for change in changed]
    bad += [json.dumps({k: x for k, x in whole.items() if k != name}).encode() for name in whole]
    bad += [b"{", b"[]", b"1", b"\xff\xfe", b"\x00\x01", b"[" * 100_000, b"a" * 2_100_000]
    with log.open("ab") as file:
        file.write(b"\n\n".join(bad) + b"\n" + json.dumps(whole).encode()[:40])
    append(log, CLICK, {})  # after a line that was cut short
    with caplog.at_level(logging.WARNING):
        got = read_log(log)
    assert [c.image for c in got.clicks] == ["b.jpg", "b.jpg"]
    assert got.skipped == len(bad) + 1
    assert "is not JSON" in caplog.text
    assert "lines skipped" in caplog.text


def test_random_damage_never_ends_the_reading(tmp_path):
    log = tmp_path / "log.jsonl"
    for i in range(20):
        append(log, click("pick", f"{i}.jpg"), {})
    data, rng = log.read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(10):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        log.write_bytes(damaged)
        try:
            got = read_log(log)
        except UserError:
            continue
        assert len(got.clicks) <= 20
        judged(got.clicks)


def test_logs_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="there is no log"):
        read_log(tmp_path / "nothing.jsonl")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="holds no clicks: it is empty"):
        read_log(tmp_path / "empty")
    (tmp_path / "bad").write_text("x\ny\n")
    with pytest.raises(UserError, match="none of its 2 lines can be read"):
        read_log(tmp_path / "bad")
    (tmp_path / "dir").mkdir()
    with pytest.raises(UserError, match=r"the log .*dir cannot be written"):
        append(tmp_path / "dir", CLICK, {})
    for place in (tmp_path / "dir", "/dev/null"):  # nor a pipe, which would be read for ever
        with pytest.raises(UserError, match="cannot be read: it is no regular file"):
            read_log(place)


def test_the_last_click_counts():
    clicks = [
        click("reject", "x.jpg"),
        click("pick", "x.jpg"),  # another mind
        click("pick", "y.jpg"),
        click("withdraw", "y.jpg"),
        click("reject", "z.jpg"),
        click("pick", "z.jpg", conversation="c2"),  # another user
        click("reject", "w.jpg", conversation="c2"),
        click("reject", "v.jpg", text="in blue", turn=1),
        click("withdraw", "u.jpg", text="in green"),
    ]
    red, blue = judged(clicks)
    assert (red.picked, red.rejected) == (("x.jpg", "z.jpg"), ("w.jpg",))
    assert (blue.text, blue.picked, blue.rejected) == ("in blue", (), ("v.jpg",))


# --- As part of a training split ------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory, prepared):
    base = tmp_path_factory.mktemp("feedback")
    prepared(base)
    config = RunConfig.of(small_config(base / "prepared"))
    builder = datasets.open_dataset(config.data)
    folder = base / "photos"
    folder.mkdir()
    test = splits.open_split(config.data, builder, "test")
    for row in range(8):
        Image.fromarray(test.gallery[row]).save(folder / f"{row}.png", compress_level=9)
    return config, splits.open_split(config.data, builder, "train"), folder


def write(path, folder, *clicks):
    for kind, reference, text, image in clicks:
        one = Click(kind, "c", 0, str(folder), (reference,), text, image)
        append(path, one, {})
    return path


def test_the_log_joins_the_split(opened, tmp_path, caplog):
    config, train, folder = opened
    shutil.copy(folder / "0.png", folder / "copy.png")
    first = train.queries
    own = Image.fromarray(train.gallery[int(first.reference[0])])
    own.save(folder / "own.png")  # a photo of the training gallery, encoded otherwise
    (folder / "text.png").write_text("no image")
    log = write(
        tmp_path / "log.jsonl",
        folder,
        ("pick", "0.png", "in red", "1.png"),
        ("pick", "0.png", "in red", "2.png"),
        ("reject", "0.png", "in red", "3.png"),
        ("reject", "0.png", "in red", "copy.png"),  # the reference itself
        ("reject", "0.png", "in red", "gone.png"),
        ("pick", "own.png", first.texts[0], "4.png"),
        ("reject", "own.png", first.texts[0], "5.png"),
        ("pick", "copy.png", "in blue", "1.png"),
        ("reject", "6.png", "never picked", "7.png"),
        ("pick", "../photos/6.png", "outside", "7.png"),
        ("pick", "text.png", "no image", "7.png"),
    )
    with caplog.at_level(logging.INFO):
        got = with_feedback(train, config.data, log, 0.25)
    for words in ("is not there any more", "lies outside", "cannot be read", "have no picked"):
        assert words in caplog.text
    before, count = len(train.gallery), len(train.queries)
    names = got.gallery.ids[before:]
    assert names == [f"feedback:{n}.png" for n in (0, 1, 2, 3, 4, 5)]
    assert len(got.gallery) == len(got.gallery.contents()) == before + 6
    np.testing.assert_array_equal(got.gallery[before + 1], np.array(Image.open(folder / "1.png")))
    np.testing.assert_array_equal(got.gallery[3], train.gallery[3])
    batch = next(iter(got.gallery.batches(np.array([before, 0]), 2)))
    np.testing.assert_array_equal(batch[0], np.array(Image.open(folder / "0.png")))
    # Four queries, repeated until they are a quarter of all.
    more = len(got.queries) - count
    assert more % 4 == 0
    assert more / len(got.queries) == pytest.approx(0.25, abs=0.02)
    queries = got.queries
    assert queries.texts[count : count + 4] == ["in red", "in red", first.texts[0], "in blue"]
    rows = queries.reference[count : count + 4].tolist()
    assert rows == [before, before, int(first.reference[0]), before]
    assert queries.target[count : count + 4].tolist() == [before + x for x in (1, 2, 4, 1)]
    assert queries.known_positives[count].tolist() == [before + 1, before + 2]
    # The pick is no negative of the same query of the split either.
    assert before + 4 in queries.known_positives[0]
    rejected = got.rejected
    assert rejected.shape[0] == len(queries)
    assert (rejected[:count] == -1).all()
    assert rejected[count : count + 4].tolist() == [[before + 3], [before + 3], [before + 5], [-1]]
    assert got.digest != train.digest
    assert image_ids_of(got, queries.relevant).max() < before
    assert known_positive_ids(got).shape[0] == len(queries)
    assert with_feedback(train, config.data, log, 0.25).digest == got.digest
    assert with_feedback(train, config.data, log, 0.5).digest != got.digest


def test_logs_that_teach_nothing_are_refused(opened, tmp_path):
    config, train, folder = opened
    log = write(tmp_path / "log.jsonl", folder, ("reject", "0.png", "in red", "1.png"))
    with pytest.raises(UserError, match="holds no query with a picked image"):
        with_feedback(train, config.data, log, 0.2)
    for share in (0, 1, float("nan")):
        with pytest.raises(UserError, match="--feedback_share is"):
            with_feedback(train, config.data, log, share)
    assert os.path.exists(log)
