"""All rows of a second directory of photos are evaluated as one gallery, by one command."""

import json
import random

import numpy as np
import pytest
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets
from dqe_jax.data.made.grammar import NA
from dqe_jax.evaluation.asked import read_prepared
from dqe_jax.evaluation.predictions import score_asked
from dqe_jax.evaluation.run import evaluate_checkpoint
from dqe_jax.evaluation.scoring import score_embeddings
from dqe_jax.testing.small_runs import small_config
from dqe_jax.training import loop
from dqe_jax.utils.errors import UserError

SIZE = 16
COLUMNS = "id,gender,masterCategory,subCategory,articleType,baseColour,season,year,usage"


def write_products(directory, count, seed, colors=("Red", "Blue")):
    """A directory in the layout of fashion_products: `styles.csv` and `images/`."""
    (directory / "images").mkdir(parents=True)
    rng, pixels = random.Random(seed), np.random.default_rng(seed)
    lines = [COLUMNS]
    for number in range(count):
        name = seed * 10_000 + number
        drawn = [rng.choice(values) for values in (("Men", "Women"), ("Tshirts", "Shoes"), colors)]
        gender, article, color = drawn
        lines.append(f"{name},{gender},Apparel,Topwear,{article},{color},Summer,2011,Casual")
        photo = Image.fromarray(pixels.integers(0, 256, (24, 24, 3), np.uint8))
        photo.save(directory / "images" / f"{name}.jpg")
    (directory / "styles.csv").write_text("\n".join(lines) + "\n")
    return directory


def config_of(base, data_dir, **changes):
    fields = {"total_steps": 1, "eval_every": 0, "checkpoint_every": 1, "num_devices": 1}
    fields |= {"data.dataset": "fashion_products", "data.data_dir": str(data_dir)}
    fields |= {"data.image_size": SIZE, "model.tiny.patch_size": 8, "eval.sheet_queries": 1}
    fields |= {"data.variant": "plain"}
    return small_config(base / "prepared", **fields | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of one step on `own/`, and another directory, whose colours training has not seen."""
    base = tmp_path_factory.mktemp("whole")
    own = write_products(base / "own", 60, 1)
    other = write_products(base / "other", 40, 2, ("Green", NA, "Red"))
    # The last row has no photo, and two rows have the same one.
    (other / "images" / "20039.jpg").unlink()
    (other / "images" / "20038.jpg").write_bytes((other / "images" / "20037.jpg").read_bytes())
    loop.train_and_evaluate(config_of(base, own), base / "run")
    return base


def evaluated(base, directory, **changes):
    """What an evaluation on all rows writes, and where."""
    before = set(base.glob("run/*"))
    config = config_of(base, base / directory, **{"data.max_bad_fraction": 0.1, **changes})
    evaluate_checkpoint(config, base / "run", split="all")
    (place,) = set(base.glob("run/*")) - before
    return json.loads((place / "whole-1.json").read_text()), place


@pytest.mark.slow
def test_all_rows_are_one_gallery(base):
    report, place = evaluated(base, "other")
    assert place.name.startswith("eval-data-")
    assert report["split"] == "whole"
    assert report["ranked_images"] == 39  # but the row without a photo
    builder = datasets.find_dataset(
        config_of(base, base / "other", **{"data.max_bad_fraction": 0.1}).data, "whole"
    )
    assert set(builder.info.splits) == {"whole", "whole_gallery"}
    assert builder.info.metadata["splits"]["whole"]["products"] == 39
    assert builder.info.metadata["lost_rows"] == 1
    queries = builder.as_data_source("whole")
    count = len(queries)
    assert 39 < count <= 2 * 39
    assert report["queries"]["used"] == count
    assert builder.info.metadata["splits"]["whole"]["dropped_rare_values"] == 0
    asked = {pair.decode() for query in queries for pair in query["attributes"]}
    assert {"baseColour=Green", "baseColour=NA"} <= asked  # though training has neither
    rows = {row for query in queries for row in query["valid"]}
    assert max(rows) < 39
    config = config_of(base, base / "other", **{"data.max_bad_fraction": 0.1})
    file = base / "products.parquet"
    own = evaluate_checkpoint(
        config, base / "run", split="all", output=base / "x", save_embeddings=file
    )
    again = score_embeddings(config, file, base / "x", split="all")
    assert again.metrics == own.metrics
    lists = base / "x" / "whole-1.ranked.json"
    asked = read_prepared(RunConfig.of(config).data, "all")
    scored = score_asked("fashion_products", asked, lists, output=base / "x")
    assert scored | own.metrics == pytest.approx(scored, abs=1e-9)


@pytest.mark.slow  # two evaluations
def test_each_directory_has_results_of_its_own(base):
    report, place = evaluated(base, "own")
    assert report["ranked_images"] == 60  # of all splits that the run was trained on
    assert place.name.startswith("eval-data-")  # by `evaluated` not that of the other directory


def test_a_data_set_without_such_a_split_says_so():
    with pytest.raises(UserError, match=r"shapes has no split 'all'; it has train"):
        datasets.split_of("shapes", "all")
    with pytest.raises(
        UserError, match=r"fashion_products has no split 'any'; .* test, whole \(all\)\."
    ):
        datasets.split_of("fashion_products", "any")


def test_a_directory_of_too_few_products_is_told(base, tmp_path):
    few = write_products(tmp_path / "few", 1, 3)
    with pytest.raises(
        UserError, match=r"leaves the split 'whole' empty \(1 products, no queries\)"
    ):
        evaluate_checkpoint(config_of(base, few), base / "run", split="all")
