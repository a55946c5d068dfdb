"""Times one refresh's mining against a plain matrix product and QuRe's rule in NumPy.

On random embeddings; the defaults are FashionIQ's size with BLIP-2. GFLOP/s count the products of
queries and tokens alone; the plain product is of the same shapes, in the same run, without maximum,
bounds and drawing. Several galleries show how time and memory grow. Peak memory is the process'
own, in total and beside the bank, so that sizes are to be given in rising order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dqe_jax.distributed import mesh
from dqe_jax.method import mining
from dqe_jax.method.arrays import Array
from dqe_jax.method.mining import Bank, Mined, MiningRule
from dqe_jax.method.settings import NegativesConfig
from dqe_jax.models.build import DTYPES
from dqe_jax.performance import records
from dqe_jax.training.bank_programs import rows_of_device
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.text_table import text_table

ZONES = {"absolute": (0.0, 0.2), "quantile": (0.02, 0.6), "std": (-3.0, 0.0)}


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is mined, but for the size of the gallery.

    Attributes:
      queries: that are mined for.
      tokens: of a gallery embedding.
      width: of the embeddings.
      dtype: of the bank: "float32" or "bfloat16".
      rule: "trns", "qure", "random" or "hardest".
      bounds: of `trns`, a key of `ZONES`.
      timed_queries: of one call; the time of all is in proportion.
    """

    queries: int = 18_000
    tokens: int = 32
    width: int = 256
    dtype: str = "float32"
    rule: str = "trns"
    bounds: str = "quantile"
    timed_queries: int = 1024

    @property
    def mining_rule(self) -> MiningRule:
        """The rule with its bounds."""
        lower, upper = ZONES[self.bounds]
        negatives = NegativesConfig(bounds=self.bounds, lower=lower, upper=upper)
        return MiningRule.named(negatives, self.rule)


@dataclasses.dataclass(frozen=True)
class MiningTime:
    """What mining a bank takes.

    Attributes:
      seconds: for all queries.
      gflops: GFLOP/s of the products of queries and tokens.
      plain: the same of the products alone.
      bank: GiB of the bank.
      peak: GiB, the most that this process has held so far.
    """

    seconds: float
    gflops: float
    plain: float
    bank: float
    peak: float


def benchmark_mining(
    sizes: Sequence[int] = (18_000,),
    workload: Workload | None = None,
    *,
    baseline_queries: int = 64,
    json_file: str | os.PathLike[str] | None = None,
) -> list[MiningTime]:
    """Times mining from banks of these sizes on all devices of this process, and logs a table.

    Args:
      sizes: images of each bank, rising, at least 2.
      workload: what is mined; None for FashionIQ's.
      baseline_queries: queries that NumPy mines from the first; 0 leaves NumPy out.
      json_file: gets the figures too.

    Raises:
      UserError: a size is too small, or the file cannot be written.
    """
    records.claim(json_file)
    workload = workload or Workload()
    if min(sizes, default=0) < 2:
        raise UserError(f"--gallery={','.join(map(str, sizes))}: give at least 2 images.")
    devices = jax.local_devices()
    times = [time_mining(size, workload, devices) for size in sizes]
    logging.info(
        "%d x %s, jax %s: %s queries, %d tokens of width %d, %s, rule %s.\n%s",
        *(len(devices), devices[0].device_kind, jax.__version__, f"{workload.queries:,}"),
        *(workload.tokens, workload.width, workload.dtype, workload.rule, table(sizes, times)),
    )
    in_numpy = None
    if baseline_queries:
        in_numpy = seconds = time_numpy(sizes[0], workload, baseline_queries)
        logging.info(
            "QuRe in NumPy and Python, %s images: %.0f s (from %d queries), %.1f times that.",
            *(f"{sizes[0]:,}", seconds, baseline_queries, seconds / times[0].seconds),
        )
    records.write(
        json_file,
        "mine",
        {f"{size:,} images": dataclasses.asdict(one) for size, one in zip(sizes, times)},
        devices=devices,
        settings=dataclasses.asdict(workload) | {"numpy_seconds": in_numpy},
    )
    return times


def table(sizes: Sequence[int], times: Sequence[MiningTime]) -> str:
    """A line for each size."""
    number = functools.partial("{:,.2f}".format)
    lines: list[tuple[str, ...]] = [
        ("gallery", "s", "GFLOP/s", "plain", "ratio", "bank GiB", "peak GiB")
    ]
    for size, found in zip(sizes, times):
        cells = (found.seconds, found.gflops, found.plain, found.gflops / found.plain)
        lines.append((f"{size:,}", *map(number, (*cells, found.bank, found.peak))))
    return text_table(lines)


def time_mining(size: int, workload: Workload, devices: Sequence[jax.Device]) -> MiningTime:
    """Times for a bank of `size` images."""
    held = random_bank(size, workload, devices)
    count = min(workload.timed_queries, workload.queries)
    query = np.random.default_rng(1).standard_normal((count, workload.width), np.float32)
    query /= np.linalg.norm(query, axis=-1, keepdims=True)
    own = np.random.default_rng(0).integers(0, size, count).astype(np.int32)
    rule = workload.mining_rule

    def mine(query: Array, own: Array, held: Bank) -> Mined:
        return mining.mine_bank(
            jax.random.key(2),
            *(query, own, own[:, None], jnp.arange(count), held, rule),
            axis=mesh.AXIS,
        )

    mined = mesh.pmap(mine, in_axes=(None, None, 0), out_axes=None, devices=devices)
    multiplied = mesh.pmap(_products, in_axes=(None, 0), out_axes=0, devices=devices)
    seconds = _seconds(mined, query, own, held)
    peak = peak_memory()  # without what the plain product needs
    of_product = _seconds(multiplied, query, held)
    flop = 2 * count * held.tokens.size
    return MiningTime(
        seconds=seconds * workload.queries / count,
        gflops=flop / seconds / 1e9,
        plain=flop / of_product / 1e9,
        bank=held.tokens.size * held.tokens.dtype.itemsize / 2**30,
        peak=peak,
    )


def random_bank(size: int, workload: Workload, devices: Sequence[jax.Device]) -> Bank:
    """A bank of `size` random embeddings, with a leading axis of devices."""
    rows, shape = rows_of_device(size, len(devices)), (workload.tokens, workload.width)
    dtype = DTYPES[workload.dtype]

    def fill(index: Array) -> Bank:
        """Chunk by chunk: random numbers of the whole bank in float32 would double its memory."""
        key = jax.random.fold_in(jax.random.key(0), index)

        def step(i: Array, held: Array) -> Array:
            x = jax.random.normal(jax.random.fold_in(key, i), (mining.CHUNK_ROWS, *shape))
            x = (x / jnp.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)
            return jax.lax.dynamic_update_slice(held, x, (i * mining.CHUNK_ROWS, 0, 0))

        start = jnp.zeros((rows, *shape), dtype)
        row = index * rows + jnp.arange(rows)
        held = jax.lax.fori_loop(0, rows // mining.CHUNK_ROWS, step, start)
        return Bank(held, jnp.where(row < size, row, -1).astype(jnp.int32))

    filled = mesh.pmap(fill, in_axes=(0,), out_axes=0, devices=devices)
    return filled(np.arange(len(devices)))


def _products(query: Array, held: Bank) -> Array:
    """The products of queries and tokens alone, summed so that none is kept."""
    tokens, width = held.tokens.shape[1:]
    size = min(mining.CHUNK_QUERIES, len(query))
    chunks = held.tokens.reshape(-1, mining.CHUNK_ROWS * tokens, width)
    queries = query[: len(query) // size * size].reshape(-1, size, width)

    def product(chunk: Array) -> Array:
        chunk = chunk.astype(jnp.float32)
        each = lambda q: jnp.dot(q, chunk.T, precision="highest").sum()  # noqa: E731
        return jax.lax.map(each, queries).sum()

    return jax.lax.map(product, chunks).sum()


def _seconds(fn: Callable[..., object], *args: object) -> float:
    """The better of two calls, after one to compile."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peak_memory() -> float:
    """Most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def time_numpy(size: int, workload: Workload, queries: int) -> float:
    """Seconds that NumPy and Python take for all queries, from those of a part."""
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((size, workload.tokens, workload.width), np.float32)
    gallery /= np.linalg.norm(gallery, axis=-1, keepdims=True)
    query = rng.standard_normal((queries, workload.width), np.float32)
    target = rng.integers(0, size, len(query))
    start = time.perf_counter()
    qure_in_numpy(query, gallery, target)
    return (time.perf_counter() - start) * workload.queries / len(query)


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
                ends = (int(min(one, other)), int(max(one, other)))
                break
        found.append(order[start + ends[0] + 1 : start + ends[1] + 1])
    return found
