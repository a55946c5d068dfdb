"""Times the ranking of an evaluation against NumPy, PyTorch and a plain matrix product.

dqe-jax benchmark evaluate [--queries=1000 --gallery=12000 --tokens=32 --width=256] [--json=FILE]

It uses random embeddings, in float32; PyTorch takes part where it is installed.
`dqe_jax/performance/ranking_benchmark.py` says what is timed and what the table means.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

_QUERIES = flags.DEFINE_integer("queries", 1_000, "Queries that are ranked for.", 1)
_GALLERY = flags.DEFINE_integer("gallery", 12_000, "Images of the gallery.", 1)
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of a gallery embedding.", 1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the embeddings.", 1)
_K = flags.DEFINE_integer("k", 50, "Length of the ranked lists.", 1)
_CHUNK_QUERIES = flags.DEFINE_integer(
    "chunk_queries", None, "Queries ranked at once, by all sides; default: those of evaluation.", 1
)
_CHUNK_ROWS = flags.DEFINE_integer(
    "chunk_rows", None, "Images scored at once, by all sides; default: those of evaluation.", 1
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds over the sides.", 1)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
REQUIRED = ()


def main(argv: Sequence[str]) -> None:
    """Times all sides and prints a table."""
    del argv
    # After the flags: importing JAX takes seconds.
    from dqe_jax.performance.ranking_benchmark import Sizes, compare_ranking

    chunks = {"chunk_queries": _CHUNK_QUERIES.value, "chunk_rows": _CHUNK_ROWS.value}
    sizes = Sizes(
        queries=_QUERIES.value,
        gallery=_GALLERY.value,
        tokens=_TOKENS.value,
        width=_WIDTH.value,
        k=_K.value,
        **{name: value for name, value in chunks.items() if value is not None},
    )
    compare_ranking(sizes, rounds=_ROUNDS.value, json_file=_JSON.value)
