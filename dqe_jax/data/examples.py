"""The one schema of every data set: queries and galleries, as splits of one TFDS builder.

A data set has, for each of `train`, `validation` and `test`, a split of queries (`test`) and a
split of the gallery they rank (`test_gallery`). An image is stored once, in the gallery; a query
names its images by **row**, the position in its gallery's split, so that both are read by random
access.

| field | gallery record | query record |
| --- | --- | --- |
| `id` | id of the image | id of the query |
| `image` | one encoded image, uint8 `[H, W, 3]` | none |
| `photo` | row of the first image with identical content (its own row if unique) | -1 |
| `attributes` | `name=value` strings, or none | `name=value` strings the text changes, or none |
| `texts` | none | captions of the modification, in their published order |
| `reference` | -1 | row of the reference image |
| `target` | -1 | row of the target that the query was made for |
| `targets` | none | rows annotated as targets, `target` first: what training may know |
| `valid` | none | rows that are in truth valid, `target` included; none where truth is unknown |
| `kind` | "" | kind of change, by which results are broken down |
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

SPLITS = ("train", "validation", "test")


def gallery_split(split: str) -> str:
    """Name of the split that holds the gallery of the queries of `split`."""
    return f"{split}_gallery"


@dataclasses.dataclass(frozen=True)
class Query:
    """One query: see the module's table. Rows are positions in the split's gallery."""

    id: str
    texts: Sequence[str]
    reference: int
    target: int
    targets: Sequence[int]
    valid: Sequence[int]
    kind: str = ""
    attributes: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """The TFDS record of this query."""
        return dict(dataclasses.asdict(self), image=[], photo=-1)


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One gallery image: see the module's table. `image` is uint8 `[H, W, 3]`."""

    id: str
    image: np.ndarray
    photo: int
    attributes: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """The TFDS record of this image, losslessly encoded as PNG."""
        encoded = io.BytesIO()
        Image.fromarray(self.image).save(encoded, "PNG", compress_level=1)
        encoded.seek(0)
        return {
            "id": self.id,
            "image": [encoded],
            "photo": self.photo,
            "attributes": list(self.attributes),
            "texts": [],
            "reference": -1,
            "target": -1,
            "targets": [],
            "valid": [],
            "kind": "",
        }


def features(image_size: int) -> Any:
    """TFDS features of the schema, with images of `image_size` x `image_size` pixels."""
    import tensorflow_datasets as tfds  # only builders need it; reading the schema does not

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            # A sequence of none or one: TFDS has no optional feature.
            "image": tfds.features.Sequence(
                tfds.features.Image(shape=(image_size, image_size, 3), encoding_format="png")
            ),
            "photo": np.int64,
            "attributes": tfds.features.Sequence(tfds.features.Text()),
            "texts": tfds.features.Sequence(tfds.features.Text()),
            "reference": np.int64,
            "target": np.int64,
            "targets": tfds.features.Sequence(np.int64),
            "valid": tfds.features.Sequence(np.int64),
            "kind": tfds.features.Text(),
        }
    )
