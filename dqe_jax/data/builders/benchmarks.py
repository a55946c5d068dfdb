"""TFDS builders of the benchmarks and of a user's own triplets, from raw files.

What a data set's files look like, and what becomes of a bad record, is said in
`dqe_jax/data/annotations/`; what becomes of a bad photo in `dqe_jax/data/photos.py`. A gallery
record stays in its place even if its photo is missing or unreadable: then it holds the reason in
place of an image, so that rows, counts and galleries are those of the published lists.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from etils import epath

from dqe_jax.data import examples
from dqe_jax.data.annotations import (
    circled,
    circo,
    cirr,
    domain_conversion,
    edir,
    fashion200k,
    fashioniq,
    genecis,
    icir,
    lasco,
    pinpoint,
    shoes,
    triplets,
)
from dqe_jax.data.annotations.schema import AnnotatedQuery, Annotations, RawFormat
from dqe_jax.data.photos import Photo, load_photo, load_photos
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.data.regions import Region
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.progress import progress


@dataclasses.dataclass(kw_only=True)
class BenchmarkConfig(tfds.core.BuilderConfig):
    """How a copy of the raw data is prepared.

    Attributes:
      raw_dir: directory of the raw files; needed to prepare, not to read.
      image_size: pixels a side of the images.
      preprocess: how a photo becomes square, a name of `preprocess.PREPROCESS`.
      image_format: how images are stored, of `settings.IMAGE_FORMATS`.
      splits: of `examples.SPLITS`, those to prepare.
      num_workers: processes that decode photos, 0 for one a core.
      beam: decode photos in a Beam pipeline instead.
    """

    raw_dir: str = ""
    image_size: int = 224
    preprocess: str = "target_pad"
    image_format: str = "png"
    splits: tuple[str, ...] = ()
    num_workers: int = 0
    beam: bool = False


class Benchmark(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """What the builders share.

    Attributes:
      raw: how the raw files are read.
    """

    raw: ClassVar[RawFormat]
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        config = self.builder_config
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=examples.features(config.image_size, config.image_format, self.raw.extras),
            disable_shuffling=True,  # queries name images by their position
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, object]:
        del dl_manager  # nothing to download
        config = self.builder_config
        files = RawFiles(config.raw_dir)
        read = read_splits(self.name, files, config.splits)
        self.info.metadata.update(official={s: _facts(a) for s, a in read.items()})
        generators: dict[str, object] = {}
        for name, parts in _galleries(read, self.raw.shared_gallery).items():
            generators[name] = self._gallery(files, parts)
        for split, part in read.items():
            parts = read if self.raw.shared_gallery else {split: part}
            generators[split] = self._generate_examples(
                _queries(part, _images(parts), self.raw.extras)
            )
        return generators

    def _gallery(self, files: RawFiles, parts: Mapping[str, Annotations]) -> object:
        """Records of a gallery, as `examples.Records` or a Beam transform."""
        config, images = self.builder_config, _images(parts)
        pools: dict[str, list[str]] = {}
        for part in parts.values():
            for pool, members in part.pools.items():
                if pool:
                    for image in members:
                        pools.setdefault(image, []).append(pool)
        paths = [files.image(self.raw.stem(image)) for image in images]
        region = self.raw.region
        regions = [None if region is None else region(image) for image in images]
        how = (str(files.root), config.image_size, config.preprocess, config.image_format)
        if config.beam:
            import apache_beam as beam

            # Plain tuples, which Beam can send to its workers.
            of_images = (pools.get(i, []) for i in images)
            rows = zip(range(len(images)), images, paths, regions, of_images)
            return beam.Create(list(rows)) | beam.Map(_beam_record, how, self.raw.extras)
        photos = load_photos(zip(paths, regions), *how, num_workers=config.num_workers)
        seen = progress(photos, len(images), f"Photos of {self.name}")
        return self._generate_examples(
            _item(image, photo, pools.get(image, ()), config.image_format, self.raw.extras)
            for image, photo in zip(images, seen)
        )

    def _generate_examples(self, records: Iterable[examples.Record]) -> examples.Records:
        yield from enumerate(records)


def read_splits(dataset: str, files: RawFiles, splits: Sequence[str]) -> dict[str, Annotations]:
    """The annotations of splits of a data set of `BUILDERS`.

    Raises:
      UserError: a file is missing or damaged, or a split has no sound record.
    """
    require_files(dataset, files, splits)
    read = {split: BUILDERS[dataset].raw.read(files, split) for split in splits}
    for split, part in read.items():
        if not part.queries:
            why = [f"{len(v)} have {reason}: {v[0]}" for reason, v in part.dropped.items()]
            raise UserError(
                f"split {split!r} of {dataset} in {files.root} has no sound record "
                f"({'; '.join(why) or 'none is of this split'}): mend the file, or leave the "
                "split out by --splits."
            )
    return read


def require_files(dataset: str, files: RawFiles, splits: Sequence[str]) -> None:
    """Checks that the annotation files of splits are there; raises as `RawFiles.require`."""
    names = BUILDERS[dataset].raw.files
    files.require(name for split in splits for name in names(split))


def _images(parts: Mapping[str, Annotations]) -> list[str]:
    """Images of a gallery that these splits rank, each once, in the order of first mention."""
    return list(dict.fromkeys(image for part in parts.values() for image in part.images))


def _galleries(
    read: Mapping[str, Annotations], shared: bool
) -> dict[str, Mapping[str, Annotations]]:
    """The splits that rank each gallery, by the gallery's name."""
    if shared:
        return {examples.GALLERY: read}
    return {examples.gallery_split(split): {split: part} for split, part in read.items()}


def _facts(annotations: Annotations) -> JsonObject:
    """What the metadata say of a published split."""
    return {
        "queries": annotations.official_queries,
        "gallery": len(annotations.images),
        "dropped": {reason: list(names) for reason, names in annotations.dropped.items()},
        "repeated_ids": list(annotations.repeated_ids),
    }


def _queries(
    part: Annotations, images: Iterable[str], extras: Sequence[str]
) -> Iterator[examples.Record]:
    row_of = {image: row for row, image in enumerate(images)}
    for query in part.queries:
        yield _query(query, row_of).record(extras)


def _query(query: AnnotatedQuery, row_of: Mapping[str, int]) -> examples.Query:
    def rows(images: Iterable[str]) -> list[int]:
        return [row_of[image] for image in images if image in row_of]

    return examples.Query(
        id=query.id,
        texts=query.texts,
        reference=row_of[query.reference],
        target=row_of[query.target] if query.target else -1,
        known_positives=rows(query.known_positives),
        relevant=rows(query.relevant),
        kinds=query.kinds,
        attributes=query.attributes,
        subset=rows(query.subset),
        pools=[query.pool] if query.pool else [],
        references=rows(query.references),
        negatives=[row_of.get(image, -1) for image in query.negatives],
    )


def _item(
    image: str, photo: Photo, pools: Sequence[str], image_format: str, extras: Sequence[str]
) -> examples.Record:
    return examples.GalleryItem(
        image,
        photo.image,
        photo.number,
        pools=pools,
        reason=photo.reason,
        image_format=image_format,
    ).record(extras)


def _beam_record(
    item: tuple[int, str, str | None, Region | None, Sequence[str]],
    how: tuple[str, int, str, str],
    extras: Sequence[str],
) -> tuple[int, examples.Record]:
    row, image, path, region, pools = item
    photo = load_photo(path, *how, region=region)
    return row, _item(image, photo, pools, how[-1], extras)


class FashionIQ(Benchmark):
    """FashionIQ (Wu et al., CVPR 2021)."""

    name = "fashioniq"
    raw = fashioniq.RAW


class CIRR(Benchmark):
    """CIRR (Liu et al., ICCV 2021)."""

    name = "cirr"
    raw = cirr.RAW


class CIRCO(Benchmark):
    """CIRCO (Baldrati et al., ICCV 2023)."""

    name = "circo"
    raw = circo.RAW


class Triplets(Benchmark):
    """A user's own triplets."""

    name = "triplets"
    raw = triplets.RAW


class GeneCIS(Benchmark):
    """GeneCIS (Vaze et al., CVPR 2023)."""

    name = "genecis"
    raw = genecis.RAW


class PinPoint(Benchmark):
    """PinPoint (Pinterest, 2026)."""

    name = "pinpoint"
    raw = pinpoint.RAW


class Shoes(Benchmark):
    """Shoes (Guo et al., NeurIPS 2018)."""

    name = "shoes"
    raw = shoes.RAW


class Pic2Word(Benchmark):
    """ImageNet-R by Pic2Word's protocol (Saito et al., CVPR 2023)."""

    name = "pic2word"
    raw = domain_conversion.RAW_PIC2WORD


class ImageNetR(Benchmark):
    """ImageNet-R by FREEDOM's protocol (Efthymiadis et al., WACV 2025)."""

    name = "imagenet_r"
    raw = domain_conversion.RAW_IMAGENET_R


class NICO(Benchmark):
    """NICO++ by FREEDOM's protocol."""

    name = "nico"
    raw = domain_conversion.RAW_NICO


class MiniDN(Benchmark):
    """MiniDomainNet by FREEDOM's protocol."""

    name = "minidn"
    raw = domain_conversion.RAW_MINIDN


class LTLL(Benchmark):
    """LTLL by FREEDOM's protocol."""

    name = "ltll"
    raw = domain_conversion.RAW_LTLL


class LaSCo(Benchmark):
    """LaSCo (Levy et al., AAAI 2024)."""

    name = "lasco"
    raw = lasco.RAW


class Fashion200k(Benchmark):
    """Fashion200k (Han et al., ICCV 2017)."""

    name = "fashion200k"
    raw = fashion200k.RAW


class ICIR(Benchmark):
    """i-CIR (Psomas et al., NeurIPS 2025)."""

    name = "icir"
    raw = icir.RAW


class EDIR(Benchmark):
    """EDIR (Song et al., ACL 2026)."""

    name = "edir"
    raw = edir.RAW


class CIRCLED(Benchmark):
    """CIRCLED (Takeda et al., 2026)."""

    name = "circled"
    raw = circled.RAW


BUILDERS = {
    cls.name: cls
    for cls in (
        *(FashionIQ, CIRR, CIRCO, Triplets, GeneCIS, PinPoint, Shoes, LaSCo, Fashion200k, ICIR),
        *(Pic2Word, ImageNetR, NICO, MiniDN, LTLL, EDIR, CIRCLED),
    )
}


def make_builder(
    dataset: str,
    prepared_dir: str,
    *,
    image_size: int,
    preprocess: str,
    image_format: str = "png",
    raw_dir: str = "",
    splits: tuple[str, ...] = (),
    num_workers: int = 0,
    beam: bool = False,
) -> Benchmark:
    """The builder of a data set of `BUILDERS`, prepared or not; see `BenchmarkConfig`."""
    config = make_config(
        image_size=image_size,
        preprocess=preprocess,
        image_format=image_format,
        raw_dir=raw_dir,
        splits=splits,
        num_workers=num_workers,
        beam=beam,
    )
    directory = os.fspath(epath.Path(prepared_dir).expanduser())
    return BUILDERS[dataset](config=config, data_dir=directory, file_format="array_record")


def make_config(
    *, image_size: int, preprocess: str, image_format: str = "png", **more: Any
) -> BenchmarkConfig:
    """A config under the name by which a copy of its size and format is found again."""
    stored = "" if image_format == "png" else f"-{image_format}"  # as it was before there were more
    return BenchmarkConfig(
        name=f"{image_size}px-{preprocess}{stored}",
        description=f"{image_size} pixels a side, {preprocess}, {image_format}.",
        image_size=image_size,
        preprocess=preprocess,
        image_format=image_format,
        **more,
    )
