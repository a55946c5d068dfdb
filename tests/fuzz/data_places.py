"""Raw files that are prepared, tables that become triplets, and what is prepared or stored."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import rules
from tests.fuzz.place import Place
from tests.fuzz.rules import Rule, any_of, record


def _either(path: Path, good: Path) -> str:
    return rules.SAME if path.read_bytes() == good.read_bytes() else rules.EITHER


def _anything(value: object) -> bool:
    """Whatever is there, and nothing: a gallery may lack an image that no query names."""
    del value
    return True


def _prepared(dataset: str, file: str, form: str, rule: Rule, kind: str = "annotations") -> Place:
    """A raw file of a benchmark, as `dqe-jax prepare` reads it."""
    raw = file.partition("/")[0]
    return Place(
        name=f"prepare-{dataset}-{Path(file).stem.partition('.')[0]}",
        kind=kind,
        arguments=(
            *("prepare", f"--dataset={dataset}", f"--raw_dir={raw}", "--data_dir=made"),
            *("--image_size=8", "--num_workers=1", "--splits=val"),
        ),
        copies=(f"raw/{raw}",),
        file=file,
        form=form,
        rule=rule,
        names=False,
    )


def _made(file: str, form: str, rule: Rule, **more: object) -> Place:
    """A file from which `dqe-jax triplets` makes queries."""
    return Place(
        name=f"triplets-{Path(file).stem}",
        kind="photos" if form == "photo" else "tables",
        arguments=(
            *("triplets", "--table=products.csv", "--images=products", "--output=made"),
            *("--attributes=colour,category", "--image_size=8"),
            *("--templates=texts.toml", "--lexicon=words.txt"),
        ),
        copies=tuple(
            f"given/{name}" for name in ("products", "products.csv", "texts.toml", "words.txt")
        ),
        file=file,
        form=form,
        rule=rule,
        **more,  # type: ignore[arg-type]
    )


def _stored(file: str, form: str) -> Place:
    """A file of the stored features, as `dqe-jax features --list` reads it."""
    return Place(
        name=f"stores-{Path(file).stem}",
        kind="features",
        arguments=(
            *("features", "--config=shapes:smoke", "--list"),
            "--config.features.directory=stores",
        ),
        copies=("given/stores",),
        file=file,
        form=form,
        rule=_either,
        names=False,
        spares=True,
    )


def _shapes(file: str, form: str) -> Place:
    """A file of the prepared `shapes`, which ranked lists are scored against."""
    return Place(
        name=f"prepared-{Path(file).name.replace('.', '-').partition('-of')[0]}",
        kind="prepared data",
        arguments=(
            *("evaluate", "--config=shapes:smoke", "--config.data.prepared_dir=prepared"),
            *("--split=test", "--predictions=ranked.json", "--output=out"),
        ),
        copies=("prepared", "given/ranked.json"),
        file=f"prepared/shapes/smoke/2.0.0/{file}",
        form=form,
        rule=_either,
        results=("out/predictions-test.json",),
        trained=True,
        names=False,
        may_change=("prepared/",),
        spares=True,
    )


DATA = (
    _prepared("cirr", "cirr/image_splits/split.rc2.val.json", "json",
              rules.of_json({"": record, "*": _anything})),
    _prepared("cirr", "cirr/captions/cap.rc2.val.json", "json", _either),
    _prepared("circo", "circo/annotations/image_info_unlabeled2017.json", "json",
              rules.of_json({"": record, "images": any_of, "images.*": _anything,
                             "images.*.id": _anything, "images.*.file_name": _anything})),
    _prepared("circo", "circo/unlabeled2017/000000001000.jpg", "photo", _either, "photos"),
    _prepared("triplets", "triplets/triplets.csv", "lines", rules.lines),
    _made("products.csv", "lines", rules.lines),
    _made("texts.toml", "lines", rules.lines, names=False),
    _made("words.txt", "lines", rules.lines),
    _made("products/p000.jpg", "photo", _either, names=False),
    _stored("stores/mine/store.json", "json"),
    _stored("stores/mine/shard-000000/shard.json", "json"),
    _stored("stores/mine/shard-000000/keys.npy", "bytes"),
    _shapes("dataset_info.json", "json"),
    _shapes("features.json", "json"),
    _shapes("index/test_gallery.json", "json"),
    _shapes("index/test_gallery.digest", "bytes"),
    _shapes("shapes-test.array_record-00000-of-00001", "bytes"),
    _shapes("shapes-test_gallery.array_record-00000-of-00001", "bytes"),
)  # fmt: skip
