"""A training split of made images, for measurements where a config's data are not prepared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from dqe_jax.config import RunConfig
from dqe_jax.data.examples import Record
from dqe_jax.data.image_formats import decode_image, encode_image
from dqe_jax.data.index import make_index
from dqe_jax.data.splits import Split, make_split

# Sides of the squares of random colour that are laid over one another, as shares of the image.
_OCTAVES = (2, 5, 11, 23)
_NOISE = 4.0  # standard deviation of each pixel, as of a camera


class EncodedImages:
    """Records of a gallery whose images are encoded in memory: a `Source`."""

    def __init__(self, records: Sequence[Record], image_format: str):
        """Records with their images as `encode_image` gives them."""
        self._records, self._raw = records, image_format == "raw"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, row: int) -> Record:
        record = self._records[row]
        return {**record, "image": [decode_image(x, raw=self._raw) for x in record["image"]]}

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Record]:
        return [self[row] for row in rows]


def made_image(size: int, seed: int) -> np.ndarray:
    """Smooth shapes with a little noise, uint8 `[size, size, 3]`: encoded it is as large as photos.

    Args:
      size: pixels a side.
      seed: of the drawing.
    """
    rng, total = np.random.default_rng(seed), np.zeros((size, size, 3), np.float32)
    for octave in _OCTAVES:
        small = Image.fromarray(rng.integers(0, 256, (octave, octave, 3), np.uint8))
        whole = small.resize((size, size), Image.Resampling.BICUBIC)
        total += np.asarray(whole, np.float32) / len(_OCTAVES)
    total += rng.normal(0, _NOISE, total.shape)
    return total.clip(0, 255).astype(np.uint8)


def made_split(config: RunConfig, images: int, *, cache: bool) -> Split:
    """A training split of made images, stored in memory as the config says.

    Each image is the reference of `config.batch.queries_per_reference` queries.

    Args:
      config: of a run.
      images: of the gallery.
      cache: whether decoded images are kept.
    """
    size, image_format = config.data.image_size, config.data.image_format
    gallery: list[Record] = [
        {
            "id": b"made-%d" % row,
            "photo": row,
            "image": [encode_image(made_image(size, row), image_format)],
            "texts": [],
            "pools": [],
        }
        for row in range(images)
    ]
    queries: list[Record] = [
        {
            "id": b"query-%d" % number,
            "texts": [b"a made query"],
            "reference": number // config.batch.queries_per_reference,
            "target": (number + 1) % images,
            "targets": [(number + 1) % images],
            "valid": [],
            "kinds": [],
            "attributes": [],
            "subset": [],
            "pools": [],
        }
        for number in range(images * config.batch.queries_per_reference)
    ]
    source = EncodedImages(gallery, image_format)
    return make_split("train", queries, source, make_index(gallery), size, cache=cache)
