"""Times the way of images to the devices: decoding, the loader, and the last copy.

Images are those of the config's prepared training split where there is one, else made ones, which
the table says. Decoding is measured in processor time of one thread, so that other work on the
machine hardly counts; formats take turns, and the median round is given. The loader is measured by
the clock and in processor time, with as many threads as the config says: first while images are
read and decoded, then once they are in memory, then without any image, which is what the rest of it
takes.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging
from etils import epath

from dqe_jax.config import AnyConfig, RunConfig, check_batch
from dqe_jax.data import datasets, preparation, splits
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.examples import gallery_split
from dqe_jax.data.image_formats import decode_image, encode_image
from dqe_jax.data.pipeline import Batches, Images, TrainBatches
from dqe_jax.data.settings import IMAGE_FORMATS
from dqe_jax.data.splits import Gallery, Split
from dqe_jax.data.text import encode_wordings
from dqe_jax.distributed import mesh
from dqe_jax.embedding.sources import PlainImages, PlainTexts
from dqe_jax.method.arrays import Tree
from dqe_jax.method.batch import Batch
from dqe_jax.performance.made_data import made_split
from dqe_jax.training.prefetch import send
from dqe_jax.training.session import open_batches
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.text_table import text_table

if TYPE_CHECKING:
    from dqe_jax.data.splits import Builder

# Batches without images that are timed: they take little time each.
COUNTED = 200
# Batches that are taken before the clock starts: by then the loader works at its own pace.
WARM = 5
# Where the images of the loader come from.
FROM_DISK = "images read and decoded"
IN_MEMORY = "images in memory"
NO_IMAGES = "without images"


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a format of stored images costs.

    Attributes:
      images_per_second: that one core decodes.
      bytes_per_image: of an encoded image, in the mean.
      difference: from the image that was encoded, mean absolute, in grey levels of 255.
    """

    images_per_second: float
    bytes_per_image: float
    difference: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What prepared data give.

    Attributes:
      images_per_second: that one core reads from disk and decodes.
      by_tfds: the same by TFDS' own decoding of records.
      bytes_on_disk: of an image of the gallery, with its record and index.
    """

    images_per_second: float
    by_tfds: float
    bytes_on_disk: float


@dataclasses.dataclass(frozen=True)
class Loading:
    """How fast the loader makes batches.

    Attributes:
      batches_per_second: by the clock.
      examples_per_second: queries, without padding, by the clock.
      images_per_second: of references and targets, by the clock.
      by_core: images a second of processor time.
    """

    batches_per_second: float
    examples_per_second: float
    images_per_second: float
    by_core: float


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What `benchmark_data` measured.

    Attributes:
      dataset: its name.
      image_size: pixels a side.
      image_format: in which the config stores images.
      prepared: whether images are those of the prepared data; else they are made.
      images: how many were decoded.
      threads: of the loader.
      cores: of the machine.
      decoding: by format.
      reading: of the prepared data; None if they are not prepared.
      loading: by where images come from.
      references: of a batch.
      queries: of a batch, padding included.
      batch_bytes: of a batch.
      padding: share of the rows of queries that is padding; None for made data.
      transfer_seconds: in which a batch reaches the devices, and its images are augmented there.
      devices: that it is sent to.
    """

    dataset: str
    image_size: int
    image_format: str
    prepared: bool
    images: int
    threads: int
    cores: int
    decoding: Mapping[str, Decoding]
    reading: Reading | None
    loading: Mapping[str, Loading]
    references: int
    queries: int
    batch_bytes: int
    padding: float | None
    transfer_seconds: float
    devices: str


def benchmark_data(
    config: AnyConfig,
    *,
    images: int = 256,
    batches: int = 20,
    rounds: int = 5,
) -> DataReport:
    """Measures the input path of a config, and logs a table.

    Args:
      config: of a run; nothing is prepared here.
      images: to decode in a round, at least 1.
      batches: of the loader, each time, at least 1.
      rounds: over the formats, at least 1.

    Raises:
      UserError: the config is not sound.
    """
    config = RunConfig.of(config)
    devices = mesh.devices_of(config.num_devices)
    check_batch(config, len(devices))
    builder = _prepared(config)
    split = _open(config, builder, images, cache=False)
    rows = np.random.default_rng(0).permutation(len(split.gallery))[:images]
    sample = [split.gallery[int(row)] for row in rows]
    held = _open(config, builder, images, cache=True) if config.data.cache_images else None
    loading, batch, padding = _loading(config, split, held, batches)
    report = DataReport(
        dataset=config.data.dataset,
        image_size=config.data.image_size,
        image_format=config.data.image_format,
        prepared=builder is not None,
        images=len(sample),
        threads=config.data.num_threads,
        cores=os.cpu_count() or 1,
        decoding=decoding_rates(sample, rounds),
        reading=None if builder is None else _reading(builder, split.gallery, rows),
        loading=loading,
        references=int(batch.reference_id.size),
        queries=int(batch.target_id.size),
        batch_bytes=sum(x.nbytes for x in jax.tree.leaves(batch)),
        padding=None if builder is None else padding,
        transfer_seconds=_transfer(batch, devices),
        devices=f"{len(devices)} x {devices[0].device_kind}",
    )
    logging.info("%s", table(report))
    return report


def _prepared(config: RunConfig) -> Builder | None:
    """The builder of a config whose data are prepared; None says why they are not, in the log."""
    try:
        builder = datasets.find_dataset(config.data)
    except UserError as error:
        logging.info("Images are made: %s", error)
        return None
    if not preparation.is_prepared(builder):
        logging.info("Images are made: %s is not prepared in %s.", builder.name, builder.data_dir)
        return None
    preparation.prepare(builder)  # its index, if that is not there
    return builder


def _open(config: RunConfig, builder: Builder | None, images: int, *, cache: bool) -> Split:
    """The training split, of made images if there is no builder."""
    if builder is None:
        return made_split(config, images, cache=cache)
    data = dataclasses.replace(config.data, cache_images=cache)
    return splits.open_split(data, builder, "train")


def decoding_rates(sample: Sequence[np.ndarray], rounds: int) -> dict[str, Decoding]:
    """What each of `IMAGE_FORMATS` costs.

    Args:
      sample: images uint8 `[H, W, 3]`.
      rounds: over the formats.
    """
    encoded = {each: [encode_image(image, each) for image in sample] for each in IMAGE_FORMATS}
    seconds: dict[str, list[float]] = {each: [] for each in IMAGE_FORMATS}
    row = np.empty_like(sample[0])  # as in a batch, to which images are copied
    for _ in range(rounds):
        for each, held in encoded.items():
            start = time.thread_time()
            for data in held:
                np.copyto(row, decode_image(data, raw=each == "raw"))
            seconds[each].append(time.thread_time() - start)
    found = {}
    for each, held in encoded.items():
        again = [decode_image(data, raw=each == "raw") for data in held]
        found[each] = Decoding(
            images_per_second=len(held) / max(float(np.median(seconds[each])), 1e-9),
            bytes_per_image=float(np.mean([len(data) for data in held])),
            difference=float(
                np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in zip(again, sample)])
            ),
        )
    return found


def _reading(builder: Builder, gallery: Gallery, rows: np.ndarray) -> Reading:
    """What the prepared data give: images of the gallery's rows."""
    stored = gallery_split("train", builder.info.splits)
    source = builder.as_data_source(split=stored)
    # Not the same rows, which may lack an image, but as many.
    others = np.linspace(0, len(source) - 1, len(rows)).astype(int).tolist()

    def rate(read: Callable[[int], object], wanted: Sequence[int]) -> float:
        read(wanted[0])  # opens files
        start = time.process_time()
        for row in wanted:
            read(row)
        return len(wanted) / max(time.process_time() - start, 1e-9)

    files = list(epath.Path(builder.data_path).glob(f"*-{stored}.*"))
    return Reading(
        images_per_second=rate(gallery.__getitem__, rows.tolist()),
        by_tfds=rate(source.__getitem__, others),
        bytes_on_disk=sum(file.stat().length for file in files) / max(len(source), 1),
    )


class _NoImages:
    """Images that take no time."""

    def draw_several(self, rows: np.ndarray, rng: np.random.Generator) -> Tree:
        """As many numbers as rows."""
        return rows.astype(np.int32)


def _loading(
    config: RunConfig, split: Split, held: Split | None, count: int
) -> tuple[dict[str, Loading], Batch, float]:
    """The rates of the loader by where images come from, a batch, and the share of padding.

    Args:
      config: of a run.
      split: whose images are read each time.
      held: whose images stay in memory; None if those of the run do not.
      count: of batches, each time.
    """
    tokenizer = text_tokens.train_word_tokenizer(split.queries.texts, config.data.max_length)
    text = encode_wordings(tokenizer, split, config.data.captions)
    texts = PlainTexts(text.ids)

    def loader(images: Images) -> TrainBatches:
        return open_batches(config, split, text, tokenizer, images, texts, 1, say=False)

    plain = loader(PlainImages(split.gallery, config.data.augment))
    rate, batch = _timed(plain, count)
    found = {FROM_DISK: rate}
    if held is not None:
        kept = PlainImages(held.gallery, config.data.augment)
        _timed(loader(kept), count)  # the same batches: now their images are in memory
        found[IN_MEMORY] = _timed(loader(kept), count)[0]
    bare = loader(_NoImages())
    found[NO_IMAGES] = _timed(bare, COUNTED)[0]
    return found, batch, bare.packing.padding.queries


def _timed(batches: Batches, count: int) -> tuple[Loading, Batch]:
    """How fast batches come, and the last of them."""
    batch = [next(batches) for _ in range(WARM)][-1]
    examples = images = 0
    start, used = time.perf_counter(), time.process_time()
    for _ in range(count):
        batch = next(batches)
        examples += int(batch.query_mask.sum())
        images += batch.reference_id.size + batch.target_id.size
    seconds, used = time.perf_counter() - start, max(time.process_time() - used, 1e-9)
    return Loading(count / seconds, examples / seconds, images / seconds, images / used), batch


def _transfer(batch: Batch, devices: Sequence[jax.Device]) -> float:
    """Seconds in which a batch reaches the devices and is augmented: the median of several."""
    jax.block_until_ready(send(batch, devices))  # compiles
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(send(batch, devices))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def table(report: DataReport) -> str:
    """A report as text."""
    kind = "prepared" if report.prepared else "made"
    lines = [
        f"{report.dataset}, {report.image_size} pixels, stored as {report.image_format}; "
        f"{report.images} {kind} images, {report.threads} threads, {report.cores} cores.",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("to decode", "images/s a core", "bytes an image", "difference of 255")
    ]
    for name, one in report.decoding.items():
        rate, size = f"{one.images_per_second:,.0f}", f"{one.bytes_per_image:,.0f}"
        rows.append((name, rate, size, f"{one.difference:.2f}"))
    lines += [text_table(rows), ""]
    if report.reading is not None:
        read = report.reading
        lines += [
            f"The prepared data take {read.bytes_on_disk:,.0f} bytes an image. One core reads and "
            f"decodes {read.images_per_second:,.0f} images a second ({read.by_tfds:,.0f} by TFDS' "
            "own decoding).",
            "",
        ]
    rows = [("loader", "batches/s", "examples/s", "images/s", "images/s a core")]
    for name, load in report.loading.items():
        rates = (load.examples_per_second, load.images_per_second, load.by_core)
        rows.append((name, f"{load.batches_per_second:.1f}", *(f"{x:,.0f}" for x in rates)))
    padding = (
        ""
        if report.padding is None
        else f" {report.padding:.1%} of the rows of queries are padding."
    )
    return "\n".join(
        [
            *lines,
            text_table(rows),
            "",
            f"Batches have {report.references} references, {report.queries} queries and "
            f"{report.batch_bytes / 1e6:.1f} MB.{padding} One reaches {report.devices} in "
            f"{1e3 * report.transfer_seconds:.1f} ms, its images augmented.",
        ]
    )
