"""Triplets from any table of products, without labels: all valid targets of a query are known.

`tables.py` tells how a table is read, `wording.py` how texts are made. Splits and queries are made
as those of `fashion_products`, whose module tells the rules: products with identical photos go to
one split, 72% of the photos to train, 8% to validation and 20% to test; a query asks for one or two
attributes to change; a photo with different attributes in different rows is neither a reference nor
a target. A product is valid for a query if it has all the values that the query asks for, those
that stay and those that change. What the table does not say, nobody knows: a wrong or missing cell
makes a valid target invalid, which `made.json` helps to judge by its counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence

from absl import logging
from etils import epath

from dqe_jax.data.builders.benchmarks import make_config
from dqe_jax.data.lexicon import load_lexicon
from dqe_jax.data.made import tables, wording
from dqe_jax.data.made.folder import Folder, folder_of, listing_digest, warn
from dqe_jax.data.made.galleries import Row, make_splits, place_products
from dqe_jax.data.made.grammar import NA
from dqe_jax.data.made.photos import ImageFile, decode_all
from dqe_jax.data.made.queries import Rules
from dqe_jax.data.made.settings import read_facts
from dqe_jax.data.made.store import Made, advice, open_output, store
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.paths import whole_path
from dqe_jax.utils.progress import progress
from dqe_jax.utils.text_table import text_table

PathLike = str | os.PathLike[str]

# Changing one changes what is made of a table.
_SPLIT_SALT = "triplets/table/split/1"
_QUERY_SALT = "triplets/table/query/1"
_TRUTH = (
    "All valid targets of a query are known as far as the table is right and complete: a product "
    "is valid if it has all the values that the query asks for."
)
_GUESSED = (
    "The attributes are guesses. Only the target of a query counts as valid, and even that only as "
    "far as its guess is right; which others fit is not known."
)


def triplets_from_table(
    table: PathLike,
    images: PathLike,
    output: PathLike,
    *,
    attributes: Sequence[str],
    image_column: str | None = None,
    templates: PathLike | None = None,
    lexicon: PathLike | None = None,
    image_size: int = 224,
    preprocess: str = "pad",
    image_format: str = "png",
    max_lost: float = 0.1,
    overwrite: bool = False,
    guessed_by: str | None = None,
) -> JsonObject:
    """Makes triplets from a table of attributes, and prepares them for training.

    Args:
      table: a CSV file; see `tables.py`.
      images: folder of the photos, which may be in folders below.
      output: directory for what `store.py` lists.
      attributes: columns that a query may change, each `COLUMN` or `COLUMN:NAME`.
      image_column: column that names the photos; None to look for one.
      templates: file of texts, see `wording.py`; None for what is built in.
      lexicon: file of further words that mention the attributes, as `dqe_jax/data/lexicon.txt`.
      image_size: pixels a side of the stored images.
      preprocess: how photos become square, a name of `preprocess.PREPROCESS`.
      image_format: how images are stored, of `settings.IMAGE_FORMATS`.
      max_lost: share of the rows that may be lost.
      overwrite: whether to make again what is made.
      guessed_by: what has guessed the attributes; the data then do not claim to know which targets
        are valid. None for a table that is to be trusted.

    Returns:
      What `made.json` holds.

    Raises:
      UserError: a file or a value cannot be used, too many rows are lost, or a split is empty.
    """
    cells = tables.read_cells(table)
    names = tables.parse_attributes(attributes)
    files = RawFiles(folder_of(images))
    at = tables.image_column(cells, image_column)
    products = tables.read_products(cells, files.image_paths, at, names)
    columns = {column.name: column for column in products.columns}
    values = {name: sorted(column.counts) for name, column in columns.items()}
    _check_values(cells.path, values)
    grammar = wording.make_grammar(values, templates)
    words = wording.make_lexicon(grammar, values)
    if lexicon is not None:
        words = wording.add_entries(words, _more_words(lexicon, tuple(values)))
    config = make_config(image_size=image_size, preprocess=preprocess, image_format=image_format)
    source = _digest(cells.path, files, names, at, templates, words, guessed_by)
    place = whole_path(output)
    if not open_output(place, config, source, overwrite=overwrite):
        return read_facts(place) or {}

    photos = Folder(files.root)
    kept = ImageFile(image_size)
    decoded = decode_all(photos, products.paths, image_size, preprocess)
    decoded = progress(decoded, len(products.paths), "Photos")
    galleries, unseen = place_products(_rows(products), decoded, kept, _SPLIT_SALT)
    lost = tables.check_lost(cells, products, unseen, max_lost)
    warn(files.root, "photos have no row", products.without_row)
    rules = Rules(grammar, _QUERY_SALT, ask_unstated=False)
    queries, counts = make_splits(
        rules,
        galleries,
        table=str(cells.path),
        advice="add products, or name fewer columns in --attributes, so that more of them agree",
    )
    if guessed_by is not None:
        for split, own in queries.items():
            queries[split] = [dataclasses.replace(query, relevant=[]) for query in own]
            counts[split] |= {"median_valid": None, "mean_valid": None}
    facts = {
        "made_from": f"attributes that {guessed_by} guessed"
        if guessed_by
        else "a table of attributes",
        "truth": _TRUTH if guessed_by is None else _GUESSED,
        "source": source,
        "attributes": list(names),
        "products": sum(map(len, galleries.values())),
        **tables.lost_facts(products, lost),
        "columns": {name: column.facts() for name, column in columns.items()},
        "splits": counts,
    }
    store(place, config, Made(galleries, queries, kept, wording.lexicon_text(words), facts))
    logging.info("%s", told(facts))
    logging.info("%s", advice(place, config))
    return facts


def told(facts: JsonObject) -> str:
    """What was made, as tables of text: the attributes, and the splits."""
    lines = [("attribute", "stated", "values", "of one row", "too long", "no text", "respelled")]
    for name, column in facts["columns"].items():
        lines.append(
            (
                name,
                f"{column['share_stated']:.0%}",
                *(
                    f"{column[key]:,}"
                    for key in ("values", "values_of_one_row", "too_long", "no_text", "respelled")
                ),
            )
        )
    splits = [("split", "products", "references", "queries", "valid targets, median")]
    for split, counts in facts["splits"].items():
        numbers = (f"{counts[key]:,}" for key in ("products", "references", "queries"))
        median = counts["median_valid"]
        splits.append((split, *numbers, "not known" if median is None else f"{median:g}"))
    return "\n".join(["", text_table(lines), "", text_table(splits), "", facts["truth"]])


def _check_values(table: epath.Path, values: Mapping[str, Sequence[str]]) -> None:
    """Sees that something can change, and says what looks wrong.

    Raises:
      UserError: no attribute has two values.
    """
    single = [name for name, own in values.items() if len(own) < 2]
    if len(single) == len(values):
        raise UserError(
            f"{table}: none of the attributes {', '.join(values)} has two different values, so "
            "that nothing can change; name others in --attributes."
        )
    if single:
        logging.warning("%s: always the same, so that no query asks for it: %s", table, single)
    of: dict[str, list[str]] = {}
    for name, own in values.items():
        for value in own:
            of.setdefault(value.casefold(), []).append(name)
    shared = [f"{value!r} of {' and '.join(own)}" for value, own in of.items() if len(own) > 1]
    if shared:
        warn(table, "values are of several attributes, which their texts may not tell", shared)


def _more_words(path: PathLike, names: Sequence[str]) -> dict[str, frozenset[str]]:
    found = load_lexicon(os.fspath(whole_path(path)))
    if not found.keys() & set(names):
        raise UserError(
            f"{path} has none of the sections {', '.join(f'[{name}]' for name in names)}; name an "
            "attribute above its words."
        )
    return found


def _rows(products: tables.Products) -> Iterator[Row]:
    names = [column.name for column in products.columns]
    for path, *values in zip(products.paths, *(column.values for column in products.columns)):
        stated = [f"{name}={value}" for name, value in zip(names, values) if value != NA]
        yield Row(id=path, values=tuple(values), attributes=tuple(stated))


def _digest(
    table: epath.Path,
    files: RawFiles,
    names: Mapping[str, str],
    image: int,
    templates: PathLike | None,
    words: Mapping[str, Sequence[str]],
    guessed_by: str | None,
) -> str:
    """A digest of all that the queries and the lexicon depend on."""
    digest = hashlib.sha256(table.read_bytes())
    digest.update(json.dumps([names, image, words, _SPLIT_SALT, _QUERY_SALT]).encode())
    digest.update((guessed_by or "").encode())
    if templates is not None:
        digest.update(whole_path(templates).read_bytes())
    return listing_digest(digest, files)
