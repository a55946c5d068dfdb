"""Measures how fast searches are answered: a server with a gallery of any size, under load.

The gallery is drawn: image files of `SIDE` pixels, and embeddings that are random unit vectors, of
any number of tokens. All else is what users get: what the model made of the reference is looked up
in the index, or its file is read and encoded, the text is encoded, the whole gallery is ranked, and
the answer goes through the server.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import psutil
from PIL import Image

from dqe_jax.search import store
from dqe_jax.search.images import read_images
from dqe_jax.search.index import Index
from dqe_jax.search.model import Model
from dqe_jax.search.store import Entry, Facts, Listing, Writer
from dqe_jax.serving import clients
from dqe_jax.serving.app import Service
from dqe_jax.serving.clients import TEXTS, Load, Measured
from dqe_jax.serving.server import listen, make_server
from dqe_jax.serving.settings import Access, Limits
from dqe_jax.utils.errors import UserError
from dqe_jax.utils.files import JsonObject
from dqe_jax.utils.text_table import text_table

SIDE = 224
BATCH = 64  # images that are drawn together
CHECKED = 16  # searches that are compared with exact ranking
WARM_UP = 2.0  # seconds of load that are not counted


def measure(
    model: Model,
    *,
    images: int,
    tokens: Sequence[int],
    numbers: Sequence[int],
    seconds: float,
    files: int = 1_000,
    keep_features: bool = True,
) -> list[JsonObject]:
    """Measures servers.

    Args:
      model: that encodes queries.
      images: of the gallery.
      tokens: of an image, each measured by itself.
      numbers: of clients at a time, likewise.
      seconds: of load.
      files: image files that are drawn, of which clients take their references.
      keep_features: whether the index keeps what the model made of references.

    Returns:
      A line for each number of tokens and of clients.

    Raises:
      UserError: answers are not those of exact ranking.
    """
    lines: list[JsonObject] = []
    for count in tokens:
        with tempfile.TemporaryDirectory(prefix="dqe-load-") as place:
            index = draw_index(model, Path(place), images, count, min(files, images), keep_features)
            check_exact(index, model)
            service = Service(index, limits=Limits(), log=None)
            service.warm_up()
            try:
                for clients_at_once in numbers:
                    line = _under_load(service, min(files, images), clients_at_once, seconds)
                    facts = {"images": images, "tokens": count, "keep_features": keep_features}
                    lines.append({**facts, **line})
            finally:
                service.batcher.close()
    return lines


def draw_index(
    model: Model, directory: Path, images: int, tokens: int, files: int, keep_features: bool
) -> Index:
    """An index of drawn images, of which the first `files` have files.

    With `keep_features` these have the features that the model makes of them. Others have zeros,
    which nobody looks at.
    """
    rng = np.random.default_rng(0)
    folder = directory / "photos"
    folder.mkdir()
    width = model.token_shape()[1]
    facts = Facts(
        fingerprint=model.fingerprint,
        model=model.origin,
        step=model.step,
        attributes=model.attribute_names,
        tokens=tokens,
        width=width,
        images=str(folder),
        features=model.reference_specs if keep_features else {},
    )
    place = directory / "index"
    entries: dict[str, Entry] = {}
    names = [f"{row:07d}.jpg" for row in range(images)]
    for name in names[:files]:
        small = rng.integers(0, 256, (7, 7, 3), np.uint8)
        photo = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        photo.save(folder / name, "JPEG")
    with store.locked(place):
        store.write_facts(place, facts)
        writer = Writer(place, facts)
        for start in range(0, images, BATCH):
            some = names[start : start + BATCH]
            features = {n: np.zeros((BATCH, *x.shape), x.dtype) for n, x in facts.features.items()}
            if keep_features and start < files:
                drawn = [folder / name for name in names[start : min(start + BATCH, files)]]
                made = model.encode_references(read_images(drawn, model.preprocessing))
                for name, array in made.items():
                    features[name][: len(array)] = array
            for row, id_ in enumerate(some):
                content = store.content_of(id_.encode())
                vectors = rng.standard_normal((tokens, width), np.float32)
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
                own = {name: array[row] for name, array in features.items()}
                writer.add(content, vectors, b"-", own)  # no thumbnail
                entries[id_] = Entry(content, 0, 0)
        writer.flush()
        store.write_listing(place, Listing(entries, {}, {}))
    listing = store.read_listing(place)
    assert listing is not None, "it was written just now"
    return Index(place, model, facts, listing)


def check_exact(index: Index, model: Model, k: int = 24) -> None:
    """Raises a `UserError` if some answers are not those of ranking all images one by one.

    Here all references are encoded from their files.
    """
    facts = store.read_facts(index.directory)
    listing = store.read_listing(index.directory)
    assert facts is not None, "it was written just now"
    assert listing is not None, "it was written just now"
    vectors = store.Vectors(index.directory, facts)
    every = vectors.embeddings([entry.content for entry in listing.entries.values()])
    for i in range(CHECKED):
        reference, text = index.ids[i], TEXTS[i % len(TEXTS)]
        found = index.search(reference, text, k=k)
        query = model.encode_query(index.root / reference, text).embedding[0]
        scores = np.concatenate([(part @ query).max(1) for part in np.array_split(every, 64)])
        scores[i] = -np.inf
        best = np.sort(scores)[::-1][:k]
        own = np.array([scores[index.ids.index(one.id)] for one in found])
        if np.abs(own - best).max() > 1e-5:
            raise UserError("the answers are not those of exact ranking: report this as a defect.")


def _under_load(service: Service, files: int, count: int, seconds: float) -> JsonObject:
    """Starts a server, loads it, and ends it."""
    listening = listen("127.0.0.1", 0)
    server = make_server(service, Access())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    process = psutil.Process()
    try:
        port, ids = listening.getsockname()[1], service.index.ids[:files]
        load = Load(port=port, ids=ids, clients=count, seconds=WARM_UP)
        _run(load)
        before = process.memory_info().rss
        measured = _run(dataclasses.replace(load, seconds=seconds))
        after = process.memory_info().rss
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
    times = np.array(measured.seconds) * 1000
    return {
        "clients": count,
        "searches": len(times),
        "errors": measured.errors,
        "per_second": len(times) / seconds,
        **{f"p{p}_ms": float(np.percentile(times, p)) for p in (50, 95, 99)},
        "memory_before_mb": before / 1e6,
        "memory_after_mb": after / 1e6,
        "device": jax.devices()[0].device_kind,
    }


def _run(load: Load) -> Measured:
    """Runs clients in a process of their own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=clients.run, args=(load, answer))
    process.start()
    measured: Measured = answer.get(timeout=load.seconds + 120)
    process.join()
    return measured


def told(lines: Sequence[JsonObject]) -> str:
    """A table of the lines."""
    rows = [["images", "tokens", "clients", "per s", "p50 ms", "p95 ms", "p99 ms", "errors", "MB"]]
    for line in lines:
        memory = f"{line['memory_before_mb']:.0f} to {line['memory_after_mb']:.0f}"
        rows.append(
            [
                *(f"{line[name]:,}" for name in ("images", "tokens", "clients")),
                f"{line['per_second']:.1f}",
                *(f"{line[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
                str(sum(line["errors"].values())),
                memory,
            ]
        )
    return text_table(rows)
