"""Prepares a data set once, and says what of it is at hand: `preparation.json` and a table.

A query without its reference's or its target's photo is dropped, and so is a record that is not
sound; a gallery image without a photo is not ranked. All are counted by split and named. The share
of a split that may be missing is limited (`max_missing`): above it the data set counts as not
prepared, though nothing is thrown away: preparing again with a higher limit takes seconds.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from absl import logging
from etils import epath

from dqe_jax.data import digest, index
from dqe_jax.data.annotations.schema import (
    MALFORMED,
    NO_REFERENCE,
    NO_TARGET,
    REASONS,
    UNKNOWN_IMAGE,
)
from dqe_jax.data.examples import GALLERY, Record, gallery_split
from dqe_jax.data.records import read_records
from dqe_jax.utils.errors import UserError, reason_of
from dqe_jax.utils.files import JsonObject, is_regular, read_json
from dqe_jax.utils.text_table import text_table

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

REPORT = "preparation.json"
# Shares of a split that may be missing unless --max_missing says otherwise.
MAX_MISSING = {"train": 0.1, "validation": 0.0, "test": 0.0}


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """Counts of a split.

    Attributes:
      official_queries: records of the published file.
      queries: of these, with all that is needed.
      dropped: the others by reason, of `annotations.schema.REASONS`.
      empty_captions: queries of which a caption is blank; they are kept.
      duplicates: queries with the reference and the captions of an earlier one; they are kept.
      official_gallery: images of the published list.
      missing: of these, without a readable photo.
      repeated_ids: ids that the list holds more than once; the first place counts.
      copies: images with the content of an earlier one; they are kept.
    """

    official_queries: int
    queries: int
    dropped: Mapping[str, int]
    empty_captions: int
    duplicates: int
    official_gallery: int
    missing: int
    repeated_ids: int
    copies: int

    @property
    def share_missing(self) -> float:
        """The larger of the shares of queries and of gallery images that are not at hand."""
        queries = (self.official_queries - self.queries) / max(self.official_queries, 1)
        return max(queries, self.missing / max(self.official_gallery, 1))


@dataclasses.dataclass(frozen=True)
class Report:
    """What of a prepared benchmark is at hand.

    Attributes:
      splits: counts of each split.
      dropped: names of the records that are left out, by split and reason.
      missing: why images have no readable photo, by gallery and image.
    """

    splits: Mapping[str, SplitReport]
    dropped: Mapping[str, Mapping[str, Sequence[str]]]
    missing: Mapping[str, Mapping[str, str]]


COLUMNS: dict[str, Callable[[SplitReport], int]] = {
    "queries": lambda r: r.official_queries,
    "kept": lambda r: r.queries,
    "no reference": lambda r: r.dropped.get(NO_REFERENCE, 0),
    "no target": lambda r: r.dropped.get(NO_TARGET, 0),
    "malformed": lambda r: r.dropped.get(MALFORMED, 0),
    "unknown id": lambda r: r.dropped.get(UNKNOWN_IMAGE, 0),
    "empty caption": lambda r: r.empty_captions,
    "duplicates": lambda r: r.duplicates,
    "gallery": lambda r: r.official_gallery,
    "missing": lambda r: r.missing,
    "repeated id": lambda r: r.repeated_ids,
    "copies": lambda r: r.copies,
}


def prepare(builder: tfds.core.DatasetBuilder, **download: object) -> None:
    """Runs a builder, unless it has run, and indexes its galleries.

    An interrupted run leaves nothing that counts as prepared: the same call starts again. Of two
    processes that prepare the same, the one that ends first is taken by both.

    Args:
      builder: a TFDS builder of the schema in `examples.py`.
      **download: fields of `tfds.download.DownloadConfig`, such as `beam_runner`.

    Raises:
      UserError: the raw data cannot be used, or the directory cannot be written.
    """
    # Imported when asked for: TFDS is slow to import.
    import tensorflow_datasets as tfds

    if not is_prepared(builder):
        logging.info("Preparing %s in %s, once.", builder.name, builder.data_dir)
        start = time.time()
        tfds.disable_progress_bar()  # it does not know how much there is; builders show their own
        config = tfds.download.DownloadConfig(**download) if download else None
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # "Downloading ... Unknown size"
                builder.download_and_prepare(download_config=config)
        except OSError as error:
            if not is_prepared(builder):
                raise UserError(
                    f"cannot prepare {builder.name} in {builder.data_dir} ({reason_of(error)}); "
                    "make room there or name another directory."
                ) from error
            logging.info("Another process has prepared it too; its records are used.")
            builder.info.read_from_directory(builder.data_path)
        for split in builder.info.splits:
            digest.write_digest(builder, split)
        logging.info("Prepared in %.0f s.", time.time() - start)
    for split in builder.info.splits:
        if is_gallery(split) and not index.path_of(builder, split).exists():
            index.write_index(builder, split)


def is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    """Whether a builder's records are there, complete."""
    return (builder.data_path / "dataset_info.json").exists()


def check_regular(directory: str | os.PathLike[str]) -> None:
    """Looks for pipes and devices among prepared files, which TFDS would read for ever.

    Args:
      directory: of a builder's versions, on a disk; it need not be there.

    Raises:
      UserError: there is one; the sentence names it.
    """
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            if os.path.exists(path) and not is_regular(path):
                raise UserError(
                    f"{path} cannot be read: it is no regular file. Remove {folder} and prepare "
                    "the data again."
                )


def unreadable_info() -> tuple[type[Exception], ...]:
    """What TFDS raises where a builder's `dataset_info.json` is damaged."""
    from google.protobuf import json_format
    from tensorflow_datasets.core.dataset_info import DatasetInfoFileError

    own = (AssertionError, LookupError, TypeError)  # of another version, without what must be there
    return DatasetInfoFileError, json_format.ParseError, ValueError, MemoryError, *own


def is_gallery(split: str) -> bool:
    """Whether a split of a builder is a gallery."""
    return split == GALLERY or split.endswith("_gallery")


def report(builder: tfds.core.DatasetBuilder) -> Report:
    """What of a prepared benchmark is at hand."""
    splits, dropped, missing = {}, {}, {}
    for split, facts in builder.info.metadata["official"].items():
        gallery = gallery_split(split, builder.info.splits)
        known = index.read_index(builder, gallery)
        records = list(read_records(builder, split))
        splits[split], dropped[split] = _split_report(facts, records, known)
        missing[gallery] = {known.ids[row]: reason for row, reason in known.missing.items()}
    return Report(splits, dropped, missing)


def _split_report(
    facts: JsonObject, records: Sequence[Record], known: index.GalleryIndex
) -> tuple[SplitReport, dict[str, list[str]]]:
    dropped = {reason: list(names) for reason, names in facts["dropped"].items()}
    seen: set[tuple[tuple[int, ...], tuple[bytes, ...], tuple[bytes, ...]]] = set()
    empty = kept = 0
    for record in records:
        references = (record["reference"], *record.get("references", ()))
        seen.add((references, tuple(record["texts"]), tuple(record["pools"])))
        empty += not record["texts"] or any(not text.strip() for text in record["texts"])
        lacking = [
            reason
            for reason, row in (
                *((NO_REFERENCE, row) for row in references),
                (NO_TARGET, record["target"]),
            )
            if row in known.missing
        ]
        if lacking:
            dropped.setdefault(lacking[0], []).append(record["id"].decode())
        kept += not lacking
    at_hand = [row for row in range(len(known)) if row not in known.missing]
    counts = SplitReport(
        official_queries=facts["queries"],
        queries=kept,
        dropped={reason: len(dropped[reason]) for reason in REASONS if reason in dropped},
        empty_captions=empty,
        duplicates=len(records) - len(seen),
        official_gallery=facts["gallery"],
        missing=len(known.missing),
        repeated_ids=len(facts["repeated_ids"]),
        copies=sum(int(known.image_ids[row]) != row for row in at_hand),
    )
    return counts, dropped


def table(found: Report) -> str:
    """A report as text: a line for each split."""
    lines = [("split", *COLUMNS)]
    for split, counts in found.splits.items():
        lines.append((split, *(f"{value(counts):,}" for value in COLUMNS.values())))
    return text_table(lines)


def write_report(
    builder: tfds.core.DatasetBuilder, found: Report, max_missing: float | None
) -> list[str]:
    """Writes `preparation.json` beside the records.

    Args:
      builder: prepared.
      found: of `report`.
      max_missing: share of a split that may be missing; None for `MAX_MISSING`.

    Returns:
      A sentence for each split that lacks more than it may; none if the data set can be used.
    """
    allowed = {s: MAX_MISSING[s] if max_missing is None else max_missing for s in found.splits}
    complaints = []
    for split, counts in found.splits.items():
        share, limit = counts.share_missing, allowed[split]
        if share > limit:
            complaints.append(
                f"{split} lacks {share:.2%} of its queries or images, {limit:.2%} are allowed"
            )
    config = builder.builder_config
    content = {
        "dataset": builder.name,
        "image_size": config.image_size,
        "preprocess": config.preprocess,
        **_format_of(config),
        "max_missing": allowed,
        "complaints": complaints,
        **dataclasses.asdict(found),
    }
    path = builder.data_path / REPORT
    partial = path.parent / f"{REPORT}.partial"
    text = json.dumps(content, indent=2) + "\n"
    try:
        if not path.exists() or path.read_text() != text:  # a shared copy may be read-only
            partial.write_text(text)
            partial.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): make its directory writable, or free space."
        ) from error
    return complaints


def _format_of(config: tfds.core.BuilderConfig) -> JsonObject:
    """How images are stored, where it is not PNG: reports of older versions stay as they are."""
    return {} if config.image_format == "png" else {"image_format": config.image_format}


def examples_of(found: Report) -> list[str]:
    """A line for each kind of what is missing, with a few names."""
    lines = []
    for split, reasons in found.dropped.items():
        for reason, names in reasons.items():
            lines.append(f"{split}, {reason}: {_some(names)}")
    for gallery, images in found.missing.items():
        by_reason: dict[str, list[str]] = collections.defaultdict(list)
        for image, reason in images.items():
            by_reason[reason].append(image)
        for reason, names in by_reason.items():
            lines.append(f"{gallery}, image {reason}: {_some(names)}")
    return lines


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def read_complaints(builder: tfds.core.DatasetBuilder) -> list[str] | None:
    """What `write_report` returned last; None if it has not run."""
    path = builder.data_path / REPORT
    if not path.exists():
        return None
    try:
        complaints = read_json(path, dict).get("complaints")
    except UserError as error:
        raise UserError(
            f"{path} is damaged ({reason_of(error)}); run dqe_jax.prepare again."
        ) from error
    if not isinstance(complaints, list) or not all(isinstance(text, str) for text in complaints):
        raise UserError(f"{path} is damaged (it lacks complaints); run dqe_jax.prepare again.")
    return complaints


def leftovers(builder: tfds.core.DatasetBuilder) -> list[str]:
    """Directories that interrupted runs left beside the builder's."""
    path = epath.Path(builder.data_path)
    if not path.parent.is_dir():
        return []
    names = [child.name for child in path.parent.iterdir()]
    ours = [n for n in names if n.startswith("incomplete.") and n.endswith(f"_{path.name}")]
    return [os.fspath(path.parent / name) for name in ours]
