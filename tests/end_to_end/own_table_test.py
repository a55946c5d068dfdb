"""From a folder of photos and a table of attributes to a search in them, at small size."""

import json
import re
import shutil

import numpy as np
import pytest

import dqe_jax
from dqe_jax.cli.command_line import use_data_dir
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.data.made.from_table import triplets_from_table
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.testing.small_runs import BENCHMARK_SIZE, small_benchmark_config
from dqe_jax.testing.standins import small_products
from dqe_jax.training import loop

ATTRIBUTES = ("colour", "category", "season")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with photos, a table, triplets and a run; its config and final metrics."""
    root = tmp_path_factory.mktemp("shop")
    small_products(root / "photos", root / "products.csv")
    triplets_from_table(
        root / "products.csv",
        root / "photos",
        root / "made",
        attributes=ATTRIBUTES,
        image_size=BENCHMARK_SIZE,
    )
    config = small_benchmark_config("triplets:tiny,smoke", root)
    use_data_dir(config, str(root / "made"))
    return root, config, loop.train_and_evaluate(config, root / "run")


@pytest.mark.slow  # made triplets train in `benchmark_runs_test.py`
def test_training_on_a_table(shop):
    root, config, metrics = shop
    assert config.model.attributes.names == ATTRIBUTES
    assert config.data.lexicon == str(root / "made" / "lexicon.txt")
    report = json.loads((root / "run" / "eval" / "test-2.json").read_text())
    assert set(report["baselines"]) == {"random", "reference_only"}
    assert {"mAP@10", "R@10/colour", "R@10/two changes"} <= set(metrics)
    assert report["queries"]["used"] == report["queries"]["official"] == metrics["queries"]


def test_its_report(shop, tmp_path):
    root, config, metrics = shop
    evaluate_checkpoint(config, root / "run", output=tmp_path, page=True)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.findall(r'id="data">(.*?)</script>', page)[0])
    assert data["attributes"] == list(ATTRIBUTES)
    assert len(data["queries"]) == metrics["queries"]
    assert {line["key"]: line["value"] for line in data["metrics"]}["R@10"] == metrics["R@10"]


def test_a_search_in_its_photos(shop):
    root, _, _ = shop
    model = dqe_jax.load(root / "run")
    index = model.index(root / "photos", table=root / "products.csv")
    found = index.search(
        "p003.jpg", "in red", k=3, weights={"colour": 2.0}, filter={"colour": "Red"}
    )
    assert len(found.results) == 3
    assert {one.metadata["colour"] for one in found.results} == {"Red"}
    assert found.attribute_weights.keys() == set(ATTRIBUTES)


def test_the_search_ranks_as_evaluation_does(shop, tmp_path):
    """Of the photos as they are, which evaluation reads as they were prepared."""
    root, config, _ = shop
    data = RunConfig.of(config).data
    split = splits.open_split(data, datasets.open_dataset(data), "test")
    result = evaluate_checkpoint(config, root / "run", output=tmp_path / "eval")
    ids, queries, folder = list(split.gallery.ids), split.queries, tmp_path / "photos"
    folder.mkdir()
    for name in ids:
        shutil.copy(root / "photos" / name, folder)
    index = dqe_jax.load(root / "run", batch_size=16).index(folder)
    asked = [ids[row] for row in queries.reference]
    found = index.search(asked, list(queries.texts), k=10, include_reference=True)
    for own, rows, scores in zip(found, result.rows, result.scores, strict=True):
        wanted = [ids[row] for row in rows[:10]]
        if [one.id for one in own] != wanted:  # scores that are almost equal
            np.testing.assert_allclose([one.score for one in own], scores[:10], atol=1e-6)
