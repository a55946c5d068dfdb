"""Times the ranking of evaluation against NumPy, PyTorch and a plain matrix product, in one run.

All rank random embeddings, cut into the same chunks of queries and of gallery rows, with a running
list of the best: `s(q, T) = max_m <q, T_m>` in float32. Rankings are compared before anything is
timed. Sides take turns, round by round, so that a machine that slows down slows all of them.
GFLOP/s count the products of queries and tokens alone. The ceiling is the fastest plain product of
the same chunks, which keeps nothing: no maximum, no list.

Ours is the function that evaluation calls, from NumPy arrays to NumPy arrays: its checks of the
embeddings and the way to the devices count.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from dqe_jax.evaluation import ranking
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import make_directory, write_json
from dqe_jax.utils.text_table import text_table

OURS, NUMPY, TORCH = "dqe_jax", "NumPy", "PyTorch"
# How far scores of two libraries may lie apart: a few roundings of a sum in float32.
TOLERANCE = 1e-5
_Ranking = tuple[np.ndarray, np.ndarray]  # rows and scores, `[Q, k]`


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is ranked.

    Attributes:
      queries: how many.
      gallery: images.
      tokens: of an image's embedding.
      width: of the embeddings.
      k: length of the lists.
      chunk_queries: ranked at once.
      chunk_rows: images scored at once.
    """

    queries: int = 1_000
    gallery: int = 12_000
    tokens: int = 32
    width: int = 256
    k: int = 50
    chunk_queries: int = ranking.CHUNK_QUERIES
    chunk_rows: int = ranking.CHUNK_ROWS

    @property
    def flop(self) -> int:
        """Of the products of all queries and tokens."""
        return 2 * self.queries * self.gallery * self.tokens * self.width


@dataclasses.dataclass(frozen=True)
class Side:
    """What one side takes.

    Attributes:
      seconds: the median of the rounds.
      fastest: of the rounds.
      slowest: of the rounds.
      gflops: GFLOP/s of the median round.
      share: of the ceiling's rate.
      memory: MiB that a call takes beside what lay there before, the embeddings among it; None
        where the system does not say.
    """

    seconds: float
    fastest: float
    slowest: float
    gflops: float
    share: float
    memory: float | None


@dataclasses.dataclass(frozen=True)
class RankingReport:
    """What `compare_ranking` measured.

    Attributes:
      sizes: of what was ranked.
      rounds: over the sides.
      devices: of ours.
      threads: of each side, on a CPU.
      versions: of the libraries.
      ranking: the sides that rank, by name.
      product: the plain products, by name.
      ceiling: the fastest of them.
    """

    sizes: Sizes
    rounds: int
    devices: str
    threads: int
    versions: dict[str, str]
    ranking: dict[str, Side]
    product: dict[str, Side]
    ceiling: str


def compare_ranking(
    sizes: Sizes | None = None,
    *,
    rounds: int = 5,
    json_file: str | os.PathLike[str] | None = None,
) -> RankingReport:
    """Times all sides, and logs a table.

    Args:
      sizes: of what is ranked; None for the defaults.
      rounds: over the sides, at least 1.
      json_file: gets the report too.

    Raises:
      UserError: a size is not positive, or the file cannot be written.
    """
    sizes = sizes or Sizes()
    if min(dataclasses.astuple(sizes)) < 1 or sizes.k > sizes.gallery:
        raise UserError("sizes must be at least 1, and --k at most the --gallery.")
    if json_file is not None:
        make_directory(epath.Path(json_file).parent)
    devices, threads = jax.local_devices(), _threads()
    queries, gallery = _embeddings(sizes)
    rank = ranking.make_rank_fn(
        sizes.k,
        chunk_rows=sizes.chunk_rows,
        chunk_queries=sizes.chunk_queries,
        devices=devices,
    )
    rankers: dict[str, Callable[[], _Ranking]] = {
        OURS: lambda: rank(queries, gallery),
        NUMPY: lambda: rank_in_numpy(queries, gallery, sizes),
    }
    products: dict[str, Callable[[], object]] = {
        "JAX": _products_in_jax(queries, gallery, sizes, devices[0]),
        NUMPY: lambda: _products_in_numpy(queries, gallery, sizes),
    }
    versions = {"jax": jax.__version__, "numpy": np.__version__}
    try:
        import torch
    except ImportError:
        logging.info("PyTorch is not installed: it is left out.")
    else:
        versions["torch"] = torch.__version__
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        on_gpu = devices[0].platform == "gpu" and torch.cuda.is_available()
        kind = "cuda" if on_gpu else "cpu"
        rankers[TORCH] = lambda: rank_in_torch(queries, gallery, sizes, kind)
        products[TORCH] = lambda: _products_in_torch(queries, gallery, sizes, kind)
    try:
        _check_alike({name: run() for name, run in rankers.items()})
        sides: dict[tuple[str, str], Callable[[], object]] = {
            **{("rank", name): run for name, run in rankers.items()},
            **{("product", name): run for name, run in products.items()},
        }
        memory = {key: _memory_of(run) for key, run in sides.items()}  # which also warms up
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
        for _ in range(rounds):
            for key, run in sides.items():
                start = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - start)
    finally:
        if TORCH in rankers:
            torch.set_num_threads(before)
    medians = {key: float(np.median(found)) for key, found in seconds.items()}
    ceiling = min((key for key in sides if key[0] == "product"), key=medians.__getitem__)

    def side(key: tuple[str, str]) -> Side:
        return Side(
            seconds=medians[key],
            fastest=min(seconds[key]),
            slowest=max(seconds[key]),
            gflops=sizes.flop / medians[key] / 1e9,
            share=medians[ceiling] / medians[key],
            memory=memory[key],
        )

    report = RankingReport(
        sizes=sizes,
        rounds=rounds,
        devices=f"{len(devices)} x {devices[0].device_kind}",
        threads=threads,
        versions=versions,
        ranking={name: side(("rank", name)) for name in rankers},
        product={name: side(("product", name)) for name in products},
        ceiling=ceiling[1],
    )
    logging.info("%s", table(report))
    if json_file is not None:
        write_json(epath.Path(json_file), dataclasses.asdict(report))
    return report


def table(report: RankingReport) -> str:
    """A report as text."""
    sizes = report.sizes
    lines: list[tuple[str, ...]] = [("", "s", "spread", "GFLOP/s", "of ceiling", "MiB")]

    def line(name: str, side: Side) -> tuple[str, ...]:
        memory = "" if side.memory is None else f"{side.memory:,.0f}"
        spread = f"{side.fastest:.2f}-{side.slowest:.2f}"
        rates = (f"{side.gflops:,.0f}", f"{side.share:.0%}")
        return name, f"{side.seconds:.2f}", spread, *rates, memory

    lines += [line(f"ranking, {name}", side) for name, side in report.ranking.items()]
    lines += [line(f"plain product, {name}", side) for name, side in report.product.items()]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return "\n".join(
        [
            f"{report.devices}, {report.threads} threads; {versions}.",
            f"{sizes.queries:,} queries against {sizes.gallery:,} images of {sizes.tokens} tokens "
            f"of width {sizes.width}, the {sizes.k} best; chunks of {sizes.chunk_queries} queries "
            f"and {sizes.chunk_rows} images. Medians of {report.rounds} rounds in turn.",
            text_table(lines),
            f"The ceiling is the plain product in {report.ceiling}.",
        ]
    )


def _threads() -> int:
    """Threads that this process may use, which is what the libraries take."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _embeddings(sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Random unit vectors: queries `[Q, d]` and a gallery `[N, M, d]`."""
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((sizes.queries, sizes.width), np.float32)
    gallery = rng.standard_normal((sizes.gallery, sizes.tokens, sizes.width), np.float32)
    for array in (queries, gallery):
        array /= np.linalg.norm(array, axis=-1, keepdims=True)
    return queries, gallery


def _check_alike(found: dict[str, _Ranking]) -> None:
    """Raises a `RuntimeError` if a side ranks otherwise than NumPy, but for roundings."""
    expected = found[NUMPY][1]
    for name, (rows, scores) in found.items():
        if rows.shape != expected.shape or np.abs(scores - expected).max() > TOLERANCE:
            raise RuntimeError(f"the ranking of {name} is not that of {NUMPY}")


def _chunks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


# ---------------------------------------------------------------------------------------- the sides


def rank_in_numpy(queries: np.ndarray, gallery: np.ndarray, sizes: Sizes) -> _Ranking:
    """The `k` best rows and scores of each query, best first, as a user of NumPy would find them.

    Args:
      queries: float32 `[Q, d]`.
      gallery: float32 `[N, M, d]`.
      sizes: of lists and chunks.
    """
    parts: list[_Ranking] = []
    for some in _chunks(len(queries), sizes.chunk_queries):
        query = queries[some]
        best: np.ndarray = np.full((len(query), 0), -np.inf, np.float32)
        rows: np.ndarray = np.zeros((len(query), 0), np.int64)
        for here in _chunks(len(gallery), sizes.chunk_rows):
            tokens = gallery[here]
            products = query @ tokens.reshape(-1, tokens.shape[-1]).T
            scores = products.reshape(len(query), len(tokens), -1).max(axis=-1)
            own = np.broadcast_to(np.arange(here.start, here.start + len(tokens)), scores.shape)
            best = np.concatenate([best, scores], axis=1)
            rows = np.concatenate([rows, own], axis=1)
            if best.shape[1] > sizes.k:
                kept = np.argpartition(-best, sizes.k - 1, axis=1)[:, : sizes.k]
                best = np.take_along_axis(best, kept, axis=1)
                rows = np.take_along_axis(rows, kept, axis=1)
        order = np.argsort(-best, axis=1)
        parts.append((np.take_along_axis(rows, order, 1), np.take_along_axis(best, order, 1)))
    return _joined(parts)


def _joined(parts: list[_Ranking]) -> _Ranking:
    rows, scores = (np.concatenate(columns) for columns in zip(*parts))
    return rows, scores


def rank_in_torch(queries: np.ndarray, gallery: np.ndarray, sizes: Sizes, device: str) -> _Ranking:
    """As `rank_in_numpy`, in PyTorch on a device."""
    import torch

    parts: list[_Ranking] = []
    with torch.inference_mode():
        images = torch.from_numpy(gallery).to(device)
        for some in _chunks(len(queries), sizes.chunk_queries):
            query = torch.from_numpy(queries[some]).to(device)
            best = query.new_zeros((len(query), 0))
            rows = torch.zeros((len(query), 0), dtype=torch.int64, device=device)
            for here in _chunks(len(gallery), sizes.chunk_rows):
                tokens = images[here]
                products = query @ tokens.reshape(-1, tokens.shape[-1]).T
                scores = products.view(len(query), len(tokens), -1).amax(dim=-1)
                own = torch.arange(here.start, here.start + len(tokens), device=device)
                best = torch.cat([best, scores], dim=1)
                rows = torch.cat([rows, own.expand(len(query), -1)], dim=1)
                best, kept = best.topk(min(sizes.k, best.shape[1]), dim=1)
                rows = rows.gather(1, kept)
            parts.append((rows.cpu().numpy(), best.cpu().numpy()))
    return _joined(parts)


def _products_in_numpy(queries: np.ndarray, gallery: np.ndarray, sizes: Sizes) -> None:
    """The products alone, each over the one before."""
    shape = sizes.chunk_queries, sizes.chunk_rows * sizes.tokens
    held = np.empty(shape, np.float32)
    for some in _chunks(len(queries), sizes.chunk_queries):
        query = queries[some]
        for here in _chunks(len(gallery), sizes.chunk_rows):
            tokens = gallery[here].reshape(-1, sizes.width)
            own = held.reshape(-1)[: len(query) * len(tokens)].reshape(len(query), len(tokens))
            np.matmul(query, tokens.T, out=own)


def _products_in_torch(queries: np.ndarray, gallery: np.ndarray, sizes: Sizes, device: str) -> None:
    """As `_products_in_numpy`, in PyTorch."""
    import torch

    with torch.inference_mode():
        images = torch.from_numpy(gallery).to(device)
        held = torch.empty(sizes.chunk_queries * sizes.chunk_rows * sizes.tokens, device=device)
        for some in _chunks(len(queries), sizes.chunk_queries):
            query = torch.from_numpy(queries[some]).to(device)
            for here in _chunks(len(gallery), sizes.chunk_rows):
                tokens = images[here].reshape(-1, sizes.width)
                own = held[: len(query) * len(tokens)].view(len(query), len(tokens))
                torch.mm(query, tokens.T, out=own)
        if device == "cuda":
            torch.cuda.synchronize()


def _products_in_jax(
    queries: np.ndarray, gallery: np.ndarray, sizes: Sizes, device: jax.Device
) -> Callable[[], object]:
    """As `_products_in_numpy`, in JAX, of arrays on a device; a number of each product is kept."""

    @jax.jit
    def multiply(query: jax.Array, tokens: jax.Array) -> jax.Array:
        product = jnp.einsum("cd,nd->nc", query, tokens, precision="highest")
        # The barrier keeps the compiler from computing that number alone.
        return jax.lax.optimization_barrier(product)[-1, -1]

    query_chunks = [
        jax.device_put(queries[some], device) for some in _chunks(len(queries), sizes.chunk_queries)
    ]
    token_chunks = [
        jax.device_put(gallery[here].reshape(-1, sizes.width), device)
        for here in _chunks(len(gallery), sizes.chunk_rows)
    ]

    def run() -> object:
        last = [multiply(query, tokens) for query in query_chunks for tokens in token_chunks]
        return jax.block_until_ready(last)

    return run


# ------------------------------------------------------------------------------------------- memory


def _memory_of(run: Callable[[], object]) -> float | None:
    """MiB by which this process grows at the most while it runs; None where that is not known."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        run()
        return None
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(most[0] - before, 0) / 2**20
