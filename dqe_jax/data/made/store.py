"""The directory that `dqe-jax triplets` writes.

| file | |
| --- | --- |
| `triplets/` | the prepared data (TFDS), which `--data_dir` of training names by this directory |
| `lexicon.txt` | words by which texts mention the attributes, if there are any; may be changed |
| `triplets.jsonl` | the queries, to be read: one a line, with the number of valid targets |
| `made.json` | from what they were made, what was lost, counts, and what is known of the truth |
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dqe_jax.data import examples, preparation
from dqe_jax.data.builders.benchmarks import BenchmarkConfig, make_builder
from dqe_jax.data.made.galleries import gallery_items
from dqe_jax.data.made.photos import ImageFile
from dqe_jax.data.made.queries import Product
from dqe_jax.data.made.settings import FACTS, LEXICON, read_facts
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject, cannot_write, make_directory, write_json
from dqe_jax.utils.paths import on_disk

QUERIES = "triplets.jsonl"


@dataclasses.dataclass(frozen=True)
class Made:
    """Queries that were made, with their galleries.

    Attributes:
      galleries: the products of each split.
      queries: of each split.
      images: of the products.
      lexicon: text of the lexicon's file; "" for none.
      facts: for `made.json`.
    """

    galleries: Mapping[str, Sequence[Product]]
    queries: Mapping[str, Sequence[examples.Query]]
    images: ImageFile
    lexicon: str
    facts: JsonObject


class MadeTriplets(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Queries made from a table or from captions.

    Read as the data set `triplets`: by the builder of that name, from the same directory.
    """

    name = "triplets"
    VERSION = tfds.core.Version("1.0.0")
    made: Made  # set before it is prepared

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=examples.features(config.image_size, config.image_format),
            disable_shuffling=True,  # queries name images by their position
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:
        del dl_manager  # nothing to download
        made = self.made
        official = {
            split: {
                "queries": len(made.queries[split]),
                "gallery": len(made.galleries[split]),
                "dropped": {},
                "repeated_ids": [],
            }
            for split in examples.SPLITS
        }
        self.info.metadata.update(official=official)
        generators: dict[str, object] = {}
        for split in examples.SPLITS:
            generators[examples.gallery_split(split)] = self._generate_examples(
                gallery_items(made.galleries[split], made.images, self.builder_config.image_format)
            )
            generators[split] = self._generate_examples(made.queries[split])
        return generators

    def _generate_examples(
        self, records: Iterable[examples.Query | examples.GalleryItem]
    ) -> examples.Records:
        for row, item in enumerate(records):
            yield row, item.record()


def open_output(
    output: epath.Path, config: BenchmarkConfig, source: str, *, overwrite: bool
) -> bool:
    """Whether there is anything to do in a directory.

    Args:
      output: of the module's table.
      config: size and format of the images.
      source: digest of all that the queries depend on.
      overwrite: whether to remove what is there.

    Returns:
      False if the same queries are prepared in this size and format already.

    Raises:
      UserError: it holds other data, is in a bucket, or cannot be written.
    """
    on_disk(output, "--output")
    make_directory(output)
    facts, prepared = read_facts(output), output / MadeTriplets.name
    if overwrite:
        if prepared.exists():
            prepared.rmtree()
        return True
    if facts is None and prepared.exists():
        raise UserError(
            f"{output} holds prepared triplets that were not made by this command; name another "
            "directory by --output."
        )
    if facts is not None and facts.get("source") != source:
        raise UserError(
            f"{output} holds triplets of another table, of other photos or by other options; name "
            "another --output, or replace them with --overwrite."
        )
    builder = _reader(output, config)
    done = preparation.is_prepared(builder) and preparation.read_complaints(builder) is not None
    if done:
        logging.info("%s is made already; --overwrite makes it again.", builder.data_dir)
    return not done


def store(output: epath.Path, config: BenchmarkConfig, made: Made) -> None:
    """Prepares the data and writes the files of the module's table.

    Args:
      output: checked by `open_output`.
      config: size and format of the images.
      made: what is stored.

    Raises:
      UserError: the directory cannot be written.
    """
    builder = MadeTriplets(config=config, data_dir=os.fspath(output), file_format="array_record")
    builder.made = made
    try:
        if made.lexicon:
            (output / LEXICON).write_text(made.lexicon, encoding="utf-8")
        with (output / QUERIES).open("w", encoding="utf-8") as file:
            for line in _lines(made):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise cannot_write(output, error) from error
    # First, so that what an interrupted run leaves is known to be of this command.
    write_json(output / FACTS, made.facts)
    preparation.prepare(builder)
    reader = _reader(output, config)
    preparation.write_report(reader, preparation.report(reader), None)


def advice(output: epath.Path, config: BenchmarkConfig) -> str:
    """How to train on what is made.

    Args:
      output: where it is.
      config: size and format of the images.
    """
    name = {64: "triplets:tiny", 224: "triplets:pretrained"}.get(config.image_size)
    flags = [f"--config={name or 'triplets:tiny'}", f"--data_dir={output}"]
    if name is None:
        flags.append(f"--config.data.image_size={config.image_size}")
    for field, usual in (("preprocess", "pad"), ("image_format", "png")):
        if (value := getattr(config, field)) != usual:
            flags.append(f"--config.data.{field}={value}")
    return f"Train on it with {' '.join(flags)}"


def _reader(output: epath.Path, config: BenchmarkConfig) -> tfds.core.DatasetBuilder:
    return make_builder(
        MadeTriplets.name,
        os.fspath(output),
        image_size=config.image_size,
        preprocess=config.preprocess,
        image_format=config.image_format,
    )


def _lines(made: Made) -> Iterator[dict[str, Any]]:
    """The queries in the form of a user's own `triplets.jsonl`."""
    for split in examples.SPLITS:
        ids = [product.id for product in made.galleries[split]]
        for query in made.queries[split]:
            yield {
                "id": query.id,
                "split": split,
                "reference": ids[query.reference],
                "texts": list(query.texts),
                "targets": [ids[row] for row in query.known_positives],
                "attributes": list(query.attributes),
                "kind": "".join(query.kinds[:1]),
                "valid_targets": len(query.relevant) or None,
            }
