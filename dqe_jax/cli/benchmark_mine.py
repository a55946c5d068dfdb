"""Times one refresh's mining, beside a plain matrix product and QuRe's rule in NumPy and Python.

python -m dqe_jax.mining_benchmark [--queries=18000 --gallery=18000 --tokens=32 --width=256]

On random embeddings; the defaults are FashionIQ's size with BLIP-2. GFLOP/s count the products of
queries and tokens alone; the plain product is of the same shapes, in the same run, without maximum,
bounds and drawing. Several `--gallery` sizes show how time and memory grow. Peak memory is the
process' own, in total and beside the bank, so that sizes are to be given in rising order.
"""

from __future__ import annotations

import functools
import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from dqe_jax.utils.errors import UserError
from dqe_jax.utils.text_table import text_table

_QUERIES = flags.DEFINE_integer("queries", 18_000, "Queries that are mined for.", 1)
_GALLERY = flags.DEFINE_list("gallery", ["18000"], "Images of the bank; several: rising sizes.")
_TOKENS = flags.DEFINE_integer("tokens", 32, "Tokens of a gallery embedding.", 1)
_WIDTH = flags.DEFINE_integer("width", 256, "Width of the embeddings.", 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the bank.")
_RULE = flags.DEFINE_enum("rule", "trns", ["trns", "qure", "random", "hardest"], "Rule.")
_BOUNDS = flags.DEFINE_enum("bounds", "quantile", ["absolute", "quantile", "std"], "Of trns.")
_TIMED = flags.DEFINE_integer("timed_queries", 1024, "Queries of one call.", 1)
_BASELINE = flags.DEFINE_integer(
    "baseline_queries", 64, "Queries that NumPy mines, scaled to all; 0 leaves NumPy out.", 0
)

# The other fields of `config.negatives`.
SETTINGS = {
    **{"per_query": 16, "floor": 0.0, "sample_temperature": 0.1},
    **{"drops_depth": 1024, "drops_apart": 1},
}
ZONES = {"absolute": (0.0, 0.2), "quantile": (0.02, 0.6), "std": (-3.0, 0.0)}
REQUIRED = ()


def qure_in_numpy(query: np.ndarray, gallery: np.ndarray, target: np.ndarray) -> list[np.ndarray]:
    """QuRe's candidates (arXiv:2507.12416) in NumPy and Python, as a user would write it.

    Args:
      query: float32 `[B, d]`.
      gallery: float32 `[N, M, d]`.
      target: int `[B]`.

    Returns:
      For each query the rows between the two steepest drops behind its target.
    """
    scores = (query @ gallery.reshape(-1, gallery.shape[2]).T).reshape(len(query), len(gallery), -1)
    scores = scores.max(axis=2)
    found = []
    for row, own in zip(scores, target):
        order = np.argsort(-row)
        start = int(np.flatnonzero(order == own)[0]) + 1
        steepest = np.argsort(np.diff(row[order[start:]]))
        ends = (0, len(order) - start - 1)
        for one, other in itertools.pairwise(steepest):
            if abs(one - other) > 1:
                ends = sorted((one, other))
                break
        found.append(order[start + ends[0] + 1 : start + ends[1] + 1])
    return found


def peak_memory() -> float:
    """Most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _seconds(fn: Callable[..., Any], *args: Any) -> float:
    """The better of two calls, after one to compile."""
    import jax

    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def time_mining(size: int, negatives: Any, devices: list[Any]) -> dict[str, float]:
    """Times for a bank of `size` images: seconds for all queries, GFLOP/s, GiB."""
    import jax
    import jax.numpy as jnp

    from dqe_jax.distributed import mesh
    from dqe_jax.method import mining
    from dqe_jax.method.mining import MiningRule
    from dqe_jax.training.bank_programs import rows_of_device

    tokens, width, rule = _TOKENS.value, _WIDTH.value, MiningRule.of(negatives)
    rows = rows_of_device(size, len(devices))
    dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[_DTYPE.value]

    def fill(index):
        """Chunk by chunk: random numbers of the whole bank in float32 would double its memory."""
        key = jax.random.fold_in(jax.random.key(0), index)

        def step(i, held):
            x = jax.random.normal(jax.random.fold_in(key, i), (mining.CHUNK_ROWS, tokens, width))
            x = (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
            return jax.lax.dynamic_update_slice(held, x, (i * mining.CHUNK_ROWS, 0, 0))

        start = jnp.zeros((rows, tokens, width), dtype)
        row = index * rows + jnp.arange(rows)
        held = jax.lax.fori_loop(0, rows // mining.CHUNK_ROWS, step, start)
        return mining.Bank(held, jnp.where(row < size, row, -1).astype(jnp.int32))

    on = {"devices": devices}
    held = mesh.pmap(fill, in_axes=(0,), out_axes=0, **on)(np.arange(len(devices)))
    count = min(_TIMED.value, _QUERIES.value)
    query = np.random.default_rng(1).standard_normal((count, width), np.float32)
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    own = np.random.default_rng(0).integers(0, size, count).astype(np.int32)

    def mine(query, own, held):
        return mining.mine_bank(
            jax.random.key(2),
            *(query, own, own[:, None], jnp.arange(count), held, rule),
            axis=mesh.AXIS,
        )

    def plain(query, held):
        """The products alone, summed so that none is kept."""
        chunks = held.tokens.reshape(-1, mining.CHUNK_ROWS * tokens, width)
        queries = query[: count // size_of_chunk * size_of_chunk]
        queries = queries.reshape(-1, size_of_chunk, width)

        def product(chunk):
            chunk = chunk.astype(jnp.float32)
            each = lambda q: jnp.dot(q, chunk.T, precision="highest").sum()  # noqa: E731
            return jax.lax.map(each, queries).sum()

        return jax.lax.map(product, chunks).sum()

    size_of_chunk = min(mining.CHUNK_QUERIES, count)
    mined = mesh.pmap(mine, in_axes=(None, None, 0), out_axes=None, **on)
    multiplied = mesh.pmap(plain, in_axes=(None, 0), out_axes=0, **on)
    seconds = _seconds(mined, query, own, held)
    peak = peak_memory()  # without what the plain product needs
    of_product = _seconds(multiplied, query, held)
    flop = 2 * count * rows * len(devices) * tokens * width
    return {
        "seconds": seconds * _QUERIES.value / count,
        "gflops": flop / seconds / 1e9,
        "plain": flop / of_product / 1e9,
        "bank": rows * len(devices) * tokens * width * dtype(0).dtype.itemsize / 2**30,
        "peak": peak,
    }


def time_numpy(size: int) -> float:
    """Seconds that NumPy and Python take for all queries, from those of a part."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((size, _TOKENS.value, _WIDTH.value), np.float32)
    gallery /= np.linalg.norm(gallery, axis=-1, keepdims=True)
    query = rng.standard_normal((_BASELINE.value, _WIDTH.value), np.float32)
    target = rng.integers(0, size, len(query))
    start = time.perf_counter()
    qure_in_numpy(query, gallery, target)
    return (time.perf_counter() - start) * _QUERIES.value / len(query)


def main(argv: Sequence[str]) -> None:
    """Times every size and prints a table."""
    del argv
    import jax
    from ml_collections import ConfigDict

    try:
        sizes = [int(size) for size in _GALLERY.value]
    except ValueError as error:
        raise UserError(f"--gallery={','.join(_GALLERY.value)}: give whole numbers.") from error
    if min(sizes) < 2:
        raise UserError(f"--gallery={','.join(_GALLERY.value)}: give at least 2 images.")
    devices = jax.local_devices()
    negatives = ConfigDict({"rule": _RULE.value, "bounds": _BOUNDS.value, **SETTINGS})
    negatives.lower, negatives.upper = ZONES[_BOUNDS.value]
    number = functools.partial("{:,.2f}".format)
    lines = [("gallery", "s", "GFLOP/s", "plain", "ratio", "bank GiB", "peak GiB")]
    for size in sizes:
        found = time_mining(size, negatives, devices)
        ratio = found["gflops"] / found["plain"]
        cells = [found[k] for k in ("seconds", "gflops", "plain")] + [ratio]
        cells += [found["bank"], found["peak"]]
        lines.append((f"{size:,}", *map(number, cells)))
    logging.info(
        "%d x %s, jax %s: %s queries, %d tokens of width %d, %s, rule %s.\n%s",
        *(len(devices), devices[0].device_kind, jax.__version__, f"{_QUERIES.value:,}"),
        *(_TOKENS.value, _WIDTH.value, _DTYPE.value, _RULE.value, text_table(lines)),
    )
    if _BASELINE.value:
        seconds, own = time_numpy(sizes[0]), float(lines[1][1].replace(",", ""))
        logging.info(
            "QuRe in NumPy and Python, %s images: %.0f s (from %d queries), %.1f times that.",
            *(f"{sizes[0]:,}", seconds, _BASELINE.value, seconds / max(own, 1e-9)),
        )
