"""Domain conversion: a photo and the name of a domain ask for the same class in that domain.

**Pic2Word's protocol** (Saito et al., CVPR 2023), from
github.com/google-research/composed_image_retrieval: `imgnet_real_query.txt`, the queries, and
`imgnet_targets.txt`, the gallery, which holds the queries' photos too. Each line is a path and a
label, `1000 * domain + class`, with domains 0 cartoon, 1 origami, 2 toy, 3 sculpture, 6 photos.

    imgnet/imagenet-r/n04086273/toy_3.jpg 2002

Every photo is a query for each of the four other domains, with the text "a toy of": the published
prompt "a toy of *" without the word that stands for the image.

**FREEDOM's protocol** (Efthymiadis et al., WACV 2025), from github.com/NikosEfth/freedom: every
image is a query for each domain other than its own; the text is the domain's word alone.

| data set | queries | gallery | words of the domains |
| --- | --- | --- | --- |
| `imagenet_r` | `imgnet_targets.txt` | the same | photo, cartoon, toy, sculpture, origami |
| `nico` | `query_files.csv` | `database_files.csv` | `autumn`, `dimlight`, `grass` and so on |
| `minidn` | `query_files.csv` | `database_files.csv` | clipart, painting, photo, sketch |
| `ltll` | `full_files.csv` | the same | today, archive |

A line of a `.csv` file is a path, a domain and a class, with single spaces between them.

    nico/autumn/airplane/autumn_0000010.jpg autumn airplane

The rules:

-   An image's id is its path. Photos are found by that path below any folder; for ImageNet without
    the first folder, which the sources call `imgnet` and `imagenet_r`.
-   A query's id is its path and the domain: `<path> to toy`. Its kind is the domain (Pic2Word), or
    both domains: `photo to toy`.
-   `relevant` are all gallery images of the class in the domain, or none. There is no single target
    and nothing is known for training.
-   A line of queries is malformed if it is not a path and a label or a path, a known domain and a
    class; the queries of it are left out. A line of a gallery must not be.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from etils import epath

from dqe_jax.data.annotations.schema import AnnotatedQuery, Annotations, Collector, RawFormat
from dqe_jax.data.raw_files import RawFiles
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text

SPLITS = {"test": "test"}
TARGETS, PHOTOS = "imgnet_targets.txt", "imgnet_real_query.txt"
# Domains of ImageNet-R by their code in a label, and the text that asks for each by FREEDOM.
IMAGENET_R = {0: "cartoon", 1: "origami", 2: "toy", 3: "sculpture", 6: "photo"}
PIC2WORD = ("cartoon", "origami", "toy", "sculpture")
_NICO = {name: name for name in ("autumn", "dim", "grass", "outdoor", "rock", "water")}
NICO = _NICO | {"dim": "dimlight"}
MINIDN = {"clipart": "clipart", "painting": "painting", "real": "photo", "sketch": "sketch"}
LTLL = {"New": "today", "Old": "archive"}


class Labelled(NamedTuple):
    """An image with the word of its domain and its class."""

    path: str
    domain: str
    kind: str


_Parse = Callable[[str], Labelled]  # of a line; raises a ValueError


def parse_label(line: str) -> Labelled:
    """A line of a path and a number.

    Raises:
      ValueError: it is none, or the number is of no domain.
    """
    path, label = line.split()
    domain, kind = divmod(int(label), 1000)
    if domain not in IMAGENET_R:
        raise ValueError(f"label {label} is of no domain")
    return Labelled(path, IMAGENET_R[domain], str(kind))


def parse_words(line: str, words: Mapping[str, str]) -> Labelled:
    """A line of a path, a domain and a class.

    Raises:
      ValueError: it is none, or the domain is not among `words`.
    """
    path, domain, kind = line.split(" ")
    if domain not in words or not path or not kind:
        raise ValueError(f"{domain!r} is no domain")
    return Labelled(path, words[domain], kind)


def read_pic2word(files: RawFiles, split: str) -> Annotations:
    """Reads Pic2Word's queries and gallery.

    Args:
      files: with both lists.
      split: a key of `SPLITS`.

    Raises:
      UserError: a file is missing, or a line of the gallery is malformed.
    """
    del split  # there is one
    path = files.find(PHOTOS)
    collected = _Collected(read_gallery(files.find(TARGETS), parse_label), "")

    def parse(line: str) -> Labelled:
        # A label of a query has no domain: its class alone, of 0 to 199.
        name, label = line.split()
        return Labelled(name, "photo", str(int(label)))

    for domain in PIC2WORD:

        def asks(image: Labelled, domain: str = domain) -> tuple[str, str, str]:
            del image  # every photo is asked with
            return domain, f"a {domain} of", domain

        collected.add(path.name, _lines(path), parse, asks)
    return collected.finish()


def read_freedom(
    files: RawFiles,
    split: str,
    *,
    folder: str,
    queries: str,
    gallery: str,
    parse: _Parse,
    words: Sequence[str],
) -> Annotations:
    """Reads a set of FREEDOM's.

    Args:
      files: with its lists.
      split: a key of `SPLITS`.
      folder: that is preferred where files of that name lie in several.
      queries: name of the list of queries.
      gallery: of the gallery; the same name where images are both.
      parse: of a line.
      words: of all domains.

    Raises:
      UserError: a file is missing, or a line of the gallery is malformed.
    """
    del split  # there is one
    path = files.find(queries, folder=folder)
    ranked = read_gallery(files.find(gallery, folder=folder), parse)
    apart = queries != gallery
    references = [line.split(" ")[0] for line in _lines(path)] if apart else []
    collected = _Collected(ranked, "database" if apart else "", references)
    for domain in words:

        def asks(image: Labelled, domain: str = domain) -> tuple[str, str, str] | None:
            same = image.domain == domain
            return None if same else (domain, domain, f"{image.domain} to {domain}")

        collected.add(path.name, _lines(path), parse, asks)
    return collected.finish()


class _Collected:
    """Queries over a labelled gallery, which share the tuples of what is relevant."""

    def __init__(self, gallery: Sequence[Labelled], pool: str, references: Sequence[str] = ()):
        of_domain: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for image in gallery:
            of_domain[image.domain, image.kind].append(image.path)
        self._relevant = {key: tuple(dict.fromkeys(v)) for key, v in of_domain.items()}
        self._pool = pool
        self._collector = Collector({pool: [image.path for image in gallery]}, references)

    def add(
        self,
        file: str,
        lines: Iterable[str],
        parse: _Parse,
        asks: Callable[[Labelled], tuple[str, str, str] | None],
    ) -> None:
        """Adds the queries of lines for one domain.

        `asks` gives the domain, the text and the kind of an image's query; None for no query.
        """
        records: list[tuple[int, object]] = []
        for number, line in enumerate(lines):
            try:
                image = parse(line)
                asked = asks(image)
            except ValueError:
                records.append((number, None))
                continue
            if asked is not None:
                records.append((number, (image, *asked)))
        self._collector.add_records(file, records, self._query)

    def _query(self, number: int, record: object) -> AnnotatedQuery:
        del number  # the path names the query
        if not isinstance(record, tuple):
            raise ValueError("the line is malformed")
        image, domain, text, kind = record
        return AnnotatedQuery(
            id=f"{image.path} to {domain}",
            texts=(text,),
            reference=image.path,
            relevant=self._relevant.get((domain, image.kind), ()),
            pool=self._pool,
            kinds=(kind,),
        )

    def finish(self) -> Annotations:
        """As `Collector.finish`."""
        return self._collector.finish()


def read_gallery(path: epath.Path, parse: _Parse) -> list[Labelled]:
    """The images of a gallery's list.

    Raises:
      UserError: a line is malformed.
    """
    found = []
    for number, line in enumerate(_lines(path), 1):
        try:
            found.append(parse(line))
        except ValueError as error:
            raise UserError(
                f"{path}: line {number} must be a path with its label, not {line[:80]!r}; get the "
                "file again."
            ) from error
    return found


def _lines(path: epath.Path) -> list[str]:
    return [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]


def imagenet_stem(image_id: str) -> str:
    """The path of a photo of ImageNet or ImageNet-R without its first folder."""
    return image_id.partition("/")[2] or image_id


def _label_set(files: RawFiles, split: str) -> Annotations:
    return read_freedom(
        *(files, split),
        folder="imgnet",
        queries=TARGETS,
        gallery=TARGETS,
        parse=parse_label,
        words=tuple(IMAGENET_R.values()),
    )


def _word_set(
    files: RawFiles, split: str, *, folder: str, names: tuple[str, str], words: Mapping[str, str]
) -> Annotations:
    return read_freedom(
        *(files, split),
        folder=folder,
        queries=names[0],
        gallery=names[1],
        parse=functools.partial(parse_words, words=words),
        words=tuple(words.values()),
    )


def _read_nico(files: RawFiles, split: str) -> Annotations:
    return _word_set(files, split, folder="nico", names=_APART, words=NICO)


def _read_minidn(files: RawFiles, split: str) -> Annotations:
    return _word_set(files, split, folder="minidn", names=_APART, words=MINIDN)


def _read_ltll(files: RawFiles, split: str) -> Annotations:
    return _word_set(files, split, folder="ltll", names=_TOGETHER * 2, words=LTLL)


_APART = ("query_files.csv", "database_files.csv")
_TOGETHER = ("full_files.csv",)
RAW_PIC2WORD = RawFormat(
    files=lambda split: (PHOTOS, TARGETS),
    read=read_pic2word,
    read_labels=read_pic2word,
    shared_gallery=False,
    stem=imagenet_stem,
    preprocess="squash",
)
RAW_IMAGENET_R = RawFormat(
    files=lambda split: (TARGETS,),
    read=_label_set,
    read_labels=_label_set,
    shared_gallery=False,
    stem=imagenet_stem,
    preprocess="squash",
)
RAW_NICO = RawFormat(
    files=lambda split: _APART,
    read=_read_nico,
    read_labels=_read_nico,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
RAW_MINIDN = RawFormat(
    files=lambda split: _APART,
    read=_read_minidn,
    read_labels=_read_minidn,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
RAW_LTLL = RawFormat(
    files=lambda split: _TOGETHER,
    read=_read_ltll,
    read_labels=_read_ltll,
    shared_gallery=False,
    stem=str,
    preprocess="squash",
)
