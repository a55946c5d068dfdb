"""The one schema of every data set: queries and galleries, as splits of one TFDS builder.

A data set has, for each of its splits (of `SPLITS`), a split of queries (`test`) and the gallery
that they rank: `test_gallery`, or `gallery` where all splits share one. An image is stored once,
in the gallery; a query names its images by **row**, the position in that gallery, so that both are
read by random access.

| field | gallery record | query record |
| --- | --- | --- |
| `id` | id of the image | id of the query |
| `image` | one encoded image, uint8 `[H, W, 3]`; none if there is no readable photo | none |
| `photo` | number of the photo: images with identical content share one | -1 |
| `attributes` | `name=value` strings, or none | `name=value` strings the text changes, or none |
| `texts` | why there is no image, or none | captions of the modification, in published order |
| `reference` | -1 | row of the reference image |
| `target` | -1 | row of the target that the query was made for; -1 if it is not published |
| `targets` | none | rows annotated as targets, `target` first: what training may know |
| `valid` | none | rows that are truly relevant, `target` included; none where truth is unknown |
| `subset` | none | rows of a small set that are ranked among themselves too (CIRR), or none |
| `pools` | parts of the gallery it belongs to, or none | the part that it ranks; none for all |
| `kinds` | none | kinds of change, by which results are broken down |

Some data sets have fields of `EXTRAS` too, which the records of the others do not hold:

| field | query record (none in a gallery record) |
| --- | --- |
| `references` | rows of further reference images; with `reference` they make one question |
| `negatives` | rows that are stated to be wrong; -1 for one that is not in the gallery |

These are the names in stored records. In the code `photo` is `image_id`, `targets` is
`known_positives` and `valid` is `relevant`.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dqe_jax.data import settings
from dqe_jax.data.image_formats import decode_image, encode_image

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# A record of the schema, by the names of its fields.
Record = Mapping[str, Any]

SPLITS = settings.SPLITS
# The gallery of all splits, where they share one.
GALLERY = "gallery"
# Fields that only some data sets have, so that records that were stored before there were any stay
# as they are.
EXTRAS = ("references", "negatives")
# In place of these: all rows of a directory as one split, to evaluate on (TFDS keeps the name
# `all`, by which users call it, for itself).
WHOLE = "whole"


# The records that a TFDS builder generates for a split, each with its row.
Records = Iterator[tuple[int, Record]]


class Source(Protocol):
    """The stored records of a split, by random access."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, row: int) -> Record:
        """One."""

    def __getitems__(self, rows: Sequence[int]) -> Sequence[Record]:
        """Several at once."""


def gallery_split(split: str, known: Container[str] = ()) -> str:
    """Name of the split that holds the gallery of the queries of `split`.

    Args:
      split: of `SPLITS`.
      known: splits of the data set; with `gallery` among them all splits share that one.
    """
    return GALLERY if GALLERY in known else f"{split}_gallery"


@dataclasses.dataclass(frozen=True)
class Query:
    """One query: see the module's table. Rows are positions in the split's gallery."""

    id: str
    texts: Sequence[str]
    reference: int
    target: int
    known_positives: Sequence[int]
    relevant: Sequence[int]
    kinds: Sequence[str] = ()
    attributes: Sequence[str] = ()
    subset: Sequence[int] = ()
    pools: Sequence[str] = ()
    references: Sequence[int] = ()
    negatives: Sequence[int] = ()

    def record(self, extras: Sequence[str] = ()) -> Record:
        """The TFDS record of this query, with these fields of `EXTRAS`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields = {k: v for k, v in fields.items() if k not in EXTRAS or k in extras}
        fields["targets"] = fields.pop("known_positives")
        fields["valid"] = fields.pop("relevant")
        lists = {k: list(v) for k, v in fields.items() if not isinstance(v, (str, int))}
        return {**fields, **lists, "image": [], "photo": -1}


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One gallery image: see the module's table.

    Attributes:
      image: uint8 `[H, W, 3]`, or this as `image_formats.encode_image` gives it; None if there is
        none.
      image_format: how it is stored, of `settings.IMAGE_FORMATS`.
    """

    id: str
    image: np.ndarray | bytes | None
    image_id: int
    attributes: Sequence[str] = ()
    pools: Sequence[str] = ()
    reason: str = ""
    image_format: str = "png"

    def record(self, extras: Sequence[str] = ()) -> Record:
        """The TFDS record of this image, with these fields of `EXTRAS`."""
        return {
            **{name: [] for name in extras},
            "id": self.id,
            "image": [] if self.image is None else [_stored(self.image, self.image_format)],
            "photo": self.image_id,
            "attributes": list(self.attributes),
            "texts": [self.reason] if self.reason else [],
            "reference": -1,
            "target": -1,
            "targets": [],
            "valid": [],
            "subset": [],
            "pools": list(self.pools),
            "kinds": [],
        }


def _stored(image: np.ndarray | bytes, image_format: str) -> np.ndarray | io.BytesIO:
    """What TFDS takes for an image: an array where it is stored raw, else a file."""
    if image_format == "raw":
        return decode_image(image, raw=True) if isinstance(image, bytes) else image
    return io.BytesIO(image if isinstance(image, bytes) else encode_image(image, image_format))


@dataclasses.dataclass(frozen=True)
class Queries:
    """The queries of a split, as columns of length `n`; rows index the split's gallery.

    Attributes:
      ids: of the queries.
      texts: the modification texts.
      reference: int32 `[n]`.
      target: int32 `[n]`; -1 where the split has no labels.
      known_positives: `n` arrays of rows: annotated targets.
      relevant: `n` arrays of rows: all that are truly relevant.
      kinds: `n` tuples of names.
      attributes: `n` tuples of `name=value`: what the text changes.
      pools: `n` names of the parts of the gallery that are ranked; "" for all of it.
      subset: `n` arrays of rows, as in the module's table.
      captions: `n` tuples: what `texts` are joined of.
      references: `n` arrays of rows of further references, beside `reference`; empty if no query
        has any.
      negatives: `n` arrays of rows that are stated to be wrong, as annotated: a row may come twice,
        and -1 stands for an image that is not in the gallery. Empty if there are none at all.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    reference: np.ndarray
    target: np.ndarray
    known_positives: Sequence[np.ndarray]
    relevant: Sequence[np.ndarray]
    kinds: Sequence[Sequence[str]]
    attributes: Sequence[Sequence[str]]
    pools: Sequence[str]
    subset: Sequence[np.ndarray]
    captions: Sequence[Sequence[str]] = ()
    references: Sequence[np.ndarray] = ()
    negatives: Sequence[np.ndarray] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Queries:
        """The queries at these positions."""

        def of(column: Sequence[object] | np.ndarray) -> Sequence[object] | np.ndarray:
            return column[rows] if isinstance(column, np.ndarray) else [column[i] for i in rows]

        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        columns: dict[str, Any] = {k: of(v) if len(v) else v for k, v in held.items()}
        return Queries(**columns)


def needed_rows(record: Record) -> list[int]:
    """Rows of the images without which a query is left out: references and target, -1 for none."""
    return [record["reference"], *record.get("references", ()), record["target"]]


def all_references(queries: Queries) -> tuple[np.ndarray, np.ndarray]:
    """Every reference of every query: numbers of the queries, ascending, and rows, int `[P]`."""
    owner, rows = np.arange(len(queries)), queries.reference
    if not len(queries.references):
        return owner, rows
    more = np.repeat(owner, [len(own) for own in queries.references])
    owner = np.concatenate([owner, more])
    rows = np.concatenate([rows, *queries.references]).astype(np.int32)
    order = np.argsort(owner, kind="stable")
    return owner[order], rows[order]


def features(
    image_size: int, image_format: str = "png", extras: Sequence[str] = ()
) -> tfds.features.FeaturesDict:
    """TFDS features of the schema.

    Args:
      image_size: pixels a side of the images.
      image_format: how they are stored, of `settings.IMAGE_FORMATS`.
      extras: fields of `EXTRAS` that the data set has.
    """
    import tensorflow_datasets as tfds  # only builders need it; reading the schema does not

    shape = (image_size, image_size, 3)
    if image_format == "raw":
        image = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
    else:
        image = tfds.features.Image(shape=shape, encoding_format=image_format)
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            # A sequence of none or one: TFDS has no optional feature.
            "image": tfds.features.Sequence(image),
            "photo": np.int64,
            "attributes": tfds.features.Sequence(tfds.features.Text()),
            "texts": tfds.features.Sequence(tfds.features.Text()),
            "reference": np.int64,
            "target": np.int64,
            "targets": tfds.features.Sequence(np.int64),
            "valid": tfds.features.Sequence(np.int64),
            "subset": tfds.features.Sequence(np.int64),
            "pools": tfds.features.Sequence(tfds.features.Text()),
            "kinds": tfds.features.Sequence(tfds.features.Text()),
            **{name: tfds.features.Sequence(np.int64) for name in extras},
        }
    )
