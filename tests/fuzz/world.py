"""Good files of every kind that a command reads, made once: cases damage copies of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CLIP = Path(__file__).resolve().parents[1] / "golden" / "clip"
# What makes runs on `shapes` small, for the commands that take a config.
SMALL = {
    **{"total_steps": 2, "log_every": 1, "eval_every": 2, "checkpoint_every": 1},
    **{"num_devices": 1, "eval.sheet_queries": 1, "batch.queries_per_reference": 2},
    **{"model.tiny.image_depth": 0, "model.tiny.text_depth": 0, "model.tiny.composer_depth": 1},
}


def small_flags(root: Path) -> list[str]:
    """The flags of a run on `shapes` whose data lie in the world at `root`."""
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return ["--config=shapes:smoke", f"--config.data.prepared_dir={root / 'prepared'}", *flags]


def build(root: Path, *, trained: bool) -> None:
    """Writes all good files below a new directory; `trained`: a run too, and what is made of it."""
    root.mkdir(parents=True)
    _raw_files(root / "raw")
    _given_by_models(root / "given")
    if trained:
        _trained(root)


def _raw_files(raw: Path) -> None:
    """The annotation files of the benchmarks, made; photos for those that are prepared."""
    from dqe_jax.testing import standins

    standins.small_fashioniq(raw / "fashioniq", count=3, images=8)
    standins.small_cirr(raw / "cirr", count=4, images=24)
    standins.small_circo(raw / "circo", images=40)
    standins.small_genecis(raw / "genecis", count=2)
    standins.small_pinpoint(raw / "pinpoint", count=4)
    standins.small_imagenet_r(raw / "imagenet_r")
    standins.small_icir(raw / "icir")
    standins.small_triplets(raw / "triplets", images=12, count=9)
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
    import shutil

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
    _write(given / "words.txt", "color: crimson\n")
    _write(
        given / "mine.py",
        "from configs import shapes\n\n\ndef get_config():\n  return shapes.get_config('smoke')\n",
    )


def _trained(root: Path) -> None:
    """Two steps on `shapes`, an export of them, photos, and an index over these."""
    from PIL import Image

    from dqe_jax.checkpoints.export import export_run
    from dqe_jax.config import RunConfig
    from dqe_jax.data import datasets, splits
    from dqe_jax.search.loading import load
    from dqe_jax.testing.small_runs import small_config
    from dqe_jax.training import loop

    config = small_config(root / "prepared", **SMALL)
    loop.train_and_evaluate(config, root / "run")
    data = RunConfig.of(config).data
    split = splits.open_split(data, datasets.open_dataset(data), "test")
    (root / "photos").mkdir()
    for row in range(12):
        Image.fromarray(split.gallery[row]).save(root / "photos" / f"{row:03d}.png")
    export_run(root / "run", root / "export")
    load(root / "export").index(root / "photos", output=root / "index")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
