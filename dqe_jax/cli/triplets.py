"""Makes triplets for training without labels, from a table of attributes or of captions.

dqe-jax triplets --table=products.csv --images=DIR --attributes=colour,category --output=DIR2

A query changes one or two of the attributes; its text is made by a grammar. Which products are
valid for it follows from the table, so that all of them are known. Photos are split into train,
validation and test. Then train with --config=triplets:tiny --data_dir=DIR2.

With --caption_column=caption in place of --attributes, pairs of images that are near by an encoder,
and whose captions differ, become queries. Then only one valid target of a query is known.

With --guess and --values in place of a table, a zero-shot model of yours guesses the attributes.

The table is a CSV file. Separators, quotes, the order of columns and how photos are called do not
matter. What is lost, missing or doubtful is counted and named. DIR2 also holds the lexicon and the
queries, to be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from dqe_jax.cli.command_line import given
from dqe_jax.data.preprocess import PREPROCESS
from dqe_jax.data.settings import IMAGE_FORMATS
from dqe_jax.utils.errors import UserError

_TABLE = flags.DEFINE_string("table", None, "CSV file with a row for each product.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of the photos, or of folders of them.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory for what is made.")
_IMAGE_COLUMN = flags.DEFINE_string(
    "image_column",
    None,
    "Column that names the photos; default: image, photo, file, filename, path or id.",
)
_ATTRIBUTES = flags.DEFINE_list(
    "attributes",
    [],
    "Columns that a query may change, each COLUMN, or COLUMN:NAME to call the attribute NAME.",
)
_CAPTION_COLUMN = flags.DEFINE_string(
    "caption_column", None, "Column of captions, in place of --attributes."
)
_ENCODER = flags.DEFINE_string(
    "encoder",
    "dqe_jax.encoders.efficientnet:images",
    "Of captions: package.module:function by which images are near.",
)
_GUESS = flags.DEFINE_string(
    "guess",
    None,
    "Without a table: package.module:function, a zero-shot model that guesses the attributes.",
)
_VALUES = flags.DEFINE_string(
    "values", None, "Of --guess: TOML file of the values, see dqe_jax/data/made/guessing.py."
)
_TEMPLATES = flags.DEFINE_string(
    "templates", None, "TOML file of texts, see dqe_jax/data/made/wording.py; default: built in."
)
_LEXICON = flags.DEFINE_string(
    "lexicon", None, "File of more words that mention the attributes, as dqe_jax/data/lexicon.txt."
)
_IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", 224, "Pixels a side of the stored images; :tiny needs 64.", 8
)
_PREPROCESS = flags.DEFINE_enum(
    "preprocess", "pad", sorted(PREPROCESS), "How photos become square."
)
_FORMAT = flags.DEFINE_enum(
    "format",
    "png",
    IMAGE_FORMATS,
    "How images are stored; a run then needs the same config.data.image_format.",
)
_MAX_LOST = flags.DEFINE_float("max_lost", 0.1, "Share of the rows that may be lost.", 0, 1)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace what --output holds.")
REQUIRED = ("images", "output")


def main(argv: Sequence[str]) -> None:
    """Makes the triplets and says what was made."""
    del argv
    common: dict[str, Any] = {
        "image_column": _IMAGE_COLUMN.value,
        "image_size": _IMAGE_SIZE.value,
        "preprocess": _PREPROCESS.value,
        "image_format": _FORMAT.value,
        "max_lost": _MAX_LOST.value,
        "overwrite": _OVERWRITE.value,
    }
    if _GUESS.value is not None:
        _make_of_guesses(_GUESS.value, common)
        return
    if _TABLE.value is None:
        raise UserError("--table must be given, such as --table=products.csv, or --guess.")
    places = _TABLE.value, given(_IMAGES), given(_OUTPUT)
    # The imports are below: TFDS is slow to import.
    if _CAPTION_COLUMN.value is not None:
        if _ATTRIBUTES.value or _TEMPLATES.value or _LEXICON.value:
            raise UserError(
                "--caption_column goes without --attributes, --templates and --lexicon: name the "
                "captions or the attributes."
            )
        from dqe_jax.data.made.from_captions import triplets_from_captions
        from dqe_jax.feature_store.encoders import open_encoder

        encoder = open_encoder(_ENCODER.value)
        triplets_from_captions(
            *places,
            encode=lambda images: encoder(images, "images"),
            encoder=f"{encoder.name} {encoder.version}".strip(),
            caption_column=_CAPTION_COLUMN.value,
            **common,
        )
        return
    from dqe_jax.data.made.from_table import triplets_from_table

    triplets_from_table(
        *places,
        attributes=_ATTRIBUTES.value,
        templates=_TEMPLATES.value,
        lexicon=_LEXICON.value,
        **common,
    )


def _make_of_guesses(name: str, common: dict[str, Any]) -> None:
    if _TABLE.value is not None or _ATTRIBUTES.value or _CAPTION_COLUMN.value is not None:
        raise UserError(
            "--guess goes without --table, --attributes and --caption_column: name one or the "
            "other."
        )
    if _VALUES.value is None:
        raise UserError("--guess needs --values=FILE, which names the attributes and values.")
    from dqe_jax.data.made.from_table import triplets_from_table
    from dqe_jax.data.made.guessing import guess_table
    from dqe_jax.feature_store.encoders import open_encoder

    model: Any = open_encoder(name).function  # of images and texts
    table, attributes = guess_table(
        given(_IMAGES),
        _VALUES.value,
        given(_OUTPUT),
        guess=model,
        image_size=_IMAGE_SIZE.value,
        preprocess=_PREPROCESS.value,
        overwrite=_OVERWRITE.value,
    )
    triplets_from_table(
        table,
        given(_IMAGES),
        given(_OUTPUT),
        attributes=attributes,
        templates=_TEMPLATES.value,
        lexicon=_LEXICON.value,
        guessed_by=name,
        **{**common, "image_column": "image"},
    )
