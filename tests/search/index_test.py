"""An index: what is new is embedded and nothing else, and a killed process loses nothing."""

import logging
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import dqe_jax
from dqe_jax.search import store
from dqe_jax.search.index import open_index
from dqe_jax.search.store import Writer
from dqe_jax.utils.errors import UserError

COUNT = 40


def counts(report):
    names = ("images", "added", "changed", "renamed", "removed", "duplicates", "embedded")
    return tuple(getattr(report, name) for name in names)


def rewrite(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (72, 72, 3), np.uint8)).save(path)


def test_only_what_has_changed_is_embedded(model, photos, tmp_path):
    place = tmp_path / "index"
    index = model.index(photos, output=place)
    assert counts(index.report) == (COUNT, COUNT, 0, 0, 0, 0, COUNT)
    assert index.ids == tuple(sorted(index.ids))
    before = {id_: e for id_, e in zip(index.ids, embeddings(index))}
    assert counts(model.index(photos, output=place).report) == (COUNT, 0, 0, 0, 0, 0, 0)

    rewrite(photos / "000.png", 1)  # changed
    rewrite(photos / "new.jpg", 2)  # added
    (photos / "002.png").unlink()  # removed
    (photos / "004.png").rename(photos / "more" / "moved.png")
    shutil.copy(photos / "006.png", photos / "copy.png")
    os.utime(photos / "008.png")  # touched
    index = model.index(photos, output=place)
    assert counts(index.report) == (COUNT + 1, 2, 1, 1, 1, 1, 2)
    after = {id_: e for id_, e in zip(index.ids, embeddings(index))}
    np.testing.assert_array_equal(after["more/moved.png"], before["004.png"])
    np.testing.assert_array_equal(after["copy.png"], before["006.png"])
    assert np.abs(after["000.png"] - before["000.png"]).max() > 1e-3
    # It is what an index would be that is made anew.
    again = model.index(photos)
    assert again.ids == index.ids
    np.testing.assert_allclose(embeddings(again), embeddings(index), atol=1e-6)
    # An opened one is the same.
    opened = open_index(place, model=model)
    assert opened.ids == index.ids
    np.testing.assert_array_equal(embeddings(opened), embeddings(index))
    assert "images of" in repr(opened)


def embeddings(index):
    return index._vectors.embeddings(index._contents)


def test_rows_that_nobody_has_are_removed(model, photos, tmp_path):
    place = tmp_path / "index"
    model.index(photos, output=place)
    for path in photos.glob("*.png"):
        path.unlink()
    (photos / "more" / "001.png").unlink()
    index = model.index(photos, output=place)
    assert len(index) == COUNT // 2 - 1
    assert index.report.embedded == 0
    held = store.Vectors(place, store.read_facts(place))
    assert len(held) == sum(len(s.keys) for s in held.shards) == len(index)
    assert Image.open(io_of(index.thumbnail(index.ids[0]))).size == (72, 72)


def io_of(data):
    import io

    return io.BytesIO(data)


class KilledError(BaseException):
    pass


def test_a_killed_update_loses_and_doubles_nothing(model, photos, tmp_path, monkeypatch):
    place = tmp_path / "index"
    whole = model.index(photos)
    monkeypatch.setattr(store, "SHARD_ROWS", 7)
    written = []
    flush = Writer.flush

    def flush_and_die(writer):
        flush(writer)
        written.append(1)
        if len(written) in (1, 3):
            raise KilledError

    monkeypatch.setattr(Writer, "flush", flush_and_die)
    with pytest.raises(KilledError):
        model.index(photos, output=place)
    with pytest.raises(UserError, match="is not finished: run dqe-jax index again"):
        open_index(place, model=model)
    with pytest.raises(KilledError):
        model.index(photos, output=place)
    # What a kill within a write leaves.
    (place / "shard-000009.123.partial").mkdir()
    (place / "images.parquet.123.partial").write_text("half")
    shutil.copytree(place / "shard-000000", place / "shard-000020")
    (place / "shard-000020" / "embeddings.npy").write_bytes(b"cut")
    index = model.index(photos, output=place)
    assert index.report.embedded == COUNT - 3 * 7
    assert index.ids == whole.ids
    np.testing.assert_allclose(embeddings(index), embeddings(whole), atol=1e-6)
    assert not list(place.rglob("*.partial"))
    assert counts(model.index(photos, output=place).report) == (COUNT, 0, 0, 0, 0, 0, 0)


def test_what_cannot_be_used_is_counted_and_named(model, photos, tmp_path, caplog):
    (tmp_path / "secret.png").write_bytes((photos / "000.png").read_bytes())
    (photos / "out.png").symlink_to(tmp_path / "secret.png")
    (photos / "in.png").symlink_to("000.png")
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "loop").symlink_to("loop")
    (photos / "folder").symlink_to(tmp_path)
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (photos / "text.png").write_text("no image")
    (photos / "old.gif").write_bytes(b"GIF89a")
    (photos / "notes.txt").write_text("no image at all")
    (photos / ".hidden.png").write_text("")
    Image.new("1", (9_000, 9_000)).save(photos / "bomb.png")
    os.mkfifo(photos / "pipe.png")
    with caplog.at_level(logging.INFO):
        index = model.index(photos)
    assert set(index.problems) == {
        *("out.png", "gone.png", "folder", "cut.jpg", "text.png", "old.gif", "bomb.png"),
        *("pipe.png", "loop.png"),
    }
    assert index.problems["out.png"] == "is a link that leads out of the folder"
    assert index.problems["bomb.png"] == "has 9000 x 9000 pixels"
    assert "is no regular file" in index.problems["pipe.png"]
    assert index.report.duplicates == 1  # the link within the folder
    assert len(index) == COUNT + 1
    assert (
        "Left out: 3 files, each of which is no JPEG, PNG or WebP: cut.jpg, old.gif, text.png"
        in caplog.text
    )
    assert "9 files are left out" in repr(index)


def test_another_model_is_refused(model, run, photos, tmp_path):
    from dqe_jax.testing.untrained import save_untrained

    place = tmp_path / "index"
    model.index(photos, output=place)
    config = run[0].copy_and_resolve_references()
    config.seed = 5
    save_untrained(config, tmp_path / "other", ["red"])
    other = dqe_jax.load(tmp_path / "other", num_devices=2)
    for use in (lambda: open_index(place, model=other), lambda: other.index(photos, output=place)):
        with pytest.raises(UserError, match="was made by another model"):
            use()


def test_directories_that_cannot_be_used(model, photos, tmp_path):
    with pytest.raises(UserError, match="there is no index in"):
        open_index(tmp_path / "none")
    with pytest.raises(UserError, match="there is no folder"):
        model.index(tmp_path / "none")
    with pytest.raises(UserError, match="holds other files"):
        model.index(photos, output=photos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no JPEG, PNG or WebP image"):
        model.index(tmp_path / "empty")
    (tmp_path / "empty" / "bad.png").write_text("")
    with pytest.raises(UserError, match=r"no image in .* can be used, such as bad\.png"):
        model.index(tmp_path / "empty")
    with pytest.raises(UserError, match="a disk of this machine"):
        model.index(photos, output="gs://bucket/index")
    with pytest.raises(UserError, match="copy them to this machine"):
        model.index("gs://bucket/photos")
    place = tmp_path / "index"
    model.index(photos, output=place)
    with store.locked(place), pytest.raises(UserError, match="another process writes"):
        model.index(photos, output=place)
    (place / "images.parquet").write_text("x")
    with pytest.raises(UserError, match=r"images\.parquet is damaged"):
        open_index(place, model=model)
    facts = (place / "index.json").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"images\.parquet is damaged"):
        model.index(photos, output=place)
    assert (place / "index.json").stat().st_mtime_ns == facts
    (place / "images.parquet").unlink()
    os.mkfifo(place / "images.parquet")
    with pytest.raises(UserError, match=r"images\.parquet is no file"):
        model.index(photos, output=place)
    (place / "index.json").write_text('{"format": 7}')
    with pytest.raises(UserError, match="has format 7"):
        open_index(place, model=model)


@pytest.fixture(scope="module")
def shop(run, model, tmp_path_factory):
    """An index with columns."""
    base = tmp_path_factory.mktemp("shop")
    lines = ["image;brand;price;code"]
    for row in range(20):
        Image.fromarray(run[2].gallery[row]).save(base / f"{row:03d}.png")
        price = "" if row == 3 else str(row * 2.5)
        lines.append(f"{row:03d};{'ABC'[row % 3]};{price};0{row}")
    (base / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return model.index(base, table=base / "table.csv")


def test_search(shop):
    found = shop.search("000.png", "make the red circle blue", k=5)
    assert len(found) == 5
    assert "000.png" not in [one.id for one in found]
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    first = found[0]
    assert first.path.is_file()
    chance = 1 / (1 + np.exp(-(10 * first.score - 6)))
    assert first.probability == pytest.approx(chance)
    assert re.search(rf"{first.id} +{first.score:.3f} +{chance:.0%} ", repr(found))
    assert set(first.metadata) == {"brand", "price", "code"}
    assert first.metadata["code"].startswith("0")
    assert first.id in repr(found)
    assert "color" in repr(found)
    others = shop.search("000.png", "make the red circle blue", k=3, include_reference=True)
    file = shop.search(found.results[0].path.parent / "000.png", "red", k=50)
    assert len(file) == 19  # the file is the reference, known by its content
    assert len(others) == 3
    batch = shop.search(["000.png", "001.png"], ["make the red circle blue", "in red"], k=5)
    assert [one.id for one in batch[0]] == [one.id for one in found]
    excluded = shop.search("000.png", "make the red circle blue", k=5, exclude=[first.id])
    assert [one.id for one in excluded][:4] == [one.id for one in found][1:]
    for wrong, words in (
        (dict(exclude=["no.png"]), "there is no image 'no.png'"),
        (dict(exclude="000.png"), "give a list of ids"),
        (dict(k=0), "k is 0"),
        (dict(weights={"x": 1.0}), "no attribute 'x'"),
        (dict(filter={"x": 1}), "no column 'x'; it has brand, price, code"),
        (dict(filter={"brand": (1, 2)}), "this one holds texts"),
        (dict(filter={"price": "cheap"}), "give a number"),
    ):
        with pytest.raises(UserError, match=words):
            shop.search("000.png", "red", **wrong)


@pytest.mark.parametrize(
    ("wanted", "passes"),
    [
        ({"brand": "A"}, lambda row: row % 3 == 0),
        ({"brand": ["A", "B"], "price": (5, 20)}, lambda row: row in (4, 6, 7)),
        ({"price": (None, 10)}, lambda row: row <= 4 and row != 3),
        ({"price": 5}, lambda row: row == 2),
        ({"code": "07"}, lambda row: row == 7),
    ],
)
def test_filters(shop, wanted, passes):
    found = shop.search("000.png", "red", k=50, filter=wanted, include_reference=True)
    assert {one.id for one in found} == {f"{row:03d}.png" for row in range(20) if passes(row)}
    everything = shop.search("000.png", "red", k=50, include_reference=True)
    kept = [one.id for one in everything if one.id in {x.id for x in found}]
    assert [one.id for one in found] == kept


def test_a_filter_that_nothing_passes_says_so(shop):
    found = shop.search("000.png", "red", filter={"brand": "Z"})
    assert len(found) == 0
    assert "no image passes the filter" in repr(found)
    assert "nothing is found" in repr(found)


def test_a_grid_of_images(shop, tmp_path):
    found = shop.search(["000.png", "001.png"], "red <b>", k=4)
    page = found._repr_html_()
    assert page.count("data:image/jpeg;base64,") == 6
    assert "red &lt;b&gt;" in page
    whole = found.save(tmp_path / "grid.html").read_text(encoding="utf-8")
    assert whole.startswith("<!doctype html>")
    assert "http" not in whole
    assert Image.open(found.save(tmp_path / "grid.png")).width > 500
    with pytest.raises(UserError, match=r"is a \.png or a \.html file"):
        found.save(tmp_path / "grid.pdf")
    with pytest.raises(UserError, match="cannot write"):
        found.save(tmp_path / "none" / "grid.html")


def test_columns_stay_until_there_is_another_table(run, model, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(3):
        Image.fromarray(run[2].gallery[row]).save(folder / f"{row}.png")
    table = tmp_path / "t.csv"
    table.write_text("name,photo\nfirst,0.png\nsecond,1.png\n")
    index = model.index(folder, output=tmp_path / "index", table=table)
    assert index.columns == {"name": ["first", "second", None]}
    Image.fromarray(run[2].gallery[3]).save(folder / "00.png")
    index = model.index(folder, output=tmp_path / "index")
    assert index.columns == {"name": ["first", None, "second", None]}
    table.write_text("image,size\n00,3\n")
    index = model.index(folder, output=tmp_path / "index", table=table)
    assert index.columns == {"size": [None, 3.0, None, None]}
