"""An index of a model of `shapes` that has not trained, for the room."""

from __future__ import annotations

import pytest
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, splits
from dqe_jax.search.loading import load
from dqe_jax.testing.small_runs import small_config
from dqe_jax.testing.untrained import save_untrained

COUNT = 40


@pytest.fixture(scope="session")
def place(tmp_path_factory, prepared):
    """A directory with a run, a folder of photos and a table of them."""
    base = tmp_path_factory.mktemp("serving")
    prepared(base)
    config = RunConfig.of(small_config(base / "prepared"))
    builder = datasets.open_dataset(config.data)
    test, train = (splits.open_split(config.data, builder, name) for name in ("test", "train"))
    save_untrained(config, base / "run", train.queries.texts)
    (base / "photos" / "more & more").mkdir(parents=True)
    lines = ["image,price,brand"]
    for row in range(COUNT):
        name = f"{'more & more/' if row % 2 else ''}{row:03d}.png"
        Image.fromarray(test.gallery[row]).save(base / "photos" / name)
        lines.append(f"{name},{row},{'North' if row % 2 else 'South'}")
    (base / "photos.csv").write_text("\n".join(lines) + "\n")
    Image.fromarray(test.gallery[COUNT]).save(base / "secret.png")
    return base


@pytest.fixture(scope="session")
def index(place):
    """The index of the photos."""
    model = load(place / "run", num_devices=1, batch_size=8)
    return model.index(place / "photos", output=place / "index", table=place / "photos.csv")
