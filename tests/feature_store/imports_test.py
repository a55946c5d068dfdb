"""Files with features: what is refused, each in one sentence that names the file and the id."""

import concurrent.futures
import json
import logging
import threading
import time

import ml_dtypes
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from dqe_jax.feature_store import writing
from dqe_jax.feature_store.imports import import_features
from dqe_jax.feature_store.manage import delete_stores, list_stores
from dqe_jax.testing.small_runs import small_config
from dqe_jax.utils.errors import UserError

IDS = np.array(["a", "b", "c"])
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def npz(path, **arrays):
    np.savez(path, **arrays)


def with_nan(array, row):
    array = array.copy()
    array[row, 1] = np.nan
    return array


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


BAD = {
    "no ids": (".npz", lambda p: npz(p, x=ROWS), "no array 'id'.*it has x"),
    "ids that are pickled": (
        ".npz",
        lambda p: npz(p, id=IDS.astype(object), x=ROWS),
        "cannot be read .*pickle",
    ),
    "ids that are floats": (".npz", lambda p: npz(p, id=ROWS[:, 0], x=ROWS), "one string for each"),
    "no features": (".npz", lambda p: npz(p, id=IDS), "holds no features"),
    "one id twice": (
        ".npz",
        lambda p: npz(p, id=np.array(["a", "b", "a"]), x=ROWS),
        "the id 'a' is there twice",
    ),
    "an empty id": (".npz", lambda p: npz(p, id=np.array(["a", "", "b"]), x=ROWS), "id of row 1"),
    "not a number": (
        ".npz",
        lambda p: npz(p, id=IDS, x=with_nan(ROWS, 1)),
        "'x' of 'b' is not finite",
    ),
    "integers": (
        ".npz",
        lambda p: npz(p, id=IDS, x=ROWS.astype(np.int64)),
        "'x' of 'a' has dtype int64",
    ),
    "too few rows": (".npz", lambda p: npz(p, id=IDS, x=ROWS[:2]), r"shape \[2, 4\] for 3 ids"),
    "too many axes": (".npz", lambda p: npz(p, id=IDS, x=ROWS[:, None, None]), "must be .3, D"),
    "a strange name": (".npz", lambda p: npz(p, id=IDS, **{"a/b": ROWS}), "'a/b' names features"),
    "a name that the keys have": (
        ".npz",
        lambda p: npz(p, id=IDS, keys=ROWS),
        "'keys' names features: .* not 'keys'",
    ),
    "cut off": (
        ".npz",
        lambda p: (npz(p, id=IDS, x=ROWS), p.write_bytes(p.read_bytes()[:90])),
        "is no whole .npz file",
    ),
    "empty": (".safetensors", lambda p: p.write_bytes(b""), "cannot be read"),
    "tensors of two shapes": (
        ".safetensors",
        lambda p: save_file({"a": ROWS[0], "b": ROWS[1, :2]}, p),
        r"'b' have shape \[2\].*'a' \[4\]",
    ),
    "ids in metadata that are no list": (
        ".safetensors",
        lambda p: save_file({"x": ROWS}, p, metadata={"ids": '"a"'}),
        "'ids' must be a JSON list of strings",
    ),
    "no column of ids": (".parquet", lambda p: parquet(p, x=ROWS.tolist()), "no column 'id'"),
    "a null id": (
        ".parquet",
        lambda p: parquet(p, id=["a", None, "c"], x=ROWS.tolist()),
        "the 'id' of row 1 is None",
    ),
    "ragged lists": (
        ".parquet",
        lambda p: parquet(p, id=["a", "b"], x=[[1.0, 2.0], [3.0]]),
        "'x' of 'b' is not a list of numbers as long",
    ),
    "a null row": (
        ".parquet",
        lambda p: parquet(p, id=["a", "b"], x=[[1.0, 2.0], None]),
        "'x' of 'b' is not a list",
    ),
    "text in place of numbers": (
        ".parquet",
        lambda p: parquet(p, id=["a"], x=[["x", "y"]]),
        "'x' of 'a' has dtype",
    ),
    "no parquet": (".parquet", lambda p: p.write_bytes(b"PAR1 and more"), "cannot be read"),
    "another format": (".csv", lambda p: p.write_text("id,x\n"), "read from .npz, .safetensors"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_and_nothing_is_left(tmp_path, name):
    suffix, write, words = BAD[name]
    path = tmp_path / f"file{suffix}"
    write(path)
    root = tmp_path / "features"
    with pytest.raises(UserError, match=words) as error:
        import_features(root, "mine", "image", [path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not root.exists() or not [*root.iterdir()]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("own", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dtypes(tmp_path, dtype, own):
    save_as = {"ids": json.dumps(IDS.tolist())}
    array = ROWS.astype(own)
    path = tmp_path / ("x.npz" if own == np.float64 else "x.safetensors")
    if own == np.float64:
        npz(path, id=IDS, x=array)
    else:
        save_file({"x": array}, path, metadata=save_as)
    import_features(tmp_path / "f", "mine", "text", [path], dtype=dtype)
    (found,) = list_stores(tmp_path / "f")
    expected = "float32" if own == np.float64 else np.dtype(own).name
    assert found.dtype == (expected if dtype == "auto" else dtype)
    assert (found.rows, found.kind, found.backbone) == (3, "text", "imported")


def test_several_files_are_one_import(tmp_path):
    npz(tmp_path / "1.npz", id=IDS, x=ROWS)
    npz(tmp_path / "2.npz", id=np.array(["d"]), x=ROWS[:1])
    files = [tmp_path / "1.npz", tmp_path / "2.npz"]
    import_features(tmp_path / "f", "mine", "image", files)
    assert list_stores(tmp_path / "f")[0].rows == 4
    with pytest.raises(UserError, match=r"1.npz: the id 'a' is there twice"):
        import_features(tmp_path / "f", "other", "image", [files[0], files[0]])
    npz(tmp_path / "3.npz", id=np.array(["a"]), x=ROWS[:1])
    with pytest.raises(UserError, match=r"3.npz: the id 'a' is there in .*1.npz too"):
        import_features(tmp_path / "f", "other", "image", [files[0], tmp_path / "3.npz"])
    npz(tmp_path / "4.npz", id=np.array(["e"]), x=ROWS[:1, :2])
    with pytest.raises(UserError, match=r"4.npz: 'x' of 'e' has shape \[2\], in .*1.npz it has"):
        import_features(tmp_path / "f", "other", "image", [files[0], tmp_path / "4.npz"])


def test_numbers_too_large_for_the_dtype_are_named(tmp_path):
    npz(tmp_path / "1.npz", id=IDS, x=ROWS * 1e4)
    with pytest.raises(UserError, match="'x' of 'b' is not finite in float16"):
        import_features(tmp_path / "f", "mine", "image", [tmp_path / "1.npz"], dtype="float16")
    assert [path.name for path in (tmp_path / "f").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a/b", {}, "take letters"),
        ("0123456789abcdef", {}, "take letters"),
        ("a.1.partial", {}, "take letters"),
        ("mine", {}, "exists; take another name"),
        ("x", {"encoder": "encode"}, "package.module:function"),
        ("x", {"encoder": "dqe_jax.testing.encoders:nothing"}, "has no function"),
        ("x", {"dtype": "int8"}, "--dtype=int8"),
    ],
)
def test_names_and_options(tmp_path, name, options, words):
    npz(tmp_path / "1.npz", id=IDS, x=ROWS)
    import_features(tmp_path / "f", "mine", "image", [tmp_path / "1.npz"])
    with pytest.raises(UserError, match=words):
        import_features(tmp_path / "f", name, "image", [tmp_path / "1.npz"], **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        import_features(tmp_path / "f", "mine", "image", [tmp_path / "1.npz"])


# ------------------------------------------------------------------- imports that do not end alone


def sources(path):
    npz(path / "1.npz", id=IDS, x=ROWS)
    return path / "f", [path / "1.npz"]


def leave(root, name="dead.4711.partial"):
    """What an import leaves that is killed between two shards."""
    (root / name / "shard-000000").mkdir(parents=True)
    (root / name / "shard-000000" / "x.npy").write_bytes(b"half")
    return root / name


def test_an_import_removes_what_killed_ones_have_left(tmp_path, caplog):
    root, files = sources(tmp_path)
    left = [leave(root), leave(root, "mine.17.partial")]
    other = leave(root, "theirs.partial")  # not ours
    with caplog.at_level(logging.INFO):
        import_features(root, "mine", "image", files)
    for place in left:
        assert f"{place} is what a killed import has left: it is removed." in caplog.text
    assert {path.name for path in root.iterdir()} == {".lock", "mine", other.name}
    assert [store.name for store in list_stores(root)] == ["mine"]


def test_deleting_all_removes_it_too(tmp_path):
    root, files = sources(tmp_path)
    import_features(root, "mine", "image", files)
    leave(root)
    fields = {"model.backbone": "features", "features.directory": str(root)}
    delete_stores(small_config(tmp_path, **fields), ["all"])
    assert {path.name for path in root.iterdir()} == {".lock"}


def test_a_disk_without_locks_keeps_what_may_be_of_an_import_that_runs(
    tmp_path, monkeypatch, caplog
):
    def none(*_):
        raise OSError(37, "No locks available")

    root, files = sources(tmp_path)
    left = leave(root)
    monkeypatch.setattr(writing.fcntl, "flock", none)
    import_features(root, "mine", "image", files)
    assert f"The disk of {root} has no locks." in caplog.text
    assert left.exists()


def test_two_imports_at_the_same_time_take_turns(tmp_path, monkeypatch, caplog):
    """The second waits, and leaves alone what the first writes; one of a name is kept."""
    root, files = sources(tmp_path)
    writes, go_on, write = threading.Event(), threading.Event(), writing.write

    def slow(*arguments):
        writes.set()
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(writing, "write", slow)
    caplog.set_level(logging.INFO)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        first = pool.submit(import_features, root, "mine", "image", files)
        assert writes.wait(60)
        rest = [pool.submit(import_features, root, n, "image", files) for n in ("mine", "other")]
        until = time.time() + 60
        while caplog.text.count("Another process writes features to") < 2:
            assert time.time() < until
            time.sleep(0.01)
        assert len(list(root.glob("*.partial"))) == 1
        go_on.set()
        assert first.result() == root / "mine"
        assert rest[1].result() == root / "other"
        with pytest.raises(UserError, match=r"--name=mine: .* exists; take another name"):
            rest[0].result()
    assert {path.name for path in root.iterdir()} == {".lock", "mine", "other"}
    assert "killed" not in caplog.text
