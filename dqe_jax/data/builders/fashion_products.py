"""Composed queries made from the attributes of the public "Fashion Product Images" data set.

Each product has one photo and a row of attributes. A query takes a product as the reference, and
asks for its gender, article type, colour, season and usage with one or two of them changed. Because
every product of the gallery has its attributes, all relevant targets of a query are known, not only
one.

The raw directory holds `styles.csv` and either `images.tar` (members `images/<id>.jpg`; preferred
if both are there) or a folder `images/` of `<id>.jpg`. The rules:

-   **Rows.** Of rows with the same id the first is kept. An empty value is read as `NA`, which is a
    value like any other. Fields beyond the header's belong to the last column (product names hold
    unquoted commas). A row with fewer fields than the header is lost.
-   **Photos.** A row whose photo is missing or does not decode is lost. Lost rows are logged,
    counted and named in the TFDS metadata; more than `max_bad_fraction` of them is an error. Photos
    without a row are counted and named too. Photos that are not square are padded with white, then
    reduced.
-   **Splits.** A hash of the photo's content assigns 72% of the products to train, 8% to
    validation and 20% to test. Products with identical photos go to the same split. A split's
    gallery is all of its products, in the order of `styles.csv`.
-   **Ambiguous photos.** A photo that occurs with different attributes is neither a reference nor a
    target, since its text could contradict what is seen. Its rows stay in the gallery, and among
    the `relevant` rows of the attributes that they state.
-   **Queries.** At most 8 a reference in train and 2 in validation and test, with distinct
    attributes asked for. The kind of change is chosen before the values, so that frequent kinds do
    not dominate; at most about a third change two attributes. Within a kind, attributes are asked
    for in proportion to the products of the split that have them.
-   **Rare values.** A query of validation or test is dropped if a value that it asks for is asked
    for by no query of train.

With coarse relevance only the article type and the colour decide which products are relevant. Of
the other attributes all products have one value, which no text asks for. Many products are then
relevant for a query, and its target is a random one of them.
Gallery records state all attributes even so.

A second directory of photos can be one split, `whole`, to evaluate on: all of its products are one
gallery, with at most 2 queries a reference. Nothing is known of training there, so no query is
dropped for a rare value.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dqe_jax.data import examples
from dqe_jax.data.builders.fashion_raw import DECODE_SIDE, Photos, read_styles
from dqe_jax.data.builders.fashion_texts import ATTRIBUTES, GRAMMAR
from dqe_jax.data.made.galleries import Row, gallery_items, make_splits, place_products
from dqe_jax.data.made.photos import ImageFile, decode_all
from dqe_jax.data.made.queries import Product, Rules
from dqe_jax.utils import errors
from dqe_jax.utils.files import JsonObject, is_regular
from dqe_jax.utils.progress import progress

# More columns that gallery records include, if the file has them.
EXTRA_COLUMNS = ("masterCategory", "subCategory", "year")
# Attributes by which a product is relevant; the others have ANY for a value.
RELEVANCE = {"fine": ATTRIBUTES, "coarse": ("baseColour", "articleType")}
ANY = "any"
# Changing one changes the data set: raise the builder's VERSION with it.
SPLIT_SALT = "fashion_products/split/1"
RULES = Rules(GRAMMAR, salt="fashion_products/query/1")


@dataclasses.dataclass(kw_only=True)
class FashionProductsConfig(tfds.core.BuilderConfig):
    """One copy of the data at one size; `name` tells it from others.

    Attributes:
        raw_dir: Directory of `styles.csv` and the photos.
        image_size: Pixels a side of the images.
        preprocess: How a photo becomes square, a name of `preprocess.PREPROCESS`.
        max_bad_fraction: Above this fraction of rows lost, preparing the data is an error.
        relevance: Which attributes count for validity, a name of `RELEVANCE`.
        image_format: How images are stored, of `settings.IMAGE_FORMATS`.
        whole: Whether all products are one split, `examples.WHOLE`.
    """

    raw_dir: str = ""
    image_size: int = 64
    preprocess: str = "pad"
    max_bad_fraction: float = 0.01
    relevance: str = "fine"
    image_format: str = "png"
    whole: bool = False


class FashionProducts(tfds.core.GeneratorBasedBuilder):
    """Fashion products with queries made from their attributes; see the module."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Kinds, subsets and pools.", "1.0.0": "First version."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=examples.features(config.image_size, config.image_format),
            # Queries name images by their position.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, examples.Records]:
        del dl_manager  # Nothing to download.
        config = self.builder_config
        raw_dir = epath.Path(config.raw_dir)
        images = ImageFile(config.image_size)
        galleries, report = _load_products(raw_dir, config, images)
        queries, report["splits"] = make_splits(
            RULES,
            galleries,
            table=str(raw_dir / "styles.csv"),
            advice="give a directory with more products by --data_dir",
        )
        self.info.metadata.update(report)

        generators = {}
        for split in galleries:
            generators[examples.gallery_split(split)] = self._generate_examples(
                gallery_items(galleries[split], images, config.image_format)
            )
            generators[split] = self._generate_examples(queries[split])
        return generators

    def _generate_examples(
        self, records: Iterable[examples.Query | examples.GalleryItem]
    ) -> examples.Records:
        for row, item in enumerate(records):
            yield row, item.record()


def _load_products(
    raw_dir: epath.Path, config: FashionProductsConfig, images: ImageFile
) -> tuple[dict[str, list[Product]], JsonObject]:
    """The products of each split, their images in `images`, and a report for the metadata."""
    styles, photos = read_styles(raw_dir / "styles.csv"), Photos(raw_dir)
    ids = (row["id"] for row in styles.rows)
    decoded = decode_all(photos, ids, config.image_size, config.preprocess, DECODE_SIDE)
    decoded = progress(decoded, len(styles.rows), "Photos of fashion_products")
    rows = (_row(row, RELEVANCE[config.relevance]) for row in styles.rows)
    galleries, unseen = place_products(rows, decoded, images, SPLIT_SALT, whole=config.whole)
    lost = {row_id or "(no id)": "its row is incomplete" for row_id in styles.incomplete_ids}
    lost |= {row_id: f"images/{row_id}.jpg {reason}" for row_id, reason in unseen.items()}
    lost_count = len(styles.incomplete_ids) + len(unseen)
    total = len(styles.rows) + len(styles.incomplete_ids)
    listed = {row["id"] for row in styles.rows} | set(styles.incomplete_ids)
    without_row = sorted(photos.sizes.keys() - listed)
    _warn(raw_dir, "rows lost for want of a usable photo or of fields", lost_count, list(lost))
    _warn(raw_dir, "photos without a row", len(without_row), without_row)
    repeated = styles.duplicate_ids
    _warn(raw_dir, "rows that repeat an id, of which the first is kept", len(repeated), repeated)
    if lost_count > config.max_bad_fraction * total:
        example = next(iter(lost.items()))
        raise errors.UserError(
            f"{raw_dir} lacks a usable photo or row for {lost_count} of {total} products (for "
            f"example {example[0]}: {example[1]}); restore the photos, take the rows out of "
            "styles.csv, or give another directory by --data_dir."
        )
    report = {
        "rows": total,
        "products": sum(map(len, galleries.values())),
        "lost_rows": lost_count,
        "lost": lost,
        "photos_without_row": len(without_row),
        "photos_without_row_ids": without_row,
        "duplicate_ids": repeated,
        "image_size": config.image_size,
        "preprocess": config.preprocess,
        "image_format": config.image_format,
        "splits": {},
    }
    return galleries, report


def _row(row: Mapping[str, str], relevant: Collection[str]) -> Row:
    """A row of the table; of attributes other than `relevant` all products have one value."""
    columns = [*ATTRIBUTES, *(column for column in EXTRA_COLUMNS if column in row)]
    return Row(
        id=row["id"],
        values=tuple(row[name] if name in relevant else ANY for name in ATTRIBUTES),
        attributes=tuple(f"{column}={row[column]}" for column in columns),
    )


def _warn(raw_dir: epath.Path, what: str, count: int, ids: Sequence[str]) -> None:
    if count:
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        logging.warning("%s: %d %s: %s", raw_dir, count, what, shown)


def make_builder(
    *,
    raw_dir: str,
    prepared_dir: str,
    image_size: int,
    preprocess: str = "pad",
    max_bad_fraction: float = 0.01,
    relevance: str = "fine",
    image_format: str = "png",
    whole: bool = False,
) -> FashionProducts:
    """The builder of a copy of the data set at one size.

    Args:
        raw_dir: Directory of `styles.csv` and the photos.
        prepared_dir: Where TFDS keeps prepared data.
        image_size: Pixels a side of the images.
        preprocess: How a photo becomes square, a name of `preprocess.PREPROCESS`.
        max_bad_fraction: Share of the rows that may be lost to missing or unreadable photos.
        relevance: "fine", or "coarse": see the module.
        image_format: How images are stored, of `settings.IMAGE_FORMATS`.
        whole: Whether all products are one split, see the module.

    Returns:
        The builder; its configuration is named by size, preprocessing, relevance unless it is fine,
        format unless it is PNG, `whole` if it is one split, and a digest of `styles.csv` and of the
        names and sizes of the photos, which is the same for an archive and for a folder.

    Raises:
        errors.UserError: The directory is not there or not complete, or the size is out of range.
    """
    if not 1 <= image_size <= DECODE_SIDE:
        raise errors.UserError(
            f"The image size {image_size} is not within 1 and {DECODE_SIDE}; choose one that is."
        )
    directory = epath.Path(raw_dir).expanduser()
    if not raw_dir or not directory.is_dir():
        raise errors.UserError(
            f"The directory {raw_dir!r} does not exist; give the one that holds styles.csv and the "
            "photos by --data_dir."
        )
    styles = directory / "styles.csv"
    if not styles.exists() or not is_regular(styles):
        raise errors.UserError(
            f"{directory} has no styles.csv; copy the data set's table there, or give another "
            "directory by --data_dir."
        )
    read_styles(styles)  # its errors before any photo is read
    digest = hashlib.sha256(styles.read_bytes())
    for photo_id, size in sorted(Photos(directory).sizes.items()):
        digest.update(f"\n{photo_id}:{size}".encode())
    coarse = "" if relevance == "fine" else f"{relevance}-"
    stored = "" if image_format == "png" else f"{image_format}-"
    together = f"{examples.WHOLE}-" if whole else ""
    config = FashionProductsConfig(
        name=f"{image_size}px-{preprocess}-{coarse}{stored}{together}{digest.hexdigest()[:8]}",
        description="Fashion products.",
        raw_dir=str(directory),
        image_size=image_size,
        preprocess=preprocess,
        max_bad_fraction=max_bad_fraction,
        relevance=relevance,
        image_format=image_format,
        whole=whole,
    )
    return FashionProducts(config=config, data_dir=prepared_dir, file_format="array_record")
