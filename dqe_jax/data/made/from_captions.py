"""Triplets from captions alone: pairs of images that are near by an encoder and differ in words.

A row of the table is an image and its caption. For each image, some of the images of its split that
are nearest by the encoder, and whose captions are others, become targets. The text says how the
captions differ: "with laces instead of buckles" where a few words do, or the whole caption of the
target. Rules of tables, photos and splits are those of `from_table.py`.

Only the target of a query is known to be valid. Other images may fit the text as well, and nobody
knows which: no query has valid targets in the data, so that there are no metrics over them, R@k
counts an image that fits and is not the target as wrong, and training may take such an image for a
negative. A caption that does not tell its image gives a wrong query.
"""

from __future__ import annotations

import collections
import difflib
import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from dqe_jax.data import examples
from dqe_jax.data.builders.benchmarks import make_config
from dqe_jax.data.made import tables
from dqe_jax.data.made.folder import Folder, folder_of, listing_digest, warn
from dqe_jax.data.made.galleries import Row, place_products
from dqe_jax.data.made.grammar import NA
from dqe_jax.data.made.photos import ImageFile, decode_all
from dqe_jax.data.made.queries import Product, ambiguous_photos
from dqe_jax.data.made.settings import read_facts
from dqe_jax.data.made.store import Made, advice, open_output, store
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.progress import progress
from dqe_jax.utils.text_table import text_table

PathLike = str | os.PathLike[str]
# Features of images uint8 [B, H, W, 3]: arrays [B, D] or [B, P, D] by name.
Encode = Callable[[np.ndarray], Mapping[str, np.ndarray]]

QUERIES_PER_REFERENCE = {"train": 4, "validation": 2, "test": 2}
LONGEST = 400  # characters of a caption
FEW_WORDS = 6  # of a difference that is said by itself
_NEAR = 20  # images among which a target is chosen
_BATCH = 64
_AT_A_TIME = 1024  # rows of a matrix of similarities
_SPLIT_SALT = "triplets/captions/split/1"
_QUERY_SALT = "triplets/captions/query/1"
_TRUTH = (
    "Only the target of a query is known to be valid: other images may fit its text too, and count "
    "as wrong."
)
REPLACED, ADDED, REMOVED, OTHER = "words replaced", "words added", "words removed", "other caption"
_TEXTS = {
    REPLACED: ("{new} instead of {old}", "{new} rather than {old}", "change {old} to {new}"),
    ADDED: ("add {new}", "the same, and {new}", "also {new}"),
    REMOVED: ("without {old}", "remove {old}", "the same, but not {old}"),
    OTHER: ("{new}", "instead: {new}", "make it {new}"),
}


def triplets_from_captions(
    table: PathLike,
    images: PathLike,
    output: PathLike,
    *,
    encode: Encode,
    encoder: str,
    caption_column: str = "caption",
    image_column: str | None = None,
    image_size: int = 224,
    preprocess: str = "pad",
    image_format: str = "png",
    max_lost: float = 0.1,
    overwrite: bool = False,
) -> JsonObject:
    """Makes triplets from captions, and prepares them for training; see the module.

    Args:
      table: a CSV file with a row for each image.
      images: folder of the images.
      output: directory for what `store.py` lists.
      encode: by which images are near.
      encoder: its name.
      caption_column: column of the captions.
      image_column: column that names the images; None to look for one.
      image_size: pixels a side of the stored images, which the encoder sees.
      preprocess: how photos become square, a name of `preprocess.PREPROCESS`.
      image_format: how images are stored, of `settings.IMAGE_FORMATS`.
      max_lost: share of the rows that may be lost.
      overwrite: whether to make again what is made.

    Returns:
      What `made.json` holds.

    Raises:
      UserError: a file or a value cannot be used, too many rows are lost, or a split is empty.
    """
    cells = tables.read_cells(table)
    files = RawFiles(folder_of(images))
    at = tables.image_column(cells, image_column)
    named = {"caption": caption_column}
    products = tables.read_products(cells, files.image_paths, at, named, LONGEST)
    config = make_config(image_size=image_size, preprocess=preprocess, image_format=image_format)
    options = json.dumps([caption_column, at, encoder, _SPLIT_SALT, _QUERY_SALT])
    digest = hashlib.sha256(cells.path.read_bytes() + options.encode())
    source = listing_digest(digest, files)
    place = whole_path(output)
    if not open_output(place, config, source, overwrite=overwrite):
        return read_facts(place) or {}

    (column,) = products.columns
    without = [path for path, text in zip(products.paths, column.values) if text == NA]
    warn(cells.path, "images have no caption, and are only in the gallery", without)
    kept = ImageFile(image_size)
    decoded = decode_all(Folder(files.root), products.paths, image_size, preprocess)
    decoded = progress(decoded, len(products.paths), "Photos")
    rows = (
        Row(path, (text,), (f"caption={text}",) if text != NA else ())
        for path, text in zip(products.paths, column.values)
    )
    galleries, unseen = place_products(rows, decoded, kept, _SPLIT_SALT)
    lost = tables.check_lost(cells, products, unseen, max_lost)
    queries = {}
    counts = {}
    for split in examples.SPLITS:
        gallery = galleries[split]
        vectors = _embed(gallery, kept, encode) if gallery else np.zeros((0, 1), np.float32)
        queries[split] = make_queries(gallery, vectors, QUERIES_PER_REFERENCE[split])
        if not queries[split]:
            raise UserError(
                f"{cells.path} leaves the split {split!r} empty ({len(gallery)} images, no "
                "queries), so add images with captions that differ."
            )
        kinds = collections.Counter(kind for query in queries[split] for kind in query.kinds)
        counts[split] = {
            "products": len(gallery),
            "queries": len(queries[split]),
            "references": len({query.reference for query in queries[split]}),
            "kinds": dict(sorted(kinds.items())),
        }
    facts = {
        "made_from": f"captions, with images that are near by {encoder}",
        "truth": _TRUTH,
        "source": source,
        "attributes": [],
        "products": sum(map(len, galleries.values())),
        "images_without_caption": len(without),
        **tables.lost_facts(products, lost),
        "splits": counts,
    }
    store(place, config, Made(galleries, queries, kept, "", facts))
    lines: list[tuple[str, ...]] = [("split", "images", "references", "queries")]
    for split, own in counts.items():
        lines.append((split, *(f"{own[key]:,}" for key in ("products", "references", "queries"))))
    logging.info("\n%s\n\n%s", text_table(lines), _TRUTH)
    logging.info("%s", advice(place, config))
    return facts


def make_queries(
    products: Sequence[Product], vectors: np.ndarray, per_reference: int
) -> list[examples.Query]:
    """The queries of a split.

    Args:
      products: its images, whose value is the caption.
      vectors: float `[N, D]` of length 1, by which they are near.
      per_reference: at most so many of an image.
    """
    ambiguous = ambiguous_photos(products)
    usable = [p.values[0] != NA and p.photo not in ambiguous for p in products]
    copies: dict[int, list[int]] = collections.defaultdict(list)
    for row, product in enumerate(products):
        copies[product.photo].append(row)
    queries = []
    for reference, near in enumerate(_nearest(vectors, 3 * _NEAR)):
        if not usable[reference]:
            continue
        own = products[reference]
        rng = random.Random(f"{_QUERY_SALT}:{own.id}")
        captions = {_plain(own.values[0])}
        found: list[tuple[int, str, str]] = []
        for row in near:
            other = products[row]
            if usable[row] and other.photo != own.photo and _plain(other.values[0]) not in captions:
                captions.add(_plain(other.values[0]))
                found.append((row, *modification(own.values[0], other.values[0], rng)))
        rng.shuffle(found := found[:_NEAR])
        # What few words say comes first: it needs the reference.
        found.sort(key=lambda each: each[2] == OTHER)
        for number, (target, text, kind) in enumerate(found[:per_reference]):
            others = [row for row in copies[products[target].photo] if row != target]
            queries.append(
                examples.Query(
                    id=f"{own.id}-{number}",
                    texts=[text],
                    reference=reference,
                    target=target,
                    known_positives=[target, *others],
                    relevant=[],  # not known
                    kinds=(kind,),
                )
            )
    return queries


def modification(old: str, new: str, rng: random.Random) -> tuple[str, str]:
    """A text that turns an image with caption `old` into one with `new`, and its kind."""
    before, after = _plain(old).split(), _plain(new).split()
    matcher = difflib.SequenceMatcher(a=before, b=after, autojunk=False)
    parts = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    kind, words = OTHER, {"new": " ".join(after), "old": " ".join(before)}
    if len(parts) == 1:
        _, a, b, c, d = parts[0]
        if max(b - a, d - c) <= FEW_WORDS and b - a < len(before):  # something stays
            kind = REPLACED if a < b and c < d else ADDED if c < d else REMOVED
            words = {"new": " ".join(after[c:d]), "old": " ".join(before[a:b])}
    # Not `format` of the caption, which may hold braces.
    return rng.choice(_TEXTS[kind]).format(**words), kind


def _plain(caption: str) -> str:
    return caption.lower().strip(" .!")


def _embed(products: Sequence[Product], images: ImageFile, encode: Encode) -> np.ndarray:
    """Vectors of length 1, float32 `[N, D]`: each array of the encoder counts alike."""
    chunks = []
    starts = range(0, len(products), _BATCH)
    for start in progress(starts, len(products), "Images encoded", _BATCH):
        batch = np.stack([images[p.image] for p in products[start : start + _BATCH]])
        parts = [np.asarray(array, np.float32) for array in encode(batch).values()]
        means = [array if array.ndim == 2 else array.mean(1) for array in parts]
        chunks.append(np.concatenate([_unit(array) for array in means], axis=1))
    return _unit(np.concatenate(chunks))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _nearest(vectors: np.ndarray, count: int) -> Iterator[list[int]]:
    """For each vector the rows of the `count` nearest others, nearest first."""
    for start in range(0, len(vectors), _AT_A_TIME):
        similar = vectors[start : start + _AT_A_TIME] @ vectors.T
        for i, line in enumerate(similar):
            line[start + i] = -np.inf
            yield np.argsort(-line, kind="stable")[: min(count, len(vectors) - 1)].tolist()
