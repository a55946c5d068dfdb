"""From the rows of a table to the products of each split, and to their queries."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import logging

from dqe_jax.data import examples
from dqe_jax.data.made.grammar import Values
from dqe_jax.data.made.photos import Decoded, ImageFile
from dqe_jax.data.made.queries import Product, Rules, asked_values, make_queries, summary
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject

QUERIES_PER_REFERENCE = {"train": 8, "validation": 2, "test": 2, examples.WHOLE: 2}
SPLIT_ENDS = (("train", 0.72), ("validation", 0.80), ("test", 1.0))


@dataclasses.dataclass(frozen=True)
class Row:
    """A product, before its photo is seen.

    Attributes:
        id: its id.
        values: of the attributes that decide for which queries it is relevant.
        attributes: all that is known of it, as `name=value`.
    """

    id: str
    values: Values
    attributes: tuple[str, ...]


def split_of(content: str, salt: str) -> str:
    """The split of a photo, by a digest of its content."""
    digest = hashlib.sha256(f"{salt}:{content}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in SPLIT_ENDS if place < end or end == 1.0)


def place_products(
    rows: Iterable[Row],
    decoded: Iterable[Decoded],
    images: ImageFile,
    salt: str,
    *,
    whole: bool = False,
) -> tuple[dict[str, list[Product]], dict[str, str]]:
    """The products of each split, and by id why rows have no usable photo.

    Args:
        rows: The table.
        decoded: The photo of each row.
        images: Takes the images of the products.
        salt: Of the splits.
        whole: Whether all are in one split, `examples.WHOLE`, in place of three.
    """
    names = (examples.WHOLE,) if whole else examples.SPLITS
    galleries: dict[str, list[Product]] = {split: [] for split in names}
    unseen: dict[str, str] = {}
    first_of: dict[str, tuple[str, int]] = {}  # Split and row of the first of identical photos.
    for row, photo in zip(rows, decoded):
        if photo.image is None:
            unseen[row.id] = photo.reason
            continue
        if photo.pixels not in first_of:
            # The bytes of the first copy decide, so that the split is that of any decoder version.
            split = examples.WHOLE if whole else split_of(photo.content, salt)
            first_of[photo.pixels] = (split, len(galleries[split]))
        split, first = first_of[photo.pixels]
        image = images.append(photo.image)
        galleries[split].append(Product(row.id, row.values, first, row.attributes, image))
    return galleries, unseen


def make_splits(
    rules: Rules, galleries: Mapping[str, Sequence[Product]], table: str, advice: str
) -> tuple[dict[str, list[examples.Query]], dict[str, JsonObject]]:
    """The queries of each split, and counts of each.

    Args:
        rules: By which they are made.
        galleries: The products of each split, in the order of `examples.SPLITS`.
        table: What it is called in an error.
        advice: What to do if a split has no queries.

    Raises:
        UserError: A split has none.
    """
    queries: dict[str, list[examples.Query]] = {}
    counts: dict[str, JsonObject] = {}
    known: set[tuple[str, str]] | None = None
    for split in galleries:  # Train is first: the others ask for what it asks for.
        queries[split], dropped = make_queries(
            rules, galleries[split], QUERIES_PER_REFERENCE[split], known
        )
        if not queries[split]:
            raise UserError(
                f"{table} leaves the split {split!r} empty ("
                f"{len(galleries[split])} products, no queries), so {advice}."
            )
        if known is None:
            known = asked_values(queries[split])
        counts[split] = summary(galleries[split], queries[split], dropped)
        logging.info("%s: %s", split, counts[split])
    return queries, counts


def gallery_items(
    products: Iterable[Product], images: ImageFile, image_format: str
) -> Iterator[examples.GalleryItem]:
    """What is stored of the products of a split, in their order.

    Args:
        products: Of the split.
        images: Of all products.
        image_format: How images are stored.
    """
    for product in products:
        yield examples.GalleryItem(
            product.id,
            images[product.image],
            product.photo,
            product.attributes,
            image_format=image_format,
        )
