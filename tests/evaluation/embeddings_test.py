"""Embeddings of any model are scored from a file as those of a run are, by every benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest

from dqe_jax.config import RunConfig
from dqe_jax.evaluation import embedding_files, query_results, scoring
from dqe_jax.evaluation.embedding_files import Rows, read_embeddings, write_embeddings
from dqe_jax.evaluation.evaluator import EmbeddingEvaluator
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.testing.commands import run_module
from dqe_jax.testing.small_runs import small_config
from dqe_jax.testing.untrained import save_untrained
from dqe_jax.utils.errors import UserError

FORMATS = embedding_files.FORMATS
ROOT = Path(__file__).resolve().parents[2]


def read(path):
    return json.loads(path.read_text())


# --- A run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, prepared):
    """A run on shapes and its embeddings of the test split: (config, directory, result)."""
    base = tmp_path_factory.mktemp("embeddings")
    prepared(base)
    config = small_config(base / "prepared", **{"eval.sheet_queries": 1})
    save_untrained(config, base / "run", ["make the red circle blue"])
    result = evaluate_checkpoint(config, base / "run", save_embeddings=base / "test.npz")
    return config, base, result


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_run_and_its_embeddings_score_the_same(run, tmp_path, suffix):
    config, base, result = run
    held = read_embeddings(base / "test.npz")
    path = tmp_path / f"mine{suffix}"
    # In another order than that of the split.
    order = np.random.default_rng(0).permutation(len(held.query.ids))
    query = Rows([held.query.ids[i] for i in order], held.query.array[order])
    write_embeddings(path, {"gallery": held.gallery, "query": query})
    again = scoring.score_embeddings(config, path, tmp_path / "out", page=suffix == ".npz")
    assert again.metrics == result.metrics
    assert again.baselines == result.baselines
    np.testing.assert_array_equal(again.rows, result.rows)
    np.testing.assert_array_equal(again.scores, result.scores)
    own, other = read(base / "run/eval/test-1.json"), read(tmp_path / "out/test-mine.json")
    differ = {"step", "averaged"}
    assert {k: v for k, v in own.items() if k not in differ} == {
        k: v for k, v in other.items() if k not in differ
    }
    low, high = other["intervals"]["R@10"]
    assert low <= other["metrics"]["R@10"] <= high
    ranked = [read(base / "run/eval/test-1.ranked.json")]
    assert ranked == [read(tmp_path / "out/test-mine.ranked.json")]
    assert (tmp_path / "out/report.html").exists() == (suffix == ".npz")


def test_several_tokens_and_other_similarities(run, tmp_path):
    """The best token counts; cosine and the inner product are told apart."""
    config, base, result = run
    held = read_embeddings(base / "test.npz")
    tokens = np.concatenate([held.gallery.array, held.gallery.array[::-1]], axis=1)
    rows = {"query": held.query, "gallery": Rows(held.gallery.ids, tokens)}
    for suffix in FORMATS:
        path = tmp_path / f"tokens{suffix}"
        write_embeddings(path, rows)
        np.testing.assert_array_equal(read_embeddings(path).gallery.array, tokens)
    got = scoring.score_embeddings(config, tmp_path / "tokens.parquet", tmp_path)
    best = np.einsum("qd,nmd->qnm", held.query.array, tokens).max(-1)
    np.testing.assert_allclose(got.scores[:, 0], best.max(1), atol=1e-5)
    longer = held.gallery.array * np.linspace(1, 3, len(held.gallery.ids))[:, None, None]
    path = tmp_path / "long.npz"
    write_embeddings(path, rows | {"gallery": Rows(held.gallery.ids, longer.astype(np.float32))})
    with pytest.raises(UserError, match=r"long\.npz: 'gallery' of .* has length .* --similarity"):
        scoring.score_embeddings(config, path, tmp_path)
    cosine = scoring.score_embeddings(config, path, tmp_path, similarity="cosine")
    assert cosine.metrics == pytest.approx(result.metrics, abs=0.01)  # rounding of lengths
    inner = scoring.score_embeddings(config, path, tmp_path, similarity="dot")
    expected = np.einsum("qd,nmd->qnm", held.query.array, longer).max(-1)
    np.testing.assert_allclose(inner.scores[:, 0], expected.max(1), atol=1e-5)


@pytest.mark.slow  # two commands; the functions that they call are tested above
def test_the_commands_of_a_run_and_of_its_embeddings(run, tmp_path):
    """`evaluate` of a run and `evaluate --embeddings` of its embeddings print the same table."""
    config, base, result = run
    tiny = config.model.tiny
    words = (
        *("--config=configs/shapes.py:smoke", "--split=test", "--config.num_devices=2"),
        f"--config.data.prepared_dir={config.data.prepared_dir}",
        "--config.batch.queries_per_reference=2",
        f"--config.model.tiny.image_depth={tiny.image_depth}",
        f"--config.model.tiny.text_depth={tiny.text_depth}",
        f"--config.model.tiny.composer_depth={tiny.composer_depth}",
    )
    file, own, again = tmp_path / "m.parquet", tmp_path / "own", tmp_path / "again"
    of_run = (f"--workdir={base / 'run'}", f"--save_embeddings={file}", f"--output={own}")
    for more in (of_run, (f"--embeddings={file}", f"--output={again}")):
        done = run_module("dqe_jax.evaluate", *words, *more, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    one, other = read(own / "test-1.json"), read(again / "test-m.json")
    assert one["metrics"] == other["metrics"] == result.metrics
    for name in ("baselines", "intervals", "ranked_images", "protocol", "data"):
        assert one[name] == other[name]
    assert read(own / "test-1.ranked.json") == read(again / "test-m.ranked.json")


# --- Annotation files alone -----------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path):
    """Triplets of 12 images without contents, and a config: they are ranked by their ids alone."""
    directory = tmp_path / "raw"
    directory.mkdir()
    for i in range(12):
        (directory / f"{i}.jpg").write_bytes(b"")
    lines = [
        {"id": f"q{i}", "reference": f"{i}.jpg", "text": "red", "target": f"{i + 1}.jpg"}
        for i in range(8)
    ]
    text = "\n".join(json.dumps(line | {"split": "test"}) for line in lines)
    (directory / "triplets.jsonl").write_text(text)
    config = RunConfig.of(small_config(tmp_path / "none", **{"data.dataset": "triplets"}))
    return config, directory


def arrays_of(seed=0, hit=()):
    """Embeddings of `raw`: queries of `hit` find their target first."""
    rng = np.random.default_rng(seed)
    gallery = rng.normal(size=(12, 16))
    query = rng.normal(size=(8, 16))
    for i in hit:
        query[i] = gallery[i + 1]
    return {
        "query": (query / np.linalg.norm(query, axis=1, keepdims=True)).astype(np.float32),
        "query_id": np.array([f"q{i}" for i in range(8)]),
        "gallery": (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32),
        "gallery_id": np.array([f"{i}.jpg" for i in range(12)]),
    }


def test_metrics_by_hand(raw, tmp_path):
    config, directory = raw
    arrays = arrays_of(hit=(0, 3, 5))
    np.savez(tmp_path / "m.npz", **arrays)
    got = scoring.score_embeddings(config, tmp_path / "m.npz", tmp_path / "out", raw_dir=directory)
    order = np.argsort(-arrays["query"] @ arrays["gallery"].T, axis=1)
    ranks = np.argmax(order == np.arange(1, 9)[:, None], axis=1)
    for k in (1, 5, 10):
        assert got.metrics[f"R@{k}"] == pytest.approx(np.mean(ranks < k), abs=1e-9)
    held = query_results.read_results(tmp_path / "out" / "test-m.queries.json")
    assert held.ids == [f"q{i}" for i in range(8)]
    np.testing.assert_array_equal(held.values["R@5"], ranks < 5)
    assert held.references == [f"{i}.jpg" for i in range(8)]


def without(name, row):
    return lambda a: a | {k: np.delete(a[k], row, 0) for k in (name, f"{name}_id")}


def changed(name, index, value):
    def change(arrays):
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value
        return arrays

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("query", 3), r"query_id lacks 1 of the 8 ids .* \(first: 'q3'\)"),
        (without("gallery", slice(2, 5)), r"gallery_id lacks 3 of the 12 ids .* '2.jpg'\)"),
        (changed("query_id", 2, "q1"), r"query_id holds 'q1' twice"),
        (changed("gallery_id", 2, ""), r"gallery_id of row 2 is empty"),
        (changed("query_id", 2, "qq"), r"query_id lacks 1 of"),
        (
            lambda a: a | {k: np.concatenate([a[k], x]) for k, x in
                           (("query", a["query"][:1]), ("query_id", ["zz"]))},
            r"query_id holds 1 ids that the split does not have \(first: 'zz'\)",
        ),
        (lambda a: a | {"query": a["query"][:, :8]}, r"of length|'query' of 'q0' has length"),
        (
            lambda a: a | {"query": a["query"][:, :8] / np.linalg.norm(
                a["query"][:, :8], axis=1, keepdims=True)},
            r"'query' has embeddings of 8 numbers, and 'gallery' of 16",
        ),
        (changed("query", (4, 2), np.nan), r"'query' of 'q4' is not finite"),
        (changed("gallery", 7, np.inf), r"'gallery' of '7.jpg' is not finite"),
        (changed("gallery", 7, 0), r"'gallery' of '7.jpg' is zero"),
        (changed("query", 5, 2.0), r"'query' of 'q5' has length 8 and not 1: say --similarity="),
        (lambda a: a | {"query": a["query"][:5]}, r"'query' has 5 rows for 8 ids"),
        (lambda a: a | {"query": a["query"][0]}, r"'query' has shape \[16\]; it must be \[N, d\]"),
        (lambda a: a | {"query": a["query"].astype(int)}, r"'query' has dtype int64"),
        (lambda a: a | {"texts": a["query"]}, r"holds 'texts'; it may hold query, "),
        (lambda a: {k: v for k, v in a.items() if k != "query_id"}, r"has no 'query_id'"),
        (lambda a: {k: v for k, v in a.items() if "gallery" not in k}, r"has no 'gallery'"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_scored(raw, tmp_path, monkeypatch, change, sentence):
    """One sentence, before anything is ranked."""
    config, directory = raw
    monkeypatch.setattr(EmbeddingEvaluator, "measure", lambda *_, **__: pytest.fail("it ranks"))
    np.savez(tmp_path / "m.npz", **change(arrays_of()))
    with pytest.raises(UserError, match=sentence) as error:
        scoring.score_embeddings(config, tmp_path / "m.npz", tmp_path / "out", raw_dir=directory)
    assert str(tmp_path / "m.npz") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow  # two commands
def test_the_command(raw, tmp_path):
    """It writes what the function gives, and says what is wrong with a file in one sentence."""
    _, directory = raw
    np.savez(tmp_path / "m.npz", **arrays_of(hit=(1, 2)))
    words = ("--config=configs/triplets.py:tiny,smoke", "--split=test", f"--raw_dir={directory}")
    words += (f"--embeddings={tmp_path / 'm.npz'}", f"--output={tmp_path / 'out'}")
    done = run_module("dqe_jax.evaluate", *words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out" / "test-m.json")
    assert found["metrics"]["R@1"] >= 2 / 8
    assert found["intervals"].keys() <= found["metrics"].keys()
    np.savez(tmp_path / "m.npz", **changed("query", (4, 2), np.nan)(arrays_of()))
    done = run_module("dqe_jax.evaluate", *words, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'm.npz'}: 'query' of 'q4'")


def test_other_files_that_cannot_be_read(tmp_path):
    import pyarrow
    import pyarrow.parquet
    from safetensors.numpy import save_file

    def fails(name, sentence):
        with pytest.raises(UserError, match=sentence):
            read_embeddings(tmp_path / name)

    fails("none.npz", "there is no such file")
    (tmp_path / "a.csv").write_text("1")
    fails("a.csv", r"read from \.npz, \.safetensors, \.parquet")
    for name in ("b.npz", "b.safetensors", "b.parquet"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not whole")
        fails(name, f"{name} cannot be read|no whole")
    unit = np.eye(3, dtype=np.float32)
    save_file({"query": unit, "gallery": unit}, tmp_path / "c.safetensors")
    fails("c.safetensors", "no metadata field '(query|gallery)_id'")
    meta = {"query_id": '["a", "b", null]', "gallery_id": '["x", "y", "z"]'}
    save_file({"query": unit, "gallery": unit}, tmp_path / "d.safetensors", metadata=meta)
    fails("d.safetensors", "query_id of row 2 is None")

    def parquet(name, rows, columns=("kind", "id", "embedding")):
        table = dict(zip(columns, map(list, zip(*rows))))
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / name)

    rows = [("query", "a", [1.0, 0.0]), ("gallery", "x", [1.0, 0.0])]
    parquet("e.parquet", rows, ("kind", "name", "embedding"))
    fails("e.parquet", "no column 'id'; it has kind, name, embedding")
    parquet("f.parquet", [*rows, ("gallery", "y", [1.0])])
    fails("f.parquet", "'embedding' of the gallery 'y' is not a list as long")
    parquet("g.parquet", [*rows, ("image", "y", [1.0])])
    fails("g.parquet", "holds 'image'; it may hold query, gallery, judgement")
    parquet("h.parquet", rows)
    held = read_embeddings(tmp_path / "h.parquet")
    assert (held.query.ids, held.gallery.array.shape) == (["a"], (1, 1, 2))
    with pytest.raises(UserError, match=r"name a file that ends in \.npz"):
        embedding_files.check_target(tmp_path / "x.txt")
