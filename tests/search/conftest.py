"""A model of `shapes` that has not trained, and a folder of its test images, for the room."""

from __future__ import annotations

import pytest
from PIL import Image

from dqe_jax.data import datasets, splits
from dqe_jax.search.loading import load
from dqe_jax.testing.small_runs import small_config
from dqe_jax.testing.untrained import save_untrained

COUNT = 40


@pytest.fixture(scope="session")
def run(tmp_path_factory, prepared):
    """A config, its workdir and the test split."""
    base = tmp_path_factory.mktemp("search")
    prepared(base)
    config = small_config(base / "prepared")
    data = datasets.open_dataset(config_data(config))
    split = splits.open_split(config_data(config), data, "test")
    train = splits.open_split(config_data(config), data, "train")
    save_untrained(config, base / "run", train.queries.texts)
    return config, base / "run", split


def config_data(config):
    from dqe_jax.config import RunConfig

    return RunConfig.of(config).data


@pytest.fixture(scope="session")
def model(run):
    """The model, with batches of one shape for images and small ones for queries."""
    return load(run[1], num_devices=2, batch_size=16)


@pytest.fixture
def photos(run, tmp_path):
    """A folder with the first images of the test split, half of them in a folder below."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for row in range(COUNT):
        Image.fromarray(run[2].gallery[row]).save(folder / path_of(row))
    return folder


def path_of(row):
    return f"{'more/' if row % 2 else ''}{row:03d}.png"
