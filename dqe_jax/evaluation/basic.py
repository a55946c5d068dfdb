"""BASIC (Psomas et al., NeurIPS 2025, arXiv:2510.25387): composed retrieval without training.

It works on features of unit length of a model whose images and texts share a space. Its steps, with
the numbers of the reference code (github.com/billpsomas/icir):

1. A text stands in context: the mean of the features of "{subject} {text}" and "{text} {subject}"
   over the first `CONTEXTS` lines of a corpus of subjects, at length 1.
2. Images are centred by the mean image feature, texts by the mean of the subjects.
3. The centred query image `v` is projected to where subjects differ and styles do not:
   `C = (1 - a) S+ - a S- + 1e-5` of the scatter matrices of subjects and styles, and
   `P = V V^T` of the eigenvectors of its `LARGEST` largest positive eigenvalues.
4. Query expansion, which is optional: the mean of the `NEAREST` gallery images most similar to
   `P v`, and of `v`, weighted by `softmax(0.1 similarity)`, takes the place of `v`.
5. `s_img = X P v` and `s_txt = X t`.
6. Both are divided by the least `s_img`, `s = (s - m) / |m_img|`, and negative ones become 0.
7. The score is `s_txt s_img - 0.1 (s_txt + s_img)^2`.

The paper takes the mean image of LAION and the minima of a made set; here both are those of the
gallery that is ranked. All is computed in float64, in NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

CONTEXTS, LARGEST, NEAREST = 100, 250, 25
CONTRAST, RIDGE, SHARPNESS, PENALTY = 0.2, 1e-5, 0.1, 0.1


@dataclasses.dataclass(frozen=True)
class Centred:
    """Features of a gallery, centred, and what projects a query image.

    Attributes:
      images: float64 `[N, d]`, the gallery.
      image_mean: `[d]`.
      text_mean: `[d]`.
      projection: `P`, `[d, d]`.
    """

    images: np.ndarray
    image_mean: np.ndarray
    text_mean: np.ndarray
    projection: np.ndarray


def in_context(text: str, subjects: Sequence[str]) -> list[str]:
    """The text with each of the first `CONTEXTS` subjects before and behind it."""
    some = subjects[:CONTEXTS]
    return [f"{one} {text}" for one in some] + [f"{text} {one}" for one in some]


def mean_direction(features: np.ndarray) -> np.ndarray:
    """The mean of features `[n, d]` at length 1, `[d]`."""
    mean = np.asarray(features, np.float64).mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def projection_of(subjects: np.ndarray, styles: np.ndarray) -> np.ndarray:
    """`P [d, d]` of centred features of subjects `[n, d]` and styles `[m, d]`."""
    wanted, unwanted = (x.T @ x / max(1, len(x) - 1) for x in (subjects, styles))
    contrast = (1 - CONTRAST) * wanted - CONTRAST * unwanted + RIDGE
    values, vectors = np.linalg.eigh(contrast)  # ascending
    kept = vectors[:, values > 0][:, -LARGEST:]
    projected: np.ndarray = kept @ kept.T
    return projected


def centre(gallery: np.ndarray, subjects: np.ndarray, styles: np.ndarray) -> Centred:
    """What is the same for all queries.

    Args:
      gallery: features of images `[N, d]`, of unit length; so are the others.
      subjects: of the corpus of subjects `[n, d]`.
      styles: of the corpus of styles `[m, d]`.
    """
    gallery, subjects, styles = (np.asarray(x, np.float64) for x in (gallery, subjects, styles))
    image_mean, text_mean = gallery.mean(0), subjects.mean(0)
    return Centred(
        images=gallery - image_mean,
        image_mean=image_mean,
        text_mean=text_mean,
        projection=projection_of(subjects - text_mean, styles - text_mean),
    )


def expanded(images: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Step 4 for centred gallery images `[n, d]` and centred, projected queries `[q, d]`."""
    similar = query @ images.T
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :NEAREST]
    # The query itself comes with a similarity of 1.
    found = np.take_along_axis(similar, nearest, axis=1)
    weights = np.exp(SHARPNESS * np.concatenate([found, np.ones((len(query), 1))], axis=1))
    weights /= weights.sum(1, keepdims=True)
    mean: np.ndarray = np.einsum("qk,qkd->qd", weights[:, :-1], images[nearest])
    return mean + weights[:, -1:] * query


def similarities(
    centred: Centred, rows: np.ndarray, image: np.ndarray, text: np.ndarray, *, expansion: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Step 5: `s_img` and `s_txt`, `[q, n]`.

    Args:
      centred: of the gallery.
      rows: int `[n]`, those of the gallery that are ranked.
      image: features of query images `[q, d]`.
      text: features of texts in context `[q, d]`.
      expansion: whether step 4 is taken.
    """
    gallery = centred.images[rows]
    query = (image - centred.image_mean) @ centred.projection
    if expansion:
        query = expanded(gallery, query) @ centred.projection
    return query @ gallery.T, (text - centred.text_mean) @ gallery.T


def score(
    by_image: np.ndarray, by_text: np.ndarray, least_image: float, least_text: float
) -> np.ndarray:
    """Steps 6 and 7: scores of similarities `[q, n]`, given the least of each kind."""
    unit = abs(least_image) or 1.0
    s_image = np.maximum((by_image - least_image) / unit, 0.0)
    s_text = np.maximum((by_text - least_text) / unit, 0.0)
    found: np.ndarray = s_text * s_image - PENALTY * (s_text + s_image) ** 2
    return found
