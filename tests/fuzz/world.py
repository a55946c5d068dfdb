"""Good files of every kind that a command reads, made once: cases damage copies of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

CLIP = Path(__file__).resolve().parents[1] / "golden" / "clip"
# What makes runs on `shapes` small, for the commands that take a config.
SMALL = {
    **{"total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 1},
    **{"num_devices": 1, "eval.sheet_queries": 1, "batch.queries_per_reference": 2},
    **{"model.tiny.image_depth": 0, "model.tiny.text_depth": 0, "model.tiny.composer_depth": 1},
}


def small_flags(prepared: str) -> list[str]:
    """The flags of a run on `shapes` whose prepared data lie in a directory."""
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return ["--config=shapes:smoke", f"--config.data.prepared_dir={prepared}", *flags]


def build(root: Path, *, trained: bool) -> None:
    """Writes all good files below a new directory; `trained`: a run too, and what is made of it."""
    root.mkdir(parents=True)
    raw_files(root / "raw")
    _given_by_models(root / "given")
    _of_dqe_jax(root)
    if trained:
        _trained(root)


def raw_files(raw: Path, *, photos: bool = True) -> None:
    """The annotation files of the benchmarks, made; `photos`: in whole, else empty files."""
    from unittest import mock

    from dqe_jax.testing import standins

    if not photos:
        with mock.patch.object(standins, "write_photo", lambda path, *_, **__: _write(path, "")):
            raw_files(raw)
        return
    standins.small_fashioniq(raw / "fashioniq", count=3, images=8)
    standins.small_cirr(raw / "cirr", count=4, images=24)
    standins.small_circo(raw / "circo", images=40)
    standins.small_genecis(raw / "genecis", count=2)
    standins.small_pinpoint(raw / "pinpoint", count=4)
    standins.small_imagenet_r(raw / "imagenet_r")
    standins.small_icir(raw / "icir")
    standins.small_triplets(raw / "triplets", images=12, count=9)
    standins.small_domains(
        *(raw / "nico", "nico", ("autumn", "dim", "grass")),
        ("query_files.csv", "database_files.csv"),
    )
    standins.small_edir(raw / "edir", images=12, count=4)
    standins.small_circled(raw / "circled")
    shutil.copytree(raw / "imagenet_r", raw / "pic2word")
    _write(raw / "hp_fashioniq/hpfiq.json", json.dumps({"user_1": {"question_set_1": _judged()}}))
    shoes = [
        {"ImageName": f"{i}.jpg", "ReferenceImageName": f"{i + 1}.jpg", "RelativeCaption": "red"}
        for i in range(3)
    ]
    _write(raw / "shoes/relative_captions_shoes.json", json.dumps(shoes))
    _write(raw / "shoes/eval_im_names.txt", "\n".join(f"{i}.jpg" for i in range(6)))
    _write(raw / "shoes/train_im_names.txt", "t.jpg\n")
    corpus = [{"id": i, "path": f"val/val2014/{i:03d}.jpg"} for i in range(6)]
    _write(raw / "lasco/lasco_val_corpus.json", json.dumps(corpus))
    queries = [
        {
            "qid": 10 + i,
            "query-text": "red",
            "query-image": [i, f"val2014/{i:03d}.jpg"],
            "target-image": [i + 1, f"val2014/{i + 1:03d}.jpg"],
        }
        for i in range(3)
    ]
    _write(raw / "lasco/lasco_val.json", json.dumps(queries))
    for category in ("dress", "jacket", "pants", "skirt", "top"):
        lines = [f"women/{category}/{i}/{i}_0.jpeg\t-5.0\ta {i} {category}" for i in range(3)]
        _write(raw / f"fashion200k/{category}_test_detect_all.txt", "\n".join(lines) + "\n")
    _write(
        raw / "fashion200k/test_queries.txt",
        "women/dress/0/0_0.jpeg women/dress/1/1_0.jpeg\n"
        "women/top/0/0_0.jpeg women/top/2/2_0.jpeg\n",
    )
    lines = [
        {"id": f"q{i}", "reference": f"{i}.jpg", "text": "red", "target": f"{i + 1}.jpg"}
        for i in range(8)
    ]
    text = "\n".join(json.dumps(line | {"split": "test"}) for line in lines)
    _write(raw / "named/triplets.jsonl", text + "\n")
    for i in range(12):  # they are ranked by their ids alone
        _write(raw / f"named/{i}.jpg", "")


def _judged(count: int = 3) -> dict[str, list[object]]:
    """Judgements of HP-FashionIQ, of one person."""
    images = [f"/data/shirt/S{i}.jpg" for i in range(10)]
    return {
        "ref_img_paths": [f"shirt/R{i}.jpg" for i in range(count)],
        "targ_img_paths": [f"shirt/T{i}.jpg" for i in range(count)],
        "sentences": ["is reddotmark andmark long"] * count,
        "retrieved_set1": [{"img_path": images[:5], "user_score": "4"}] * count,
        "retrieved_set2": [{"img_path": images[5:], "user_score": "2"}] * count,
        "preferred set": ["1", "2", "1"][:count],
    }


def embeddings() -> dict[str, np.ndarray]:
    """Embeddings of `raw/named`: queries 0, 3 and 5 find their target first."""
    rng = np.random.default_rng(0)
    gallery, query = rng.normal(size=(12, 16)), rng.normal(size=(8, 16))
    for i in (0, 3, 5):
        query[i] = gallery[i + 1]
    return {
        "query": (query / np.linalg.norm(query, axis=1, keepdims=True)).astype(np.float32),
        "query_id": np.array([f"q{i}" for i in range(8)]),
        "gallery": (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).astype(np.float32),
        "gallery_id": np.array([f"{i}.jpg" for i in range(12)]),
    }


def _given_by_models(given: Path) -> None:
    """What other models found: ranked lists, embeddings, features; and pretrained weights."""
    import pyarrow as pa
    import pyarrow.parquet
    from safetensors.numpy import save_file

    given.mkdir()
    arrays = embeddings()
    np.savez(given / "embeddings.npz", **arrays)
    ids = {k: json.dumps(arrays[k].tolist()) for k in ("query_id", "gallery_id")}
    floats = {k: arrays[k] for k in ("query", "gallery")}
    save_file(floats, given / "embeddings.safetensors", ids)
    rows = [
        {"kind": kind, "id": name, "embedding": row.tolist()}
        for kind in floats
        for name, row in zip(arrays[f"{kind}_id"].tolist(), floats[kind])
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), given / "embeddings.parquet")
    features = np.random.default_rng(1).normal(size=(12, 6)).astype(np.float32)
    names = np.array([f"{i}.jpg" for i in range(12)])
    np.savez(given / "features.npz", id=names, pooled=features)
    held = {"ids": json.dumps(names.tolist())}
    save_file({"pooled": features}, given / "features.safetensors", held)
    columns = {"id": names.tolist(), "pooled": features.tolist()}
    pyarrow.parquet.write_table(pa.table(columns), given / "features.parquet")
    cirr = {
        str(100 + i): [f"val-{j}-{j % 4}-img{j % 2}" for j in (23, (i * 5 + 3) % 24, 22)]
        for i in range(4)
    }
    _write(given / "cirr.json", json.dumps(cirr))
    _write(
        given / "circo.json", json.dumps({str(i): [1000 + 7 * (i + 10), 1000] for i in range(5)})
    )
    fashioniq = {
        f"{c}-val-{i}": [f"{c[0].upper()}VAL{(i * 7 + 1) % 8:04d}"]
        for c in ("dress", "shirt", "toptee")
        for i in range(3)
    }
    _write(given / "fashioniq.json", json.dumps(fashioniq))
    _write(given / "shoes.json", json.dumps({f"eval-{i}": [f"{i}.jpg"] for i in range(3)}))
    _write(given / "lasco.json", json.dumps({str(10 + i): [f"{i + 1:03d}"] for i in range(3)}))
    _write(
        given / "fashion200k.json",
        json.dumps({"test-0": ["women/dress/1/1_0.jpeg"], "test-1": ["women/top/1/1_0.jpeg"]}),
    )
    _write(given / "named.json", json.dumps({f"q{i}": [f"{i + 1}.jpg"] for i in range(8)}))
    shutil.copytree(CLIP, given / "clip")
    table = ["image,colour,kind"]
    table += [
        f"{i:03d}.png,{('red', 'blue')[i % 2]},{('hat', 'shoe')[i // 2 % 2]}" for i in range(12)
    ]
    _write(given / "table.csv", "\n".join(table) + "\n")
    scores = {f"user_1/question_set_1/{i}": [[0.5] * 5, [0.25 * i] * 5] for i in range(3)}
    _write(given / "scores.json", json.dumps(scores))
    _write(given / "words.txt", "[colour]\ncrimson, navy\n[category]\ntee\n")
    texts = 'joints = ["{} and {}"]\n\n[colour]\nnoun = "colour"\nnew = ["in {new}"]\n'
    _write(given / "texts.toml", texts + 'new_and_old = ["{new}, not {old}"]\n')
    _write(
        given / "mine.py",
        "from configs import shapes\n\n\ndef get_config():\n  return shapes.get_config('smoke')\n",
    )


# Benchmarks whose ranked lists name the first images of a gallery, and the splits.
_RANKED = {
    **dict.fromkeys(("genecis", "pinpoint", "imagenet_r", "pic2word", "nico", "icir"), "test"),
    **dict.fromkeys(("edir", "circled"), "test"),
}


def _of_dqe_jax(root: Path) -> None:
    """What dqe_jax makes without a model: ranked lists of sound queries, stored features."""
    from dqe_jax.evaluation.asked import read_labels
    from dqe_jax.feature_store.imports import import_features
    from dqe_jax.testing import standins

    given = root / "given"
    for dataset, split in _RANKED.items():
        asked = read_labels(dataset, split, root / "raw" / dataset)
        names, queries = asked.gallery.ids, asked.queries
        ranked = {}
        for i, query in enumerate(queries.ids):
            rows = queries.subset[i] if len(queries.subset[i]) else asked.pools[queries.pools[i]]
            ranked[query] = [names[row] for row in rows]
        _write(given / f"{dataset}.json", json.dumps(ranked))
    import_features(given / "stores", "mine", "image", [given / "features.npz"])
    standins.small_products(given / "products", given / "products.csv", count=60)


def _trained(root: Path) -> None:
    """Two steps on `shapes`, one alone, an export of them, photos, an index over these, a log."""
    from PIL import Image

    from dqe_jax.checkpoints.export import export_run
    from dqe_jax.config import RunConfig
    from dqe_jax.data import datasets, splits
    from dqe_jax.search.loading import load
    from dqe_jax.testing.small_runs import small_config
    from dqe_jax.training import loop

    config = small_config(root / "prepared", **SMALL)
    loop.train_and_evaluate(config, root / "run")
    loop.train_and_evaluate(config, root / "stopped", stop_at=1)
    data = RunConfig.of(config).data
    prepared = datasets.open_dataset(data)
    splits.open_split(data, prepared, "train").gallery.contents()  # which feedback asks for
    split = splits.open_split(data, prepared, "test")
    (root / "photos").mkdir()
    for row in range(12):
        Image.fromarray(split.gallery[row]).save(root / "photos" / f"{row:03d}.png")
    export_run(root / "run", root / "export")
    load(root / "export").index(root / "photos", output=root / "index")
    ranked = json.loads((root / "run/eval/test-2.ranked.json").read_text())
    _write(root / "given/ranked.json", json.dumps(ranked))
    clicks = [
        {
            **{"format": 1, "time": "2026-05-01T10:00:00Z", "kind": ("pick", "reject")[i % 2]},
            **{"conversation": f"c{i // 2}", "turn": 0, "folder": str(root / "photos")},
            **{"references": [f"{i // 2:03d}.png"], "text": "in red", "image": f"{i + 3:03d}.png"},
            **{"shown": ["004.png", "005.png"], "model": "f00d"},
        }
        for i in range(8)
    ]
    _write(root / "given/clicks.jsonl", "".join(json.dumps(line) + "\n" for line in clicks))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
