"""Composed queries made from the attributes of the public "Fashion Product Images" data set.

Each product has one photo and a row of attributes. A query takes a product as the reference, and
asks for its gender, article type, colour, season and usage with one or two of them changed. Because
every product of the gallery has its attributes, all valid targets of a query are known, not only
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
-   **Splits.** A hash of the photo's content assigns 72 % of the products to train, 8 % to
    validation and 20 % to test. Products with identical photos go to the same split. A split's
    gallery is all of its products, in the order of `styles.csv`.
-   **Ambiguous photos.** A photo that occurs with different attributes is neither a reference nor a
    target, since its text could contradict what is seen. Its rows stay in the gallery, and among
    the `valid` rows of the attributes that they state.
-   **Queries.** At most 8 a reference in train and 2 in validation and test, with distinct
    attributes asked for. The kind of change is chosen before the values, so that frequent kinds do
    not dominate; at most about a third change two attributes. Within a kind, attributes are asked
    for in proportion to the products of the split that have them.
-   **Rare values.** A query of validation or test is dropped if a value that it asks for is asked
    for by no query of train.

With coarse relevance only the article type and the colour decide which products are valid: of the
other attributes all products have one value, which no text asks for. Many products are then valid
for a query, and its target is a random one of them. Gallery records state all attributes even so.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import random
import statistics
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dqe_jax.data import examples
from dqe_jax.data.builders.fashion_texts import (
    ATTRIBUTES,
    KINDS,
    NA,
    TWO_CHANGES,
    Values,
    changes,
    modification,
)
from dqe_jax.data.photos import MAX_BYTES, decode_photo
from dqe_jax.utils import errors

# Columns that gallery records state besides, where the file has them.
EXTRA_COLUMNS = ("masterCategory", "subCategory", "year")
# Attributes by which a product is valid; the others have ANY for a value.
RELEVANCE = {"fine": ATTRIBUTES, "coarse": ("baseColour", "articleType")}
ANY = "any"
QUERIES_PER_REFERENCE = {"train": 8, "validation": 2, "test": 2}
# Changing either salt changes the data set: raise the builder's VERSION with it.
_SPLIT_SALT = "fashion_products/split/1"
_QUERY_SALT = "fashion_products/query/1"
_SPLIT_ENDS = (("train", 0.72), ("validation", 0.80), ("test", 1.0))
# Photos are decoded at the smallest JPEG scale of at least this many pixels a side, whatever the
# size asked for, so that which photos are identical does not depend on that size.
_DECODE_SIDE = 512
_DECODE_THREADS = 4


# --- Reading styles.csv ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Styles:
    """Rows of `styles.csv`, by column; and the ids of rows that were left out, by reason."""

    rows: list[dict[str, str]]
    duplicate_ids: list[str]
    incomplete_ids: list[str]


def parse_styles(text: str, name: str = "styles.csv") -> Styles:
    """Reads the attribute table.

    Args:
        text: Content of the file, with any line ends.
        name: Name of the file, for errors.

    Returns:
        The rows with a distinct id, in order, empty values as `NA`.

    Raises:
        errors.UserError: A column that is needed is missing.
    """
    # Not the csv module: a product name that opens with a quote would swallow the rows after it.
    # Not splitlines: it also splits at characters that names may hold.
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]
    header = [_clean(column) for column in lines[0].split(",")] if lines else []
    for column in ("id", *ATTRIBUTES):
        if column not in header:
            raise errors.UserError(
                f"{name} has no column {column!r}; it has {', '.join(header) or 'none'}, so give a "
                "directory with the published styles.csv by --data_dir."
            )
    rows: dict[str, dict[str, str]] = {}
    duplicates, incomplete = [], []
    for line in lines[1:]:
        fields = [_clean(field) for field in line.split(",", len(header) - 1)]
        row = dict(zip(header, fields))
        row_id = row.get("id", "")
        if len(fields) < len(header) or not row_id:
            incomplete.append(row_id)
        elif row_id in rows:
            duplicates.append(row_id)
        else:
            rows[row_id] = {column: value or NA for column, value in row.items()}
    return Styles(list(rows.values()), duplicates, incomplete)


def _clean(field: str) -> str:
    field = field.strip()
    if len(field) >= 2 and field[0] == field[-1] == '"':
        field = field[1:-1]
    return " ".join(field.split())


# --- Reading photos -------------------------------------------------------------------------------


class Photos:
    """The photos of a raw directory, by id, from `images.tar` or the folder `images/`."""

    def __init__(self, raw_dir: epath.Path):
        """Lists the photos.

        Raises:
            errors.UserError: Neither form is there, or the archive is damaged.
        """
        self._tar = raw_dir / "images.tar"
        self._folder = raw_dir / "images"
        self._offsets: dict[str, int] | None = None
        self._file: Any = None
        self.sizes: dict[str, int] = {}
        if self._tar.exists():
            self._offsets = {}
            try:
                # "r:" refuses compression, which has no random access.
                with self._tar.open("rb") as f, tarfile.open(fileobj=f, mode="r:") as tar:
                    for member in tar:
                        photo_id = _photo_id(member.name)
                        if member.isreg() and photo_id is not None:
                            self._offsets[photo_id] = member.offset_data
                            self.sizes[photo_id] = member.size
            except (tarfile.TarError, EOFError, OSError) as e:
                raise errors.UserError(
                    f"{self._tar} is not a complete uncompressed tar archive ({e}); copy it "
                    f"again, or unpack the photos to {self._folder}/ and remove it."
                ) from e
        elif self._folder.is_dir():
            for path in self._folder.iterdir():
                photo_id = _photo_id(path.name)
                if photo_id is not None:
                    self.sizes[photo_id] = path.stat().length
        else:
            raise errors.UserError(
                f"{raw_dir} has neither images.tar nor a folder images/; put the photos there as "
                "images/<id>.jpg, or give another directory by --data_dir."
            )

    def read(self, photo_id: str) -> bytes:
        """Bytes of a photo. Not thread-safe.

        Raises:
            ValueError: There is no such photo, or it is too large to be one.
        """
        if photo_id not in self.sizes:
            raise ValueError("is missing")
        if self.sizes[photo_id] > MAX_BYTES:
            raise ValueError(f"has {self.sizes[photo_id]} bytes")
        if self._offsets is None:
            return (self._folder / f"{photo_id}.jpg").read_bytes()
        if self._file is None:
            self._file = self._tar.open("rb")
        self._file.seek(self._offsets[photo_id])
        return self._file.read(self.sizes[photo_id])

    def close(self) -> None:
        """Closes the archive; a later read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _photo_id(name: str) -> str | None:
    base = name.rsplit("/", 1)[-1]
    # Hidden files are the resource forks that some systems add to archives.
    if base.startswith(".") or not base.endswith(".jpg"):
        return None
    return base.removesuffix(".jpg")


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """A decoded photo, or the reason why there is none."""

    image: np.ndarray | None = None
    pixels: str = ""  # Digest of the pixels: equal for identical photos.
    content: str = ""  # Digest of the bytes: the same with any version of the decoder.
    reason: str = ""


def _decode(data: bytes, image_size: int, preprocess: str) -> _Decoded:
    try:
        image, pixels = decode_photo(data, image_size, preprocess, _DECODE_SIDE)
    except Exception as e:  # Decoders of damaged files raise nearly anything.
        return _Decoded(reason=f"does not decode ({' '.join(str(e).split())[:80]})")
    return _Decoded(image, pixels, hashlib.sha256(data).hexdigest())


def _decode_all(
    photos: Photos, ids: Iterable[str], image_size: int, preprocess: str
) -> Iterator[_Decoded]:
    """Decodes photos in order, in threads (decoders release the interpreter lock)."""
    pending: collections.deque[concurrent.futures.Future[_Decoded]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for photo_id in ids:
            try:
                pending.append(pool.submit(_decode, photos.read(photo_id), image_size, preprocess))
            except (ValueError, OSError) as e:
                failed: concurrent.futures.Future[_Decoded] = concurrent.futures.Future()
                failed.set_result(_Decoded(reason=str(e)))
                pending.append(failed)
            # A bounded number in flight: the encoded photos of a large set do not fit in memory.
            if len(pending) >= 8 * _DECODE_THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    photos.close()


class _ImageFile:
    """Images of one shape in a temporary file: those of a large set do not fit in memory."""

    def __init__(self, image_size: int):
        self._shape = (image_size, image_size, 3)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (as long-lived as the object)
        self._count = 0

    def append(self, image: np.ndarray) -> int:
        """Adds an image, and returns its index."""
        self._file.seek(self._count * int(np.prod(self._shape)))
        self._file.write(image.tobytes())
        self._count += 1
        return self._count - 1

    def __getitem__(self, index: int) -> np.ndarray:
        size = int(np.prod(self._shape))
        self._file.seek(index * size)
        return np.frombuffer(self._file.read(size), np.uint8).reshape(self._shape)


# --- Products and splits --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of one split.

    Attributes:
        id: Its id.
        values: What decides for which queries it is valid.
        photo: Row of the first product with an identical photo.
        attributes: All that is known of it, as `name=value`.
        image: Index in the file of images.
    """

    id: str
    values: Values
    photo: int
    attributes: tuple[str, ...] = ()
    image: int = -1


def split_of(content: str) -> str:
    """The split of a photo, by a digest of its content."""
    digest = hashlib.sha256(f"{_SPLIT_SALT}:{content}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return next(split for split, end in _SPLIT_ENDS if place < end or end == 1.0)


# --- Queries --------------------------------------------------------------------------------------


def neighbours(tuples: Collection[Values]) -> dict[Values, dict[tuple[int, ...], list[Values]]]:
    """For each 5-tuple, those that differ from it in one or two values, by the positions changed.

    Found through indexes of the tuples with one or two values removed, not by comparing all pairs.

    Args:
        tuples: Distinct 5-tuples.

    Returns:
        `{tuple: {positions: [tuples]}}`, in a fixed order; positions without any are absent.
    """
    ordered = sorted(tuples)
    positions = [
        *((i,) for i in range(len(ATTRIBUTES))),
        *itertools.combinations(range(len(ATTRIBUTES)), 2),
    ]
    result: dict[Values, dict[tuple[int, ...], list[Values]]] = {values: {} for values in ordered}
    for removed in positions:
        index: dict[Values, list[Values]] = collections.defaultdict(list)
        for values in ordered:
            index[_without(values, removed)].append(values)
        for values in ordered:
            found = [
                other
                for other in index[_without(values, removed)]
                if all(other[i] != values[i] for i in removed)
            ]
            if found:
                result[values][removed] = found
    return result


def _without(values: Values, removed: tuple[int, ...]) -> Values:
    return tuple(value for i, value in enumerate(values) if i not in removed)


def ambiguous_photos(products: Sequence[Product]) -> set[int]:
    """The `photo` of those photos that occur with different attributes."""
    seen: dict[int, Values] = {}
    return {p.photo for p in products if seen.setdefault(p.photo, p.values) != p.values}


def _choose(
    found: Mapping[tuple[int, ...], list[Values]],
    sizes: Mapping[Values, int],
    count: int,
    rng: random.Random,
) -> list[Values]:
    """Up to `count` distinct tuples, one or two changes away: the kind first, then the values."""
    # A third of two changes in expectation, and no more than half as many as of one change.
    two = count // 3 + (rng.random() < (count % 3) / 3)
    singles = _cycle({k: v for k, v in found.items() if len(k) == 1}, sizes, count - two, rng)
    two = min(two, -(-len(singles) // 2))
    return singles + _cycle({k: v for k, v in found.items() if len(k) == 2}, sizes, two, rng)


def _cycle(
    found: Mapping[tuple[int, ...], list[Values]],
    sizes: Mapping[Values, int],
    count: int,
    rng: random.Random,
) -> list[Values]:
    """Takes random tuples from each kind in turn, kinds in random order, until `count`.

    Within a kind, in proportion to the products of a tuple (`sizes`) and without replacement: the
    largest of `uniform ** (1 / size)` (Efraimidis and Spirakis, 2006).
    """
    kinds = sorted(found)
    rng.shuffle(kinds)
    samples = []
    for kind in kinds:
        keys = {values: rng.random() ** (1 / sizes[values]) for values in found[kind]}
        samples.append(sorted(keys, key=keys.__getitem__, reverse=True)[:count])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*samples))
    return list(itertools.islice((values for values in turns if values is not None), count))


def make_queries(
    products: Sequence[Product],
    queries_per_reference: int,
    known: Collection[tuple[str, str]] | None = None,
) -> tuple[list[examples.Query], int]:
    """Makes the queries of a split, in the order of their references; see the module's rules.

    Args:
        products: The gallery of the split.
        queries_per_reference: At most so many a product.
        known: The (attribute, value) that may be asked for; any if None.

    Returns:
        The queries, and how many were dropped because they ask for a value not in `known`.
    """
    rows: dict[Values, list[int]] = collections.defaultdict(list)
    copies: dict[int, list[int]] = collections.defaultdict(list)
    for row, product in enumerate(products):
        rows[product.values].append(row)
        copies[product.photo].append(row)
    ambiguous = ambiguous_photos(products)
    # Rows that can be a target. Copies of the reference have its own tuple, since ambiguous photos
    # are no references, so that none of them is a target.
    clear = {
        values: usable
        for values, those in rows.items()
        if (usable := [row for row in those if products[row].photo not in ambiguous])
    }
    near = neighbours(clear)
    sizes = {values: len(usable) for values, usable in clear.items()}

    drafts: list[tuple[int, int, str, Values]] = []  # reference, target, text, values asked for
    dropped = 0
    for reference, product in enumerate(products):
        if product.photo in ambiguous:
            continue
        rng = random.Random(f"{_QUERY_SALT}:{product.id}")
        for values in _choose(near[product.values], sizes, queries_per_reference, rng):
            target = rng.choice(clear[values])
            text = modification(product.values, values, rng)
            asked = [(ATTRIBUTES[i], values[i]) for i in changes(product.values, values)]
            if known is not None and not all(pair in known for pair in asked):
                dropped += 1
                continue
            drafts.append((reference, target, text, values))

    # Queries with the same words about the same photo are one question to a model.
    answers: dict[tuple[int, str], dict[int, None]] = collections.defaultdict(dict)
    for reference, target, text, _ in drafts:
        answers[products[reference].photo, text].update(
            dict.fromkeys(copies[products[target].photo])
        )
    queries = []
    numbers: collections.Counter[int] = collections.Counter()
    for reference, target, text, values in drafts:
        product = products[reference]
        changed = changes(product.values, values)
        others = sorted(answers[product.photo, text].keys() - {target})
        queries.append(
            examples.Query(
                id=f"{product.id}-{numbers[reference]}",
                texts=[text],
                reference=reference,
                target=target,
                targets=[target, *others],
                valid=rows[values],
                kinds=(KINDS[ATTRIBUTES[changed[0]]] if len(changed) == 1 else TWO_CHANGES,),
                attributes=[f"{ATTRIBUTES[i]}={values[i]}" for i in changed],
            )
        )
        numbers[reference] += 1
    return queries, dropped


def asked_values(queries: Iterable[examples.Query]) -> set[tuple[str, str]]:
    """The (attribute, value) pairs that the queries ask for."""
    return {tuple(pair.split("=", 1)) for query in queries for pair in query.attributes}  # type: ignore[misc]


def summary(
    products: Sequence[Product], queries: Sequence[examples.Query], dropped: int
) -> dict[str, Any]:
    """Counts of a split, for the metadata."""
    valid = [len(query.valid) for query in queries] or [0]
    kinds = collections.Counter(kind for query in queries for kind in query.kinds)
    return {
        "products": len(products),
        "distinct_photos": len({product.photo for product in products}),
        "ambiguous_photos": len(ambiguous_photos(products)),
        "distinct_attributes": len({product.values for product in products}),
        "queries": len(queries),
        "references": len({query.reference for query in queries}),
        "kinds": dict(sorted(kinds.items())),
        "median_valid": float(statistics.median(valid)),
        "mean_valid": round(statistics.fmean(valid), 3),
        "dropped_rare_values": dropped,
    }


# --- The builder ----------------------------------------------------------------------------------


@dataclasses.dataclass(kw_only=True)
class FashionProductsConfig(tfds.core.BuilderConfig):
    """One copy of the data at one size; `name` tells it from others.

    Attributes:
        raw_dir: Directory of `styles.csv` and the photos.
        image_size: Pixels a side of the images.
        preprocess: How a photo becomes square, a name of `preprocess.PREPROCESS`.
        max_bad_fraction: Above this fraction of rows lost, preparing the data is an error.
        relevance: Which attributes count for validity, a name of `RELEVANCE`.
    """

    raw_dir: str = ""
    image_size: int = 64
    preprocess: str = "pad"
    max_bad_fraction: float = 0.01
    relevance: str = "fine"


class FashionProducts(tfds.core.GeneratorBasedBuilder):
    """Fashion products with queries made from their attributes; see the module."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {"2.0.0": "Kinds, subsets and pools.", "1.0.0": "First version."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=examples.features(self.builder_config.image_size),
            # Queries name images by their position.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        del dl_manager  # Nothing to download.
        config = self.builder_config
        raw_dir = epath.Path(config.raw_dir)
        images = _ImageFile(config.image_size)
        galleries, report = _load_products(raw_dir, config, images)
        queries: dict[str, list[examples.Query]] = {}
        known: set[tuple[str, str]] | None = None
        for split in examples.SPLITS:  # Train is first: the others ask for what it asks for.
            queries[split], dropped = make_queries(
                galleries[split], QUERIES_PER_REFERENCE[split], known
            )
            if not queries[split]:
                raise errors.UserError(
                    f"{raw_dir / 'styles.csv'} leaves the split {split!r} empty ("
                    f"{len(galleries[split])} products, no queries), so give a directory with more "
                    "products by --data_dir."
                )
            if known is None:
                known = asked_values(queries[split])
            report["splits"][split] = summary(galleries[split], queries[split], dropped)
            logging.info("%s: %s", split, report["splits"][split])
        self.info.metadata.update(report)

        generators = {}
        for split in examples.SPLITS:
            generators[examples.gallery_split(split)] = self._generate_examples(
                _gallery_items(galleries[split], images)
            )
            generators[split] = self._generate_examples(queries[split])
        return generators

    def _generate_examples(
        self, records: Iterable[examples.Query | examples.GalleryItem]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, item in enumerate(records):
            yield row, item.record()


def _gallery_items(
    products: Sequence[Product], images: _ImageFile
) -> Iterator[examples.GalleryItem]:
    for product in products:
        yield examples.GalleryItem(
            product.id, images[product.image], product.photo, product.attributes
        )


def _load_products(
    raw_dir: epath.Path, config: FashionProductsConfig, images: _ImageFile
) -> tuple[dict[str, list[Product]], dict[str, Any]]:
    """The products of each split, their images in `images`, and a report for the metadata."""
    styles = parse_styles(_read_text(raw_dir / "styles.csv"), str(raw_dir / "styles.csv"))
    photos = Photos(raw_dir)
    lost = {row_id or "(no id)": "its row is incomplete" for row_id in styles.incomplete_ids}
    lost_count = len(styles.incomplete_ids)
    relevant = RELEVANCE[config.relevance]
    galleries: dict[str, list[Product]] = {split: [] for split in examples.SPLITS}
    first_of: dict[str, tuple[str, int]] = {}  # Split and row of the first of identical photos.
    ids = (row["id"] for row in styles.rows)
    decoded_all = _decode_all(photos, ids, config.image_size, config.preprocess)
    for row, decoded in zip(styles.rows, decoded_all):
        if decoded.image is None:
            lost[row["id"]] = f"images/{row['id']}.jpg {decoded.reason}"
            lost_count += 1
            continue
        if decoded.pixels not in first_of:
            # The bytes of the first copy decide, so that the split is that of any decoder version.
            split = split_of(decoded.content)
            first_of[decoded.pixels] = (split, len(galleries[split]))
        split, photo = first_of[decoded.pixels]
        columns = [*ATTRIBUTES, *(column for column in EXTRA_COLUMNS if column in row)]
        galleries[split].append(
            Product(
                id=row["id"],
                values=tuple(row[name] if name in relevant else ANY for name in ATTRIBUTES),
                photo=photo,
                attributes=tuple(f"{column}={row[column]}" for column in columns),
                image=images.append(decoded.image),
            )
        )

    ids = {row["id"] for row in styles.rows} | set(styles.incomplete_ids)
    without_row = sorted(photos.sizes.keys() - ids)
    total = len(styles.rows) + len(styles.incomplete_ids)
    _warn(raw_dir, "rows lost for want of a usable photo or of fields", lost_count, list(lost))
    _warn(raw_dir, "photos without a row", len(without_row), without_row)
    _warn(
        raw_dir,
        "rows that repeat an id, of which the first is kept",
        len(styles.duplicate_ids),
        styles.duplicate_ids,
    )
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
        "duplicate_ids": styles.duplicate_ids,
        "image_size": config.image_size,
        "preprocess": config.preprocess,
        "splits": {},
    }
    return galleries, report


def _warn(raw_dir: epath.Path, what: str, count: int, ids: Sequence[str]) -> None:
    if count:
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        logging.warning("%s: %d %s: %s", raw_dir, count, what, shown)


def _read_text(path: epath.Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def make_builder(
    *,
    raw_dir: str,
    prepared_dir: str,
    image_size: int,
    preprocess: str = "pad",
    max_bad_fraction: float = 0.01,
    relevance: str = "fine",
) -> FashionProducts:
    """The builder of a copy of the data set at one size.

    Args:
        raw_dir: Directory of `styles.csv` and the photos.
        prepared_dir: Where TFDS keeps prepared data.
        image_size: Pixels a side of the images.
        preprocess: How a photo becomes square, a name of `preprocess.PREPROCESS`.
        max_bad_fraction: Share of the rows that may be lost to missing or unreadable photos.
        relevance: "fine", or "coarse": see the module.

    Returns:
        The builder; its configuration is named by size, preprocessing, relevance unless it is fine,
        and a digest of `styles.csv` and of the names and sizes of the photos, which is the same for
        an archive and for a folder.

    Raises:
        errors.UserError: The directory is not there or not complete, or the size is out of range.
    """
    if not 1 <= image_size <= _DECODE_SIDE:
        raise errors.UserError(
            f"The image size {image_size} is not within 1 and {_DECODE_SIDE}; choose one that is."
        )
    directory = epath.Path(raw_dir).expanduser()
    if not raw_dir or not directory.is_dir():
        raise errors.UserError(
            f"The directory {raw_dir!r} does not exist; give the one that holds styles.csv and the "
            "photos by --data_dir."
        )
    styles = directory / "styles.csv"
    if not styles.is_file():
        raise errors.UserError(
            f"{directory} has no styles.csv; copy the data set's table there, or give another "
            "directory by --data_dir."
        )
    parse_styles(_read_text(styles), str(styles))
    digest = hashlib.sha256(styles.read_bytes())
    for photo_id, size in sorted(Photos(directory).sizes.items()):
        digest.update(f"\n{photo_id}:{size}".encode())
    coarse = "" if relevance == "fine" else f"{relevance}-"
    config = FashionProductsConfig(
        name=f"{image_size}px-{preprocess}-{coarse}{digest.hexdigest()[:8]}",
        description="Fashion products.",
        raw_dir=str(directory),
        image_size=image_size,
        preprocess=preprocess,
        max_bad_fraction=max_bad_fraction,
        relevance=relevance,
    )
    return FashionProducts(config=config, data_dir=prepared_dir, file_format="array_record")
