"""Compares models on one benchmark, query by query, in a table with intervals.

dqe-jax compare runs/shapes runs/infonce --split=test [--output=DIR]

Each argument is a run, the directory of its results, or a FILE.queries.json that
`dqe-jax evaluate` wrote, also for embeddings and predictions of other models. NAME=PATH names it in
the table. The others are compared with the first. Models that were not measured alike are refused.
`--output` also writes Markdown, CSV and LaTeX.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from dqe_jax.utils.errors import UserError

_SPLIT = flags.DEFINE_string(
    "split", None, "Of whose results, where a run has those of several splits."
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory for comparison.md, .csv and .tex.")
REQUIRED = ()
ARGUMENTS = 1000


def main(argv: Sequence[str]) -> None:
    """Reads the results, compares them, prints a table and writes it."""
    if len(argv) < 3:
        raise UserError("name two models or more: dqe-jax compare runs/shapes runs/infonce.")
    from dqe_jax.evaluation.comparison import compare, read_models
    from dqe_jax.evaluation.comparison_tables import as_text, write_tables
    from dqe_jax.utils.paths import whole_path

    # Results lie under our names of splits.
    ours = {"val": "validation", "test1": "test", "all": "whole"}
    split = None if _SPLIT.value is None else ours.get(_SPLIT.value, _SPLIT.value)
    comparison = compare(read_models([_named(word) for word in argv[1:]], split))
    sys.stdout.write(as_text(comparison) + "\n")
    if _OUTPUT.value is not None:
        write_tables(comparison, whole_path(_OUTPUT.value))


def _named(word: str) -> tuple[str, str]:
    """Name and path of `NAME=PATH`; no name where there is a path alone."""
    name, equals, path = word.partition("=")
    if equals and path and "/" not in name:
        return name, path
    return "", word
