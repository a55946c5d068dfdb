"""Rows without training: what pretrained features find by themselves.

With features of unit length of the query's image `v`, its text `t` and the gallery `X`:

| row | score |
| --- | --- |
| text | `X t` |
| image | `X v` |
| sum | `X v + X t` |
| product | `max(X v, 0) max(X t, 0)` |
| basic, basic_expanded | BASIC without and with query expansion, see `basic.py` |

They need a backbone whose images and texts share a space, such as CLIP's, with the weights that
`config.model.weights` names. Without such a space there is the row of the image alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from dqe_jax.config import RunConfig
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.examples import Queries, all_references
from dqe_jax.data.splits import Split
from dqe_jax.data.text import encode_wordings
from dqe_jax.distributed import mesh
from dqe_jax.embedding.encoders import encoders
from dqe_jax.embedding.rows import RowEmbedder
from dqe_jax.embedding.several import directions_of
from dqe_jax.embedding.sources import Column, Images, PlainImages
from dqe_jax.evaluation import basic, ranking, scored
from dqe_jax.evaluation.gain import SINGLE
from dqe_jax.evaluation.protocols import Protocol
from dqe_jax.feature_store.features import Features, sizes_of
from dqe_jax.method.arrays import Array, Params, Tree
from dqe_jax.models import setup
from dqe_jax.models.dqe import DQE
from dqe_jax.models.features import has_common_space
from dqe_jax.models.layers import normalize
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import read_text
from dqe_jax.utils.paths import whole_path

BASIC = ("basic", "basic_expanded")
ROWS = (*SINGLE, "sum", "product", *BASIC)


@dataclasses.dataclass(frozen=True)
class Corpora:
    """The corpora of BASIC, a line a text.

    Attributes:
      subjects: such as "dress": what images may show.
      styles: such as "a sketch of": how they may show it.
    """

    subjects: tuple[str, ...]
    styles: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Space:
    """Features of a split, float32 and of unit length.

    Attributes:
      images: `[E, d]`, of the images that are ranked or asked with.
      place: int `[N]`, where those of a gallery row are; -1 for none.
      texts: `[Q, d]` of the queries; None without a common space.
      basic: what BASIC needs; None where it is not asked for.
    """

    images: np.ndarray
    place: np.ndarray
    texts: np.ndarray | None = None
    basic: BasicFeatures | None = None

    def asked(self, queries: Queries) -> np.ndarray:
        """Of the queries' references, `[Q, d]`; of several the direction of their mean."""
        owner, rows = all_references(queries)
        found = self.images[self.place[rows]]
        return found if len(owner) == len(queries) else directions_of(found, owner)


@dataclasses.dataclass(frozen=True)
class BasicFeatures:
    """What BASIC needs beside the images.

    Attributes:
      contexts: `[Q, d]`, the texts in context.
      subjects: `[n, d]`.
      styles: `[m, d]`.
    """

    contexts: np.ndarray
    subjects: np.ndarray
    styles: np.ndarray


def read_rows(names: Sequence[str]) -> tuple[str, ...]:
    """The rows that a user names, in the order of `ROWS`.

    Raises:
      UserError: one is not known, or there is none.
    """
    for name in names:
        if name not in ROWS:
            raise UserError(f"--zero_shot names {name!r}: the rows are {', '.join(ROWS)}.")
    if not names:
        raise UserError(f"--zero_shot names no row: the rows are {', '.join(ROWS)}.")
    return tuple(name for name in ROWS if name in names)


def read_corpora(subjects: str | None, styles: str | None) -> Corpora:
    """The corpora of BASIC, from text files with a line for each entry.

    Raises:
      UserError: a file is missing, or has fewer than two lines.
    """
    found = []
    for flag, path in (("--basic_subjects", subjects), ("--basic_styles", styles)):
        if not path:
            raise UserError(
                f"--zero_shot=basic needs {flag}=FILE, a text file with a line for each entry."
            )
        lines = [line.strip() for line in read_text(whole_path(path)).splitlines()]
        lines = [line for line in lines if line]
        if len(lines) < 2:
            raise UserError(f"{flag}: {path} has {len(lines)} lines; it needs two at the least.")
        found.append(tuple(lines))
    return Corpora(*found)


def measure_rows(
    config: RunConfig,
    split: Split,
    protocol: Protocol,
    names: Sequence[str],
    devices: Sequence[jax.Device],
    corpora: Corpora | None = None,
) -> dict[str, dict[str, float]]:
    """Metrics of rows, in their order.

    Args:
      config: of a run, whose weights are read; there need be no run.
      split: to measure on.
      protocol: of the data set.
      names: of `ROWS`.
      devices: to run on.
      corpora: for BASIC.

    Raises:
      UserError: there are no labels or no weights, or the backbone cannot give one of the rows.
    """
    if not len(protocol.labelled(split.queries)):
        raise UserError(
            f"--zero_shot: {split.name} of {config.data.dataset} has no labels, so nothing can be "
            "measured; take --split=validation."
        )
    space = embed(config, split, protocol, names, devices, corpora)
    ranking.check_embeddings(space.images, space.images[:, None])
    return {
        name: scored.measure_scores(
            split, protocol, config.eval.top_k, score_of(name, space, split, protocol)
        )
        for name in names
    }


def score_of(name: str, space: Space, split: Split, protocol: Protocol) -> scored.Score:
    """The score of a row, of queries with gallery rows."""
    texts = space.texts

    def image(mine: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = space.asked(split.queries)[mine] @ space.images[space.place[rows]].T
        return found

    def text(mine: np.ndarray, rows: np.ndarray) -> np.ndarray:
        assert texts is not None, "`embed` refuses these rows without a common space"
        found: np.ndarray = texts[mine] @ space.images[space.place[rows]].T
        return found

    if name in BASIC:
        return _basic_score(space, split, protocol, expansion=name == "basic_expanded")
    formulas: Mapping[str, scored.Score] = {
        "image": image,
        "text": text,
        "sum": lambda mine, rows: image(mine, rows) + text(mine, rows),
        "product": lambda mine, rows: (
            np.maximum(image(mine, rows), 0) * np.maximum(text(mine, rows), 0)
        ),
    }
    return formulas[name]


def _basic_score(
    space: Space, split: Split, protocol: Protocol, *, expansion: bool
) -> scored.Score:
    own = space.basic
    assert own is not None, "`embed` makes it where BASIC is asked for"
    ranked = np.unique(np.concatenate([*scored.pools_of(split, protocol).values()]))
    place = np.full(len(space.place), -1, np.int64)
    place[ranked] = np.arange(len(ranked))
    centred = basic.centre(space.images[space.place[ranked]], own.subjects, own.styles)

    def similar(mine: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return basic.similarities(
            centred,
            place[rows],
            space.asked(split.queries)[mine].astype(np.float64),
            own.contexts[mine],
            expansion=expansion,
        )

    least = np.array(
        [[x.min() for x in similar(mine, rows)] for mine, rows in scored.parts_of(split, protocol)]
    ).min(0)

    def score(mine: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return basic.score(*similar(mine, rows), float(least[0]), float(least[1]))

    return score


def embed(
    config: RunConfig,
    split: Split,
    protocol: Protocol,
    names: Sequence[str],
    devices: Sequence[jax.Device],
    corpora: Corpora | None = None,
) -> Space:
    """The features that rows need; arguments and errors as of `measure_rows`."""
    # Adapters are what a run learns.
    config = config.with_changes({"model.lora.rank": 0})
    queries, batch = split.queries, -(-config.eval.batch_size // len(devices)) * len(devices)
    rows = np.concatenate([all_references(queries)[1], *scored.pools_of(split, protocol).values()])
    rows = np.unique(rows)
    place = np.full(len(split.gallery), -1, np.int64)
    place[rows] = np.arange(len(rows))

    def embed_images(encode: Callable[..., Tree], params: Params, images: Images) -> np.ndarray:
        run = RowEmbedder[np.ndarray](encode, columns=1, batch_size=batch, devices=devices)
        return run(params, (images, rows))

    if config.model.backbone == "features":
        _check_rows(config, names, common=False)
        images = _given_images(config, split, devices)
        # Something stands for parameters: `jax.pmap` takes the axes of an empty tree for others'.
        return Space(embed_images(_unit_states, {"none": np.zeros(1)}, images), place)

    weights = config.model.weights
    pretrained = setup.open_weights(config.model, config.data) if weights else None
    if pretrained is None:
        raise UserError(
            "--zero_shot needs pretrained weights: the config has the backbone "
            f"{config.model.backbone!r} and config.model.weights {weights!r}."
        )
    tokenizer = setup.tokenizer_of(config.model, config.data, pretrained)
    model = setup.model_of(config.model, config.data, tokenizer, pretrained.sizes)
    _check_rows(config, names, common=has_common_space(model.backbone))
    params = setup.init_params(model, config.model, config.data, config.seed, pretrained)
    params = mesh.replicate(params, devices)
    space = Space(embed_images(_first_token(model), params, PlainImages(split.gallery)), place)
    if not set(names) - {"image"}:
        return space

    def embed_texts(ids: np.ndarray) -> np.ndarray:
        run = RowEmbedder[np.ndarray](
            _text_encoder(model), columns=1, batch_size=batch, devices=devices
        )
        return run(params, (Column(ids), np.arange(len(ids))))

    texts = embed_texts(encode_wordings(tokenizer, split, "forward").ids[:, 0])
    found = None
    if set(names) & set(BASIC):
        if corpora is None:
            corpora = read_corpora(None, None)
        found = _basic_features(tokenizer, embed_texts, queries.texts, corpora)
    return dataclasses.replace(space, texts=texts, basic=found)


def _check_rows(config: RunConfig, names: Sequence[str], *, common: bool) -> None:
    """Raises a `UserError` for a row that needs a common space where there is none."""
    wrong = [name for name in names if name != "image"]
    if wrong and not common:
        raise UserError(
            f"--zero_shot={','.join(wrong)}: images and texts of the backbone "
            f"{config.model.backbone!r} share no space, so it gives the row 'image' alone; train "
            "heads for the others (config.model.query)."
        )


def _basic_features(
    tokenizer: Tokenizer,
    embed_texts: Callable[[np.ndarray], np.ndarray],
    texts: Sequence[str],
    corpora: Corpora,
) -> BasicFeatures:
    def features(lines: Sequence[str]) -> np.ndarray:
        return embed_texts(text_tokens.encode(tokenizer, lines)[0])

    by_text: dict[str, np.ndarray] = {}
    for text in texts:
        if text not in by_text:
            by_text[text] = basic.mean_direction(features(basic.in_context(text, corpora.subjects)))
    return BasicFeatures(
        contexts=np.stack([by_text[text] for text in texts]),
        subjects=features(corpora.subjects).astype(np.float64),
        styles=features(corpora.styles).astype(np.float64),
    )


def _given_images(config: RunConfig, split: Split, devices: Sequence[jax.Device]) -> Images:
    """The imported or computed features of a gallery, as they are."""
    words = text_tokens.train_word_tokenizer(split.queries.texts, config.data.max_length)
    model = setup.model_of(config.model, config.data, words, sizes_of(config, None))
    features = Features(config, model, list(devices))
    images = features.images(split.gallery)
    features.fill({})
    return images


@functools.lru_cache(mesh.REMEMBERED)
def _first_token(model: DQE) -> Callable[[Params, Tree], Array]:
    """Images to their embedding `[B, d]`; of several tokens the first."""
    encode_gallery = encoders(model)[1]
    return lambda params, images: encode_gallery(params, images)[:, 0]


@functools.lru_cache(mesh.REMEMBERED)
def _text_encoder(model: DQE) -> Callable[[Params, Tree], Array]:
    """Texts to their embedding in the space of images, `[B, d]`."""

    def encode(params: Params, ids: Tree) -> Array:
        return cast(Array, model.apply({"params": params}, ids, method="encode_text"))

    return encode


def _unit_states(_: Params, states: Tree) -> Array:
    """Features from outside as one vector `[B, *]`: each array at length 1, side by side."""
    flat = [normalize(jnp.asarray(x).reshape(len(x), -1)) for _, x in sorted(states.items())]
    return normalize(jnp.concatenate(flat, axis=1))
