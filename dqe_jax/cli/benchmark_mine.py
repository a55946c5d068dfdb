"""Times one refresh's mining against a plain matrix product and QuRe's rule in NumPy.

dqe-jax benchmark mine [--queries=18000 --gallery=18000 --tokens=32 --width=256 --json=FILE]

It uses random embeddings; the defaults are the size of FashionIQ with BLIP-2.
`dqe_jax/performance/mining_benchmark.py` says what is timed and what the table means.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from dqe_jax.utils.errors import UserError

_QUERIES = flags.DEFINE_integer("queries", 18_000, "Queries that are mined for.", 1)
_GALLERY = flags.DEFINE_list("gallery", ["18000"], "Images of the bank; several: rising sizes.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of a gallery embedding.", 1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the embeddings.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the bank.")
_RULE = flags.DEFINE_enum("rule", "trns", ["trns", "qure", "random", "hardest"], "Rule.")
_BOUNDS = flags.DEFINE_enum("bounds", "quantile", ["absolute", "quantile", "std"], "Of trns.")
_TIMED = flags.DEFINE_integer("timed_queries", 1024, "Queries of one call.", 1)
_BASELINE = flags.DEFINE_integer(
    "baseline_queries", 64, "Queries that NumPy mines, scaled up to all; 0 leaves NumPy out.", 0
)
_JSON = flags.DEFINE_string("json", None, "File that gets the figures as JSON.")
REQUIRED = ()


def main(argv: Sequence[str]) -> None:
    """Times every size and prints a table."""
    del argv
    try:
        sizes = [int(size) for size in _GALLERY.value]
    except ValueError as error:
        raise UserError(f"--gallery={','.join(_GALLERY.value)}: give whole numbers.") from error
    # After the flags: importing JAX takes seconds.
    from dqe_jax.distributed import compiled
    from dqe_jax.performance.mining_benchmark import Workload, benchmark_mining

    compiled.keep_programs()
    workload = Workload(
        queries=_QUERIES.value,
        tokens=_TOKENS.value,
        width=_WIDTH.value,
        dtype=_DTYPE.value,
        rule=_RULE.value,
        bounds=_BOUNDS.value,
        timed_queries=_TIMED.value,
    )
    benchmark_mining(sizes, workload, baseline_queries=_BASELINE.value, json_file=_JSON.value)
