"""To how many tokens the texts of a batch are padded: to one of at most two lengths of a run.

A text model reads padding as if it were text. Each length is a program of its own, so there are
few: one that holds every text, and a shorter one if most batches can do with it.
"""

from __future__ import annotations

import numpy as np

# Lengths are multiples of this, as far as `config.data.max_length` allows.
MULTIPLE = 8
# The share of the tokens that a second length must save: it is compiled too.
WORTH = 0.15


def choose_lengths(needed: np.ndarray, queries: int, max_length: int) -> tuple[int, ...]:
    """The lengths of a run, ascending: the one that all texts need, and perhaps a shorter one.

    The shorter one is that with which the batches have fewest tokens on average.

    Args:
      needed: int `[n]`, tokens of each text, n at least 1.
      queries: of a batch.
      max_length: of the config; no length is greater.
    """
    longest = _rounded(int(needed.max()), max_length)
    best, fewest = longest, (1 - WORTH) * longest
    for length in range(MULTIPLE, longest, MULTIPLE):
        share = share_of_batches(needed, queries, length)
        tokens = share * length + (1 - share) * longest
        if tokens <= fewest:
            best, fewest = length, tokens
    return tuple(sorted({best, longest}))


def share_of_batches(needed: np.ndarray, queries: int, length: int) -> float:
    """How many of the batches, 0 to 1, can do with this length, if texts come at random."""
    return float((needed <= length).mean() ** queries)


def length_for(needed: np.ndarray, lengths: tuple[int, ...]) -> int:
    """The shortest length that holds these texts, int `[...]` tokens of each."""
    longest = needed.max(initial=0)
    return next(length for length in lengths if length >= longest)


def _rounded(tokens: int, max_length: int) -> int:
    return min(-(-tokens // MULTIPLE) * MULTIPLE, max_length)
