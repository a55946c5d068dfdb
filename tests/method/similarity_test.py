"""The forms of the score beside a plain statement; those of a batch are in `trns_test.py`."""

import numpy as np
import pytest

from dqe_jax.method import similarity

B, C, S, D = 5, 7, 3, 8


def arrays(tokens):
    rng = np.random.default_rng(tokens)
    shapes = (B, D), (C, tokens, D), (B, S, tokens, D)
    return (rng.normal(size=shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("tokens", [1, 4])
def test_forms_are_the_score(tokens):
    query, chunk, listed = arrays(tokens)
    plain = [[max(q @ t for t in image) for image in chunk] for q in query]
    for form in (similarity.chunk_similarity, similarity.ranking_similarity):
        np.testing.assert_allclose(form(query, chunk), plain, atol=1e-5)
    own = [[max(q @ t for t in image) for image in images] for q, images in zip(query, listed)]
    np.testing.assert_allclose(similarity.listed_similarity(query, listed), own, atol=1e-5)


def test_the_best_token_and_its_score():
    query, chunk, listed = arrays(4)
    for image in chunk:
        found = similarity.best_token(query[0], image)
        np.testing.assert_array_equal(found, image[np.argmax([query[0] @ t for t in image])])
    scores = [[q @ t for t in tokens] for q, tokens in zip(query, listed[:, 0])]
    np.testing.assert_allclose(similarity.token_similarity(query, listed[:, 0]), scores, atol=1e-5)
